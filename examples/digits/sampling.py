"""Sample the digits models, plain or compiled, with the schedulers of diffusers.

The noise of a sample depends on its seed alone, so a set of samples is the same however it is split into batches (up to
the rounding of matrix products). The model is called with keywords and a timestep tensor [B], always the same way, so
that a compiled model is captured once.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Generator, Tensor

from examples.digits.data import IMAGE_SIZE
from examples.digits.models import NULL_CLASS, load_class_tokens

NUM_TRAIN_TIMESTEPS = 1000
NOISE_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}  # what any scheduler for the DiT is made with
FLOW_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
}  # what any multi-step scheduler for the flow model is made with

Model = Callable[..., Any]  # the calling convention of a diffusers transformer
Progress = Callable[[int, int], None]  # called with (steps done, steps in all)
MakeScheduler = Callable[[int], Any]  # a number of steps -> a scheduler of diffusers, its timesteps set


@torch.no_grad()
def sample_dit(
    model: Model,
    *,
    seeds: Sequence[int],
    labels: Tensor,
    steps: int = 50,
    cfg: float = 1.0,
    solver: Literal["ddim", "dpmsolver++"] | MakeScheduler = "ddim",
    progress: Progress | None = None,
) -> Tensor:
    """Sample the noise-predicting DiT.

    Args:
        model: What `load_dit` gives, or that compiled.
        seeds: B seeds, one per sample.
        labels: [B] int64 in 0..9.
        steps: Denoising steps, one call of the model each.
        cfg: Scale of classifier-free guidance; 1 is no guidance and batch B, else a batch is 2B, [uncond; cond]. The
            shipped DiT is made for 1: its null class is too weak for more (2 ruins the samples; see the README).
        solver: "ddim" (first order, eta 0), "dpmsolver++" (second order, for a base line with fewer steps), or what
            makes a scheduler for `NOISE_SCHEDULE`.
        progress: Called after every step.

    Returns: Images [B, 1, 8, 8] float32 in about [-1, 1].
    Source: DDIM, arXiv:2010.02502; DPM-Solver++, arXiv:2211.01095; guidance, arXiv:2207.12598.
    """
    _check(seeds, labels, steps)
    make: Any  # the schedulers' constructors are untyped
    if callable(solver):
        scheduler = solver(steps)
    elif solver in ("ddim", "dpmsolver++"):
        make = DDIMScheduler if solver == "ddim" else DPMSolverMultistepScheduler
        scheduler = make(**NOISE_SCHEDULE, **({"clip_sample": True} if solver == "ddim" else {"solver_order": 2}))
        scheduler.set_timesteps(steps)
    else:
        raise ValueError(f"sample_dit: solver must be 'ddim', 'dpmsolver++' or a function, got {solver!r}.")
    null = torch.full_like(labels, NULL_CLASS)

    def denoise(x_BCHW: Tensor, timestep: Tensor) -> Tensor:
        if cfg == 1:
            return call(x_BCHW, timestep, labels)
        both = call(torch.cat([x_BCHW, x_BCHW]), torch.cat([timestep, timestep]), torch.cat([null, labels]))
        unconditional, conditional = both.chunk(2)
        return _guide(unconditional, conditional, cfg)

    def call(x_BCHW: Tensor, timestep: Tensor, classes: Tensor) -> Tensor:
        noise: Tensor = model(hidden_states=x_BCHW, timestep=timestep, class_labels=classes, return_dict=False)[0]
        return noise

    return _run(scheduler, denoise, seeds, labels.device, progress)


@torch.no_grad()
def sample_flow(
    model: Model,
    *,
    seeds: Sequence[int],
    labels: Tensor,
    steps: int = 50,
    cfg: float = 2.0,
    two_calls: bool = False,
    solver: Literal["euler", "dpmsolver++"] | MakeScheduler = "euler",
    class_tokens: Tensor | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Sample the flow model.

    Args:
        model: What `load_flow` gives, or that compiled.
        seeds: B seeds, one per sample.
        labels: [B] int64 in 0..9.
        steps: Steps of equal length in t, from 1 (noise) to 0.
        cfg: Scale of classifier-free guidance; 1 is no guidance, and one call of batch B.
        two_calls: Guidance as two calls of batch B a step, first unconditional, then conditional (two streams), and not
            as one call of batch 2B, [uncond; cond].
        solver: "euler" (first order), "dpmsolver++" (second order, for a base line with fewer steps), or what makes a
            scheduler for `FLOW_SCHEDULE`.
        class_tokens: [11, 4, 64]; None takes the shipped ones.
        progress: Called after every step.

    Returns: Images [B, 1, 8, 8] float32 in about [-1, 1].
    Source: rectified flow, arXiv:2209.03003; DPM-Solver++, arXiv:2211.01095; guidance, arXiv:2207.12598.
    """
    _check(seeds, labels, steps)
    make: Any  # the schedulers' constructors are untyped
    if callable(solver):
        scheduler = solver(steps)
    elif solver == "euler":
        make = FlowMatchEulerDiscreteScheduler
        scheduler = make(num_train_timesteps=NUM_TRAIN_TIMESTEPS)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))  # without these the last step is 1/1000 long
    elif solver == "dpmsolver++":
        make = DPMSolverMultistepScheduler
        scheduler = make(**FLOW_SCHEDULE, solver_order=2)
        scheduler.set_timesteps(steps)
    else:
        raise ValueError(f"sample_flow: solver must be 'euler', 'dpmsolver++' or a function, got {solver!r}.")
    tokens = (load_class_tokens() if class_tokens is None else class_tokens).to(labels.device)
    class_states, null_states = tokens[labels], tokens[torch.full_like(labels, NULL_CLASS)]

    def denoise(x_BCHW: Tensor, timestep: Tensor) -> Tensor:
        timestep = timestep.float()
        if cfg == 1:
            return call(x_BCHW, timestep, class_states)
        if two_calls:
            return _guide(call(x_BCHW, timestep, null_states), call(x_BCHW, timestep, class_states), cfg)
        states = torch.cat([null_states, class_states])
        both = call(torch.cat([x_BCHW, x_BCHW]), torch.cat([timestep, timestep]), states)
        unconditional, conditional = both.chunk(2)
        return _guide(unconditional, conditional, cfg)

    def call(x_BCHW: Tensor, timestep: Tensor, states: Tensor) -> Tensor:
        velocity: Tensor = model(
            hidden_states=x_BCHW,
            encoder_hidden_states=states,
            timestep=timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return velocity

    return _run(scheduler, denoise, seeds, labels.device, progress)


def _run(
    scheduler: Any,
    denoise: Callable[[Tensor, Tensor], Tensor],
    seeds: Sequence[int],
    device: torch.device,
    progress: Progress | None,
) -> Tensor:
    x_BCHW = _noise(seeds).to(device)  # every scheduler above starts from unit noise
    timesteps = scheduler.timesteps.to(device)
    for done, timestep in enumerate(timesteps, start=1):
        prediction = denoise(x_BCHW, timestep.repeat(len(seeds)))
        x_BCHW = scheduler.step(prediction, timestep, x_BCHW, return_dict=False)[0]
        if progress is not None:
            progress(done, len(timesteps))
    return x_BCHW


def _noise(seeds: Sequence[int]) -> Tensor:
    shape = (1, 1, IMAGE_SIZE, IMAGE_SIZE)
    return torch.cat([torch.randn(shape, generator=Generator().manual_seed(seed)) for seed in seeds])


def _guide(unconditional: Tensor, conditional: Tensor, cfg: float) -> Tensor:
    return unconditional + cfg * (conditional - unconditional)


def _check(seeds: Sequence[int], labels: Tensor, steps: int) -> None:
    if labels.shape != (len(seeds),) or not seeds:
        raise ValueError(f"expected one label per seed, got {len(seeds)} seeds and labels {list(labels.shape)}.")
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps!r}.")
