"""From a plan to a bundle's schedule: every step as runs of graphs over named buffers.

The rules are those of `omnifx.runner`, followed once with names instead of tensors: what a full step stores, how many
old values are kept, when the noise is measured, what a correction is scaled by. So a bundle's runner knows nothing of
plans. A value is written to a buffer that the same run does not read and that nobody wants any more; two buffers that
take turns are enough where a branch is updated for some tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from omnifx.bundle import BufferInfo, Keep, Run, Source, Step, Target
from omnifx.errors import PlanError
from omnifx.export_graphs import CONDITION, INVARIANT, TIMESTEP, Graph, GraphMaker, difference_graph
from omnifx.grid import low_pass
from omnifx.passes.pipeline import VariantSpec
from omnifx.plan import COMPUTE, Combination, Plan, PlanStep, Row, is_partial, is_stored, reuses
from omnifx.prior import Prior
from omnifx.program import Program


@dataclass
class Buffers:
    """The buffers of one stream, by name."""

    infos: dict[str, BufferInfo] = field(default_factory=dict)
    _groups: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def take(self, kind: str, about: str, like: Tensor, *, busy: set[str]) -> str:
        """A buffer of a kind that is not busy; a new one if there is none."""
        names = self._groups.setdefault((kind, about), [])
        for name in names:
            if name not in busy:
                return name
        name = f"{kind}:{about}" + (f"#{len(names)}" if names else "")
        names.append(name)
        self.infos[name] = BufferInfo(shape=tuple(like.shape), dtype=dtype_name(like), kind=kind, about=about)
        return name


def dtype_name(value: Tensor | torch.dtype) -> Any:
    """The type of a tensor as manifests spell it."""
    return str(value if isinstance(value, torch.dtype) else value.dtype).removeprefix("torch.")


@dataclass
class _Stream:
    """What a stream holds between its steps, by name."""

    cuts: dict[str, tuple[str, ...]] = field(default_factory=dict)  # newest first
    noise: dict[int, str] = field(default_factory=dict)
    history: tuple[tuple[str, str], ...] = ()  # outputs and latents, newest first
    tokens: dict[str, str | float] = field(default_factory=dict)  # a buffer, or one number for all
    scale: float = 1.0
    has_noise: bool = False
    age: int = 0


@dataclass(frozen=True)
class Schedule:
    """What runs when, and all that it runs."""

    prologue: tuple[Run, ...]
    steps: tuple[Step, ...]
    graphs: dict[str, Graph]
    buffers: dict[str, BufferInfo]
    constants: dict[str, Tensor]


@dataclass
class ScheduleMaker:
    """Makes the schedule of one plan.

    Args:
        program: What was found in the captured graph.
        maker: Makes the graphs.
        plan: Must fit the program: see `check_fits`.
        prior: Of the profile, where the plan follows trends.

    Raises: PlanError from `make`, for a plan that this model cannot follow.
    """

    program: Program
    maker: GraphMaker
    plan: Plan
    prior: Prior | None = None
    buffers: Buffers = field(default_factory=Buffers)
    constants: dict[str, Tensor] = field(default_factory=dict)
    graphs: dict[str, Graph] = field(default_factory=dict)
    _stream: _Stream = field(default_factory=_Stream)

    def make(self) -> Schedule:
        """The prologue and the steps."""
        check_fits(self.plan, self.program, self.prior)
        for k, row in enumerate(self.plan.rows):  # all graphs first: the replay takes one that is there
            self._graph(self._spec(k, row))
        letters = self.plan.timeline().splitlines()[-1]
        steps = tuple(self._step(k, letters[k]) for k in range(len(self.plan.steps)))
        runs: tuple[Run, ...] = ()
        if (prologue := self.maker.prologue()) is not None:
            self.graphs[prologue.name] = prologue
            runs = (self._run(prologue, 0, {}),)
        return Schedule(runs, steps, self.graphs, self.buffers.infos, self.constants)

    # -- which graphs --------------------------------------------------------------------------------------------------

    @property
    def _kept(self) -> tuple[str, ...]:
        return tuple(sorted(self.plan.kept))

    def _spec(self, k: int, row: Row) -> VariantSpec:
        plan, program, step = self.plan, self.program, self.plan.steps[k]
        if not reuses(row):
            return program.full(measures=False, kept=self._kept, selection=plan.selection)
        if step.combination is not None:
            return program.reusing(row, corrects=False, combines=plan.history, combines_noise=plan.combines_noise)
        return program.reusing(
            row,
            corrects=plan.corrects,
            kept=self._kept,
            spans=plan.span_names,
            terms=plan.terms,
            stores=step.stores,
            trend=plan.trend,
            selection=plan.selection,
        )

    def _replay_spec(self) -> VariantSpec:
        """A graph that can repeat the newest values of everything; one that the plan runs anyway, if there is one."""
        plan, program = self.plan, self.program
        found: list[VariantSpec] = []
        for corrects in (plan.corrects, not plan.corrects):
            if plan.terms:
                stores = any(step.stores for step in plan.steps)
                found.append(
                    program.reusing(
                        program.predict_row, corrects=corrects, terms=plan.terms, stores=stores, trend=plan.trend
                    )
                )
            else:
                found.append(program.reusing(program.reuse_row, corrects=corrects))
        if plan.combinations and not plan.terms:
            found.append(
                program.reusing(
                    program.reuse_row, corrects=False, combines=plan.history, combines_noise=plan.combines_noise
                )
            )
        return next((spec for spec in found if spec in self.maker.graphs), found[0])

    def _graph(self, spec: VariantSpec) -> Graph:
        graph = self.maker.make(spec)
        self.graphs[graph.name] = graph
        if graph.conditions is not None:
            self.graphs[graph.conditions.name] = graph.conditions
        return graph

    # -- one step ------------------------------------------------------------------------------------------------------

    def _step(self, k: int, letter: str) -> Step:
        row = self.plan.rows[k]
        graph = self._graph(self._spec(k, row))
        computes = not reuses(row)
        replayed = self._measures(k) if computes else []
        runs = list(replayed)
        if not computes:
            self._scale(self.plan.steps[k])
        if graph.conditions is not None:
            runs.append(self._run(graph.conditions, k, {}))
        run = self._run(graph, k, {} if computes else self._numbers(k, graph))
        runs.append(run)
        keeps: tuple[Keep, ...] = ()
        if computes:
            self._stream.scale, self._stream.has_noise = 1.0, False
            if replayed:
                runs += self._subtract()
            keeps = self._remember()
        self._store(k, graph, run)
        return Step(timestep=self.plan.timesteps[k], action=letter, runs=tuple(runs), keeps=keeps)

    def _measures(self, k: int) -> list[Run]:
        """The replay of the old caches before a full step, where the plan wants its noise."""
        stream, program = self._stream, self.program
        cuts = [cut for branch in program.branches for cut in branch.cuts]
        if not self.plan.reads_noise or not program.noisy or not all(cut in stream.cuts for cut in cuts):
            return []
        graph = self._graph(self._replay_spec())
        numbers: dict[str, Source] = {}
        for port in graph.inputs:
            kind = port.label.partition(":")[0]
            if kind == "predictor":
                numbers[port.name] = _padded(self.plan.steps[k].weights or (1.0,), port.value)
            elif kind == "combination":
                alone = Combination(reuse=1.0)
                numbers[port.name] = Source(numbers=alone.vector(self.plan.history))
            elif kind not in ("cut", "call", TIMESTEP, INVARIANT, CONDITION):
                numbers[port.name] = Source(fill=0.0)
        runs = [self._run(graph.conditions, k, {})] if graph.conditions is not None else []
        return [*runs, self._run(graph, k, numbers, replay=True)]

    def _subtract(self) -> list[Run]:
        """The noise: what the replay gave minus the truth."""
        runs = []
        for position in self.program.noisy:
            like = self.program.output_value(position)
            graph = difference_graph(like)
            graph = self.graphs.setdefault(graph.name, graph)
            replay = self.buffers.take("replay", str(position), like, busy=set())
            noise = self.buffers.take("noise", str(position), like, busy=set())
            self._stream.noise[position] = noise
            inputs = {"a": Source(buffer=replay), "b": Source(output=position)}
            runs.append(Run(variant=graph.name, inputs=inputs, outputs={"a - b": Target(buffer=noise)}))
        self._stream.has_noise = True
        return runs

    def _remember(self) -> tuple[Keep, ...]:
        """Copies of a full step's output and latents, where later steps combine them."""
        history, found = self.plan.history, self.program.combines
        at = self.program.analysis.inputs.latents
        if not history or found.reason or at is None:
            return ()
        stream = self._stream
        busy = {name for pair in stream.history[: history - 1] for name in pair}
        output = self.buffers.take("past_output", str(found.output), self.program.output_value(found.output), busy=busy)
        keeps = [Keep(source=Source(output=found.output), buffer=output)]
        latents = ""
        if not found.latents_reason:
            name = self.program.analysis.inputs.plain_name(at)
            latents = self.buffers.take("past_latents", name, self.program.inputs[at], busy=busy)
            keeps.append(Keep(source=Source(call=name), buffer=latents))
        stream.history = ((output, latents), *stream.history)[:history]
        return tuple(keeps)

    def _scale(self, step: PlanStep) -> None:
        if step.correction is not None and self._stream.has_noise:
            self._stream.scale *= step.correction.gamma

    def _numbers(self, k: int, graph: Graph) -> dict[str, Source]:
        """What the plan's numbers feed of a graph's inputs."""
        stream, step = self._stream, self.plan.steps[k]
        found: dict[str, Source] = {}
        correction = step.correction
        for port in graph.inputs:
            kind, _, name = port.label.partition(":")
            if kind == "coefficients":
                s = stream.scale if correction is not None and stream.has_noise else 0.0
                word = correction.filter if correction is not None else "all"
                found[port.name] = Source(numbers={"all": (s, 0.0), "low": (0.0, s), "high": (s, -s)}[word])
            elif kind == "low_pass":
                cutoff = correction.cutoff if correction is not None else 0.5
                matrix = low_pass(int(port.value.shape[0]), cutoff)
                found[port.name] = self._constant(f"low_pass:{matrix.shape[0]}@{cutoff:g}", matrix)
            elif kind == "predictor":
                found[port.name] = _padded(step.weights or (1.0,), port.value)
            elif kind == "trend_scale":
                found[port.name] = _padded((step.trend or 0.0,), port.value)
            elif kind == "combination":
                vector = (step.combination or Combination()).vector(self.plan.history)
                found[port.name] = Source(numbers=vector)
            elif kind == "trend":
                found[port.name] = self._trend(k, name, port.value)
            elif kind == "age":
                found[port.name] = Source(fill=float(stream.age))
        return found

    def _trend(self, k: int, cut: str, like: Tensor) -> Source:
        if self.prior is None or not self.plan.steps[k].trend:
            return Source(fill=0.0)
        key = self.program.cut_keys[cut]
        moved = self.prior.trend(key, k).contiguous()
        if tuple(moved.shape) != tuple(like.shape):
            raise PlanError(
                f"export: the prior of {key} has the shape {tuple(moved.shape)}, but a sample's cut here is "
                f"{tuple(like.shape)}. Calibrate at this size."
            )
        return self._constant(f"trend:{key}@{k}", moved)

    def _constant(self, name: str, value: Tensor) -> Source:
        self.constants.setdefault(name, value.detach().cpu())
        return Source(constant=name)

    # -- runs ----------------------------------------------------------------------------------------------------------

    def _run(self, graph: Graph, k: int, numbers: dict[str, Source], *, replay: bool = False) -> Run:
        """A run of a graph at step `k`: where its inputs come from, and where its outputs go."""
        inputs = {
            port.name: numbers[port.name] if port.name in numbers else self._source(port.label, k, graph)
            for port in graph.inputs
        }
        read = {source.buffer for source in inputs.values() if source.buffer is not None}
        outputs = {}
        for port in graph.outputs:
            kind, _, name = port.label.partition(":")
            if kind == "output":
                outputs[port.name] = Target(output=int(name))
                if replay:
                    kept = int(name) in self.program.noisy
                    buffer = self.buffers.take("replay", name, port.value, busy=set()) if kept else None
                    outputs[port.name] = Target(buffer=buffer)
            elif kind in (INVARIANT, CONDITION):
                about = self.maker.cut_name(name) if kind == INVARIANT else f"{graph.name}:{name}"
                outputs[port.name] = Target(buffer=self.buffers.take(kind, about, port.value, busy=set()))
            elif replay or not self._wanted(k, port.label):
                outputs[port.name] = Target()
            else:
                outputs[port.name] = Target(buffer=self._room(port.label, port.value, read))
        return Run(variant=graph.name, inputs=inputs, outputs=outputs)

    def _source(self, label: str, k: int, graph: Graph) -> Source:
        stream, timestep = self._stream, self.plan.timesteps[k]
        kind, _, name = label.partition(":")
        if kind == "call":
            return Source(call=name)
        if kind == TIMESTEP:
            return self._constant(f"{name}@{timestep:.9g}", self.maker.table(name, timestep))
        if kind == INVARIANT:
            return Source(buffer=f"{INVARIANT}:{self.maker.cut_name(name)}")
        if kind == CONDITION and graph.conditions is not None:
            return Source(buffer=f"{CONDITION}:{graph.conditions.name}:{name}")
        if kind == "cut":
            cut, _, age = name.partition("@")
            values = stream.cuts.get(cut, ())
            if not values:
                raise PlanError(
                    f"export: a step reads the cache of {self.maker.cut_name(cut)} before any step has written it. "
                    "Make the plan anew with `omnifx plan`."
                )
            return Source(buffer=values[int(age)] if age and int(age) < len(values) else values[0])
        if kind == "noise":
            held = stream.noise.get(int(name))
            return Source(buffer=held) if held is not None else Source(fill=0.0)
        if kind in ("past_output", "past_latents"):
            back = int(name)
            if back >= len(stream.history):
                return Source(fill=0.0)
            return Source(buffer=stream.history[back][kind == "past_latents"])
        if kind in ("score", "stamp"):
            value = stream.tokens.get(label)
            if kind == "score" and value is None:
                raise PlanError(f"export: a step chooses tokens by {name}, which no step has scored. Plan anew.")
            return Source(buffer=value) if isinstance(value, str) else Source(fill=value or 0.0)
        raise PlanError(f"export: nothing feeds the input {label}. This is a bug.")

    def _wanted(self, k: int, label: str) -> bool:
        """Whether what a step makes is stored."""
        kind, _, cut = label.partition(":")
        if kind != "cut":
            return True
        plan, row, step = self.plan, self.plan.rows[k], self.plan.steps[k]
        for branch, action in zip(self.program.branches, row, strict=False):
            if cut in branch.cuts:
                return is_stored(step, action) if plan.terms or plan.combinations else True
        return True

    def _room(self, label: str, like: Tensor, read: set[str]) -> str:
        """A buffer for a new value; old ones that are still wanted, and those that the run reads, stay as they are."""
        kind, _, name = label.partition(":")
        if kind == "cut":
            old = self._stream.cuts.get(name, ())
            return self.buffers.take(
                "cut", self.maker.cut_name(name), like, busy={*old[: self._terms(name) - 1], *read}
            )
        return self.buffers.take(kind, self.maker.cut_name(name), like, busy=read)

    def _terms(self, cut: str) -> int:
        branch_cuts = {cut for branch in self.program.branches for cut in branch.cuts}
        return max(1, self.plan.terms) if cut in branch_cuts else 1

    def _store(self, k: int, graph: Graph, run: Run) -> None:
        """What a step left behind is what the next ones find."""
        stream, row = self._stream, self.plan.rows[k]
        if not reuses(row):
            stream.age = 0
            stream.tokens = {label: v for label, v in stream.tokens.items() if not label.startswith("stamp:")}
        for port in graph.outputs:
            kind, _, name = port.label.partition(":")
            buffer = run.outputs[port.name].buffer
            if buffer is None:
                continue
            if kind == "cut":
                stream.cuts[name] = (buffer, *stream.cuts.get(name, ()))[: self._terms(name)]
            elif kind in ("score", "stamp"):
                stream.tokens[port.label] = buffer
        if reuses(row):
            stream.age += is_partial(row)
            for branch, action in zip(self.program.branches, row, strict=False):
                if action == COMPUTE and branch.tokens is not None and self.plan.selection is not None:
                    stream.tokens[f"stamp:{branch.name}"] = float(stream.age)


