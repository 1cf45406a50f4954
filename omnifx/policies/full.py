"""Compute everything at every step: the uncached model, through the same machinery.

Use: as the baseline of a comparison, and to check that omnifx changes nothing.
Cost: none; the one variant is the captured graph itself.
"""

from dataclasses import dataclass
from typing import ClassVar

from omnifx.plan import COMPUTE, Plan, Row
from omnifx.policy import Policy, check_speedup, refuse_speedup, register
from omnifx.profile import Profile


@register
@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """Every branch computed at every step."""

    name: ClassVar[str] = "full"
    most_speedup: ClassVar[float] = 1.0
    needs_profile: ClassVar[bool] = False

    def plan(self, profile: Profile, *, speedup: float | None = None) -> Plan:
        if (wanted := check_speedup(speedup, default=1.0)) > 1.0:
            raise refuse_speedup(self.name, wanted, 1.0, "it computes everything")
        return Plan.uniform(profile, [COMPUTE] * profile.num_steps, policy=self.name)

    def rows(self, num_branches: int) -> tuple[Row, ...]:
        return ((COMPUTE,) * num_branches,)
