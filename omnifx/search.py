"""Find the mildest setting of a policy that is fast enough."""

from __future__ import annotations

from collections.abc import Iterable

from omnifx.plan import Plan
from omnifx.policy import SLACK, check_speedup, refuse_speedup


def mildest(policy: str, plans: Iterable[Plan], speedup: float, why: str) -> Plan:
    """The first plan whose speedup is `speedup`, up to `SLACK` of a step.

    Args:
        policy: Who asks, for the error.
        plans: From the mildest setting to the strongest; at least one.
        speedup: FLOPs uncached over planned, >= 1.
        why: What bounds the strongest setting, for the error.

    Raises: ConfigError that names the most that any of the plans reaches.
    """
    wanted, most = check_speedup(speedup, default=1.0), 0.0
    for plan in plans:
        most = max(most, plan.speedup)
        if plan.speedup >= wanted / (1.0 + SLACK * wanted / len(plan.steps)) - 1e-9:
            return plan
    raise refuse_speedup(policy, wanted, most, why)


__all__ = ["mildest"]
