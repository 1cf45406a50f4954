"""Reuse each kind of branch for as long as its outputs were measured to stay the same.

Source: SmoothCache, arXiv:2411.10510, and its release: for each kind of layer, the relative L1 error of outputs that
are 1 to 3 steps old, ``||L_t - L_{t-k}||_1 / ||L_t||_1``, is averaged over its layers in a calibration; from a computed
step on, the longest lag whose error stays below `alpha` is reused. Alpha 0.35 at 50 steps.
Ours: kinds are those of `omnifx.explain`; one recorded generation calibrates, or the mean of as many as were measured.
A speedup takes the smallest alpha that reaches it.
Cost: none at run time; the plan is static. While it is calibrated, the caches of 3 older steps are kept as well.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from omnifx.errors import ConfigError
from omnifx.plan import COMPUTE, REUSE, Action, Plan
from omnifx.policy import Policy, register
from omnifx.profile import Profile
from omnifx.search import mildest

NUM_LAGS = 3


@register
@dataclass(frozen=True, kw_only=True)
class SmoothCache(Policy):
    """The longest lag of each kind whose calibrated error is below `alpha`."""

    name: ClassVar[str] = "smoothcache"
    measures: ClassVar[str] = "branches"
    measured_lags: ClassVar[int] = NUM_LAGS

    alpha: float | None = None  # bound on the relative L1 error; no unit, >= 0; None: from the speedup, or 0.35

    def __post_init__(self) -> None:
        if self.alpha is not None and not self.alpha >= 0.0:
            raise ConfigError(f"alpha must be a number >= 0 or None, got {self.alpha!r}.")

    def plan(self, profile: Profile, *, speedup: float | None = None) -> Plan:
        errors = self.errors(profile)
        if speedup is None or self.alpha is not None:
            return self._plan(profile, errors, 0.35 if self.alpha is None else self.alpha)
        plans = (self._plan(profile, errors, alpha) for alpha in _alphas(errors))
        return mildest(self.name, plans, speedup, f"at most {NUM_LAGS} reuses in a row")

    @staticmethod
    def errors(profile: Profile) -> dict[str, Tensor]:
        """By kind: [S, NUM_LAGS], the error at each step of outputs that are 1, 2, ... steps old.

        Raises: ConfigError if the profile does not hold them.
        """
        table = profile.changes_of([branch.name for branch in profile.meta.branches], lags=NUM_LAGS)
        kinds = [branch.kind for branch in profile.meta.branches]
        return {
            kind: table[..., [i for i, other in enumerate(kinds) if other == kind]].mean(-1)
            for kind in dict.fromkeys(kinds)
        }

    def _plan(self, profile: Profile, errors: Mapping[str, Tensor], alpha: float) -> Plan:
        schedules = {kind: schedule(table, alpha) for kind, table in errors.items()}
        rows = [
            tuple(schedules[branch.kind][step] for branch in profile.meta.branches) for step in range(profile.num_steps)
        ]
        return Plan.from_rows(profile, rows, policy=self.name, policy_options={"alpha": alpha})


def schedule(errors: Tensor, alpha: float) -> list[Action]:
    """The actions of one kind; `errors` [S, lags] as in `SmoothCache.errors`."""
    table = errors.tolist()
    actions: list[Action] = []
    while len(actions) < len(table):
        start = len(actions)
        lags = range(min(len(table[0]), len(table) - 1 - start), 0, -1)
        longest = next((lag for lag in lags if table[start + lag][lag - 1] < alpha), 0)
        actions += [COMPUTE, *[REUSE] * longest]
    return actions


def _alphas(errors: Mapping[str, Tensor]) -> Iterator[float]:
    """From 0 on, the bounds at which a schedule changes."""
    values = sorted({value for table in errors.values() for value in table.flatten().tolist() if value > 0.0})
    last: list[list[Action]] = []
    for alpha in (0.0, *(value * (1.0 + 1e-9) for value in values)):
        found = [schedule(table, alpha) for table in errors.values()]
        if found != last:
            last = found
            yield alpha
