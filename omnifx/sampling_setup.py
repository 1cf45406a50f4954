"""How a bundle is sampled, as it is written down beside it: the scheduler, how guidance calls the model, and the values
that no request gives.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from torch import Tensor

from omnifx.bundle import CallInput, Manifest, SchedulerInfo
from omnifx.errors import BundleError, ConfigError
from omnifx.schedulers import make_scheduler

FORMAT = 1
SAMPLING = "sampling.json"
SAMPLING_TENSORS = "sampling.safetensors"

Guidance = Literal["none", "one-call", "two-calls"]
"""How classifier-free guidance calls the model in a step: not at all, or the model guides by itself; once, with a batch
of [negative; positive]; or twice, first with the negative inputs."""


class Sampling(BaseModel):
    """How a bundle is sampled, as JSON beside it; its tensors are a safetensors file.

    Raises: BundleError from `load`, if a file is missing or not valid.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, arbitrary_types_allowed=True)

    format: int = FORMAT
    scheduler: SchedulerInfo
    guidance: Guidance
    guidance_scale: FiniteFloat
    """Where a request gives none."""
    inputs: tuple[str, ...]
    """Arguments of the model that a request gives, a row for each sample."""
    negative: tuple[str, ...]
    """Those of them that have another value in the negative half of guidance."""
    tensors: dict[str, Tensor] = Field(default_factory=dict, exclude=True)
    """`fixed.NAME`: arguments that are the same in all requests. `negative.NAME`: rows where a request gives none."""

    def save(self, folder: Path) -> None:
        """Write it into a folder."""
        from safetensors.torch import save_file

        text = json.dumps(self.model_dump(mode="json", exclude_defaults=True) | {"format": self.format}, indent=1)
        (folder / SAMPLING).write_text(text + "\n", encoding="utf-8")
        save_file({name: value.contiguous() for name, value in self.tensors.items()}, folder / SAMPLING_TENSORS)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read it from a folder."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = folder / SAMPLING
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if (found := raw.get("format")) != FORMAT:
                raise BundleError(f"{path} has format {found}, but this omnifx reads format {FORMAT}.")
            tensors = load_file(folder / SAMPLING_TENSORS)
            return cls.model_validate(raw).model_copy(update={"tensors": tensors})
        except (OSError, ValueError, AttributeError, SafetensorError) as error:
            raise BundleError(f"{path} cannot be read: {error}. Write it anew with `omnifx triton`.") from error


def sampling_of(
    manifest: Manifest,
    *,
    scheduler: Any = None,
    guidance: Guidance = "none",
    guidance_scale: float = 1.0,
    negative: Mapping[str, float | Tensor | None] | None = None,
    fixed: Mapping[str, Tensor] | None = None,
    own_sampler: bool = False,
) -> Sampling:
    """Put together how a bundle is sampled, and look whether it can be; see `write_triton` for the arguments.

    Raises: ConfigError for options that do not fit the bundle; BundleError if its scheduler cannot be made.
    """
    if guidance not in get_args(Guidance):
        raise ConfigError(f"sampling: guidance must be one of {list(get_args(Guidance))}, got {guidance!r}.")
    info = manifest.scheduler
    if scheduler is not None:
        from omnifx.schedulers import scheduler_info

        info = scheduler_info(scheduler, info.timesteps)
    make_scheduler(info)
    samples_of(manifest, guidance)
    varying = [name for name, each in manifest.call.inputs.items() if each.role == "varying"]
    if varying and not own_sampler:
        raise ConfigError(
            f"sampling: {', '.join(varying)} of {manifest.model.name} changes from step to step, and the sampler here "
            "does not know how. Give a sampler of your own: a Python file with sample(runner, request)."
        )
    fixed = dict(fixed or {})
    rows, shared = _split_inputs(manifest, fixed)
    if missing := sorted(set(shared) - set(fixed)):
        raise ConfigError(
            f"sampling: {', '.join(missing)} of {manifest.model.name} has no row for each sample, so no request can "
            f"give it. Give its value: fixed={{{missing[0]!r}: tensor}}, or `--fixed FILE.safetensors`."
        )
    chosen = _negatives(manifest, rows, negative) if guidance != "none" else {}
    tensors = {f"fixed.{name}": _as_input(manifest, name, fixed[name], rows=False) for name in shared}
    tensors |= {
        f"negative.{name}": _as_input(manifest, name, value, rows=True)
        for name, value in chosen.items()
        if value is not None
    }
    return Sampling(
        scheduler=info,
        guidance=guidance,
        guidance_scale=guidance_scale,
        inputs=tuple(rows),
        negative=tuple(chosen),
        tensors=tensors,
    )


