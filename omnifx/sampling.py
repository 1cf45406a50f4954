"""Sample with a bundle: the loop of a scheduler of diffusers around a runner, for samples with seeds of their own.

What the loop needs beside the bundle is a `Sampling`: the scheduler, how guidance calls the model, and the values that
no request gives. A loop of one's own is a function with the signature of `sample`, in a Python file.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from torch import Generator, Tensor

from omnifx.bundle import CallInput, Manifest, SchedulerInfo
from omnifx.bundle_runner import BundleRunner
from omnifx.errors import BundleError, ConfigError, OmnifxError
from omnifx.schedulers import make_scheduler

FORMAT = 1
SAMPLING = "sampling.json"
SAMPLING_TENSORS = "sampling.safetensors"

Guidance = Literal["none", "one-call", "two-calls"]
"""How classifier-free guidance calls the model in a step: not at all, or the model guides by itself; once, with a batch
of [negative; positive]; or twice, first with the negative inputs."""

GUIDANCE = ("none", "one-call", "two-calls")


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
    if guidance not in GUIDANCE:
        raise ConfigError(f"sampling: guidance must be one of {list(GUIDANCE)}, got {guidance!r}.")
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


@dataclass(frozen=True)
class SampleRequest:
    """What one run of a sampler makes: as many samples as the bundle's batch holds."""

    sampling: Sampling
    scheduler: Any
    """Of diffusers, set up; it is this run's own."""
    seeds: tuple[int, ...]
    """One for each sample: all of a sample's noise comes from a generator of its own."""
    inputs: Mapping[str, Tensor]
    """[S, ...] for each argument that requests give."""
    negative: Mapping[str, Tensor] = field(default_factory=dict)
    """[S, ...] for each argument that differs in the negative half of guidance."""
    guidance_scale: Tensor = field(default_factory=lambda: torch.ones(1))
    """[S]"""
    progress: Callable[[int, Tensor], None] = lambda step, latents: None
    """To be called after each step with the number of steps done and the latents [S, ...]."""


Sample = Callable[[BundleRunner, SampleRequest], Tensor]


@torch.no_grad()
def sample(runner: BundleRunner, request: SampleRequest) -> Tensor:
    """Run all steps: the sampler for models that predict noise, a velocity or a sample from embeddings or labels.

    A sample depends on its own row and seed alone. Its latents start as noise of the latents' shape, and stay in
    float32 between the calls of the model. Where the model returns twice the latents' channels, the second half (a
    learned variance) is left out.

    Returns: [S, ...] float32 on the runner's device: the last latents.
    Source: classifier-free guidance, arXiv:2207.12598.
    """
    scheduler, generators = request.scheduler, [Generator().manual_seed(seed) for seed in request.seeds]
    shape = latents_of(runner.manifest)[1].shape[1:]
    x = torch.cat([torch.randn((1, *shape), generator=each) for each in generators]).to(runner.device)
    x = x * float(scheduler.init_noise_sigma) if hasattr(scheduler, "init_noise_sigma") else x
    draws = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": generators} if draws else {}
    with runner.generation():
        for k, timestep in enumerate(scheduler.timesteps):
            scales = hasattr(scheduler, "scale_model_input")
            given = scheduler.scale_model_input(x, timestep) if scales else x
            predicted = guided(runner, request, given, k)
            if x.dim() > 1 and predicted.shape[1] == 2 * x.shape[1]:
                predicted = predicted.chunk(2, dim=1)[0]
            x = scheduler.step(predicted, timestep, x, return_dict=False, **options)[0]
            request.progress(k + 1, x)
    return x


def guided(runner: BundleRunner, request: SampleRequest, x: Tensor, k: int) -> Tensor:
    """The model's prediction at step `k`, guided as the request's sampling says; [S, ...] float32."""
    positive, negative = dict(request.inputs), {**request.inputs, **request.negative}
    if request.sampling.guidance == "none":
        return _call(runner, request, x, positive, k)
    if request.sampling.guidance == "one-call":
        both = {name: torch.cat([negative[name], positive[name]]) for name in positive}
        without, with_ = _call(runner, request, torch.cat([x, x]), both, k).chunk(2)
    else:
        with runner.cache_context("negative"):
            without = _call(runner, request, x, negative, k)
        with runner.cache_context("positive"):
            with_ = _call(runner, request, x, positive, k)
    scale = request.guidance_scale.to(x.device).reshape(-1, *(1,) * (without.dim() - 1))
    return without + scale * (with_ - without)


