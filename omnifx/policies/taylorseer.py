"""Predict branches between full steps by a Taylor series of their last computed values.

Source: TaylorSeer, arXiv:2503.06923, and its code: the first `num_warmup_steps` steps are full, then one in each
`interval`; differences are taken over the steps between the last full ones, and begin with the last but one warm-up
step. Cached are the outputs of attention and MLP before their gates.
Ours: the smallest interval that reaches a speedup, and the other predictors.
Measured on the digits models, 20 steps, every other one full (`python -m benchmarks.predictors --intervals 2`, 50
seeds, PSNR to the uncached run in dB, DiT / flow): reuse 42.4 / 39.9; taylor:1 46.7 / 46.8; taylor:2 47.0 / 47.6;
taylor:3 47.0 / 47.7; newton:2 46.7 / 48.5; average 45.0 / 43.5; chebyshev:2 46.1 / 45.3; fitted:3 46.6 / 48.2.
Cost: ``order + 1`` sets of cuts, and a pass over them in each predicted step.
"""

from dataclasses import dataclass
from typing import ClassVar

from omnifx.errors import ConfigError
from omnifx.plan import COMPUTE, REUSE, Action, Plan
from omnifx.policy import Policy, check_speedup, refuse_speedup, register, reuse_steps_needed
from omnifx.predictors import resolve_predictor, with_predictor
from omnifx.profile import Profile


@register
@dataclass(frozen=True, kw_only=True)
class TaylorSeer(Policy):
    """Full step every `interval` steps after a warm-up, Taylor series in between."""

    name: ClassVar[str] = "taylorseer"

    interval: int | None = None  # steps from one full step to the next, >= 1; None: from the speedup
    num_warmup_steps: int = 3  # full steps at the start, >= 1; the source's "first enhance" for FLUX
    predictor: str = "taylor:1"  # as in omnifx.predictors; order 1 is the default of the source's code for FLUX

    def __post_init__(self) -> None:
        for option, value in (("interval", self.interval), ("num_warmup_steps", self.num_warmup_steps)):
            if option == "interval" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{option} must be >= 1 (steps), got {value!r}.")
        resolve_predictor(self.predictor)

    @property
    def terms(self) -> int:
        """Stored values that the predictor reads."""
        return resolve_predictor(self.predictor).terms

    def plan(self, profile: Profile, *, speedup: float | None = None) -> Plan:
        interval = self.interval
        if interval is None:
            wanted = check_speedup(speedup, default=2.0)
            interval = self._interval_for(profile, wanted)
        options = {**self.options, "interval": interval}
        plan = Plan.uniform(
            profile, self._actions(profile.num_steps, interval), policy=self.name, policy_options=options
        )
        return with_predictor(plan, profile, self.predictor, oldest=max(0, self.num_warmup_steps - 2))

    def _actions(self, num_steps: int, interval: int) -> list[Action]:
        last = self.num_warmup_steps - 1  # the last warm-up step begins the first interval
        return [COMPUTE if k <= last or (k - last) % interval == 0 else REUSE for k in range(num_steps)]

    def _interval_for(self, profile: Profile, speedup: float) -> int:
        """The smallest interval that reaches a speedup. Raises ConfigError if none does."""
        steps, needed = profile.num_steps, reuse_steps_needed(profile, speedup)
        for interval in range(1, steps + 1):
            if self._actions(steps, interval).count(REUSE) >= needed:
                return interval
        most = Plan.uniform(profile, self._actions(steps, steps), policy=self.name).speedup
        raise refuse_speedup(self.name, speedup, most, f"the first {min(steps, self.num_warmup_steps)} steps full")
