"""Sample the digits models, plain or compiled, with the schedulers of diffusers.

All noise of a sample, also what a stochastic sampler adds in every step, depends on its seed alone: a set of samples is
the same however it is split into batches (up to the rounding of matrix products), and however the model's work is
cached. The model is called with keywords and a timestep tensor [B], always the same way, so that a compiled model is
captured once.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
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
DitSolver = Literal["ddim", "ddpm", "dpmsolver++", "sde-dpmsolver++", "unipc"]
FlowSolver = Literal["euler", "stochastic-euler", "dpmsolver++", "sde-dpmsolver++", "unipc"]


@torch.no_grad()
def sample_dit(
    model: Model,
    *,
    seeds: Sequence[int],
    labels: Tensor,
    steps: int = 50,
    cfg: float = 1.0,
    solver: DitSolver | MakeScheduler = "ddim",
    eta: float = 0.0,
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
        solver: "ddim" (first order), "ddpm" (ancestral), "dpmsolver++" (second order), "sde-dpmsolver++" (the same with
            noise), "unipc" (second order, with a corrector), or what makes a scheduler for `NOISE_SCHEDULE`.
        eta: Share of fresh noise in each step of "ddim", 0..1; 0 is deterministic, 1 as much as "ddpm".
        progress: Called after every step.

    Returns: Images [B, 1, 8, 8] float32 in about [-1, 1].
    Source: DDIM, arXiv:2010.02502; DDPM, arXiv:2006.11239; DPM-Solver++, arXiv:2211.01095; UniPC, arXiv:2302.04867;
        guidance, arXiv:2207.12598.
    """
    _check(seeds, labels, steps)
    scheduler = solver(steps) if callable(solver) else _dit_scheduler(solver, steps, eta)
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

    more = {"eta": eta} if solver == "ddim" else {}
    return _run(scheduler, denoise, seeds, labels.device, progress, **more)


@torch.no_grad()
def sample_flow(
    model: Model,
    *,
    seeds: Sequence[int],
    labels: Tensor,
    steps: int = 50,
    cfg: float = 2.0,
    two_calls: bool = False,
    solver: FlowSolver | MakeScheduler = "euler",
    class_tokens: Tensor | None = None,
    size: int = IMAGE_SIZE,
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
        solver: "euler" (first order), "stochastic-euler" (all noise drawn anew in each step), "dpmsolver++" (second
            order), "sde-dpmsolver++" (the same with noise), "unipc" (second order, with a corrector), or what makes a
            scheduler for `FLOW_SCHEDULE`.
        class_tokens: [11, 4, 64]; None takes the shipped ones.
        size: Pixels of a side, even. The shipped model knows digits of 8; others show it more canvas than it has seen.
        progress: Called after every step.

    Returns: Images [B, 1, size, size] float32 in about [-1, 1].
    Source: rectified flow, arXiv:2209.03003; DPM-Solver++, arXiv:2211.01095; UniPC, arXiv:2302.04867;
        guidance, arXiv:2207.12598.
    """
    _check(seeds, labels, steps)
    scheduler = solver(steps) if callable(solver) else _flow_scheduler(solver, steps)
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

    return _run(scheduler, denoise, seeds, labels.device, progress, size=size)


def _dit_scheduler(solver: DitSolver, steps: int, eta: float) -> Any:
    if not 0.0 <= eta <= 1.0 or (eta and solver != "ddim"):
        raise ValueError(
            f"sample_dit: eta must be in [0, 1], and 0 for solvers but 'ddim', got {eta!r} with {solver!r}."
        )
    multistep = partial(DPMSolverMultistepScheduler, solver_order=2)
    made: dict[str, Callable[..., Any]] = {
        "ddim": partial(DDIMScheduler, clip_sample=True),
        "ddpm": partial(DDPMScheduler, clip_sample=True),
        "dpmsolver++": multistep,
        "sde-dpmsolver++": partial(multistep, algorithm_type="sde-dpmsolver++"),
        "unipc": partial(UniPCMultistepScheduler, solver_order=2),
    }
    scheduler = _of(made, solver, "sample_dit")(**NOISE_SCHEDULE)
    scheduler.set_timesteps(steps)
    return scheduler


def _flow_scheduler(solver: FlowSolver, steps: int) -> Any:
    multistep = partial(DPMSolverMultistepScheduler, solver_order=2)
    made: dict[str, Callable[..., Any]] = {
        "euler": FlowMatchEulerDiscreteScheduler,
        "stochastic-euler": partial(FlowMatchEulerDiscreteScheduler, stochastic_sampling=True),
        "dpmsolver++": multistep,
        "sde-dpmsolver++": partial(multistep, algorithm_type="sde-dpmsolver++"),
        "unipc": partial(UniPCMultistepScheduler, solver_order=2),
    }
    make = _of(made, solver, "sample_flow")
    if "euler" in solver:
        scheduler = make(num_train_timesteps=NUM_TRAIN_TIMESTEPS)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))  # without these the last step is 1/1000 long
    else:
        scheduler = make(**FLOW_SCHEDULE)
        scheduler.set_timesteps(steps)
    return scheduler


def _of(made: dict[str, Callable[..., Any]], solver: str, caller: str) -> Callable[..., Any]:
    if solver not in made:
        raise ValueError(f"{caller}: solver must be one of {list(made)}, got {solver!r}.")
    return made[solver]


def _run(
    scheduler: Any,
    denoise: Callable[[Tensor, Tensor], Tensor],
    seeds: Sequence[int],
    device: torch.device,
    progress: Progress | None,
    *,
    size: int = IMAGE_SIZE,
    **options: Any,
) -> Tensor:
    generators = [Generator().manual_seed(seed) for seed in seeds]  # one for each sample: the start, then each step
    x_BCHW = torch.cat([torch.randn((1, 1, size, size), generator=each) for each in generators])
    x_BCHW = x_BCHW.to(device)  # every scheduler above starts from unit noise
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generators
    timesteps = scheduler.timesteps.to(device)
    for done, timestep in enumerate(timesteps, start=1):
        prediction = denoise(x_BCHW, timestep.repeat(len(seeds)))
        x_BCHW = scheduler.step(prediction, timestep, x_BCHW, return_dict=False, **options)[0]
        if progress is not None:
            progress(done, len(timesteps))
    return x_BCHW


def _guide(unconditional: Tensor, conditional: Tensor, cfg: float) -> Tensor:
    return unconditional + cfg * (conditional - unconditional)


def _check(seeds: Sequence[int], labels: Tensor, steps: int) -> None:
    if labels.shape != (len(seeds),) or not seeds:
        raise ValueError(f"expected one label per seed, got {len(seeds)} seeds and labels {list(labels.shape)}.")
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps!r}.")
