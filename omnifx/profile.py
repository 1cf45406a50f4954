"""A profile: what a calibration measured, as inner products. A safetensors file with JSON in its header, never a
pickle.

Every method of this package asks a recording only for inner products, so that is what is kept. For each run and stream
the vectors are, in this order, the latents x_0 .. x_{S-1}, the outputs o_0 .. o_{S-1}, and the noise q_0 .. q_{S-1}
that reusing the previous step's cuts would have caused at each step (q = cached output - true output; q_0 is zero).
Each vector is split by an orthonormal DCT into `NUM_BANDS` bands (band b holds the frequencies whose larger normalised
index lies in [b / NUM_BANDS, (b + 1) / NUM_BANDS)) and each band into two halves by the parity of its coefficients: one
to fit on, one held back. Inner products of different bands or halves are zero by construction, so the sum over both is
the plain inner product.

What a run-time policy learns from is the exception: such a profile holds that policy's signals at each step, and no
inner products.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import safetensors
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors.torch import save_file
from torch import Tensor

from omnifx.errors import ConfigError, ProfileError
from omnifx.plan import COMPUTE, PREDICT, REUSE, SKIP, Action, Row, partial_tokens
from omnifx.prior import Prior, prior_path
from omnifx.quality import Quality, Refinement, Timing

FORMAT = 1
NUM_BANDS = 4
NUM_HALVES = 2


class BranchMeta(BaseModel):
    """What a plan must know of a branch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: str
    flops: int = Field(ge=0)
    """FLOPs that reusing this branch saves in one call."""
    cache_bytes: int = Field(ge=0)
    """Bytes of its cuts, for one stream."""
    tokens: int | None = Field(default=None, ge=0)
    """Tokens of a sample, if some of them may be computed alone; 0 if not; None if unknown (an older profile)."""
    token_flops: int = Field(default=0, ge=0)
    """FLOPs in proportion to the tokens computed."""
    spared_flops: int = Field(default=0, ge=0)
    """FLOPs that a partial step saves however many tokens it computes."""
    token_reason: str = ""
    """Why its tokens cannot be computed alone."""
    scores: tuple[str, ...] = ()
    """Whether attentions are known that tell of its tokens: as their "keys", as their "queries"."""
    grid: tuple[int, int] | None = None
    """Rows and columns, if the tokens are an image."""

    def saved_by(self, action: Action) -> float:
        """FLOPs that an action saves in one call."""
        k = partial_tokens(action)
        if not k:
            return 0.0 if action == COMPUTE else float(self.flops)
        return min(self.flops, self.spared_flops + self.token_flops * (1.0 - k / self.tokens)) if self.tokens else 0.0


class BlockMeta(BaseModel):
    """One block of the trunk: see `omnifx.spans`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    branches: tuple[str, ...]
    """Those of its branches that are cached."""


class SpanMeta(BaseModel):
    """What a plan must know of a range of blocks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    first: int = Field(ge=0)
    last: int = Field(ge=0)
    flops: int = Field(ge=0)
    """FLOPs that reusing it saves in one call."""
    cache_bytes: int = Field(ge=0)
    """Bytes of its deltas, for one stream."""
    reason: str = ""
    """Why it cannot be reused; empty if it can."""

    @property
    def name(self) -> str:
        """What plans call it."""
        return f"span{self.first}-{self.last}"


