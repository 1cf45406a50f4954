"""Broadcast the outputs of attentions over ranges of steps, each kind over its own, inside a window of timesteps.

Source: Pyramid Attention Broadcast, arXiv:2408.12588, and its release (VideoSys): an attention is reused at step k if
``k % range != 0`` and its timestep lies inside the window; the MLPs of some blocks are reused for a few steps behind
listed timesteps. The release's settings, as (window; spatial, temporal, cross range): Open-Sora (450, 930; 2, 4, 6)
with the MLPs of blocks 0 to 4 for 2 steps behind 676, 788 and 864; Latte (100, 800; 2, 3, 6) with the same MLPs behind
720, 640, 560, 480 and 400; CogVideoX (100, 850; 2).
Ours: the defaults take CogVideoX's window and Open-Sora's ranges for any model. Joint attention takes the spatial
range, and branches that fuse attention and MLP are always computed. An asked speedup multiplies all three ranges by the
smallest whole number that reaches it. Listed timesteps stand for the nearest step.
Cost: none at run time; the plan is static, and the cuts of branches that it never reuses are not kept.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from omnifx.errors import ConfigError
from omnifx.plan import COMPUTE, REUSE, Action, Plan
from omnifx.policy import Policy, register
from omnifx.profile import BranchMeta, Profile
from omnifx.search import mildest


@register
@dataclass(frozen=True, kw_only=True)
class Pab(Policy):
    """Attention outputs broadcast over `spatial_range`, `temporal_range` or `cross_range` steps."""

    name: ClassVar[str] = "pab"

    spatial_range: int = 2  # steps from one computed self- or joint attention to the next; 1 reuses none
    temporal_range: int = 4  # the same, of attentions along time, which have "tempor" in their names
    cross_range: int = 6  # the same, of cross-attentions
    window: tuple[float, float] = (100.0, 850.0)  # timesteps, of 0 .. 1000 (1000 is noise), between which it reuses
    mlp_times: tuple[float, ...] = ()  # timesteps behind whose steps MLPs are reused
    mlp_skip: int = 2  # for how many steps
    mlp_blocks: tuple[int, ...] = (0, 1, 2, 3, 4)  # in which blocks, by the number in their names

    def __post_init__(self) -> None:
        for option in ("spatial_range", "temporal_range", "cross_range", "mlp_skip"):
            value = getattr(self, option)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{option} must be a whole number >= 1 (steps), got {value!r}.")
        if len(self.window) != 2 or not 0.0 <= self.window[0] < self.window[1] <= 1000.0:
            raise ConfigError(f"window must be two rising timesteps in [0, 1000], got {self.window!r}.")
        if any(not 0.0 <= time <= 1000.0 for time in self.mlp_times):
            raise ConfigError(f"mlp_times must be timesteps in [0, 1000], got {self.mlp_times!r}.")

    def plan(self, profile: Profile, *, speedup: float | None = None) -> Plan:
        if speedup is None:
            return self._plan(profile)
        scaled = (self._scaled(factor)._plan(profile) for factor in range(1, profile.num_steps + 1))
        return mildest(
            self.name, scaled, speedup, f"attentions alone, timesteps {self.window[0]:g} to {self.window[1]:g}"
        )

    def _scaled(self, factor: int) -> "Pab":
        ranges = ("spatial_range", "temporal_range", "cross_range")
        return replace(self, **{option: factor * getattr(self, option) for option in ranges})

    def _plan(self, profile: Profile) -> Plan:
        times = noise_levels(profile.meta.timesteps)
        skipped = self._mlp_steps(times)
        rows = [
            tuple(self._action(branch, step, times[step], step in skipped) for branch in profile.meta.branches)
            for step in range(profile.num_steps)
        ]
        return Plan.from_rows(profile, rows, policy=self.name, policy_options=self.options)

    def _action(self, branch: BranchMeta, step: int, time: float, mlp: bool) -> Action:
        if branch.kind == "mlp":
            return REUSE if mlp and block_number(branch.name) in self.mlp_blocks else COMPUTE
        if "attention" not in branch.kind:
            return COMPUTE
        if branch.kind == "cross_attention":
            span = self.cross_range
        else:
            span = self.temporal_range if "tempor" in branch.name else self.spatial_range
        low, high = self.window
        return REUSE if step % span and low < time < high else COMPUTE

    def _mlp_steps(self, times: Sequence[float]) -> set[int]:
        """The steps behind the one nearest to each listed timestep."""
        firsts = {min(range(len(times)), key=lambda k: abs(times[k] - time)) for time in self.mlp_times}
        skipped = {first + n for first in firsts for n in range(1, self.mlp_skip + 1)}
        return skipped - firsts


def noise_levels(timesteps: Sequence[float]) -> list[float]:
    """Timesteps on the scale of 0 to 1000, 1000 being noise, whatever the model's units and direction are.

    Values up to 1 are taken for shares, and rising ones for levels of signal.
    """
    largest = max(map(abs, timesteps))
    unit = 1.0 if largest <= 1.0 else max(1000.0, largest)
    scaled = [1000.0 * time / unit for time in timesteps]
    return [1000.0 - time for time in scaled] if scaled[-1] > scaled[0] else scaled


def block_number(name: str) -> int | None:
    """The first number that stands alone in a branch's name: 3 of ``blocks.3.mlp``; None if there is none."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found.group(1)) if found else None
