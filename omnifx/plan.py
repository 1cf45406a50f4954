"""A plan: which variant every step of a generation runs, and the noise correction of each step.

A plan is plain data. It is made by a policy, saved as JSON, validated when it is loaded, and printed as a timeline.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    StringConstraints,
    ValidationError,
    model_validator,
)

from omnifx.errors import PlanError
from omnifx.tokens import Selection

if TYPE_CHECKING:
    from omnifx.profile import Profile

FORMAT = 1

_ACTION = r"compute|reuse|predict|skip|partial:(0|[1-9][0-9]*)"

Action = Annotated[str, StringConstraints(pattern=rf"^({_ACTION})$")]
"""What a step does with a branch: "compute", "reuse", "predict", "skip", or "partial:64": compute 64 tokens of each
sample."""
COMPUTE: Action = "compute"
REUSE: Action = "reuse"
"""Take the newest stored value of a branch's cuts."""
PREDICT: Action = "predict"
"""Take a combination of the last stored values, with the weights of the step."""
SKIP: Action = "skip"
"""Compute nothing and read no cut: the step's `Combination` alone gives its output. A row skips all or nothing."""

Row = tuple[Action, ...]
"""One action for each branch, in the order of the branches; its row of actions is a variant's name."""


def partial(k: int) -> Action:
    """The action that computes `k` tokens of each sample; with 0 it reuses all, but lets their counts grow."""
    return f"partial:{k}"


def partial_tokens(action: Action) -> int | None:
    """How many tokens a partial action computes; None for another action."""
    return int(action.removeprefix("partial:")) if action.startswith("partial:") else None


def is_partial(row: Row) -> bool:
    """Whether a row treats any branch token by token, if only to count."""
    return any(partial_tokens(action) is not None for action in row)


class Correction(BaseModel):
    """The noise correction of one reuse step: ``output - F(gamma * q)``, then ``q <- gamma * q``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gamma: float = Field(ge=-4.0, le=4.0)
    """Ratio of this step's cache-induced noise to the last known one; no unit."""
    filter: Literal["all", "low", "high"] = "all"
    """What of ``gamma * q`` is subtracted: all of it, or its low or high spatial frequencies."""
    cutoff: float = Field(default=0.5, gt=0.0, le=1.0)
    """Where low ends and high begins, as a share of the Nyquist frequency of each axis."""


class Combination(BaseModel):
    """The output of a step as a sum of what is known, with x_k the latents now::

        reuse * r_k + noise * q + sum_j outputs[j] * o_j + sum_j latents[j] * (x_k - x_j)

    o_j and x_j are the model's output and latents at the j-th last full step, newest first; r_k is what reusing all
    branches gives, and q the noise that the last full step measured: what reusing the cuts stored before it would have
    given there, minus its output. Gammas of corrections do not multiply it.

    Extrapolation of the output, Adams-Bashforth and OmniCache's correction (arXiv:2508.16212) are special cases; the
    general form is ours.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    reuse: FiniteFloat = 0.0
    noise: FiniteFloat = 0.0
    outputs: tuple[FiniteFloat, ...] = ()
    latents: tuple[FiniteFloat, ...] = ()

    @property
    def depth(self) -> int:
        """How many full steps back it reads outputs or latents."""
        return max(len(self.outputs), len(self.latents))

    def vector(self, history: int) -> tuple[float, ...]:
        """All weights in the order of `omnifx.passes.combine_output`, for graphs that read `history` full steps."""
        pad = (0.0,) * history
        return (self.reuse, self.noise, *(*self.outputs, *pad)[:history], *(*self.latents, *pad)[:history])


class PlanStep(BaseModel):
    """One step of a plan: the number of its variant, and its correction if the variant reuses anything."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    variant: int = Field(ge=0)
    correction: Correction | None = None
    weights: tuple[FiniteFloat, ...] = ()
    """What predicted branches multiply their stored values by, newest first. At a full step: what the replay that
    measures noise predicts with; without weights it repeats the newest values."""
    stores: bool = False
    """Whether predicted values are stored as if they had been computed."""
    trend: FiniteFloat = 0.0
    """What the trends of predicted branches are multiplied by, see `Plan.trend`."""
    merges: tuple[str, ...] = ()
    """Branches whose cuts become, behind this step, the mean of both halves of the batch, where these have the same
    latents (a conditional and an unconditional half)."""
    combination: Combination | None = None
    """What the output of a step that reuses or skips all branches is; None: what its graph gives."""


