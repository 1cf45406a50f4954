"""Move reused branches on by the change between their last two stored values, where that was seen to help.

Source: GOC, arXiv:2503.05156, and its code: ``f_cached + eta (f_cached - f_prev)`` for the outputs of attention and MLP
before their gates, from a queue of the last two outputs, in which cached and corrected ones are stored like computed
ones; eta is 1.2 with FORA and 0.8 with L2C. Only listed steps are corrected: of DDIM-20 with every other step cached
3, 5, 7, 9, 11, 13, 15 and 19; step 1 has no history, and step 17 is an inflection.
Ours: without a list, the steps where the correction would have brought the measured generation's outputs nearer to the
truth (outputs stand for features, of which a profile keeps nothing; they are nearly linear in them). And the smallest
interval that reaches a speedup.
With eta above 1 a corrected value's error comes back larger in the next correction, as f_prev, so that a run of
corrections grows without bound where nothing interrupts it; the judgement does.
Measured on the digits models, 20 steps, every other one full (`python -m benchmarks.predictors --intervals 2`, 50
seeds, PSNR to the uncached run in dB, DiT / flow): reuse 42.4 / 39.9; eta 1.2 45.5 / 44.0, at all cached steps 28.9 /
35.2; eta 0.8 46.9 / 47.8.
Cost: two sets of cuts, and a pass over them in each cached step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from omnifx.errors import ConfigError
from omnifx.plan import COMPUTE, PREDICT, Plan
from omnifx.policies.fora import interval_for
from omnifx.policy import Policy, register
from omnifx.predictors import Difference, Weights
from omnifx.profile import Profile


@register
@dataclass(frozen=True, kw_only=True)
class Goc(Policy):
    """Full step every `interval` steps; in between, reuse plus a multiple of the last difference."""

    name: ClassVar[str] = "goc"

    interval: int | None = None  # steps from one full step to the next; None: the smallest that reaches the speedup
    eta: float = 1.2  # what the last difference is multiplied by, >= 0; the source's value for FORA
    steps: tuple[int, ...] | None = None  # the cached steps to correct; None: judged on the profile

    def __post_init__(self) -> None:
        if self.interval is not None and (not isinstance(self.interval, int) or self.interval < 1):
            raise ConfigError(f"interval must be >= 1 (steps), got {self.interval!r}.")
        if isinstance(self.eta, bool) or not isinstance(self.eta, int | float) or not 0.0 <= self.eta < math.inf:
            raise ConfigError(f"eta must be a number >= 0, got {self.eta!r}.")
        if self.steps is not None and not all(isinstance(step, int) and step >= 0 for step in self.steps):
            raise ConfigError(f"steps must be numbers of steps, from 0 on, got {self.steps!r}.")

    @property
    def terms(self) -> int:
        """Two: the queue."""
        return 2

    @property
    def stores(self) -> bool:
        """The queue holds corrected values too."""
        return True

    def plan(self, profile: Profile, *, speedup: float | None = None) -> Plan:
        interval = interval_for(self.name, profile, speedup) if self.interval is None else self.interval
        cached = [step % interval != 0 for step in range(profile.num_steps)]
        weights = self._weights(profile, cached)
        corrected = [step for step, values in enumerate(weights) if len(values) > 1]
        num_cached = sum(cached)
        return Plan.uniform(
            profile,
            [PREDICT if reused else COMPUTE for reused in cached],
            policy=self.name,
            policy_options={**self.options, "interval": interval},
            weights=weights,
            stores=cached,
            terms=self.terms if num_cached else 0,
            notes=[f"Corrected at {len(corrected)} of {num_cached} cached steps: {corrected}."],
        )

    def _weights(self, profile: Profile, cached: Sequence[bool]) -> list[Weights]:
        """The weights of each step: those of the correction, or those that repeat the newest value."""
        can = [step for step in range(2, len(cached)) if cached[step]]  # two values are stored by then
        if self.steps is not None and (wrong := sorted(set(self.steps) - set(can))):
            raise ConfigError(f"goc: steps {wrong} are not cached with two values stored before them; {can} are.")
        gram = profile.gram("o", "o").sum((0, 1, 2))
        outputs = torch.eye(len(cached), dtype=torch.float64)  # each as a combination of the measured ones
        queue: list[Tensor] = []
        found: list[Weights] = []
        for step, reused in enumerate(cached):
            value = outputs[step]
            weights: Weights = ()
            if reused:
                repeated, weights = queue[0], (1.0,)
                moved = repeated + self.eta * (repeated - queue[-1])
                left, right = (float((v - value) @ gram @ (v - value)) for v in (moved, repeated))
                if step in can and (left < right if self.steps is None else step in self.steps):
                    weights = Difference(eta=self.eta).weights(range(2), step, profile)
                value = moved if len(weights) > 1 else repeated
            queue = [value, *queue[:1]]
            found.append(weights)
        return found
