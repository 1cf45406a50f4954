"""Write down how a scheduler of diffusers was set up, and set one up in the same way again.

A class and a configuration do not say which timesteps `set_timesteps` was asked for: some take sigmas of the caller's,
or a shift that depends on the size. So what it left is written down too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from omnifx.bundle import SamplerState, SchedulerInfo
from omnifx.clock import close, shown
from omnifx.errors import BundleError

_WORDS = {"Infinity": "inf", "-Infinity": "-inf", "NaN": "nan"}


def scheduler_info(scheduler: Any, timesteps: Sequence[float]) -> SchedulerInfo:
    """What a manifest says of a scheduler, or of none.

    Args:
        scheduler: A scheduler of diffusers; where `set_timesteps` was called, what that left is written down.
        timesteps: Of the plan, as the model sees them.
    """
    return SchedulerInfo(
        name=type(scheduler).__name__ if scheduler is not None else "",
        config=plain_config(getattr(scheduler, "config", None)),
        timesteps=tuple(timesteps),
        state=_state_of(scheduler),
    )


def plain_config(config: Any) -> dict[str, Any]:
    """A configuration of diffusers as JSON can hold it; infinities, which JSON lacks, are words."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(config or {}), default=str), parse_constant=_WORDS.__getitem__)
    return {key: value for key, value in plain.items() if not key.startswith("_")}


def make_scheduler(info: SchedulerInfo) -> Any:
    """A scheduler that is set up as the one that was written down.

    Raises: BundleError if none was, diffusers has no such class, or its timesteps are not those of the steps.
    """
    import diffusers
    from diffusers import SchedulerMixin

    if not info.name:
        raise BundleError(
            "the bundle does not say what scheduler its steps belong to. Export it with scheduler=, or give one here."
        )
    found = getattr(diffusers, info.name, None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise BundleError(f"diffusers {diffusers.__version__} has no scheduler {info.name!r}. Install one that has it.")
    words = _WORDS.values()
    config = {key: float(value) if value in words else value for key, value in info.config.items()}
    scheduler: Any = found.from_config(config)
    state = info.state
    # Any shift will do where sigmas were written down: they replace those that it gives.
    more = {"mu": 0.0} if info.config.get("use_dynamic_shifting") and state is not None and state.sigmas else {}
    try:
        scheduler.set_timesteps(state.num_steps if state is not None else len(info.timesteps), **more)
    except (TypeError, ValueError) as error:
        raise BundleError(
            f"{info.name} cannot be set up from what the bundle says: {error}. Export it with a scheduler on which "
            "set_timesteps was called, or give that one here."
        ) from error
    if state is not None:
        scheduler.timesteps = torch.tensor(state.timesteps, dtype=scheduler.timesteps.dtype)
        if state.sigmas:
            scheduler.sigmas = torch.tensor(state.sigmas, dtype=scheduler.sigmas.dtype)
    _check_timesteps(info, [float(t) for t in scheduler.timesteps])
    return scheduler


def _state_of(scheduler: Any) -> SamplerState | None:
    num_steps = getattr(scheduler, "num_inference_steps", None)
    if num_steps is None:
        return None
    sigmas = getattr(scheduler, "sigmas", None)
    return SamplerState(
        num_steps=int(num_steps),
        timesteps=tuple(float(t) for t in scheduler.timesteps),
        sigmas=tuple(float(s) for s in sigmas) if sigmas is not None else (),
    )


def _check_timesteps(info: SchedulerInfo, own: Sequence[float]) -> None:
    """The scheduler's timesteps must be those that the model sees, up to one factor: pipelines divide by 1000."""
    seen = info.timesteps
    largest = max(range(len(own)), key=lambda k: abs(own[k])) if own else 0
    fits = len(own) == len(seen)
    if fits and own[largest] and seen[largest] / own[largest] > 0:
        factor = seen[largest] / own[largest]
        fits = all(close(a * factor, b) for a, b in zip(own, seen, strict=True))
    if not fits:
        raise BundleError(
            f"{info.name} has {len(own)} timesteps {shown(own)}, but the bundle's steps are at {len(seen)}: "
            f"{shown(seen)}. Give the scheduler as it samples: made with its configuration, set_timesteps called."
        )


__all__ = ["make_scheduler", "plain_config", "scheduler_info"]
