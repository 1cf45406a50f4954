"""A prior: what the cuts of a model are on average at each step, and so how they go from one step to the next.

It is measured along with a profile where a policy asks for it, and kept beside the profile: a safetensors file with
JSON in its header, ``<profile>.prior``. Its bytes are known when the first step begins: cuts of one sample, times the
steps.

Source: the prior knowledge of EOC, arXiv:2501.19243, which averages the conditional half of DiT-XL's outputs over one
sample of each of 1000 classes, and applies the average to both halves. Low precision is ours
(20 steps of DiT-XL/2 take 1.3 GB in float32), and so is low rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from omnifx.errors import ConfigError, ProfileError

Samples = Literal["all", "first", "second"]
Precision = Literal["float32", "float16", "bfloat16"]

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class PriorSpec:
    """What a prior averages, and how it is kept.

    Raises: ConfigError for values out of range.
    """

    samples: Samples = "all"
    """Samples of a call that are averaged: all, or the first or second half of the batch (the conditional one of
    guidance in one call). The average stands for all samples either way."""
    precision: Precision = "float16"
    rank: int | None = None
    """Directions in which the steps of a cut may differ; None keeps all steps as they are."""

    def __post_init__(self) -> None:
        for option, value, allowed in (("samples", self.samples, Samples), ("precision", self.precision, Precision)):
            if value not in get_args(allowed):
                raise ConfigError(f"prior: {option} must be one of {list(get_args(allowed))}, got {value!r}.")
        if self.rank is not None and (not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1):
            raise ConfigError(f"prior: rank must be >= 1 or None, got {self.rank!r}.")

    @property
    def dtype(self) -> torch.dtype:
        """The type of what is kept."""
        found: torch.dtype = getattr(torch, self.precision)
        return found


@dataclass(frozen=True, eq=False)
class Prior:
    """Mean cuts at each step.

    Attributes:
        spec: How they were averaged and kept.
        num_runs: Generations that were averaged.
        means: By branch and number of the cut, ``blocks.0.attn:0``. [S, rows, ...] with the rows of one sample; or with
            a rank [rank, rows, ...], directions in which steps differ.
        places: With a rank, by the same names: [S, rank] float32, where each step lies in these directions.
    Memory: `num_bytes` on the host, and once more where the model runs, once a plan reads it.
    """

    spec: PriorSpec
    num_runs: int
    means: Mapping[str, Tensor]
    places: Mapping[str, Tensor]

    @classmethod
    def of(cls, means: Mapping[str, Tensor], spec: PriorSpec, *, num_runs: int = 1) -> Self:
        """The prior of mean cuts [S, rows, ...]."""
        if spec.rank is None:
            return cls(spec, num_runs, {key: mean.to(spec.dtype) for key, mean in means.items()}, {})
        kept: dict[str, Tensor] = {}
        places: dict[str, Tensor] = {}
        for key, mean in means.items():
            centred = mean.float() - mean.float().mean(0)  # a constant moves nothing
            u, s, v = torch.linalg.svd(centred.flatten(1), full_matrices=False)
            rank = min(spec.rank, len(s))
            places[key] = (u[:, :rank] * s[:rank]).contiguous()
            kept[key] = v[:rank].reshape(rank, *mean.shape[1:]).to(spec.dtype).contiguous()
        return cls(spec, num_runs, kept, places)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in (*self.means.values(), *self.places.values()))

    @property
    def num_steps(self) -> int:
        """Steps of the generation that was measured."""
        return len(next(iter((self.places or self.means).values())))

    def to(self, device: torch.device) -> Prior:
        """The same prior on a device."""
        moved = ({key: t.to(device) for key, t in part.items()} for part in (self.means, self.places))
        return Prior(self.spec, self.num_runs, *moved)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of one cut's trend."""
        return tuple(self.means[key].shape[1:])

    def trend(self, key: str, step: int) -> Tensor:
        """``E = P_step - P_{step-1}`` of one cut, [rows, ...] float32; zeros at step 0."""
        before = max(0, step - 1)
        if not self.places:
            return self.means[key][step].float() - self.means[key][before].float()
        place = self.places[key][step] - self.places[key][before]
        moved: Tensor = torch.tensordot(place, self.means[key].float(), 1)
        return moved

    def along(self, key: str) -> Tensor:
        """One cut at all steps, [S, rows, ...] float32; with a rank, up to a constant."""
        return torch.tensordot(self.places[key], self.means[key].float(), 1) if self.places else self.means[key].float()

    def save(self, path: str | Path, *, fingerprint: str) -> None:
        """Write one safetensors file, for the model of a fingerprint."""
        meta = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "num_runs": self.num_runs,
            "samples": self.spec.samples,
            "precision": self.spec.precision,
            "rank": self.spec.rank,
        }
        tensors = {f"means/{key}": t.cpu().contiguous() for key, t in self.means.items()}
        tensors |= {f"places/{key}": t.cpu().contiguous() for key, t in self.places.items()}
        save_file(tensors, str(path), metadata={"omnifx_prior": json.dumps(meta)})

    @classmethod
    def load(cls, path: str | Path, *, fingerprint: str, num_steps: int) -> Self:
        """Read and check a prior.

        Raises: ProfileError if the file is corrupt, of another format, or of another model or number of steps.
        """
        again = "Measure it anew with `omnifx calibrate`"
        try:
            with safetensors.safe_open(str(path), framework="pt") as file:
                meta: dict[str, Any] = json.loads((file.metadata() or {})["omnifx_prior"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            spec = PriorSpec(samples=meta["samples"], precision=meta["precision"], rank=meta["rank"])
            parts = (
                {name.partition("/")[2]: t for name, t in tensors.items() if name.startswith(f"{part}/")}
                for part in ("means", "places")
            )
            found = cls(spec, meta["num_runs"], *parts)
            if meta["format"] != FORMAT or not found.means or (found.places and set(found.places) != set(found.means)):
                raise ProfileError(f"Prior.load: {path} is of another format. {again}.")
        except OSError as error:
            raise ProfileError(f"Prior.load: cannot read {path}: {error}. {again}.") from error
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ProfileError(f"Prior.load: {path} is corrupt: {error}. {again}.") from error
        if meta["fingerprint"] != fingerprint or found.num_steps != num_steps:
            raise ProfileError(
                f"Prior.load: {path} is not of this profile: it has {found.num_steps} steps of model "
                f"{meta['fingerprint']}, the profile {num_steps} steps of {fingerprint}. {again}."
            )
        if not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
            raise ProfileError(f"Prior.load: {path} holds NaN or infinity. {again}.")
        return found


def merge_priors(priors: Sequence[Prior]) -> Prior:
    """The mean of several generations' priors. Raises ProfileError unless they are of the same cuts and steps."""
    sizes = [{key: (prior.num_steps, *prior.shape(key)) for key in prior.means} for prior in priors]
    if any(size != sizes[0] for size in sizes):
        raise ProfileError("merge: the runs made other cuts, or other steps; all must be of one model and sampler.")
    runs = sum(prior.num_runs for prior in priors)
    means = {
        key: torch.stack([prior.along(key) * (prior.num_runs / runs) for prior in priors]).sum(0)
        for key in priors[0].means
    }
    return Prior.of(means, priors[0].spec, num_runs=runs)


@dataclass
class PriorSums:
    """Mean cuts of the generation under way."""

    spec: PriorSpec
    budget: int
    """Most bytes to hold."""
    problem: str = ""
    """Why there will be no prior; empty if there will be one."""
    held_bytes: int = 0
    _means: list[dict[str, Tensor]] = field(default_factory=list)
    _counts: list[dict[str, int]] = field(default_factory=list)

    def give_up(self, problem: str) -> None:
        """Hold nothing from now on."""
        self.problem = problem
        self.held_bytes = 0
        self._means.clear()
        self._counts.clear()

    def add(self, step: int, key: str, value: Tensor, *, batch: int) -> None:
        """A cut [batch * rows, ...] of one call; calls of the same step are averaged."""
        if self.problem:
            return
        mean = self._averaged(value, batch)
        if mean is None:
            return
        while len(self._means) <= step:
            self._means.append({})
            self._counts.append({})
        means, counts = self._means[step], self._counts[step]
        count = counts[key] = counts.get(key, 0) + 1
        if count > 1:
            mean = means[key].float() + (mean - means[key].float()) / count
        else:
            self.held_bytes += mean.numel() * self.spec.dtype.itemsize
            if self.held_bytes > self.budget:
                self.give_up(
                    f"the prior takes more than {self.budget:,} bytes by step {step}. Raise record_budget, or keep it "
                    "in less precision"
                )
                return
        means[key] = mean.to(self.spec.dtype)

    def _averaged(self, value: Tensor, batch: int) -> Tensor | None:
        if value.shape[0] % batch:
            self.give_up(f"a cut of shape {list(value.shape)} has no rows for each of {batch} samples")
            return None
        taken: Tensor = value.detach().float().unflatten(0, (batch, -1))
        half = batch // 2
        if self.spec.samples != "all":
            if batch % 2:
                self.give_up(f"samples={self.spec.samples!r} asks for half of the batch, but it has {batch} samples")
                return None
            taken = taken[:half] if self.spec.samples == "first" else taken[half:]
        return taken.mean(0)

    def finish(self) -> Prior | None:
        """The prior; None if there is a `problem`."""
        if self.problem or not self._means:
            return None
        keys = list(self._means[0])
        if any(list(means) != keys for means in self._means):
            self.give_up("some steps made other cuts than the first")
            return None
        means = {key: torch.stack([step[key].cpu() for step in self._means]) for key in keys}
        return Prior.of(means, self.spec)


def prior_path(profile: str | Path) -> Path:
    """Where the prior of a profile lies."""
    return Path(f"{profile}.prior")


def cut_key(branch: str, number: int) -> str:
    """What a prior calls a cut of a branch."""
    return f"{branch}:{number}"


__all__ = ["Prior", "PriorSpec", "PriorSums", "cut_key", "merge_priors", "prior_path"]
