"""Sample with a bundle: the loop of a scheduler of diffusers around a runner, for samples with seeds of their own.

What the loop needs beside the bundle is a `Sampling`: the scheduler, how guidance calls the model, and the values that
no request gives. A loop of one's own is a function with the signature of `sample`, in a Python file.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from omnifx.bundle_runner import BundleRunner
from omnifx.errors import BundleError, ConfigError, OmnifxError
from omnifx.sampling_setup import Sampling, latents_of, samples_of
from omnifx.schedulers import make_scheduler


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


__all__ = ["SampleRequest", "Sampler", "guided", "load_function", "sample"]