class ProfileMeta(BaseModel):
    """The JSON half of a profile."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    model: str
    fingerprint: str
    """Hash of the model's class, its weights (sampled) and its branches."""
    versions: dict[str, str]
    timesteps: tuple[float, ...]
    """One value per step, as the model sees it."""
    num_streams: int = Field(ge=1)
    num_runs: int = Field(ge=1)
    flops: int = Field(ge=0)
    """FLOPs of one call that computes everything."""
    reuse_flops: int | None = Field(default=None, ge=0)
    """FLOPs of one call that reuses all branches, if its timesteps and labels were seen before; None if it was measured
    by an older version."""
    branches: tuple[BranchMeta, ...]
    latent_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    filter_axes: tuple[int, ...] = ()
    """Axes of the output along which frequencies are told apart; empty if it has no grid."""
    time_inputs: tuple[int, ...] = ()
    """Positions of the graph's inputs that change from step to step with the timestep."""
    varying_inputs: tuple[int, ...] = ()
    """Positions of large inputs, beside the latents, that change from step to step."""
    time_names: tuple[str, ...] = ()
    """What the model calls its `time_inputs`; empty if unknown. Positions may differ at another size."""
    varying_names: tuple[str, ...] = ()
    """What the model calls its `varying_inputs`; empty if unknown."""
    blocks: tuple[BlockMeta, ...] = ()
    """The blocks of the trunk in graph order; empty if the model is not one graph."""
    spans: tuple[SpanMeta, ...] = ()
    """Ranges of blocks that were looked at: all that begin with the first block or end with the last."""
    measured: tuple[str, ...] = ()
    """Branches and spans whose cuts were compared from step to step."""
    num_lags: int = Field(default=0, ge=0)
    """How many steps back they were compared."""
    sketched: bool = False
    """Whether the vectors were too large to keep, so that inner products come from a random sketch."""
    runtime_policy: str = ""
    """The policy that decides at run time and learns from this; empty for a profile to plan from."""
    signals: tuple[str, ...] = ()
    """What that policy measured at each step."""
    quality: tuple[Quality, ...] = ()
    """What plans made from it were found to be worth, one for each policy that was tried."""
    refined: tuple[Refinement, ...] = ()
    """Which variants of a policy's plans were found to be better than others, by the speedup asked."""
    timing: Timing | None = None
    """How long a step took; None if the model is not one graph, or it was measured by an older version."""
    resampled_from: int = Field(default=0, ge=0)
    """Steps of the profile that it was interpolated from (`omnifx.transfer`); 0: it was measured as it is."""
    in_parts: bool = False
    """Whether the model was captured in parts: outputs can be combined at its boundary, but not with the reuse
    graph's."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.format != FORMAT:
            raise ValueError(f"format {self.format} is not known; this omnifx reads format {FORMAT}")
        if not self.timesteps:
            raise ValueError("a profile needs at least one timestep")
        if bool(self.runtime_policy) != bool(self.signals):
            raise ValueError("a run-time policy and its signals come together")
        return self

    @property
    def unplannable(self) -> str:
        """Why no plan can be made from the profile; empty if one can."""
        if not self.runtime_policy:
            return ""
        return (
            f"it holds signals that policy {self.runtime_policy!r} learns from, which decides at run time, and nothing "
            "to plan from. Measure it anew with `omnifx calibrate` and the policy you mean to use."
        )

    def cost_of(self, row: Row, spans: Sequence[str] = ()) -> float:
        """FLOPs of a call that does `row`, over those of a call that computes everything.

        The row's last actions are those of `spans`; a reused one counts for all that is inside of it.
        """
        if SKIP in row:  # nothing of the network is left
            return 0.0
        if self.reuse_flops is not None and row and not spans and set(row) <= {REUSE, PREDICT}:
            return self.reuse_flops / self.flops if self.flops else 1.0
        reused = {
            name: self.span(name)
            for name, action in zip(spans, row[len(self.branches) :], strict=True)
            if action == REUSE
        }
        counted: set[int] = set()
        saved = 0.0
        for span in sorted(reused.values(), key=lambda span: span.flops, reverse=True):
            if counted.isdisjoint(range(span.first, span.last + 1)):
                saved += span.flops
                counted.update(range(span.first, span.last + 1))
        inside = {name for number in counted for name in self.blocks[number].branches}
        saved += sum(
            branch.saved_by(action)
            for branch, action in zip(self.branches, row, strict=False)
            if branch.name not in inside
        )
        return 1.0 - saved / self.flops if self.flops else 1.0

    def span(self, name: str) -> SpanMeta:
        """A range of blocks by its name.

        Raises: ConfigError if the profile does not know it, or it cannot be reused.
        """
        found = next((span for span in self.spans if span.name == name), None)
        if found is None:
            known = (
                f"it knows those from block 0 and those to block {len(self.blocks) - 1}"
                if self.spans
                else "it knows none, as the model is not one graph or was measured by an older version"
            )
            raise ConfigError(
                f"the profile of {self.model} does not hold the range of blocks {name}: {known}. Measure it anew with "
                "`omnifx calibrate`."
            )
        if found.reason:
            raise ConfigError(
                f"blocks {found.first} to {found.last} of {self.model} cannot be reused as one: {found.reason}."
            )
        return found

    @property
    def stack(self) -> str:
        """The name of the range of all blocks."""
        return f"span0-{max(0, len(self.blocks) - 1)}"

    def branches_in(self, span: SpanMeta) -> tuple[str, ...]:
        """The cached branches inside of a range of blocks."""
        return tuple(name for block in self.blocks[span.first : span.last + 1] for name in block.branches)


@dataclass(frozen=True, eq=False)  # tensors have no truth value; a profile equals itself
class Profile:
    """What a calibration measured on one model with one sampler.

    Attributes:
        meta: Names, shapes, timesteps, costs.
        grams: [runs, streams, NUM_HALVES, NUM_BANDS, 3 S, 3 S], float32: inner products of the recorded vectors; of no
        vectors (0 for 3 S) where the signals of a run-time policy were measured instead.
        moves: [runs, S], float32: ``||x_k - x_{k-1}|| / ||x_{k-1}||`` (0 for k = 0), what the clock expects of a next
        step.
        changes: [runs, streams, S, lags + 1, columns], float32, for the `measured` columns: the relative L1 error of
        cuts that are 1, 2, ... steps old, then the growth, as `omnifx.changes` defines them; None if not measured.
        prior: Mean cuts at each step, if they were measured.
        path: [runs, NUM_HALVES, 3 S, 3 S], float64: inner products of the latents, of the output that the sampler makes
        of all streams (guided, see `omnifx.path`), and of its noise; None if outputs cannot be combined: latents have
        another shape, or the model has several outputs.
        signals: [runs, streams, S, signals], float32, for the `signals` of the meta data; NaN where a step gave none.
    Memory: (4 * streams * 8 + 16) * runs * 9 S^2 bytes on the host: 1.1 MB for one run of 50 steps.
    """

    meta: ProfileMeta
    grams: Tensor
    moves: Tensor
    changes: Tensor | None = None
    prior: Prior | None = None
    signals: Tensor | None = None
    path: Tensor | None = None

    def __post_init__(self) -> None:
        meta, size = self.meta, 0 if self.meta.signals else 3 * len(self.meta.timesteps)
        expected = (meta.num_runs, meta.num_streams, NUM_HALVES, NUM_BANDS, size, size)
        if tuple(self.grams.shape) != expected:
            raise ProfileError(f"Profile: grams have shape {tuple(self.grams.shape)}, expected {expected}.")
        if tuple(self.moves.shape) != (meta.num_runs, len(meta.timesteps)):
            raise ProfileError(
                f"Profile: moves have shape {tuple(self.moves.shape)}, expected {(meta.num_runs, len(meta.timesteps))}."
            )
        table = (meta.num_runs, meta.num_streams, len(meta.timesteps), meta.num_lags + 1, len(meta.measured))
        if tuple(() if self.changes is None else self.changes.shape) != (table if meta.measured else ()):
            found = None if self.changes is None else tuple(self.changes.shape)
            raise ProfileError(f"Profile: changes have shape {found}, expected {table if meta.measured else None}.")
        columns = (meta.num_runs, meta.num_streams, len(meta.timesteps), len(meta.signals))
        if tuple(() if self.signals is None else self.signals.shape) != (columns if meta.signals else ()):
            found = None if self.signals is None else tuple(self.signals.shape)
            raise ProfileError(f"Profile: signals have shape {found}, expected {columns if meta.signals else None}.")
        pair = (meta.num_runs, NUM_HALVES, size, size)
        if self.path is not None and tuple(self.path.shape) != pair:
            raise ProfileError(f"Profile: the path has shape {tuple(self.path.shape)}, expected {pair}.")
        known = [self.grams, self.moves, *(values for values in (self.changes, self.path) if values is not None)]
        if self.signals is not None:
            known.append(self.signals[~self.signals.isnan()])
        if not all(bool(torch.isfinite(values).all()) for values in known):
            raise ProfileError("Profile: the measured values hold NaN or infinity. Calibrate again on finite latents.")

    @property
    def num_steps(self) -> int:
        """Number of steps of the generation that was measured."""
        return len(self.meta.timesteps)

    def gram(self, a: str, b: str, *, run: int | slice = slice(None), half: int | None = None) -> Tensor:
        """Inner products between two families of vectors, each one of "x", "o", "q".

        Returns: [runs, streams, NUM_BANDS, S, S], float64 (without the runs axis if `run` is a number); entry (i, j) is
            <a_i, b_j>. `half` 0 or 1 keeps one half of the coefficients; None sums both.
        Raises: ConfigError if the profile holds signals instead.
        """
        if self.meta.unplannable:
            raise ConfigError(f"the profile of {self.meta.model} holds no inner products: {self.meta.unplannable}")
        steps, order = self.num_steps, "xoq"
        rows = slice(order.index(a) * steps, (order.index(a) + 1) * steps)
        cols = slice(order.index(b) * steps, (order.index(b) + 1) * steps)
        picked = self.grams[run][..., rows, cols].double()
        axis = -4
        return picked.sum(axis) if half is None else picked.select(axis, half)

    def points(self) -> list[dict[str, float]]:
        """The signals of each step of all streams and runs, by name; a step has those that it gave."""
        if self.signals is None:
            return []
        rows = self.signals.flatten(0, 2).tolist()
        return [
            {name: value for name, value in zip(self.meta.signals, row, strict=True) if not math.isnan(value)}
            for row in rows
        ]

    def changes_of(self, names: Sequence[str], *, lags: int) -> Tensor:
        """[S, lags, names], float64: relative L1 errors of old cuts at each step, the mean over runs and streams.

        Raises: ConfigError if the profile does not hold them.
        """
        return self._measured(names, lags)[:, :lags]

    def growth_of(self, name: str) -> Tensor:
        """[S], float64: how much larger a branch's or span's cuts are than those of the step before, the mean over runs
        and streams.

        Raises: ConfigError if the profile does not hold it.
        """
        return self._measured([name], 1)[:, -1, 0]

    def _measured(self, names: Sequence[str], lags: int) -> Tensor:
        meta = self.meta
        missing = [name for name in names if name not in meta.measured or meta.num_lags < lags]
        if self.changes is None or missing:
            raise ConfigError(
                f"the profile of {meta.model} does not tell how {missing[:3]} change over {lags} steps: it was "
                "measured for another policy, or cache_budget had no room for the older caches. Measure it anew with "
                "`omnifx calibrate` and the policy you mean to use."
            )
        return self.changes.double().mean((0, 1))[..., [meta.measured.index(name) for name in names]]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; the JSON half lies in its header. The prior lies beside it, see `prior_path`."""
        tensors = {"grams": self.grams.contiguous(), "moves": self.moves.contiguous()}
        if self.changes is not None:
            tensors["changes"] = self.changes.contiguous()
        if self.signals is not None:
            tensors["signals"] = self.signals.contiguous()
        if self.path is not None:
            tensors["path"] = self.path.contiguous()
        save_file(tensors, str(path), metadata={"omnifx": self.meta.model_dump_json()})
        if self.prior is not None:
            self.prior.save(prior_path(path), fingerprint=self.meta.fingerprint)
        else:
            prior_path(path).unlink(missing_ok=True)  # of another profile that lay here

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read and validate a profile.

        Raises: ProfileError if the file is missing, corrupt, of another format, or inconsistent.
        """
        again = "Measure it anew with `omnifx calibrate`"
        try:
            with safetensors.safe_open(str(path), framework="pt") as file:
                header = (file.metadata() or {}).get("omnifx")
                if header is None:
                    raise ProfileError(f"Profile.load: {path} is not a profile (no omnifx header). {again}.")
                meta = ProfileMeta.model_validate_json(header)
                names = set(file.keys())
                if names - {"changes", "signals", "path"} != {"grams", "moves"}:
                    raise ProfileError(
                        f"Profile.load: {path} holds {sorted(names)}, expected grams and moves. {again}."
                    )
                prior, beside = None, prior_path(path)
                if beside.exists():
                    prior = Prior.load(beside, fingerprint=meta.fingerprint, num_steps=len(meta.timesteps))
                return cls(
                    meta=meta,
                    grams=file.get_tensor("grams").float(),
                    moves=file.get_tensor("moves").float(),
                    changes=file.get_tensor("changes").float() if "changes" in names else None,
                    prior=prior,
                    signals=file.get_tensor("signals").float() if "signals" in names else None,
                    path=file.get_tensor("path").double() if "path" in names else None,
                )
        except OSError as error:
            raise ProfileError(f"Profile.load: cannot read {path}: {error}. {again}.") from error
        except safetensors.SafetensorError as error:
            raise ProfileError(f"Profile.load: {path} is corrupt: {error}. {again}.") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ProfileError(f"Profile.load: {path} is corrupt: {where} {first['msg']}. {again}.") from error

    def summary(self) -> dict[str, Any]:
        """The meta data as plain values, for tables and logs."""
        loaded: dict[str, Any] = json.loads(self.meta.model_dump_json())
        return loaded
