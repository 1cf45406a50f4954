"""A plan: which variant every step of a generation runs, and the noise correction of each step.

A plan is plain data. It is made by a policy, saved as JSON, validated when it is loaded, and printed as a timeline.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from omnifx.errors import PlanError
from omnifx.tokens import Selection

if TYPE_CHECKING:
    from omnifx.profile import Profile

FORMAT = 1

_ACTION = r"compute|reuse|partial:(0|[1-9][0-9]*)"

Action = Annotated[str, StringConstraints(pattern=rf"^({_ACTION})$")]
"""What a step does with a branch: "compute", "reuse", or "partial:64": compute 64 tokens of each sample."""
COMPUTE: Action = "compute"
REUSE: Action = "reuse"

Row = tuple[Action, ...]
"""One action for each branch, in the order of the branches; its row of actions is a variant's name."""


def partial(k: int) -> Action:
    """The action that computes `k` tokens of each sample; with 0 it reuses all, but lets their counts grow."""
    return f"partial:{k}"


def partial_tokens(action: Action) -> int | None:
    """How many tokens a partial action computes; None for another action."""
    return int(action.removeprefix("partial:")) if action.startswith("partial:") else None


def reads_caches(row: Row) -> bool:
    """Whether a row takes anything from an earlier step, rather than computing everything."""
    return any(action != COMPUTE for action in row)


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


class PlanStep(BaseModel):
    """One step of a plan: the number of its variant, and its correction if the variant reuses anything."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    variant: int = Field(ge=0)
    correction: Correction | None = None


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
    variants: tuple[Row, ...]
    """The distinct rows; each is compiled once, however many steps run it."""
    steps: tuple[PlanStep, ...]
    reuse_flops: tuple[float, ...]
    """FLOPs of each variant over the FLOPs of the variant that computes everything."""
    notes: tuple[str, ...] = ()
    """What the policy measured and decided, in sentences."""
    selection: Selection | None = None
    """How the tokens of partial branches are chosen."""
    tokens: tuple[int, ...] = ()
    """Tokens of each branch at the size it was made for, if it has a selection; 0 if they cannot be computed alone."""

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
        if bad := [i for i, row in enumerate(self.variants) if len(row) != len(self.branches)]:
            raise ValueError(f"variants {bad} do not have one action for each of the {len(self.branches)} branches")
        if bad := [k for k, step in enumerate(self.steps) if step.variant >= len(self.variants)]:
            raise ValueError(f"steps {bad} name a variant that is not in the plan (it has {len(self.variants)})")
        if reads_caches(self.rows[0]):
            raise ValueError("step 0 reuses a branch, but nothing was computed before it")
        if self.tokens and len(self.tokens) != len(self.branches):
            raise ValueError(f"tokens of {len(self.tokens)} branches, but there are {len(self.branches)}")
        if self.selection is None and any(map(is_partial, self.variants)):
            raise ValueError("some branches are partial, but no selection says which tokens they compute")
        return self

    @property
    def rows(self) -> tuple[Row, ...]:
        """The row of actions of each step."""
        return tuple(self.variants[step.variant] for step in self.steps)

    def row_of(self, step: int) -> Row:
        """The row of actions of one step."""
        return self.variants[self.steps[step].variant]

    @property
    def speedup(self) -> float:
        """FLOPs of an uncached generation over the planned FLOPs; no unit, >= 1."""
        return len(self.steps) / sum(self.reuse_flops[step.variant] for step in self.steps)

    @property
    def num_reuse_steps(self) -> int:
        """How many steps reuse at least one branch, or some of its tokens."""
        return sum(map(reads_caches, self.rows))

    @property
    def reads_noise(self) -> bool:
        """Whether any step corrects its output, so that full steps must measure the noise."""
        return any(step.correction is not None for step in self.steps)

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
        notes: Sequence[str] = (),
        selection: Selection | None = None,
    ) -> Self:
        """A plan from one row per step; equal rows share a variant.

        Raises: PlanError if a row does not fit the profile's branches or step 0 reuses anything.
        """
        meta = profile.meta
        table: dict[Row, int] = {}
        steps = []
        for k, row in enumerate(rows):
            correction = corrections[k] if corrections is not None else None
            steps.append(PlanStep(variant=table.setdefault(tuple(row), len(table)), correction=correction))
        try:
            return cls(
                policy=policy,
                policy_options=policy_options or {},
                model=meta.model,
                fingerprint=meta.fingerprint,
                timesteps=meta.timesteps,
                branches=tuple(branch.name for branch in meta.branches),
                variants=tuple(table),
                steps=tuple(steps),
                reuse_flops=tuple(meta.cost_of(row) for row in table),
                notes=tuple(notes),
                selection=selection,
                tokens=tuple(branch.tokens or 0 for branch in meta.branches) if selection is not None else (),
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
        """The plan in two lines of text: F a full step, r a reuse, m a row that mixes both, p one that computes some
        tokens, c a corrected reuse."""
        letters = []
        for step, row in zip(self.steps, self.rows, strict=True):
            letter = "F" if not reads_caches(row) else ("m" if COMPUTE in row else "r")
            letter = "p" if any(map(partial_tokens, row)) else letter
            letters.append("c" if step.correction is not None and letter == "r" else letter)
        head = (
            f"{self.policy}: {len(self.steps)} steps, {self.num_reuse_steps} reuse, "
            f"{len(self.variants)} variants, {self.speedup:.2f}x fewer FLOPs"
        )
        return head + "\n" + "".join(letters)

    def __str__(self) -> str:
        return "\n".join((self.timeline(), *(f"- {note}" for note in self.notes)))


def is_action(value: object) -> bool:
    """Whether `value` is one of the known actions."""
    return isinstance(value, str) and re.fullmatch(_ACTION, value) is not None


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"])
