"""Which step of which stream a call is: the streams under way, and the plans that each of them may follow."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from omnifx.changes import ChangeMeter
from omnifx.clock import Marked, Reading, Timeline, largest_move
from omnifx.plan import Plan
from omnifx.profile import Profile
from omnifx.runlog import GenerationLog, Log
from omnifx.store import CacheStore, StreamCache
from omnifx.tokens import Selection

if TYPE_CHECKING:
    from omnifx.recording import Recording

_keys = itertools.count(1)

MOST_STREAMS = 64
"""Streams that may be under way at once; the oldest one is forgotten first."""


@dataclass
class Entry:
    """A profile and the plan made from it."""

    profile: Profile
    plan: Plan
    timeline: Timeline

    @cached_property
    def stored_before(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """See `Plan.stored_before`."""
        return self.plan.stored_before()

    @cached_property
    def full_before(self) -> tuple[tuple[int, ...], ...]:
        """See `Plan.full_before`."""
        return self.plan.full_before()

    @property
    def size(self) -> tuple[int, ...]:
        """Shape of the latents it was measured on, without the batch."""
        return self.profile.meta.latent_shape[1:]


@dataclass
class Stream:
    """One stream of one generation, while it runs."""

    key: int
    mark: Marked | None
    log: GenerationLog
    number: int
    cache: StreamCache
    last: Reading
    step: int = 0
    entries: list[Entry] = field(default_factory=list)  # plans that fit so far; empty while recording
    recording: Recording | None = None
    doubt: str = ""  # why nothing is reused for the rest of this generation
    scale: float = 1.0  # what the last known noise is multiplied by
    has_noise: bool = False
    on_plan: bool = True  # whether every planned reuse did reuse, so that gammas hold
    age: int = 0  # partial steps since the last full one, as tokens count them
    homeless: bool = False  # whether its caches alone are over the budget, so that it has none
    meter: ChangeMeter | None = None  # compares cuts from step to step, while it is recorded for a policy that asks
    halved: bool = False  # whether both halves of the batch began with the same latents, and the plan asks
    kept: tuple[str, ...] | None = None  # branches whose cuts its steps return; None: all

    @property
    def corrects(self) -> bool:
        """Whether any plan that still fits corrects outputs."""
        return any(entry.plan.corrects for entry in self.entries)

    @property
    def reads_noise(self) -> bool:
        """Whether any plan that still fits corrects outputs, or combines them with the noise."""
        return any(entry.plan.reads_noise for entry in self.entries)

    @property
    def history(self) -> int:
        """Full steps that it keeps for combinations; 0 if no plan that still fits combines older outputs."""
        return max((entry.plan.history for entry in self.entries), default=0)

    @property
    def terms(self) -> int:
        """Values of each cut that it stores for predictions; 0 if no plan that still fits predicts."""
        return max((entry.plan.terms for entry in self.entries), default=0)

    @property
    def selection(self) -> Selection | None:
        """How the plans that still fit choose tokens."""
        return next((entry.plan.selection for entry in self.entries), None)

    @property
    def is_last_step(self) -> bool:
        """Whether no plan that fits has a further step."""
        return bool(self.entries) and self.step + 1 >= max(len(e.timeline.timesteps) for e in self.entries)


class Streams:
    """The streams under way, oldest first, and the known plans, newest first."""

    def __init__(self, store: CacheStore, log: Log) -> None:
        self.store = store
        self.log = log
        self.entries: list[Entry] = []
        self._live: dict[int, Stream] = {}

    def __iter__(self) -> itertools.chain[Stream]:
        return itertools.chain(self._live.values())

    def add_entry(self, entry: Entry) -> None:
        """A plan for streams that begin from now on; replaces one with the same timesteps, measured at this size."""
        kept = [e for e in self.entries if (e.timeline.timesteps, e.size) != (entry.timeline.timesteps, entry.size)]
        self.entries = [entry, *kept]

    def proceed(self, reading: Reading, mark: Marked | None) -> tuple[Stream | None, str]:
        """The stream whose next step this call is, with a reason if that is not proven."""
        fitting: list[tuple[float, Stream, list[Entry]]] = []
        unproven: list[tuple[float, Stream, list[Entry]]] = []
        for stream in self._live.values():
            if stream.mark is not mark or not stream.entries:
                continue
            entries = [
                e
                for e in stream.entries
                if e.timeline.expects(stream.step + 1, reading) and e.timeline.same_stream(stream.last, reading)
            ]
            if not entries:
                continue
            move = reading.moved_from(stream.last)
            bound = max(largest_move(e.timeline.moves[stream.step + 1]) for e in entries)
            (fitting if mark is not None or move <= bound else unproven).append((move, stream, entries))
        if not fitting:
            if unproven and not any(e.timeline.expects(0, reading) for e in self.entries):
                move, stream, entries = min(unproven, key=lambda found: found[0])
                _advance(stream, reading, entries)
                if reading.finite:
                    stream.doubt = (
                        f"the latents moved {move:.2f} of their norm since the last step, more than this generation "
                        "can; mark it with omnifx.generation(...) if it is one"
                    )
                return stream, stream.doubt
            return None, ""
        fitting.sort(key=lambda found: found[0])
        move, stream, entries = fitting[0]
        reason = ""
        if len(fitting) > 1 and not move * 4 < fitting[1][0]:
            reason = "two generations with equal inputs fit this call; mark them with omnifx.generation(...)"
            stream.doubt = reason
        _advance(stream, reading, entries)
        return stream, reason

    def begin(
        self, reading: Reading, mark: Marked | None, *, num_bytes: Callable[[tuple[str, ...] | None, int], int]
    ) -> Stream | None:
        """A new stream at step 0 of some known plan; None if no plan begins with such a call.

        Args:
            reading: What the clock read.
            mark: The call's mark.
            num_bytes: Tells the bytes of its caches, from the names of the branches that it keeps, and how many of
                their values the plans predict from.
        """
        entries = self.starting(reading, mark)
        if not entries:
            return None
        self.leave_behind(reading, mark)
        kept, terms = kept_by(entries), max(entry.plan.terms for entry in entries)
        stream = self.open(reading, mark, self._siblings(reading, mark), num_bytes=num_bytes(kept, terms))
        stream.entries, stream.kept = entries, kept
        return stream

    def starting(self, reading: Reading, mark: Marked | None) -> list[Entry]:
        """The plans whose first step a call may be; of those with the same timesteps, the one measured at its size, or
        else the newest."""
        size = reading.shapes[-1][1:] if reading.shapes else ()
        found: dict[tuple[float, ...], Entry] = {}
        for e in sorted(self.entries, key=lambda e: e.size != size):
            if e.timeline.expects(0, reading) and (
                mark is None or mark.steps is None or len(e.timeline.timesteps) == mark.steps
            ):
                found.setdefault(e.timeline.timesteps, e)
        return [e for e in self.entries if found.get(e.timeline.timesteps) is e]

    def leave_behind(self, reading: Reading, mark: Marked | None) -> None:
        """Forget the streams that this call continues in another way than they expect: their next step is not its next.

        Timesteps of one step count are often among those of another, so such a stream could seem to fit again later.
        """
        for stream in list(self._live.values()):
            if stream.mark is not mark or not stream.entries:
                continue
            if mark is not None and stream.last.shapes[-1:] != reading.shapes[-1:]:
                self.drop(stream.key)  # one generation, whose latents have another shape from now on
                continue
            for e in stream.entries:
                moves = e.timeline.moves
                near = mark is not None or reading.moved_from(stream.last) <= largest_move(
                    moves[min(stream.step + 1, len(moves) - 1)]
                )
                if (
                    near
                    and not e.timeline.expects(stream.step, reading)
                    and e.timeline.same_stream(stream.last, reading)
                ):
                    self.drop(stream.key)
                    break

    def open(self, reading: Reading, mark: Marked | None, log: GenerationLog | None, *, num_bytes: int) -> Stream:
        """A new stream, with room for `num_bytes` of caches; of the generation of `log`, or of a new one."""
        for key in list(self._live)[: -MOST_STREAMS or None]:
            self.drop(key)  # abandoned long ago
        key = next(_keys)
        homeless = num_bytes > self.store.budget
        cache = StreamCache() if homeless else self.store.admit(key, num_bytes)
        number = 0 if log is None else 1 + max((step.stream for step in log.steps), default=0)
        stream = Stream(key, mark, log or self.log.begin(), number, cache, reading, homeless=homeless)
        if homeless:
            stream.doubt = (
                f"at this size one stream's caches need {num_bytes:,} bytes, but cache_budget is {self.store.budget:,}"
            )
        self._live[key] = stream
        return stream

    def drop(self, key: int) -> None:
        """A stream is over, or lost: free its caches."""
        self._live.pop(key, None)
        self.store.release(key)

    def drop_marked(self, mark: Marked) -> None:
        """Drop all streams of a marked generation."""
        for key in [k for k, s in self._live.items() if s.mark is mark]:
            self.drop(key)

    def drop_finished(self) -> None:
        """Drop streams whose last step is done (parts of a broken graph may have kept them)."""
        for key in [k for k, s in self._live.items() if s.is_last_step]:
            self.drop(key)

    def _siblings(self, reading: Reading, mark: Marked | None) -> GenerationLog | None:
        """The generation that a first step belongs to as a further stream: equal latents, also at its first step."""
        for other in reversed(self._live.values()):
            if other.mark is mark and other.step == 0 and other.entries and other.last.sample == reading.sample:
                same = any(e.timeline.same_stream(other.last, reading) for e in other.entries)
                return None if same else other.log
        return None


def kept_by(entries: Iterable[Entry]) -> tuple[str, ...]:
    """The branches that any of these plans keeps; the same for plans in another order."""
    names = dict.fromkeys(name for entry in entries for name in entry.plan.kept)
    return tuple(sorted(names))


def _advance(stream: Stream, reading: Reading, entries: list[Entry]) -> None:
    stream.step += 1
    stream.last = reading
    stream.entries = entries