def _call(runner: BundleRunner, request: SampleRequest, x: Tensor, inputs: Mapping[str, Tensor], k: int) -> Tensor:
    """One call of the model at step `k`: arguments by path, whatever they are nested in."""
    manifest = runner.manifest
    call = manifest.call
    arguments: dict[str, Any] = {**call.constants, **inputs, latents_of(manifest)[0]: x}
    for name, info in call.inputs.items():
        if info.role == "timestep":
            arguments[name] = manifest.steps[k].timestep
        elif (stored := request.sampling.tensors.get(f"fixed.{name}")) is not None:
            arguments[name] = stored.to(runner.device)
    found = runner(**arguments, **({"return_dict": False} if "return_dict" in call.parameters else {}))
    first = found if isinstance(found, Tensor) else next(iter(found.values() if isinstance(found, dict) else found))
    return first.float() if isinstance(first, Tensor) else torch.as_tensor(first)


class Sampler:
    """Samples with a bundle for requests of any number of rows up to a run's.

    Args:
        runner: What `load_bundle` gave.
        sampling: How.
        function: The loop; None: `sample`.

    Raises: ConfigError, BundleError if both do not fit.
    """

    def __init__(self, runner: BundleRunner, sampling: Sampling, function: Sample | None = None) -> None:
        self.runner = runner
        self.sampling = sampling
        self.num_samples = samples_of(runner.manifest, sampling.guidance)
        self._function = function or sample
        self._scheduler = make_scheduler(sampling.scheduler)

    @property
    def num_steps(self) -> int:
        """Of a generation, as a scheduler counts them."""
        return int(self._scheduler.num_inference_steps)

    def run(
        self,
        *,
        seeds: Sequence[int],
        inputs: Mapping[str, Tensor],
        negative: Mapping[str, Tensor],
        guidance_scale: Tensor,
        progress: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Make one sample for each seed; empty places of the batch repeat the first one.

        Args:
            seeds: 1 to `num_samples`.
            inputs: [n, ...] for each of the sampling's inputs.
            negative: [n, ...] for each of the sampling's negative ones.
            guidance_scale: [n]
            progress: Called after each step with the number of steps done and the latents [n, ...].

        Returns: [n, ...] float32 on the CPU.
        """
        n = len(seeds)
        if not 1 <= n <= self.num_samples:
            raise ConfigError(f"sampling: a run makes 1 to {self.num_samples} samples, not {n}.")
        rows = [*range(n), *(0,) * (self.num_samples - n)]
        device = self.runner.device

        def after(step: int, latents: Tensor) -> None:
            if progress is not None:
                progress(step, latents[:n])

        request = SampleRequest(
            sampling=self.sampling,
            scheduler=copy.deepcopy(self._scheduler),
            seeds=tuple(seeds[row] for row in rows),
            inputs={name: value[rows].to(device) for name, value in inputs.items()},
            negative={name: value[rows].to(device) for name, value in negative.items()},
            guidance_scale=guidance_scale[rows].float(),
            progress=after,
        )
        try:
            made = self._function(self.runner, request)
        except OmnifxError:
            raise
        except Exception as error:
            raise BundleError(f"sampling: the sampler failed with {type(error).__name__}: {error}") from error
        if not isinstance(made, Tensor) or made.shape[:1] != (self.num_samples,):
            shown = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise BundleError(f"sampling: the sampler returned {shown}, expected a tensor [{self.num_samples}, ...].")
        return made[:n].detach().float().cpu()


def load_function(path: Path) -> Sample:
    """The function `sample(runner, request)` of a Python file.

    Raises: ConfigError if the file or the function is not there. What the file raises passes through.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"sampling: there is no Python file {path}.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, "sample", None)
    if not callable(found):
        raise ConfigError(f"sampling: {path} has no function sample(runner, request).")
    function: Sample = found
    return function


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


__all__ = [
    "GUIDANCE",
    "Guidance",
    "SampleRequest",
    "Sampler",
    "Sampling",
    "guided",
    "latents_of",
    "load_function",
    "row_shape",
    "sample",
    "samples_of",
    "sampling_of",
]
