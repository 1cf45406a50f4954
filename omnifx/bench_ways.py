"""What `omnifx bench` compares, policies at the asked speedups and fewer steps, and how much is measured."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from omnifx.errors import ConfigError
from omnifx.policy import Policy, resolve
from omnifx.results import Family
from omnifx.runtime import is_runtime

CALIBRATION_SEED = 1_000_000
"""First seed of the generations that are measured; the reported ones count up from 0, so the two never meet."""
FEWER = "fewer steps"
DECIDING = frozenset({"alpha", "budget", "gate_step", "interval", "threshold"})
"""Options of policies that decide their speedup: with one of them given, none can be asked for."""
DEFAULT_POLICIES = ("auto", "omnicache")
DEFAULT_SPEEDUPS = (1.5, 2.0, 2.5, 3.0)


@dataclass(frozen=True, kw_only=True)
class Way:
    """One row to be measured."""

    method: str
    family: Family
    setting: str
    policy: Policy | None = None
    """None: the model as it is."""
    speedup: float | None = None
    """What is asked of a policy that plans, or what fewer steps are to save; None: nothing can be asked."""

    @property
    def label(self) -> str:
        """Method and setting."""
        return f"{self.method}, {self.setting}"

    def fewer(self, steps: int) -> int:
        """How many of `steps` are left at its speedup."""
        return max(1, round(steps / (self.speedup or 1.0)))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is measured."""

    samples: int = 16
    """Samples that are reported, at least; whole generations are made."""
    sets: int = 1
    """Sets of seeds that they are split into; more than one give a spread."""
    runs: int = 3
    """Generations that a plan is calibrated on."""
    repeats: int = 3
    """Uncached generations that are timed beside each way's own."""
    keep: int = 8
    """Samples that are kept to look at, of each way."""
    lowering: Literal["inductor", "eager"] = "inductor"
    """"eager" runs everything without Inductor: quick to start, and no times worth reading."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of the backend, such as ``{"cache_budget": "2GiB"}``."""

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("sets", 1), ("runs", 1), ("repeats", 1), ("keep", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"bench: {name} must be a number >= {least}, got {value!r}.")
        if self.sets > self.samples:
            raise ConfigError(f"bench: {self.samples} samples cannot be split into {self.sets} sets; ask for more.")

    def seeds(self, batch: int) -> tuple[range, tuple[range, ...]]:
        """Seeds of the calibration, and those of each reported set, for generations of `batch` samples.

        Raises: ConfigError if one would be both calibrated on and reported.
        """
        each = -(-self.samples // (self.sets * batch))
        report = tuple(range(first * each, (first + 1) * each) for first in range(self.sets))
        calibration = range(CALIBRATION_SEED, CALIBRATION_SEED + self.runs)
        if report[-1].stop > calibration.start:
            raise ConfigError(
                f"bench: {self.samples} samples need {report[-1].stop} generations, whose seeds would reach those of "
                f"the calibration, from {calibration.start} on. Ask for fewer."
            )
        return calibration, report


def ways_of(policies: Sequence[str | Policy], speedups: Sequence[float]) -> list[Way]:
    """All rows: each policy at each speedup (or once, where its options or its run decide), then fewer steps.

    Args:
        policies: Objects, names, or names with options such as "fora(interval=3)".
        speedups: FLOPs uncached over planned.

    Raises: ConfigError for policies or options that are not known, and speedups under 1.
    """
    if bad := [speedup for speedup in speedups if not speedup >= 1.0]:
        raise ConfigError(f"bench: speedups must be >= 1 (FLOPs uncached over planned), got {bad}.")
    found: list[Way] = []
    for given in policies:
        policy = given if isinstance(given, Policy) else parse_policy(given)
        usual = type(policy)().options
        own = {key: value for key, value in policy.options.items() if value != usual[key]}
        said = ", ".join(f"{key}={value}" for key, value in own.items())
        family: Family = "ours" if policy.name == "auto" else "policy"
        if is_runtime(policy) or DECIDING & set(own):
            found.append(Way(method=policy.name, family=family, setting=said or "its defaults", policy=policy))
            continue
        method = f"{policy.name} ({said})" if said else policy.name
        found += [
            Way(method=method, family=family, setting=f"speedup={speedup:g}", policy=policy, speedup=speedup)
            for speedup in dict.fromkeys(speedups)
        ]
    fewer = [
        Way(method=FEWER, family="solver", setting=f"for speedup={speedup:g}", speedup=speedup)
        for speedup in dict.fromkeys(speedups)
        if speedup > 1.0
    ]
    return list({way.label: way for way in (*found, *fewer)}.values())


def with_steps(ways: Sequence[Way], steps: int) -> list[Way]:
    """The ways, with fewer steps called by their number, where an uncached generation has `steps`; each once."""
    found = [
        way if way.policy is not None else replace(way, setting=f"{way.fewer(steps)} of {steps} steps") for way in ways
    ]
    return list({way.label: way for way in found}.values())


def parse_policy(text: str) -> Policy:
    """A policy from its name, or from its name and options: ``fora(interval=3)``; values are JSON, or else text."""
    match = re.fullmatch(r"\s*([\w-]+)\s*(?:\((.*)\))?\s*", text)
    if match is None:
        raise ConfigError(f"bench: expected a policy such as auto or fora(interval=3), got {text!r}.")
    options: dict[str, Any] = {}
    for part in filter(None, (match[2] or "").split(",")):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ConfigError(f"bench: an option of {match[1]} must be such as interval=3, got {part.strip()!r}.")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    plain = resolve(match[1])
    if unknown := sorted(set(options) - set(plain.options)):
        raise ConfigError(f"bench: policy {match[1]} has no options {unknown}; it has {sorted(plain.options)}.")
    return replace(plain, **options) if options else plain  # type: ignore[type-var]  # a dataclass, as all policies


__all__ = [
    "CALIBRATION_SEED",
    "DEFAULT_POLICIES",
    "DEFAULT_SPEEDUPS",
    "FEWER",
    "Settings",
    "Way",
    "parse_policy",
    "ways_of",
    "with_steps",
]
