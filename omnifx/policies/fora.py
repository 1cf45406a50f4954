"""Compute every branch each `interval` steps, and reuse all of them in between.

Source: FORA, arXiv:2407.01425: pre-gate attention and MLP outputs, gates recomputed. Predicting instead of reusing is
an option of ours.
Cost: none at run time; the plan is static. A predictor keeps as many sets of cuts as it has terms.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from omnifx.errors import ConfigError
from omnifx.plan import COMPUTE, REUSE, Plan
from omnifx.policy import Policy, check_speedup, refuse_speedup, register, reuse_steps_needed
from omnifx.predictors import resolve_predictor, with_predictor
from omnifx.profile import Profile


@register
@dataclass(frozen=True, kw_only=True)
class Fora(Policy):
    """Full step every `interval` steps; without an interval, the smallest one that reaches the speedup."""

    name: ClassVar[str] = "fora"

    interval: int | None = None  # steps from one full step to the next; 1 reuses nothing; None: from the speedup
    predictor: str | None = None  # what to predict with, as in omnifx.predictors; None: reuse

    def __post_init__(self) -> None:
        if self.interval is not None and (not isinstance(self.interval, int) or self.interval < 1):
            raise ConfigError(f"interval must be >= 1 (steps), got {self.interval!r}.")
        if self.predictor is not None:
            resolve_predictor(self.predictor)

    @property
    def terms(self) -> int:
        """Stored values that the predictor reads."""
        return resolve_predictor(self.predictor).terms if self.predictor is not None else 0

    def plan(self, profile: Profile, *, speedup: float | None = None) -> Plan:
        interval = interval_for(self.name, profile, speedup) if self.interval is None else self.interval
        actions = [COMPUTE if step % interval == 0 else REUSE for step in range(profile.num_steps)]
        options: dict[str, Any] = {"interval": interval}
        if self.predictor is None:
            return Plan.uniform(profile, actions, policy=self.name, policy_options=options)
        options["predictor"] = self.predictor
        plan = Plan.uniform(profile, actions, policy=self.name, policy_options=options)
        return with_predictor(plan, profile, self.predictor)


def interval_for(policy: str, profile: Profile, speedup: float | None) -> int:
    """The smallest interval between full steps that reaches a speedup, 2 by default.

    Raises: ConfigError in the name of `policy` if none does.
    """
    steps, wanted = profile.num_steps, check_speedup(speedup, default=2.0)
    needed = reuse_steps_needed(profile, wanted)
    if needed > steps - 1:
        most = Plan.uniform(profile, [COMPUTE] + [REUSE] * (steps - 1), policy=policy).speedup
        raise refuse_speedup(policy, wanted, most, f"one full step in {steps}")
    return next(n for n in range(1, steps + 1) if steps - -(-steps // n) >= needed)
