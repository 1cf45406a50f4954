"""Sample the moving digits model, plain or compiled, with the schedulers of diffusers.

The noise of a sample depends on its seed alone, so a set of samples is the same however it is split into batches (up to
the rounding of matrix products). The model is called with keywords and a timestep tensor [B], always the same way, so
that a compiled model is captured once.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Generator, Tensor

from examples.moving_digits.data import FRAME_SIZE, NUM_FRAMES
from examples.moving_digits.models import NULL_CLASS, TIME_SHIFT, load_class_tokens

NUM_TRAIN_TIMESTEPS = 1000

Model = Callable[..., Any]  # the calling convention of a diffusers transformer
Progress = Callable[[int, int], None]  # called with (steps done, steps in all)
MakeScheduler = Callable[[int], Any]  # a number of steps -> a scheduler of diffusers, its timesteps set
FLOW_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": TIME_SHIFT,
}  # what any multi-step scheduler is made with


@torch.no_grad()
def sample_latte(
    model: Model,
    *,
    seeds: Sequence[int],
    labels: Tensor,
    steps: int = 50,
    cfg: float = 2.0,
    solver: Literal["euler", "dpmsolver++"] | MakeScheduler = "euler",
    progress: Progress | None = None,
) -> Tensor:
    """Sample videos.

    Args:
        model: What `load_latte` gives, or that compiled.
        seeds: B seeds, one per sample.
        labels: [B] int64 in 0..9.
        steps: Steps from t = 1 (noise) to 0, one call of the model each; shifted towards noise as video models do.
        cfg: Scale of classifier-free guidance; 1 is no guidance and batch B, else a batch is 2B, [uncond; cond].
        solver: "euler" (first order), "dpmsolver++" (second order, for a base line with fewer steps), or what makes a
            scheduler for `FLOW_SCHEDULE`.
        progress: Called after every step.

    Returns: Videos [B, 1, 8, 16, 16] float32 in about [-1, 1].
    Source: rectified flow, arXiv:2209.03003; DPM-Solver++, arXiv:2211.01095; guidance, arXiv:2207.12598; shifted
        times, arXiv:2403.03206.
    """
    if labels.shape != (len(seeds),) or not seeds:
        raise ValueError(f"expected one label per seed, got {len(seeds)} seeds and labels {list(labels.shape)}.")
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps!r}.")
    scheduler = solver(steps) if callable(solver) else make_scheduler(solver, steps)
    tokens = load_class_tokens().to(labels.device)
    class_states, null_states = tokens[labels], tokens[torch.full_like(labels, NULL_CLASS)]

    def denoise(x_BCFHW: Tensor, timestep: Tensor) -> Tensor:
        if cfg == 1:
            return call(x_BCFHW, timestep, class_states)
        states = torch.cat([null_states, class_states])
        unconditional, conditional = call(torch.cat([x_BCFHW] * 2), torch.cat([timestep] * 2), states).chunk(2)
        return unconditional + cfg * (conditional - unconditional)

    def call(x_BCFHW: Tensor, timestep: Tensor, states: Tensor) -> Tensor:
        velocity: Tensor = model(
            hidden_states=x_BCFHW, encoder_hidden_states=states, timestep=timestep, return_dict=False
        )[0]
        return velocity.contiguous()  # Latte returns a permuted view, and the next input must not change its strides

    shape = (1, 1, NUM_FRAMES, FRAME_SIZE, FRAME_SIZE)
    noise = [torch.randn(shape, generator=Generator().manual_seed(seed)) for seed in seeds]
    x_BCFHW = torch.cat(noise).to(labels.device)  # both schedulers start from unit noise
    timesteps = scheduler.timesteps.to(labels.device)
    for done, timestep in enumerate(timesteps, start=1):
        velocity = denoise(x_BCFHW, timestep.float().repeat(len(seeds)))
        x_BCFHW = scheduler.step(velocity, timestep, x_BCFHW, return_dict=False)[0]
        if progress is not None:
            progress(done, len(timesteps))
    return x_BCFHW


def make_scheduler(solver: str, steps: int) -> Any:  # Any: the schedulers are untyped
    """A scheduler of diffusers with its `steps` timesteps set; t goes from 1 to 0, shifted by `TIME_SHIFT`."""
    make: Any
    if solver == "euler":
        make = FlowMatchEulerDiscreteScheduler
        scheduler = make(num_train_timesteps=NUM_TRAIN_TIMESTEPS, shift=TIME_SHIFT)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))  # before the shift
    elif solver == "dpmsolver++":
        make = DPMSolverMultistepScheduler
        scheduler = make(**FLOW_SCHEDULE, solver_order=2)
        scheduler.set_timesteps(steps)
    else:
        raise ValueError(f"sample_latte: solver must be 'euler' or 'dpmsolver++', got {solver!r}.")
    return scheduler