class PlanSpan(BaseModel):
    """A range of blocks that some rows reuse as one: one more column of the rows, behind those of the branches."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    first: int = Field(ge=0)
    """Number of its first block, as `omnifx.spans` counts them."""
    last: int = Field(ge=0)
    branches: tuple[str, ...]
    """The branches inside, which are reused in every row that reuses the range."""

    @property
    def name(self) -> str:
        """What caches and variants call it: ``span3-9``."""
        return f"span{self.first}-{self.last}"


class Plan(BaseModel):
    """Steps x branches -> action, with the correction of each step.

    Raises:
        PlanError: from `load` and `check_fits`, when a file or a plan is not usable; it names the field.
    Memory: a few kilobytes, none on the device.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    policy: str
    policy_options: dict[str, Any] = Field(default_factory=dict)
    model: str
    """Class name of the model."""
    fingerprint: str
    """What the profile was measured on: see `omnifx.profile.ProfileMeta.fingerprint`."""
    timesteps: tuple[float, ...]
    """One value per step, as the model sees it (its own units)."""
    branches: tuple[str, ...]
    spans: tuple[PlanSpan, ...] = ()
    """Ranges of blocks that are reused as one; a row has an action for each branch, then one for each of these."""
    variants: tuple[Row, ...]
    """The distinct rows; each is compiled once, however many steps run it."""
    steps: tuple[PlanStep, ...]
    reuse_flops: tuple[float, ...]
    """FLOPs of each variant over the FLOPs of the variant that computes everything."""
    terms: int = Field(default=0, ge=0)
    """Stored values that a predicted branch reads, and a stream keeps of it; 0 if no branch is predicted."""
    trend: Literal["", "scale", "shift"] = ""
    """How predicted values follow the trends E of the profile's prior, with the step's factor s: ``f (1 + s E)`` or
    ``f + s E``; empty if they do not."""
    notes: tuple[str, ...] = ()
    """What the policy measured and decided, in sentences."""
    selection: Selection | None = None
    """How the tokens of partial branches are chosen."""
    tokens: tuple[int, ...] = ()
    """Tokens of each branch at the size it was made for, if it has a selection; 0 if they cannot be computed alone."""
    history: int = Field(default=0, ge=0)
    """Full steps whose outputs and latents a stream keeps for combinations; 0 for none."""
    expected_psnr: FiniteFloat | None = None
    """dB against the uncached samples, as its calibration measured it; None if it did not."""
    transferred_from: int = Field(default=0, ge=0)
    """Steps of the generation that it was interpolated from; 0: it was planned from one with these timesteps."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.format != FORMAT:
            raise ValueError(f"format {self.format} is not known; this omnifx reads format {FORMAT}")
        if len(self.steps) != len(self.timesteps) or not self.steps:
            raise ValueError(
                f"{len(self.steps)} steps for {len(self.timesteps)} timesteps; both must agree and be >= 1"
            )
        if len(self.variants) != len(self.reuse_flops):
            raise ValueError(f"{len(self.variants)} variants but {len(self.reuse_flops)} FLOPs ratios")
        columns = len(self.branches) + len(self.spans)
        if bad := [i for i, row in enumerate(self.variants) if len(row) != columns]:
            and_spans = f" and {len(self.spans)} spans" if self.spans else ""
            raise ValueError(
                f"variants {bad} do not have one action for each of the {len(self.branches)} branches{and_spans}"
            )
        if bad := [
            i for i, row in enumerate(self.variants) if self._with_insides(row, self.branches, self.spans) != row
        ]:
            raise ValueError(f"variants {bad} compute or predict a branch inside of a span that they reuse")
        if bad := [i for i, row in enumerate(self.variants) if PREDICT in row[len(self.branches) :]]:
            raise ValueError(f"variants {bad} predict a span; spans are computed or reused")
        if bad := [i for i, row in enumerate(self.variants) if is_partial(row[len(self.branches) :])]:
            raise ValueError(f"variants {bad} compute some tokens of a span; spans are computed or reused")
        if bad := [k for k, step in enumerate(self.steps) if step.variant >= len(self.variants)]:
            raise ValueError(f"steps {bad} name a variant that is not in the plan (it has {len(self.variants)})")
        if reuses(self.rows[0]):
            raise ValueError("step 0 reuses a branch, but nothing was computed before it")
        self._check_tokens()
        self._check_predictions()
        self._check_combinations()
        return self

    def _check_tokens(self) -> None:
        if self.tokens and len(self.tokens) != len(self.branches):
            raise ValueError(f"tokens of {len(self.tokens)} branches, but there are {len(self.branches)}")
        if self.selection is None and any(map(is_partial, self.variants)):
            raise ValueError("some branches are partial, but no selection says which tokens they compute")
        for name, column in zip(self.branches, zip(*self.variants, strict=True), strict=False):
            if PREDICT in column and is_partial(column):
                raise ValueError(
                    f"{name} is predicted in some steps and partial in others; only one of both is possible"
                )

    def _check_predictions(self) -> None:
        stored = self.stored_before() if any(step.weights for step in self.steps) else ()
        for k, (step, row) in enumerate(zip(self.steps, self.rows, strict=True)):
            if len(step.weights) > self.terms:
                raise ValueError(f"step {k} has {len(step.weights)} weights, but the plan's terms are {self.terms}")
            if PREDICT in row and not step.weights:
                raise ValueError(f"step {k} predicts a branch, but has no weights")
            if step.weights and PREDICT not in row and reuses(row):
                raise ValueError(f"step {k} has weights, but predicts no branch")
            if step.trend and (PREDICT not in row or not self.trend):
                raise ValueError(f"step {k} follows trends, but predicts no branch, or the plan does not say how")
            if step.stores and PREDICT not in row:
                raise ValueError(f"step {k} stores predicted values, but predicts no branch")
            needed = max((i + 1 for i, weight in enumerate(step.weights) if weight), default=0)
            for i, action in enumerate(row[: len(self.branches)] if needed else ()):
                if (action == PREDICT or not reuses(row)) and len(stored[k][i]) < needed:
                    raise ValueError(
                        f"step {k} predicts from {needed} stored values, but {self.branches[i]} has "
                        f"{len(stored[k][i])} before it"
                    )

    def _check_combinations(self) -> None:
        if bad := [i for i, row in enumerate(self.variants) if SKIP in row and set(row) != {SKIP}]:
            raise ValueError(f"variants {bad} skip some columns and not others; a step is skipped as a whole")
        num_full = 0
        for k, (step, row) in enumerate(zip(self.steps, self.rows, strict=True)):
            known, skips = step.combination, SKIP in row
            num_full += not reuses(row)
            if skips and (known is None or known.reuse or not known.outputs):
                raise ValueError(f"step {k} is skipped, so it needs a combination of old outputs, without reuse")
            if known is None:
                continue
            if set(row) not in ({REUSE}, {SKIP}) or self.spans:
                raise ValueError(f"step {k} combines outputs, so it must reuse or skip all branches, without spans")
            if step.correction is not None:
                raise ValueError(f"step {k} has a correction and a combination; the combination's noise is one, too")
            if known.depth > self.history:
                raise ValueError(f"step {k} combines {known.depth} outputs, but the plan's history is {self.history}")
            if known.depth > num_full:
                raise ValueError(f"step {k} combines {known.depth} outputs, but {num_full} full steps are before it")
            if known.noise and num_full < 2:
                raise ValueError(
                    f"step {k} combines noise, which is measured from the second full step on, but {num_full} are "
                    "before it"
                )

    @property
    def rows(self) -> tuple[Row, ...]:
        """The row of actions of each step."""
        return tuple(self.variants[step.variant] for step in self.steps)

    def row_of(self, step: int) -> Row:
        """The row of actions of one step."""
        return self.variants[self.steps[step].variant]

    def stored_before(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """For each step and branch, the steps whose values are stored when it begins: newest first, at most `terms`."""
        stored: tuple[tuple[int, ...], ...] = ((),) * len(self.branches)
        found = []
        for k, (step, row) in enumerate(zip(self.steps, self.rows, strict=True)):
            found.append(stored)
            stored = tuple(
                (k, *old)[: max(1, self.terms)] if is_stored(step, action) else old
                for action, old in zip(row[: len(self.branches)], stored, strict=True)
            )
        return tuple(found)

    def full_before(self) -> tuple[tuple[int, ...], ...]:
        """For each step, the full steps before it: newest first, at most `history`, but at least the last one."""
        full: tuple[int, ...] = ()
        found = []
        for k, row in enumerate(self.rows):
            found.append(full)
            full = full if reuses(row) else (k, *full)[: max(1, self.history)]
        return tuple(found)

    @property
    def readings(self) -> tuple[tuple[Row, bool], ...]:
        """The distinct rows that read caches and combine nothing, each with whether it stores what it predicts."""
        found = zip(self.rows, self.steps, strict=True)
        return tuple(
            dict.fromkeys((row, step.stores) for row, step in found if reuses(row) and step.combination is None)
        )

    @property
    def combined_rows(self) -> tuple[Row, ...]:
        """The distinct rows whose outputs are combined."""
        found = zip(self.rows, self.steps, strict=True)
        return tuple(dict.fromkeys(row for row, step in found if step.combination is not None))

    @property
    def combinations(self) -> tuple[Combination, ...]:
        """The combinations of all steps that have one."""
        return tuple(step.combination for step in self.steps if step.combination is not None)

    @property
    def speedup(self) -> float:
        """FLOPs of an uncached generation over the planned FLOPs; no unit, >= 1."""
        return len(self.steps) / sum(self.reuse_flops[step.variant] for step in self.steps)

    @property
    def num_reuse_steps(self) -> int:
        """How many steps reuse or predict at least one branch, or some of its tokens."""
        return sum(map(reuses, self.rows))

    @property
    def corrects(self) -> bool:
        """Whether any step corrects its output."""
        return any(step.correction is not None for step in self.steps)

    @property
    def combines_noise(self) -> bool:
        """Whether any step combines its output with the noise."""
        return any(known.noise for known in self.combinations)

    @property
    def reads_noise(self) -> bool:
        """Whether any step needs the noise, so that full steps must measure it."""
        return self.corrects or self.combines_noise

    @property
    def kept(self) -> tuple[str, ...]:
        """The branches and spans whose cuts are kept from step to step: those that some row reuses or predicts by
        themselves.

        All branches if any step needs the noise of reusing, which is measured with all cuts.
        """
        found = set(self.branches) if self.reads_noise else set()
        for row in self.variants:
            spans = [s for s, action in zip(self.spans, row[len(self.branches) :], strict=True) if action == REUSE]
            inside = {name for span in spans for name in span.branches}
            found.update(span.name for span in spans)
            columns = zip(self.branches, row, strict=False)
            found.update(n for n, action in columns if action not in (COMPUTE, SKIP) and n not in inside)
        return tuple(name for name in (*self.branches, *self.span_names) if name in found)

    @property
    def merges(self) -> bool:
        """Whether any step merges cuts of both halves of the batch."""
        return any(step.merges for step in self.steps)

    @property
    def span_names(self) -> tuple[str, ...]:
        """Names of the spans, in the order of their columns."""
        return tuple(span.name for span in self.spans)

    @staticmethod
    def _with_insides(row: Row, branches: Sequence[str], spans: Sequence[PlanSpan]) -> Row:
        """The row with all branches inside of its reused spans reused as well."""
        inside = {
            name
            for span, action in zip(spans, row[len(branches) :], strict=True)
            if action == REUSE
            for name in span.branches
        }
        return tuple(REUSE if name in inside else action for name, action in zip(branches, row, strict=False)) + tuple(
            row[len(branches) :]
        )

    @classmethod
    def uniform(cls, profile: Profile, actions: Sequence[Action], **fields: Any) -> Self:
        """A plan in which every branch does the same in a step: `actions` holds one action per step."""
        rows = [(action,) * len(profile.meta.branches) for action in actions]
        return cls.from_rows(profile, rows, **fields)

    @classmethod
    def from_rows(
        cls,
        profile: Profile,
        rows: Iterable[Row],
        *,
        policy: str,
        policy_options: dict[str, Any] | None = None,
        corrections: Sequence[Correction | None] | None = None,
        weights: Sequence[tuple[float, ...]] | None = None,
        stores: Sequence[bool] | None = None,
        terms: int = 0,
        trends: Sequence[float] | None = None,
        trend: Literal["", "scale", "shift"] = "",
        notes: Sequence[str] = (),
        spans: Sequence[str] = (),
        merges: Mapping[int, tuple[str, ...]] | None = None,
        selection: Selection | None = None,
        combinations: Sequence[Combination | None] | None = None,
        history: int = 0,
    ) -> Self:
        """A plan from one row per step; equal rows share a variant.

        `merges` holds the branches that a step merges, by its number. `combinations` holds one for each step, or None;
        they read outputs and latents of the last `history` full steps.

        A row has an action for each of the profile's branches, then one for each of `spans`; what is inside of a reused
        span becomes reused.

        Raises: PlanError if a row does not fit the profile's branches, step 0 reuses anything, or a step predicts from
            or combines more values than are stored; ConfigError if a span cannot be reused.
        """
        meta = profile.meta
        ranges = tuple(
            PlanSpan(first=span.first, last=span.last, branches=meta.branches_in(span))
            for span in map(meta.span, spans)
        )
        names = tuple(branch.name for branch in meta.branches)
        table: dict[Row, int] = {}
        steps = []
        for k, row in enumerate(rows):
            row = cls._with_insides(tuple(row), names, ranges) if ranges else tuple(row)
            step = PlanStep(
                variant=table.setdefault(row, len(table)),
                correction=corrections[k] if corrections is not None else None,
                weights=weights[k] if weights is not None else (),
                stores=stores[k] if stores is not None else False,
                trend=trends[k] if trends is not None else 0.0,
                merges=(merges or {}).get(k, ()),
                combination=combinations[k] if combinations is not None else None,
            )
            steps.append(step)
        try:
            return cls(
                policy=policy,
                policy_options=policy_options or {},
                model=meta.model,
                fingerprint=meta.fingerprint,
                timesteps=meta.timesteps,
                branches=names,
                spans=ranges,
                variants=tuple(table),
                steps=tuple(steps),
                reuse_flops=tuple(meta.cost_of(row, spans) for row in table),
                terms=terms,
                trend=trend,
                notes=tuple(notes),
                selection=selection,
                tokens=tuple(branch.tokens or 0 for branch in meta.branches) if selection is not None else (),
                history=history,
            )
        except ValidationError as error:
            raise PlanError(f"Plan: {_first_problem(error)}. Mend the policy that made these rows.") from error
        except ValueError as error:
            raise PlanError(f"Plan: a row does not have one action for each branch ({error}).") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read and validate a plan.

        Raises: PlanError if the file is missing, is not JSON, or breaks a rule of the format.
        """
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"Plan.load: cannot read {path}: {error.strerror}. Make one with `omnifx plan`.") from error
        except (ValidationError, UnicodeDecodeError) as error:
            problem = _first_problem(error) if isinstance(error, ValidationError) else str(error)
            raise PlanError(f"Plan.load: {path} is not a plan: {problem}. Make it anew with `omnifx plan`.") from error

    def timeline(self) -> str:
        """The plan in two lines of text: F a full step, r a reuse, p a prediction, t a row that computes some tokens, m
        a row that computes some branches and not others, c a corrected reuse, C a corrected prediction, a a reuse whose
        output is combined with older ones, s a step that is skipped."""
        letters = []
        for step, row in zip(self.steps, self.rows, strict=True):
            letter = "F" if not reuses(row) else ("m" if COMPUTE in row else ("p" if PREDICT in row else "r"))
            letter = "t" if any(map(partial_tokens, row)) else letter
            letter = ("s" if SKIP in row else "a") if step.combination is not None else letter
            letters.append({"r": "c", "p": "C"}.get(letter, letter) if step.correction is not None else letter)
        head = (
            f"{self.policy}: {len(self.steps)} steps, {self.num_reuse_steps} reuse, "
            f"{len(self.variants)} variants, {self.speedup:.2f}x fewer FLOPs"
        )
        return head + "\n" + "".join(letters)

    def __str__(self) -> str:
        return "\n".join((self.timeline(), *(f"- {note}" for note in self.notes)))


def reuses(row: Row) -> bool:
    """Whether a row takes anything from a cache: anything is reused, predicted or skipped, or computed in part."""
    return any(action != COMPUTE for action in row)


def stored_actions(step: PlanStep) -> tuple[Action, ...]:
    """The actions on whole branches whose values a step stores."""
    return (COMPUTE, PREDICT) if step.stores else (COMPUTE,)


def is_stored(step: PlanStep, action: Action) -> bool:
    """Whether a step stores what an action makes; one that computes some tokens stores them among the old ones."""
    return action in stored_actions(step) or bool(partial_tokens(action))


def is_action(value: object) -> bool:
    """Whether `value` is one of the known actions."""
    return isinstance(value, str) and re.fullmatch(_ACTION, value) is not None


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"])
