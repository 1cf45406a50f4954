"""Measure what plans are worth: generations that follow them, against uncached ones of the same seeds.

The forecast of a plan's drift is no promise (within a factor of five on the digits models), and a recording does not
show the final samples; so the samples of a few held-back seeds are generated in full and by several plans. All of it
runs through one compiled model, whose plan is exchanged from generation to generation, so that each variant is
compiled once.

Cost: for each held-back seed one uncached generation and one for each speedup s, of 1/s of its FLOPs; with `SPEEDUPS`
3.0 uncached generations in all, and a few of 1/s for each PSNR that is refined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from omnifx.asking import least_enough
from omnifx.errors import ConfigError, ProfileError
from omnifx.metrics import psnr
from omnifx.plan import COMPUTE, Plan, PlanStep
from omnifx.policy import Policy
from omnifx.profile import Profile
from omnifx.quality import MOST_PSNR, Quality, QualityPoint, Refinement, plain_options
from omnifx.session import find_session, generation

SPEEDUPS = (1.5, 2.0, 3.0, 4.0, 6.0, 10.0)
"""What is tried: about even in the logarithm; milder ones cost most."""


@dataclass
class Rollouts:
    """Generations that follow plans, compared with uncached ones.

    Args:
        model: The denoiser, not compiled.
        generate: `generate(model, seed)` returns the samples, the same ones for the same seed.
        policy: Makes the plans.
        profile: What they are made from.
        seeds: Held back from the profile.
        options: Of the backend.
        data_range: Largest possible value of a sample minus the smallest; None: `range_of` the uncached samples.
        tick: Called after each generation.
        grow: Called with a number of generations that were not planned for.

    Memory: the uncached samples of all seeds, on the host.
    """

    model: nn.Module
    generate: Callable[[Any, int], object]
    policy: Policy
    profile: Profile
    seeds: Sequence[int]
    options: Mapping[str, Any]
    data_range: float | None = None
    tick: Callable[[], None] = lambda: None
    grow: Callable[[int], None] = lambda number: None
    _uncached: list[Tensor] = field(default_factory=list, init=False)
    _compiled: Any = field(default=None, init=False)

    def measure(self, speedups: Sequence[float] = SPEEDUPS, *, min_psnr: Sequence[float] = ()) -> Quality:
        """What the plans for these speedups are worth, and the plans that `min_psnr` would choose.

        Speedups that the policy cannot reach, or that give a plan already measured, are left out.

        Raises: ConfigError if the policy reaches none, or `generate` returns no samples; ProfileError if a generation
            ran otherwise than planned.
        """
        self._prepare()
        points: dict[float, QualityPoint] = {}
        for asked in sorted(speedups):
            plan = self._plan(asked)
            if plan is not None and round(plan.speedup, 6) not in points:
                points[round(plan.speedup, 6)] = self._point(plan, asked)
        if not points:
            raise ConfigError(f"calibrate: {self.policy.name} reaches none of the speedups {list(speedups)} here.")
        quality = Quality(
            policy=self.policy.name,
            options=plain_options(self.policy.options),
            data_range=self.data_range or 1.0,
            num_samples=sum(map(len, self._uncached)),
            points=tuple(points[key] for key in sorted(points)),
        )
        for wanted in min_psnr:
            quality = self._refined(quality, wanted)
        return quality

    def refine(self, speedups: Sequence[float] = SPEEDUPS) -> tuple[Refinement, ...]:
        """Which of the policy's variants is best at each speedup that it reaches: the highest mean PSNR.

        Raises: as `measure`.
        """
        self._prepare()
        return tuple(found for asked in sorted(speedups) if (found := self._best_at(asked)) is not None)

    def _best_at(self, asked: float) -> Refinement | None:
        """The best variant at a speedup; None if the policy as it is does not reach it. Equal plans run once."""
        reached: dict[tuple[PlanStep, ...], float] = {}
        tried: list[tuple[float, Policy]] = []
        for policy in (self.policy, *self.policy.variants(self.profile)):
            if (plan := self._plan(asked, policy)) is not None:
                if plan.steps not in reached:
                    reached[plan.steps] = self._point(plan, asked).psnr
                tried.append((reached[plan.steps], policy))
            elif not tried:
                return None
        psnr, best = max(tried, key=lambda pair: pair[0])  # of equal ones the first
        before, after = plain_options(self.policy.options), plain_options(best.options)
        return Refinement(
            policy=self.policy.name,
            options=before,
            asked=asked,
            better={key: value for key, value in after.items() if before[key] != value},
            psnr=psnr,
            plain_psnr=tried[0][0],
        )

    def _prepare(self) -> None:
        """Compile the model, and generate the uncached samples."""
        full = Plan.uniform(self.profile, [COMPUTE] * self.profile.num_steps, policy="uncached")
        taken = {**self.options, "policy": self.policy, "profile": self.profile, "plan": full, "profile_cache": False}
        self._compiled = torch.compile(self.model, backend="omnicache", options=taken)
        self._uncached = [self._run(full, seed).cpu() for seed in self.seeds]
        self.data_range = self.data_range or range_of(torch.cat(self._uncached))

    def _plan(self, asked: float, policy: Policy | None = None) -> Plan | None:
        try:
            return (policy or self.policy).plan(self.profile, speedup=asked)
        except ConfigError:
            return None

    def _refined(self, quality: Quality, wanted: float) -> Quality:
        """With the plan measured that is chosen for this PSNR, until one is chosen that was."""
        while True:
            if all(point.psnr < wanted for point in quality.points):  # milder ones, half as far from no speedup
                asked = math.sqrt(quality.points[0].asked)
                plan = self._plan(asked) if asked > 1.0 + 1.0 / self.profile.num_steps else None
                if plan is None:
                    return quality  # out of reach: the one who asks for it is told
            else:
                plan, asked = least_enough(self.policy, self.profile, quality, wanted)
            if quality.measured(plan.speedup):
                return quality
            self.grow(len(self.seeds))
            quality = quality.with_points(self._point(plan, asked))

    def _point(self, plan: Plan, asked: float) -> QualityPoint:
        found = []
        for seed, uncached in zip(self.seeds, self._uncached, strict=True):
            samples = self._run(plan, seed)
            if samples.shape != uncached.shape:
                raise ConfigError(
                    f"calibrate: generate() gave samples {list(uncached.shape)} for seed {seed}, and then "
                    f"{list(samples.shape)}. It must give the same samples for the same seed."
                )
            found.append(psnr(samples.cpu(), uncached, data_range=self.data_range or 1.0).clamp(max=MOST_PSNR))
        values = torch.cat(found)
        spread = float(values.std()) if len(values) > 1 else 0.0
        return QualityPoint(
            asked=asked,
            speedup=plan.speedup,
            psnr=float(values.mean()),
            psnr_p10=float(torch.quantile(values, 0.1)),
            error=spread / math.sqrt(len(values)),
        )

    def _run(self, plan: Plan, seed: int) -> Tensor:
        """The samples of one generation that follows a plan."""
        with torch.no_grad(), generation(self._compiled):
            session = find_session(self._compiled)
            before = max((log.number for log in session.log.generations), default=0)
            for conductor in session.conductors:
                if conductor.entries:
                    conductor.add_profile(self.profile, plan)
            result = self.generate(self._compiled, seed)
            logs = [log for log in session.log.generations if log.number > before and log.steps]
        if not logs:
            raise ConfigError("calibrate: generate() never called the model it was given.")
        if reasons := [reason for log in logs for reason in log.reasons]:
            raise ProfileError(
                f"calibrate: a generation that was to follow a plan of {plan.speedup:.2f}x ran steps in full: "
                f"{'; '.join(dict.fromkeys(reasons))}."
            )
        self.tick()
        return samples_of(result)


def samples_of(result: object) -> Tensor:
    """The samples that a generation returned: a tensor or an array [B, ...], a list of images, or what diffusers'
    pipelines return.

    Returns: [B, ...]; whole numbers stay such.
    Raises: ConfigError if it is none of these.
    """
    for name in ("images", "frames", "audios", "sample"):
        result = getattr(result, name, result)
    if isinstance(result, list | tuple) and result:
        if len(result) == 1 and isinstance(result[0], Tensor | np.ndarray):
            return samples_of(result[0])
        return torch.stack([_tensor(item) for item in result])
    found = _tensor(result)
    if found.dim() < 2:
        raise ConfigError(
            f"calibrate: generate() returned samples of shape {list(found.shape)}, expected a batch [B, ...]."
        )
    return found


def _tensor(value: object) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, list | tuple) and value:  # the frames of a video
        return torch.stack([_tensor(item) for item in value])
    if isinstance(value, np.ndarray) or hasattr(value, "__array_interface__"):
        return torch.from_numpy(np.array(value))
    raise ConfigError(
        f"calibrate: rollouts compare samples, but generate() returned {type(value).__name__}. Return the samples: a "
        "tensor [B, ...], an array, a list of images, or what the pipeline returned."
    )


def range_of(samples: Tensor) -> float:
    """Largest possible value minus the smallest, as the samples suggest: 255 for bytes, 1 for values in [0, 1], 2 for
    values in [-1, 1], else the range that they take."""
    if samples.dtype == torch.uint8:
        return 255.0
    least, most = float(samples.min()), float(samples.max())
    if not (math.isfinite(least) and math.isfinite(most) and most > least):
        raise ConfigError(f"calibrate: the samples range from {least} to {most}; there is nothing to compare.")
    for low, high in ((0.0, 1.0), (-1.0, 1.0)):
        if low <= least and most <= high:
            return high - low
    return most - least


__all__ = ["SPEEDUPS", "Rollouts", "range_of", "samples_of"]
