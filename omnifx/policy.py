"""What a policy is, and the register of those that are there.

A policy turns a profile into a plan. It keeps nothing but its options, so one object may serve many models and
generations.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from omnifx.errors import ConfigError
from omnifx.plan import COMPUTE, PREDICT, REUSE, Plan, Row
from omnifx.prior import PriorSpec
from omnifx.profile import Profile
from omnifx.tokens import Selection


class Policy(ABC):
    """Base of all policies: a frozen, keyword-only dataclass whose fields are its options.

    Subclasses set `name` (what users write in ``options={"policy": ...}``) and implement `plan`.
    """

    name: ClassVar[str]
    uses_noise: ClassVar[bool] = False
    """Whether its plans may correct outputs, so that full steps measure the noise that reuse would cause."""

    measures: ClassVar[str] = ""
    """What a recording is to compare from step to step: "branches", the "stack" of all blocks, or nothing."""
    measured_lags: ClassVar[int] = 1
    """How many steps back it compares; so many older caches are kept meanwhile."""

    most_speedup: ClassVar[float] = math.inf
    """What its rules allow at most, whatever the model and the steps."""
    needs_profile: ClassVar[bool] = True
    """Whether a generation must be measured before its first plan."""

    @property
    def terms(self) -> int:
        """Stored values of a branch that its plans predict from; 0 if they predict nothing. As many sets of cuts are
        kept."""
        return 0

    @property
    def stores(self) -> bool:
        """Whether its plans store predicted values as if they had been computed."""
        return False

    @property
    def trend(self) -> Literal["", "scale", "shift"]:
        """How what its plans predict follows the trends of a prior; empty if it does not."""
        return ""

    @property
    def history(self) -> int:
        """Full steps whose outputs and latents its plans combine (`Plan.history`), so that their variants are compiled
        before the first plan exists; 0 if they combine none."""
        return 0

    @property
    def prior(self) -> PriorSpec | None:
        """The prior that it needs beside a profile, if any."""
        return None

    @property
    def selection(self) -> Selection | None:
        """How its plans choose the tokens of partial branches; None if none of them is partial."""
        return None

    @abstractmethod
    def plan(self, profile: Profile, *, speedup: float | None = None) -> Plan:
        """The plan for `profile` whose FLOPs are at most 1/`speedup` of the uncached ones.

        Raises: ConfigError if `speedup` is beyond what the policy allows, naming the most it allows.
        """

    def variants(self, profile: Profile) -> tuple[Policy, ...]:
        """The same policy with other options, among which a calibration may choose by generations that follow them;
        none where a recording tells enough."""
        return ()

    @property
    def most_variants(self) -> int:
        """How many these may be, whatever the profile."""
        return 0

    def refined(self, profile: Profile, speedup: float) -> Policy:
        """The variant that a calibration found best at the nearest speedup; the policy itself if none was tried."""
        known = [found for found in profile.meta.refined if found.is_of(self.name, self.options)]
        if not known:
            return self
        nearest = min(known, key=lambda found: abs(math.log(found.asked / speedup)))
        return type(self)(**{**self.options, **nearest.better})

    def rows(self, num_branches: int) -> tuple[Row, ...]:
        """Rows that its plans may use, to be compiled before the first plan exists."""
        return ((COMPUTE,) * num_branches, (PREDICT if self.terms else REUSE,) * num_branches)

    @property
    def options(self) -> dict[str, Any]:
        """The options as plain values, as a plan records them."""
        if not dataclasses.is_dataclass(self):
            return {}
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


_POLICIES: dict[str, type[Policy]] = {}


def register(cls: type[Policy]) -> type[Policy]:
    """Class decorator: makes a policy known under its `name`. Raises ConfigError if the name is taken."""
    if _POLICIES.setdefault(cls.name, cls) is not cls:
        raise ConfigError(f"policy {cls.name!r} is already registered by {_POLICIES[cls.name].__module__}.")
    return cls


def policies() -> dict[str, type[Policy]]:
    """All policies by name; the files in `omnifx/policies/` register themselves."""
    package = importlib.import_module("omnifx.policies")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"omnifx.policies.{module.name}")
    return dict(sorted(_POLICIES.items()))


def resolve(policy: str | Policy) -> Policy:
    """The policy that a name or an object stands for. Raises ConfigError that lists the names."""
    if isinstance(policy, Policy):
        return policy
    known = policies()
    if not isinstance(policy, str) or policy not in known:
        raise ConfigError(f"policy: found {policy!r}, expected one of {list(known)} or a Policy object.")
    return known[policy]()


SLACK = 0.05
"""How much of a step a plan may miss the asked speedup by: a reuse step is not quite free, and half of the steps reused
is what a user means by 2x."""


def reuse_steps_needed(profile: Profile, speedup: float) -> int:
    """How many of the profile's steps must reuse everything so that FLOPs fall to 1/`speedup`, up to `SLACK` of a step;
    may exceed what exists."""
    steps, cost = profile.num_steps, profile.meta.cost_of((REUSE,) * len(profile.meta.branches))
    if cost >= 1.0:
        raise ConfigError("the profile's branches save no FLOPs, so no number of reuse steps reaches any speedup.")
    needed = steps * (1.0 - 1.0 / speedup) / (1.0 - cost)
    return max(0, int(-(-(needed - SLACK) // 1)))


def refuse_speedup(policy: str, speedup: float, most: float, why: str) -> ConfigError:
    """The error for a speedup that a policy cannot reach."""
    return ConfigError(f"{policy}: speedup must be in [1, {most:.3f}] here ({why}), got {speedup}. Ask for less.")


def check_speedup(speedup: float | None, *, default: float) -> float:
    """`speedup` or its default, checked to be a number >= 1."""
    value = default if speedup is None else speedup
    if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 1.0:
        raise ConfigError(f"speedup must be a number >= 1 (FLOPs uncached over planned), got {speedup!r}.")
    return float(value)


__all__: Sequence[str] = (
    "SLACK",
    "Policy",
    "check_speedup",
    "policies",
    "refuse_speedup",
    "register",
    "resolve",
    "reuse_steps_needed",
)
