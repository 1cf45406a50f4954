"""Examine a model through ``torch.compile(model, backend="omnicache")``: what is found, and whether reuse is exact.

The yardstick is the eager model with forward hooks, which replace each attention and feed-forward module's output by
that of an earlier step.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

import omnifx
from omnifx.errors import OmnifxWarning
from omnifx.graph import EXTRA_INPUTS, clone, run_passes
from omnifx.passes.narrow_linears import NarrowLinears
from omnifx.passes.pipeline import pipeline
from omnifx.program import Program
from omnifx.report import MatchReport
from omnifx.session import Session, find_session
from tests.reuse import EAGER, Pattern, Reference, distance, letters_of
from tests.zoo.entry import Entry, Inputs, Tiny

LETTERS = "FrrF"
"""The generation that models are examined on: a full step, two that reuse everything, a full step."""


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors of a model's output, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    return [t for each in output for t in tensors_of(each)] if isinstance(output, list | tuple) else []


def worst(outputs: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """The largest distance between tensors and what they should be."""
    return max(distance(a, b) for a, b in zip(outputs, references, strict=True))


# -- the examination ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What one examination found. Errors are relative, and the worst over all outputs."""

    report: MatchReport
    full_error: float
    """Of full steps, against the eager model."""
    replay_error: float
    """Of reuse graphs fed a step's own cuts, against that step; 0.0 means equal bits."""
    reference_error: float
    """Of step 1 with step 0's cuts, against the reference."""
    moved: float
    """How far the reference's step 1 lies from the eager model's: what a wrong cache would cost."""
    followed: str
    """What the second generation ran, as letters."""
    followed_error: float
    """Of that generation, against the reference."""
    recompilations: int
    """Graphs captured after the first step, and variants compiled after planning."""

    @property
    def branches(self) -> str:
        """Branches by kind, as `Entry` pins them."""
        return counted(branch.kind for branch in self.report.branches)

    @property
    def dependence(self) -> str:
        """Branches by dependence, as `Entry` pins them."""
        return counted(branch.dependence for branch in self.report.branches)

    @property
    def left_alone(self) -> int:
        """Branches that are not cached."""
        return len(self.report.branches) - len(self.report.cacheable)

    @property
    def left(self) -> float:
        """Share of the FLOPs that a reuse step costs."""
        return round(self.report.reuse_flops / self.report.flops, 3)

    def unlike(self, entry: Entry) -> list[str]:
        """Where this differs from what the entry pins, as sentences."""
        pinned = {
            "graphs": self.report.graphs,
            "branches": self.branches,
            "dependence": self.dependence,
            "left_alone": self.left_alone,
        }
        wrong = [
            f"{entry.name}: {field} is {value!r}, pinned is {getattr(entry, field)!r}"
            for field, value in pinned.items()
            if value != getattr(entry, field)
        ]
        if abs(self.left - entry.left) > 0.002:
            wrong.append(f"{entry.name}: left is {self.left}, pinned is {entry.left}")
        return wrong

    def inexact(self, entry: Entry) -> list[str]:
        """What is not exact, as sentences."""
        limits = {"full_error": 1e-5, "replay_error": 0.0, "reference_error": 1e-5, "recompilations": 0}
        wrong = [
            f"{entry.name}: {field} is {getattr(self, field):.1e}, at most {limit:.1e} is right"
            for field, limit in limits.items()
            if not getattr(self, field) <= limit
        ]
        if not self.moved > 1e-3:
            wrong.append(f"{entry.name}: reuse cannot be told from computing, they differ by {self.moved:.1e} only")
        return wrong

    def not_followed(self, entry: Entry) -> list[str]:
        """What is wrong with the generation that omnifx planned by itself, as sentences."""
        wrong = []
        if self.followed != LETTERS:
            wrong.append(f"{entry.name}: the second generation ran {self.followed}, planned was {LETTERS}")
        if not self.followed_error <= 1e-5:
            wrong.append(f"{entry.name}: followed_error is {self.followed_error:.1e}, at most 1.0e-05 is right")
        return wrong


def counted(words: Iterable[str]) -> str:
    """Words with their counts, in alphabetical order: "2 mlp, 2 self_attention"."""
    return ", ".join(f"{count} {word}" for word, count in sorted(Counter(words).items()))