def samples_of(manifest: Manifest, guidance: Guidance) -> int:
    """Samples that one run of a bundle makes: its batch, or half of it where guidance is one call."""
    batch = latents_of(manifest)[1].shape[0]
    if guidance != "one-call":
        return batch
    if batch % 2:
        raise ConfigError(
            f"sampling: guidance in one call takes an even batch, but the bundle of {manifest.model.name} has a batch "
            f"of {batch}. Export it with one for [negative; positive], or choose guidance 'two-calls' or 'none'."
        )
    return batch // 2


def latents_of(manifest: Manifest) -> tuple[str, CallInput]:
    """The argument that holds the latents.

    Raises: BundleError if there is none.
    """
    inputs = manifest.call.inputs
    found = [(name, info) for name, info in inputs.items() if info.role == "latents" and info.shape]
    if not found:
        raise BundleError(f"sampling: the bundle of {manifest.model.name} has no latents with a batch.")
    return found[0]


def row_shape(manifest: Manifest, name: str) -> tuple[int, ...]:
    """The shape of one sample's row of an argument."""
    return manifest.call.inputs[name].shape[1:]


def _split_inputs(manifest: Manifest, fixed: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Arguments with a row for each sample, and those that are the same for all."""
    batch = latents_of(manifest)[1].shape[0]
    known = [name for name, info in manifest.call.inputs.items() if info.role == "invariant"]
    if unknown := sorted(set(fixed) - set(known)):
        raise ConfigError(f"sampling: fixed {unknown} are none of the arguments {known} of {manifest.model.name}.")
    shapes = {name: manifest.call.inputs[name].shape for name in known}
    rows = [name for name in known if name not in fixed and shapes[name][:1] == (batch,)]
    return rows, [name for name in known if name not in rows]


def _negatives(
    manifest: Manifest, rows: Sequence[str], given: Mapping[str, float | Tensor | None] | None
) -> dict[str, float | Tensor | None]:
    """Arguments that differ in the negative half, with the rows of those that requests need not give."""
    if given is not None:
        if unknown := sorted(set(given) - set(rows)):
            raise ConfigError(f"sampling: negative {unknown} are none of the arguments {list(rows)} of a request.")
        if not given:
            raise ConfigError("sampling: guidance needs at least one argument that differs in its negative half.")
        return dict(given)
    inputs = manifest.call.inputs
    found: dict[str, float | Tensor | None] = {}
    for name in rows:
        label = "float" not in inputs[name].dtype and len(inputs[name].shape) == 1
        if label:  # the table of labels of diffusers has one more row, for no label
            found[name] = manifest.model.config.get("num_embeds_ada_norm")
        elif len(inputs[name].shape) > 1:
            found[name] = None
    if not found:
        raise ConfigError(f"sampling: which of {list(rows)} differ in the negative half of guidance? Give negative=.")
    return found


def _as_input(manifest: Manifest, name: str, value: float | Tensor, *, rows: bool) -> Tensor:
    """A value in the type and shape of an argument, or of its row."""
    info = manifest.call.inputs[name]
    shape = info.shape[1:] if rows else info.shape
    tensor = torch.as_tensor(value).detach().cpu().to(getattr(torch, info.dtype))
    if rows and tensor.dim() == 0:
        tensor = tensor.expand(shape)
    if rows and tensor.shape[:1] == (1,) and tensor.dim() == len(shape) + 1:
        tensor = tensor[0]
    if tuple(tensor.shape) != shape:
        raise ConfigError(f"sampling: {name} has the shape {list(tensor.shape)}, expected {list(shape)}.")
    return tensor.clone()


__all__ = ["Guidance", "Sampling", "latents_of", "row_shape", "samples_of", "sampling_of"]
