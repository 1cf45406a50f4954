"""Options of ``torch.compile(model, backend="omnicache", options={...})``: every key optional, every value checked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from omnifx.asking import Ask
from omnifx.errors import ConfigError
from omnifx.plan import Plan
from omnifx.policy import Policy, refuse_speedup, resolve
from omnifx.profile import Profile
from omnifx.runtime import is_runtime

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Options(BaseModel):
    """What a user may say. Unknown keys and values out of range are errors that list what is allowed."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, validate_default=True)

    policy: str | Policy = "auto"
    """A policy's name, or a policy object."""
    speedup: float | None = Field(default=None, ge=1.0)
    """Target ratio of compute: FLOPs of full steps over planned FLOPs; None: the policy's default."""
    min_psnr: float | None = Field(default=None, gt=0.0)
    """dB against the uncached samples, instead of a speedup; needs a profile that was calibrated with rollouts."""
    target_ms: float | None = Field(default=None, gt=0.0)
    """Milliseconds for the model's calls of one generation, instead of a speedup."""
    steps: int | None = Field(default=None, ge=1)
    """Steps of a generation, where the caller knows; a recording of any other length is not used."""
    transfer: bool = False
    """Whether other numbers of steps (of `steps`, or of marked generations) get plans by interpolation of a profile."""
    profile: str | Path | Profile | None = None
    """A profile, or the path of one; None: the first generation is measured."""
    plan: str | Path | Plan | None = None
    """A plan, or the path of one, instead of making one from the profile's policy; needs a profile."""
    profile_cache: bool = True
    """Whether measured profiles are kept in, and looked up from, the user's cache directory."""
    record_only: bool = False
    """Whether to only measure, and never follow a plan; `omnifx.calibrate` sets it."""
    record_budget: int | str = "64MiB"
    """Most bytes that a recording may hold."""
    cache_budget: int | str | None = None
    """Most bytes that all caches may hold together, or "2GiB"; None: a quarter of the device's memory."""
    lowering: Literal["inductor", "eager"] = "inductor"
    """"eager" runs the same variants without Inductor, for debugging."""
    inductor: dict[str, Any] = Field(default_factory=dict)
    """Inductor's own options, as ``torch.compile(options=...)`` takes them."""

    @field_validator("cache_budget", "record_budget")
    @classmethod
    def _bytes(cls, value: int | str | None) -> int | None:
        return None if value is None else parse_bytes(value)

    @field_validator("policy")
    @classmethod
    def _known_policy(cls, value: str | Policy) -> str | Policy:
        resolve(value)
        return value

    @classmethod
    def parse(cls, options: dict[str, Any] | None) -> Self:
        """Check a dictionary of options.

        Raises: ConfigError that names the key, what was found, and what is allowed.
        """
        options = dict(options or {})
        if unknown := set(options) - set(cls.model_fields):
            raise ConfigError(
                f"omnicache: unknown options {sorted(unknown)}; known are {sorted(cls.model_fields)}. "
                "Options of Inductor itself go under 'inductor'."
            )
        try:
            parsed = cls(**options)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"][:1])
            described = (
                (cls.model_fields[key].annotation, first["msg"]) if key in cls.model_fields else ("", first["msg"])
            )
            raise ConfigError(
                f"omnicache: option {key!r} found {options.get(key)!r}: {described[1].removeprefix('Value error, ')} "
                f"(allowed: {_readable(described[0])})."
            ) from error

        policy = parsed.resolved_policy
        parsed.ask.check_policy(policy)
        if parsed.min_psnr is not None and parsed.profile is None:
            raise ConfigError(
                f"omnicache: option 'min_psnr' found {parsed.min_psnr:g}, but no 'profile': what PSNR a plan reaches "
                "cannot be told from a generation under way, for the model never sees the final samples. Measure it "
                f"once: omnifx.calibrate(model, generate, rollouts=4, min_psnr={parsed.min_psnr:g}, save=PATH), with a "
                "generate() that returns the samples, and give that profile."
            )
        if parsed.speedup is not None and is_runtime(policy):
            raise ConfigError(
                f"omnicache: option 'speedup' found {parsed.speedup}, but {policy.name} decides at run time, from each "
                f"step's signal, so no ratio can be promised. Set its own options instead: {policy.options}."
            )
        if parsed.speedup is not None and parsed.speedup > policy.most_speedup:
            raise refuse_speedup(policy.name, parsed.speedup, policy.most_speedup, "its own rules")
        return parsed

    @property
    def ask(self) -> Ask:
        """What a plan is to reach. Raises ConfigError if more than one thing is asked for."""
        return Ask(speedup=self.speedup, min_psnr=self.min_psnr, target_ms=self.target_ms)

    @property
    def resolved_policy(self) -> Policy:
        """The policy object that `policy` stands for."""
        return resolve(self.policy)


def parse_bytes(value: int | str) -> int:
    """A number of bytes from an int or a text such as "2GiB" or "500 MB"."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and (match := re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", value)):
        unit = match[2].upper()
        if unit in _UNITS:
            return int(float(match[1]) * _UNITS[unit])
    raise ValueError(f"expected bytes as a number >= 0 or a text such as '2GiB', got {value!r}")


def _readable(annotation: object) -> str:
    return re.sub(r"(typing|omnifx\.\w+|pathlib)\.|<class '([^']+)'>", r"\2", str(annotation))
