"""Which step of which stream a call is, where no profile tells what a generation looks like.

A call is the next step of a stream only if the inputs that did not change so far are the same, those that changed from
step to step (the timestep) have changed again and in the same direction, and the latents have moved, but less than two
unrelated ones differ. Everything else begins a new stream, and a first step computes everything.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from omnifx.clock import Marked, Reading
from omnifx.runlog import GenerationLog, Log
from omnifx.store import CacheStore, StreamCache

MOST_MOVE = 0.7
"""The largest move of the latents, over their norm, that an unmarked call may have made: unrelated ones lie about 1.4
apart."""

MOST_FOLLOWED = 64
"""Streams that may be under way at once; the oldest one is forgotten first."""

PATIENCE = 8
"""Calls for each stream under way after which one that none of them went on with is taken for abandoned."""

_keys = itertools.count(-1, -1)  # those of streams that follow a plan are positive


@dataclass
class Followed:
    """One stream while it runs."""

    key: int
    mark: Marked | None
    log: GenerationLog
    number: int
    cache: StreamCache
    last: Reading
    state: Any
    """What the policy decides from."""
    step: int = 0
    changing: frozenset[int] | None = None
    """Positions within `Inputs.small` of what changes from step to step; None until the second step."""
    upwards: bool | None = None
    """Whether the first of them grows; None until the second step."""
    doubt: str = ""
    """Why all of its further steps have to compute everything; empty if they have not."""
    signal: Any = None
    """[signals, B]: measured at the last computed step's end, and not read yet."""
    measured: list[dict[str, float]] = field(default_factory=list)
    """The signals of its steps, while the policy learns from them."""
    fit: Any = None
    """What was learned at its timesteps, and is followed from its second step on; None if nothing was."""
    total: int | None = None
    """How many steps it has, if what it follows tells."""
    times: list[float] = field(default_factory=list)
    """The timestep of each of its steps; empty until the second one tells which input that is."""
    moves: list[float] = field(default_factory=lambda: [0.0])
    """How far the latents moved before each of its steps."""
    weights: int = -1
    """Version of the weights that its cached values were computed with."""
    computed: tuple[int, ...] = ()
    """The computed steps that its cached values are of, newest first."""
    touched: int = 0
    """The number of the call that it last went on with."""
    homeless: bool = False
    """Whether its caches alone are over the budget, so that it has none."""


class Following:
    """The streams of one captured graph that are under way, oldest first.

    Args:
        store: Holds their caches.
        log: Where their generations are noted.
        moving: Positions within `Inputs.large` of further latents, which change at each step.
    """

    def __init__(self, store: CacheStore, log: Log, *, moving: frozenset[int] = frozenset()) -> None:
        self.store = store
        self.log = log
        self.moving = moving
        self._live: dict[int, Followed] = {}
        self._calls = 0

    def __iter__(self) -> Iterator[Followed]:
        return iter(self._live.values())

    def proceed(self, reading: Reading, mark: Marked | None) -> tuple[Followed | None, str]:
        """The stream whose next step this call is, advanced to it, and why its step is in doubt (empty if it is not);
        None if no stream goes on with this call."""
        fitting = []
        self._calls += 1
        for stream in self._live.values():
            if stream.mark is not mark or (changed := self._changed(stream, reading)) is None:
                continue
            move = reading.moved_from(stream.last)
            if mark is not None or move <= MOST_MOVE or not reading.finite:
                fitting.append((len(changed), move, stream, changed))
        if not fitting:
            return None, ""
        fitting.sort(key=lambda found: found[:2])
        count, move, stream, changed = fitting[0]
        rivals = [other for other in fitting[1:] if other[0] == count]
        for _, other, rival, _ in rivals:
            if not move * 4 < other:  # either may be the one, now and from now on
                why = "two generations with equal inputs fit this call; mark them with omnifx.generation(...)"
                stream.doubt = rival.doubt = why
        doubt = stream.doubt if reading.finite else "the latents hold NaN or infinity"
        first = min(changed)
        if stream.changing is None:
            stream.upwards = _mean(reading.small[first]) > _mean(stream.last.small[first])
            stream.times = [_mean(stream.last.small[first])]
        stream.times.append(_mean(reading.small[first]))
        stream.moves.append(move)
        stream.changing = changed
        stream.step += 1
        stream.last = reading
        stream.touched = self._calls
        return stream, doubt

    def begin(self, reading: Reading, mark: Marked | None, state: Any, *, num_bytes: int) -> Followed:
        """A new stream at its first step, with room for `num_bytes` of caches."""
        log = self._sibling(reading, mark)
        for key in list(self._live)[: -MOST_FOLLOWED or None]:
            self.drop(key)  # abandoned long ago
        for stream in list(self._live.values()):
            idle = stream.mark is None and self._calls - stream.touched > PATIENCE * len(self._live)
            if idle or self._is_over(stream, reading, mark):
                self.drop(stream.key)
        key = next(_keys)
        homeless = num_bytes > self.store.budget
        cache = StreamCache() if homeless else self.store.admit(key, num_bytes)
        number = 0 if log is None else 1 + max((step.stream for step in log.steps), default=0)
        stream = Followed(key, mark, log or self.log.begin(), number, cache, reading, state)
        stream.homeless, stream.touched = homeless, self._calls
        self._live[key] = stream
        return stream

    def drop(self, key: int) -> None:
        """A stream is over, or lost: free its caches."""
        self._live.pop(key, None)
        self.store.release(key)

    def drop_marked(self, mark: Marked) -> None:
        """Drop all streams of a marked generation."""
        for key in [key for key, stream in self._live.items() if stream.mark is mark]:
            self.drop(key)

    def _changed(self, stream: Followed, reading: Reading) -> frozenset[int] | None:
        """What changed of the small inputs since a stream's last step; None if this call is not its next."""
        last = stream.last
        if last.shapes != reading.shapes or last.sample == reading.sample:
            return None
        changed = frozenset(i for i, (a, b) in enumerate(zip(last.small, reading.small, strict=True)) if a != b)
        if not changed or (stream.changing is not None and changed != stream.changing):
            return None
        first = min(changed)
        upwards = _mean(reading.small[first]) > _mean(last.small[first])
        if stream.upwards is not None and upwards != stream.upwards:
            return None
        same = all(i in self.moving or reading.large[i].same(known) for i, known in enumerate(last.large))
        return changed if same else None

    def _is_over(self, stream: Followed, reading: Reading, mark: Marked | None) -> bool:
        """Whether a first step shows that a stream has ended: it has the same inputs but for the timestep, which runs
        the other way."""
        if stream.mark is not mark or stream.changing is None or stream.last.shapes != reading.shapes:
            return False
        changed = {i for i, (a, b) in enumerate(zip(stream.last.small, reading.small, strict=True)) if a != b}
        first = min(stream.changing)
        upwards = _mean(reading.small[first]) > _mean(stream.last.small[first])
        return changed == stream.changing and upwards != stream.upwards

    def _sibling(self, reading: Reading, mark: Marked | None) -> GenerationLog | None:
        """The generation that a first step belongs to as a further stream: equal latents, also at its first step."""
        for other in reversed(self._live.values()):
            if other.mark is mark and other.step == 0 and other.last.sample == reading.sample:
                if other.last.shapes != reading.shapes:
                    continue
                same = other.last.small == reading.small and all(
                    a.same(b) for a, b in zip(reading.large, other.last.large, strict=True)
                )
                return None if same else other.log
        return None


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / max(1, len(values))


__all__ = ["Followed", "Following"]
