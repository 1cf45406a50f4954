"""What ran: for each generation the variant of each step, and the reason for every full step that the plan did not ask
for."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

MOST_GENERATIONS = 256


@dataclass
class StepLog:
    """One call of the model; where its graph is broken, all parts of that call."""

    step: int
    stream: int
    variant: str
    reason: str
    """Why it computed everything although the plan did not ask for it; empty otherwise."""
    spent: int
    """FLOPs of this call."""
    whole: int
    """FLOPs of one that computes everything once."""
    signals: dict[str, float] = field(default_factory=dict)
    """What a run-time policy measured and accumulated, by name; empty with any other policy."""
    decision: str = ""
    """What a run-time policy decided, and why; empty with any other policy."""

    @property
    def compute(self) -> float:
        """FLOPs of this call over those of a full one."""
        return self.spent / self.whole if self.whole else 1.0

    def add(self, variant: str, reason: str, spent: int, whole: int) -> None:
        """A further part of the same call."""
        if variant and variant not in self.variant.split(" & "):
            self.variant = f"{self.variant} & {variant}" if self.variant else variant
        self.reason = self.reason or reason
        self.spent += spent
        self.whole += whole


@dataclass
class GenerationLog:
    """One generation."""

    number: int
    steps: list[StepLog] = field(default_factory=list)
    peak_cache_bytes: int = 0

    @property
    def variants(self) -> list[str]:
        """The variant of each call, in order."""
        return [step.variant for step in self.steps]

    @property
    def reasons(self) -> dict[str, int]:
        """Reasons for unplanned full steps, and how often each occurred."""
        return dict(Counter(step.reason for step in self.steps if step.reason))

    @property
    def speedup(self) -> float:
        """FLOPs uncached over FLOPs spent; no unit."""
        spent = sum(step.compute for step in self.steps)
        return len(self.steps) / spent if spent else 1.0


@dataclass
class Stats:
    """What `omnifx.stats(compiled)` returns; printing it gives a summary."""

    model: str
    generations: list[GenerationLog]
    graphs: int
    """Graphs captured: 1 unless the model has graph breaks or runs at several shapes."""
    variants_compiled: list[str]
    recompilations: int
    """Variants compiled after the first generation that followed a plan had begun."""
    cache_bytes: int
    """Bytes of caches held now."""
    peak_cache_bytes: int
    cache_budget: int
    compile_seconds: float
    notes: list[str]
    """What the user should know of this model: refusals, calibration results."""

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {self.graphs} graph(s), variants {', '.join(self.variants_compiled) or 'none'} "
            f"(compiled in {self.compile_seconds:.1f} s), {self.recompilations} recompilations, caches "
            f"{self.cache_bytes / 2**20:.1f} MiB now, {self.peak_cache_bytes / 2**20:.1f} MiB at most, "
            f"budget {self.cache_budget / 2**20:.0f} MiB"
        ]
        for log in self.generations[-8:]:
            counts = ", ".join(f"{count} x {name}" for name, count in Counter(log.variants).items())
            lines.append(f"  generation {log.number}: {counts}; {log.speedup:.2f}x fewer FLOPs")
            lines += [f"    {count} full steps not planned: {reason}" for reason, count in log.reasons.items()]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


class Log:
    """Collects what a `Stats` shows; bounded."""

    def __init__(self) -> None:
        self.generations: deque[GenerationLog] = deque(maxlen=MOST_GENERATIONS)
        self.notes: dict[str, None] = {}
        self._count = 0

    def begin(self) -> GenerationLog:
        """A new generation."""
        self._count += 1
        self.generations.append(GenerationLog(self._count))
        return self.generations[-1]

    def forget(self, generation: GenerationLog) -> None:
        """Take a generation back: its calls are told of elsewhere."""
        if generation in self.generations:
            self.generations.remove(generation)

    def note(self, text: str) -> bool:
        """Keep a sentence for the user; returns whether it is new."""
        new = text not in self.notes
        self.notes[text] = None
        return new

    def extend(self, notes: Iterable[str]) -> None:
        """Keep several sentences."""
        for text in notes:
            self.note(text)
