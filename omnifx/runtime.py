"""Run-time policies: what is skipped is decided at each step, from a signal that the step itself gives.

A decision is a pure function of the state, the signals and the step; the state belongs to a stream, and the policy
keeps nothing. A batch skips only if all of its samples would: each signal is the largest over the samples. Where
several ranks of torch.distributed are at work the signals are reduced (maximum) over the default group before anyone
acts, so that all ranks run the same graph; then all of them must make the same calls.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, fx

from omnifx.errors import ConfigError
from omnifx.plan import Plan
from omnifx.policy import Policy
from omnifx.probes import Probe, Trunk
from omnifx.profile import Profile

S = TypeVar("S")


@dataclass(frozen=True)
class Step:
    """Which step of its stream a call is."""

    index: int
    """From 0."""
    total: int | None
    """Steps of the generation, if known."""
    must: str = ""
    """Why it has to compute everything whatever the signals say; empty if it has not."""

    @property
    def is_last(self) -> bool:
        """Whether it is known to be the last one."""
        return self.total is not None and self.index == self.total - 1

    @property
    def progress(self) -> float | None:
        """The share of the steps that lie before it; None if their number is not known."""
        return self.index / self.total if self.total else None


@dataclass(frozen=True)
class Decision(Generic[S]):
    """What a step does, and the state that the next one starts from."""

    computes: bool
    state: S
    why: str
    """In a few words, with numbers."""
    shown: dict[str, float] = field(default_factory=dict)
    """What the decision rested on, beside the signals: the accumulated value, its limit."""


@dataclass(frozen=True, kw_only=True)
class RuntimePolicy(Policy, Generic[S]):
    """Base of the policies that decide at run time. A frozen, keyword-only dataclass whose fields are its options.

    Subclasses set `name`, and implement `probe` (what is measured, kept and skipped), `start` (the state before the
    first step) and `decide`.
    """

    needs_profile: ClassVar[bool] = False
    ranks_agree: bool = (
        True  # whether the ranks of torch.distributed decide together; False if each runs its own prompts
    )
    uses_steps: ClassVar[str] = ""
    """What becomes of its rules where the number of steps is not known, as the rest of a sentence; empty: nothing."""

    @abstractmethod
    def probe(self, gm: fx.GraphModule, trunk: Trunk) -> Probe:
        """What to measure, keep and skip of a captured graph.

        Raises: PassError or ConfigError if the graph lacks what the method needs.
        """

    @abstractmethod
    def start(self) -> S:
        """The state before the first step."""

    @abstractmethod
    def decide(self, state: S, signals: Sequence[float], step: Step) -> Decision[S]:
        """Whether a step computes everything.

        Args:
            state: What the last step of the stream left.
            signals: As the probe names them, the largest over samples and ranks; infinite where a sample's is no
                number. Empty if nothing was measured since the last step.
            step: Which step it is; with `Step.must`, the answer has to be yes.
        """

    def for_model(self, model: str) -> tuple[RuntimePolicy[S], str]:
        """This policy with what is published for a model's class, and a sentence on it for the user (empty: nothing to
        say)."""
        return self, ""

    @property
    def learns(self) -> bool:
        """Whether a generation has to be measured, computed in full, before anything is skipped."""
        return False

    def learned(self, measured: Sequence[dict[str, float]]) -> tuple[RuntimePolicy[S], str]:
        """This policy with what the signals of steps, of one generation or of several, taught it, and a sentence on it
        for the user without its full stop; the same policy and no sentence if they were too few."""
        return self, ""

    def plan(self, profile: Profile, *, speedup: float | None = None) -> Plan:
        raise ConfigError(
            f"{self.name}: it decides at run time, so there is no plan to make. Use it as the option 'policy'; "
            f"its options here are {self.options}."
        )


def check_number(policy: str, name: str, value: object, low: float, high: float = math.inf) -> None:
    """Raise ConfigError unless an option is a number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{policy}: {name} must be a number in [{low:g}, {high:g}], got {value!r}.")


def check_count(policy: str, name: str, value: object, low: int) -> None:
    """Raise ConfigError unless an option is a whole number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{policy}: {name} must be a whole number >= {low}, got {value!r}.")


def agreed(
    signal: Tensor | None, *, count: int, must: bool, device: torch.device, alone: bool = False
) -> tuple[tuple[float, ...], bool]:
    """The signals that all ranks act on, and whether any of them has to compute; one transfer from the device.

    Args:
        signal: [signals, B], or None where nothing was measured.
        count: How many signals there are when something is measured.
        must: Whether this rank has to compute.
        device: Where a reduction over the ranks works.
        alone: Whether this rank decides for itself.
    """
    if signal is not None:  # infinite signals skip nothing; a maximum of no number is anything
        signal = torch.nan_to_num(signal.detach(), nan=math.inf, posinf=math.inf, neginf=math.inf).amax(1)
    if alone or not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return (() if signal is None else tuple(signal.tolist())), must
    none = torch.full((count,), -math.inf, device=device)
    flag = torch.tensor([float(must)], device=device)
    together = torch.cat([flag, none if signal is None else signal.to(flag)])
    dist.all_reduce(together, op=dist.ReduceOp.MAX)
    first, *values = together.tolist()
    return (() if -math.inf in values else tuple(values)), bool(first)


def is_runtime(policy: object) -> bool:
    """Whether a policy decides at run time."""
    return isinstance(policy, RuntimePolicy)


AnyRuntimePolicy = RuntimePolicy[Any]

__all__ = [
    "AnyRuntimePolicy",
    "Decision",
    "RuntimePolicy",
    "Step",
    "agreed",
    "check_count",
    "check_number",
    "is_runtime",
]