def examined(names: Sequence[str], *, jobs: int = 1) -> Iterator[Found]:
    """Examine entries by name, in order, each in a process of its own, as Dynamo forgets no model entirely."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.zoo.warm"])
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        yield from pool.map(_examine_named, names)


def _examine_named(name: str) -> Found:
    from tests.zoo.models import ZOO

    warnings.simplefilter("ignore", OmnifxWarning)  # graph breaks are in the table
    return examine(ZOO[name].make())


@torch.no_grad()
def examine(tiny: Tiny) -> Found:
    """Compare two generations through omnifx, and its captured graphs, with the eager model with and without hooks.

    The first generation is measured, the second one follows the plan. Then two single steps run on the captured graphs
    themselves, without plan or clock.
    """
    with _alone():
        steps = [tiny.step(number) for number in range(len(LETTERS))]
        plain = [tensors_of(tiny.model(**step)) for step in steps]
        reference = Reference(tiny.model, LETTERS, tiny.modules, stream_of=lambda **inputs: 0)
        expected = [tensors_of(reference(**step)) for step in steps]

        compiled = torch.compile(tiny.model, backend="omnicache", options={**EAGER, "policy": Pattern(pattern=LETTERS)})
        measured, graphs = [], []
        for number in range(3):
            with omnifx.generation(compiled, steps=len(steps)):
                for step in steps:
                    measured.append(tensors_of(compiled(**step)))
                    graphs.append(counters["stats"]["unique_graphs"])
            session = find_session(compiled)
            stats = session.stats()
            if number and letters_of(stats.generations[-1]) == LETTERS:
                break  # a model that was captured anew in its first generation is measured in the second
        followed, recompilations = letters_of(stats.generations[-1]), stats.recompilations

        report = session.report()

        calls = _Calls(session)
        calls.run(compiled, steps[0])
        reused = tensors_of(calls.run(compiled, steps[1], reuse=True))
        return Found(
            report=report,
            full_error=max(map(worst, measured[: len(steps)], plain)),
            replay_error=calls.replay_error,
            reference_error=worst(reused, expected[1]),
            moved=worst(expected[1], plain[1]),
            followed=followed,
            followed_error=max(map(worst, measured[-len(steps) :], expected)),
            recompilations=graphs[-1] - graphs[0 if session.boundary is None else len(steps) - 1] + recompilations,
        )


@contextmanager
def _alone() -> Iterator[None]:
    """One thread, and nothing of other models in Dynamo."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    counters.clear()
    try:
        yield
    finally:
        torch._dynamo.reset()
        torch.set_num_threads(threads)


class _Calls:
    """Runs each call of each captured graph in full, or on the cuts of the same call of an earlier step.

    That needs neither a clock nor a plan, and works however many graphs a step has.
    """

    def __init__(self, session: Session) -> None:
        self.cuts: dict[tuple[int, int], dict[str, Tensor]] = {}
        self.replay_error = 0.0
        self._counts: Counter[int] = Counter()
        self._reuse = False
        for number, runner in enumerate(session.runners):
            runner.deactivate("examined")  # then every call runs the plain variant, whose place is taken here
            if runner.program.names:
                self._take_place(number, runner.program)

    def run(self, compiled: Any, step: Inputs, *, reuse: bool = False) -> Any:
        """One step of the model."""
        self._counts.clear()
        self._reuse = reuse
        return compiled(**step)

    def _take_place(self, number: int, program: Program) -> None:
        full = program.variant(program.full(measures=False))
        reusing, labels = _reading(program)

        def call(args: list[Any]) -> Sequence[Any]:
            key = (number, self._counts[number])
            self._counts[number] += 1
            if not self._reuse:
                made = full.run(list(args))
                self.cuts[key] = dict(zip(full.extra_outputs, made[program.num_outputs :], strict=True))
            again = reusing(*args, *(self.cuts[key][label] for label in labels))
            if self._reuse:
                return again
            pairs = [(a, b) for a, b in zip(again, made, strict=False) if isinstance(a, Tensor) and a is not b]
            wrong = [distance(a, b) or 1e-30 for a, b in pairs if not torch.equal(a, b)]
            self.replay_error = max([self.replay_error, *wrong])
            return made[: program.num_outputs]

        program.variant(program.plain).run = call


def _reading(program: Program) -> tuple[Callable[..., Sequence[Any]], tuple[str, ...]]:
    """The graph that reuses everything, with labels of the cuts it takes, without the one pass that may round anew."""
    spec = program.reusing(program.reuse_row, corrects=False)
    gm = clone(program.gm)
    run_passes(
        gm, [step for step in pipeline(spec, program.grids, hoists=False) if not isinstance(step, NarrowLinears)]
    )
    return gm.forward, tuple(gm.meta[EXTRA_INPUTS])
