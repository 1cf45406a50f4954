"""The cache store: who owns which cuts. Caches belong to one stream of one generation, and die with it.

Values are handed over by pointer: a full step's outputs become a reuse step's inputs, and nothing is copied. Where a
plan predicts from several values, older ones move on by pointer as well. The bytes
of a stream's caches are known before its first reuse, and all streams together stay under a budget.
"""

from __future__ import annotations

import itertools
import os
from collections import OrderedDict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from omnifx.errors import CacheError


@dataclass(frozen=True)
class FullStep:
    """What later steps combine of a step that computed everything."""

    step: int
    weights: tuple[int, int]
    """Versions of the weights that computed it."""
    output: Tensor
    """The model's main output, as its caller saw it."""
    latents: Tensor | None
    """As they were then; None where they cannot be added to the output."""


@dataclass
class StreamCache:
    """What one stream keeps between its steps."""

    cuts: dict[str, Tensor] = field(default_factory=dict)
    """By part and node name; [as the branch made them], from the last step that computed the branch."""
    past: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """By part and node name: older values, newest first, where a plan predicts from several."""
    steps: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """By part and node name: the steps that the values come from, newest first, where a plan predicts."""
    noise: dict[int, Tensor] = field(default_factory=dict)
    """By output position: q of the last full step that measured it."""
    noise_of: tuple[int, tuple[int, int]] | None = None
    """The planned full step, with its versions of the weights, that measured the noise as plans combine it."""
    history: tuple[FullStep, ...] = ()
    """The last planned full steps, newest first, where a plan combines outputs."""
    tokens: dict[str, Tensor] = field(default_factory=dict)
    """By label: scores of tokens from the last step that computed their attention, and the age at which each was
    computed last (``stamp:``; zeros if absent)."""
    weights: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By part: versions of the weights, the model's and the part's, that computed its cuts."""

    def make_room(self, key: str, terms: int) -> None:
        """Move the newest value to the past, of which at most ``terms - 1`` values stay: another one will come."""
        if (newest := self.cuts.pop(key, None)) is not None and terms > 1:
            self.past[key] = (newest, *self.past.get(key, ()))[: terms - 1]

    def push(self, key: str, value: Tensor, *, step: int, terms: int) -> None:
        """Store a step's value as the newest one, of at most `terms` values."""
        self.make_room(key, terms)
        self.cuts[key] = value
        self.steps[key] = (step, *self.steps.get(key, ()))[: 1 + len(self.past.get(key, ()))]

    def remember(self, full: FullStep, *, most: int) -> None:
        """Keep a full step for combinations, and of older ones as many as make `most`."""
        self.history = (full, *self.history)[:most]

    def forget(self, key: str) -> None:
        """Forget all values of one cut."""
        for values in (self.cuts, self.past, self.steps):
            values.pop(key, None)

    @property
    def num_bytes(self) -> int:
        """Bytes held, each storage counted once."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._tensors()}
        return sum(storages.values())

    def _tensors(self) -> itertools.chain[Tensor]:
        full = [value for step in self.history for value in (step.output, step.latents) if value is not None]
        return itertools.chain(self.cuts.values(), *self.past.values(), self.noise.values(), self.tokens.values(), full)

    def clear(self) -> None:
        """Forget everything."""
        self.cuts.clear()
        self.past.clear()
        self.steps.clear()
        self.noise.clear()
        self.noise_of, self.history = None, ()
        self.tokens.clear()


class CacheStore:
    """All live stream caches of one compiled model, least recently used first."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._live: OrderedDict[int, tuple[StreamCache, int]] = OrderedDict()
        self.peak_bytes = 0
        self.evictions = 0

    def admit(self, key: int, num_bytes: int) -> StreamCache:
        """A cache for a new stream that will hold at most `num_bytes`; evicts the longest unused ones to make room.

        Raises: CacheError if `num_bytes` alone is over the budget.
        """
        if num_bytes > self.budget:
            raise CacheError(
                f"one stream's caches need {num_bytes:,} bytes, but cache_budget is {self.budget:,}. "
                "Raise cache_budget, or cache fewer branches."
            )
        self._make_room(num_bytes)
        cache = StreamCache()
        self._live[key] = (cache, num_bytes)
        self.peak_bytes = max(self.peak_bytes, self.reserved_bytes)
        return cache

    def enlarge(self, key: int, num_bytes: int) -> bool:
        """Reserve more for a stream; False, and nothing changed, if its cache was evicted or there is no room at
        all."""
        if key not in self._live:
            return False
        cache, reserved = self._live.pop(key)
        fits = reserved + num_bytes <= self.budget
        if fits:
            self._make_room(reserved + num_bytes)
        self._live[key] = (cache, reserved + (num_bytes if fits else 0))
        self.peak_bytes = max(self.peak_bytes, self.reserved_bytes)
        return fits

    def _make_room(self, num_bytes: int) -> None:
        while self._live and self.reserved_bytes + num_bytes > self.budget:
            _, (evicted, _) = self._live.popitem(last=False)
            evicted.clear()
            self.evictions += 1

    def touch(self, key: int) -> None:
        """Mark a stream as just used."""
        if key in self._live:
            self._live.move_to_end(key)

    def holds(self, key: int) -> bool:
        """Whether the stream's cache is still there (it may have been evicted)."""
        return key in self._live

    def release(self, key: int) -> None:
        """Free a stream's caches; a key that is gone already is no error."""
        if (entry := self._live.pop(key, None)) is not None:
            entry[0].clear()

    @property
    def reserved_bytes(self) -> int:
        """Bytes that the live streams may hold at most."""
        return sum(size for _, size in self._live.values())

    @property
    def held_bytes(self) -> int:
        """Bytes that the live streams hold now."""
        return sum(cache.num_bytes for cache, _ in self._live.values())


def default_budget(device: torch.device) -> int:
    """A quarter of the device's memory, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory // 4)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
