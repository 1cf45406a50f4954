"""Skip the whole stack of blocks while its residual is predicted to keep its magnitude.

Source: MagCache, arXiv:2506.09045, and its release: with the calibrated ratio gamma_t, the mean over tokens of
``||r_t|| / ||r_{t-1}||`` of the residual r = output - input of all blocks, a step multiplies rho by gamma_t and adds
``|1 - rho|`` to an error; it is skipped, reusing the last residual unchanged, while the error is at most `threshold`
and at most `max_skips` steps were skipped in a row. A computed step resets both. The first `retention` of the steps are
computed. The release: FLUX in 28 steps 0.24, 5, 0.1; HunyuanVideo 6 skips, 0.2.
Ours: the curve is measured on the recorded generation, the mean over its streams and runs; the release's further full
step at index 11 of FLUX is not taken over. A speedup takes the smallest threshold that reaches it.
Cost: none at run time; the plan is static, and the cache is one tensor for each trunk.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from omnifx.errors import ConfigError
from omnifx.plan import COMPUTE, REUSE, Action, Plan
from omnifx.policy import Policy, register
from omnifx.profile import Profile
from omnifx.search import mildest


@register
@dataclass(frozen=True, kw_only=True)
class MagCache(Policy):
    """Reuse of the whole stack's residual under a bound on the predicted change of its magnitude."""

    name: ClassVar[str] = "magcache"
    measures: ClassVar[str] = "stack"

    threshold: float | None = None  # bound on the summed error; no unit, >= 0; None: from the speedup, or 0.24
    max_skips: int = 5  # reuses in a row
    retention: float = 0.1  # share of the steps, from the first on, that are computed

    def __post_init__(self) -> None:
        if self.threshold is not None and not self.threshold >= 0.0:
            raise ConfigError(f"threshold must be a number >= 0 or None, got {self.threshold!r}.")
        if not isinstance(self.max_skips, int) or isinstance(self.max_skips, bool) or self.max_skips < 1:
            raise ConfigError(f"max_skips must be a whole number >= 1 (steps), got {self.max_skips!r}.")
        if not 0.0 <= self.retention <= 1.0:
            raise ConfigError(f"retention must be a number in [0, 1], got {self.retention!r}.")

    def plan(self, profile: Profile, *, speedup: float | None = None) -> Plan:
        stack = profile.meta.span(profile.meta.stack).name  # or says why all blocks cannot be reused as one
        curve = profile.growth_of(stack).tolist()
        if speedup is None or self.threshold is not None:
            return self._plan(profile, stack, curve, 0.24 if self.threshold is None else self.threshold)
        plans = (self._plan(profile, stack, curve, threshold) for threshold in self._thresholds(curve))
        why = f"the first {self._first(len(curve))} steps computed, at most {self.max_skips} skipped in a row"
        return mildest(self.name, plans, speedup, why)

    def _first(self, num_steps: int) -> int:
        return max(1, int(self.retention * num_steps))

    def _thresholds(self, curve: Sequence[float]) -> Iterator[float]:
        """From 0 on, the thresholds at which the schedule changes."""
        errors = {0.0}
        for start in range(self._first(len(curve)), len(curve)):
            rho, error = 1.0, 0.0
            for ratio in curve[start : start + self.max_skips]:
                rho *= ratio
                error += abs(1.0 - rho)
                errors.add(error)
        last: list[Action] | None = None
        for threshold in sorted(errors):
            if (actions := self.schedule(curve, threshold)) != last:
                last = actions
                yield threshold

    def schedule(self, curve: Sequence[float], threshold: float) -> list[Action]:
        """The actions of each step.

        Args:
            curve: The magnitude ratio of each step's residual to that of the step before; the first is not read.
            threshold: Most summed error of a run of reuses.
        """
        actions: list[Action] = []
        rho, error, skips = 1.0, 0.0, 0
        for step, ratio in enumerate(curve):
            if step >= self._first(len(curve)):
                rho, skips = rho * ratio, skips + 1
                error += abs(1.0 - rho)
                if error <= threshold and skips <= self.max_skips:
                    actions.append(REUSE)
                    continue
            actions.append(COMPUTE)
            rho, error, skips = 1.0, 0.0, 0
        return actions

    def _plan(self, profile: Profile, stack: str, curve: Sequence[float], threshold: float) -> Plan:
        branches = (COMPUTE,) * len(profile.meta.branches)
        rows = [(*branches, action) for action in self.schedule(curve, threshold)]
        options = replace(self, threshold=threshold).options
        return Plan.from_rows(profile, rows, policy=self.name, policy_options=options, spans=(stack,))
