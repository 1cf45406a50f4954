"""What the tests of sampling and of Triton share: a toy's bundle that runs in PyTorch, and samplers of it."""

from __future__ import annotations

from functools import cache
from typing import Any

import diffusers
import torch
from torch import nn

import omnifx
from omnifx.bundle_runner import BundleRunner
from omnifx.sampling import Sampler
from omnifx.sampling_setup import sampling_of
from omnifx.schedulers import scheduler_info
from tests.exporting import in_torch, plan_by_hand
from tests.toys import noise, toy, toy_inputs

PATTERN = "FrFr"
BATCH = 4
LABELS, TEXTS, NEGATIVES = torch.tensor([1, 5, 8, 2]), noise(4, 5, 8, seed=1), noise(4, 5, 8, seed=2)


def made(name: str, **config: Any) -> Any:
    """A scheduler of diffusers, set up for a few steps."""
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(len(PATTERN))
    return scheduler


@cache
def model() -> nn.Module:
    return toy(1, text=8)


def runner(pattern: str = PATTERN) -> BundleRunner:
    """A toy's bundle for the timesteps of DDIM, run in PyTorch; made once."""
    return _runner(pattern)


@cache
def _runner(pattern: str) -> BundleRunner:
    example = toy_inputs(BATCH, text=8)
    names = tuple(branch.name for branch in omnifx.explain(model(), *example).branches if branch.cacheable)
    plan = plan_by_hand(model(), names, pattern, [float(t) for t in made("DDIMScheduler").timesteps])
    return in_torch(model(), example, plan)


def sampler(scheduler: str = "DDIMScheduler", pattern: str = PATTERN, **options: Any) -> Sampler:
    """One with another scheduler is told that the bundle's steps are at its timesteps; the graphs do not mind."""
    found, times = runner(pattern), [float(t) for t in made(scheduler).timesteps]
    steps = tuple(step.model_copy(update={"timestep": t}) for step, t in zip(found.manifest.steps, times, strict=True))
    info = scheduler_info(made(scheduler), times)
    manifest = found.manifest.model_copy(update={"steps": steps, "scheduler": info})
    retimed = BundleRunner(manifest, found.engine, found._constants)
    return Sampler(retimed, sampling_of(manifest, **options))


__all__ = ["BATCH", "LABELS", "NEGATIVES", "PATTERN", "TEXTS", "made", "model", "runner", "sampler"]
