"""Reuse the residual of a range of blocks: the rear ones in early steps, the front ones in late steps.

Source: Delta-DiT, arXiv:2406.01125: what is kept is the difference between a range's output and its input, which is
added to the range's present input; rear blocks make detail, which early steps do not have yet, and front blocks make
outlines, which late steps do not change any more. One step in `interval` is computed in full.
Ours: the range is `share` of the blocks and the rear gives way to the front at `switch` of the steps, with a full step
there, so that no residual is older than `interval` - 1 steps. Where one of the two ranges cannot be reused as one
(the long skips of a U-ViT leave its front blocks), the next smaller one is taken, or else the other side throughout.
Without an interval, a speedup takes the smallest one that reaches it; without either the interval is 3.
Cost: none at run time; the plan is static, and the caches are one tensor for each trunk and range.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from omnifx.errors import ConfigError
from omnifx.plan import COMPUTE, REUSE, Action, Plan
from omnifx.policy import Policy, register
from omnifx.profile import Profile, SpanMeta
from omnifx.search import mildest


@register
@dataclass(frozen=True, kw_only=True)
class DeltaDit(Policy):
    """Residuals of `share` of the blocks, rear then front, computed every `interval` steps."""

    name: ClassVar[str] = "delta-dit"

    interval: int | None = None  # steps from one full step to the next; 1 reuses nothing; None: from the speedup, or 3
    share: float = 0.75  # of the blocks that are reused, in (0, 1]
    switch: float = 0.5  # share of the steps that reuse the rear blocks; the others reuse the front ones

    def __post_init__(self) -> None:
        interval = self.interval
        if interval is not None and (not isinstance(interval, int) or isinstance(interval, bool) or interval < 1):
            raise ConfigError(f"interval must be a whole number >= 1 (steps) or None, got {interval!r}.")
        if not 0.0 < self.share <= 1.0:
            raise ConfigError(f"share must be a number in (0, 1], got {self.share!r}.")
        if not 0.0 <= self.switch <= 1.0:
            raise ConfigError(f"switch must be a number in [0, 1], got {self.switch!r}.")

    def plan(self, profile: Profile, *, speedup: float | None = None) -> Plan:
        rear, front, notes = self._ranges(profile)
        if speedup is None or self.interval is not None:
            return self._plan(profile, self.interval or 3, rear, front, notes)
        plans = (self._plan(profile, n, rear, front, notes) for n in range(1, profile.num_steps + 1))
        return mildest(self.name, plans, speedup, f"{self.share:.0%} of the blocks")

    def _ranges(self, profile: Profile) -> tuple[SpanMeta, SpanMeta, list[str]]:
        """The rear and the front range, and what had to be changed about them."""
        count = len(profile.meta.blocks)
        most = min(max(1, round(self.share * count)), max(1, count - 1) if self.share < 1.0 else count)
        sizes = range(most, 0, -1)
        rear = _first_usable(profile, (f"span{count - size}-{count - 1}" for size in sizes))
        front = _first_usable(profile, (f"span0-{size - 1}" for size in sizes))
        if rear is None and front is None:
            profile.meta.span(f"span0-{most - 1}")  # says why
        either = rear or front
        assert either is not None
        notes = [
            f"The {side} blocks cannot be reused as one; the others are, throughout."
            for side, found in (("rear", rear), ("front", front))
            if found is None
        ]
        return rear or either, front or either, notes

    def _plan(self, profile: Profile, interval: int, rear: SpanMeta, front: SpanMeta, notes: list[str]) -> Plan:
        spans = tuple(dict.fromkeys((rear.name, front.name)))
        switch = round(self.switch * profile.num_steps)
        rows: list[tuple[Action, ...]] = []
        for step in range(profile.num_steps):
            early = step < switch
            reuses = (step if early else step - switch) % interval != 0
            reused = (rear if early else front).name if reuses else ""
            actions = [REUSE if name == reused else COMPUTE for name in spans]
            rows.append((*[COMPUTE] * len(profile.meta.branches), *actions))
        options = {**self.options, "interval": interval}
        return Plan.from_rows(profile, rows, policy=self.name, policy_options=options, spans=spans, notes=notes)


def _first_usable(profile: Profile, names: Iterable[str]) -> SpanMeta | None:
    known = {span.name: span for span in profile.meta.spans if not span.reason}
    return next((known[name] for name in names if name in known), None)