def _padded(numbers: Sequence[float], like: Tensor) -> Source:
    size = int(like.shape[0])
    return Source(numbers=(*numbers, *(0.0,) * size)[:size])


def check_fits(plan: Plan, program: Program, prior: Prior | None) -> None:
    """Raise PlanError for a plan that this model cannot follow, or that cannot be exported."""
    if plan.branches != program.names:
        missing = [name for name in plan.branches if name not in program.names]
        more = [name for name in program.names if name not in plan.branches]
        raise PlanError(
            f"export: the plan is for other branches than the model has here: {missing[:3]} are missing, {more[:3]} "
            "are new. Calibrate and plan on this model, at this size."
        )
    if plan.merges:
        raise PlanError(
            "export: the plan merges the caches of both halves of a batch behind some step, which bundles cannot. Use "
            "another policy, or run it with torch.compile."
        )
    for row in plan.variants:
        if refusal := program.refusal_of(row, plan.tokens):
            raise PlanError(f"export: {refusal}.")
    for name in plan.span_names:
        if problem := program.span_problem(name):
            raise PlanError(f"export: {name} cannot be reused here: {problem}.")
    found = program.combines if plan.combinations else None
    if found is not None and found.reason:
        raise PlanError(f"export: outputs cannot be combined here: {found.reason}.")
    if found is not None and found.latents_reason and any(any(c.latents) for c in plan.combinations):
        raise PlanError(f"export: latents cannot be combined with outputs here: {found.latents_reason}.")
    filtered = any(step.correction is not None and step.correction.filter != "all" for step in plan.steps)
    if filtered and not program.filters:
        raise PlanError("export: the plan filters its corrections, but the output has no grid here.")
    if any(step.trend for step in plan.steps) and prior is None:
        raise PlanError(
            "export: the plan follows the trends of its profile's prior. Give the profile: omnifx.export(..., "
            "profile=)."
        )


__all__ = ["Buffers", "Schedule", "ScheduleMaker", "check_fits", "dtype_name"]
