"""The stages of a graph that is split at a probe: its head, the tail that computes, and the one that restores."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import sympy
from torch import Tensor

from omnifx.backends.lowering import Runnable
from omnifx.graph import (
    EXTRA_INPUTS,
    EXTRA_OUTPUTS,
    Pass,
    clone,
    output_of,
    run_passes,
    total_flops,
)
from omnifx.passes.eliminate import Eliminate
from omnifx.passes.narrow_linears import NarrowLinears
from omnifx.passes.split_probe import (
    RestoreSpan,
    ResumeTail,
    Split,
    SplitHead,
    WriteResiduals,
    kept_values,
    span_work,
    split_at,
)
from omnifx.passes.write_cuts import WriteCuts
from omnifx.probes import Probe
from omnifx.program import Program
from omnifx.sizes import Sizes


@dataclass
class Stage:
    """One lowered graph of a split step."""

    label: str
    run: Runnable
    extra_inputs: tuple[str, ...]
    extra_values: tuple[Tensor, ...]
    """Fake values of the extra inputs."""
    extra_outputs: tuple[str, ...]
    made: tuple[Any, ...]
    """Fake values of the extra outputs."""
    flops: int
    guards: tuple[sympy.Basic, ...] = ()
    compile_seconds: float = 0.0
    checked: set[Sizes] = field(default_factory=set)


class Stages:
    """A program split at a probe. Raises PassError if it cannot be."""

    def __init__(self, program: Program, probe: Probe) -> None:
        self.program = program
        self.probe = probe
        gm = program.gm
        self.split: Split = split_at(gm, probe) if probe.measure is not None else Split(frozenset(), ())
        self.kept: dict[str, tuple[Tensor, bool]] = {label: (v, every) for label, v, every in kept_values(gm, probe)}
        if not probe.span:
            self.kept |= {f"cut:{name}": (value, False) for name, value in program.cut_values.items()}
        if probe.measure is not None:
            self._check_like()

    @cached_property
    def head(self) -> Stage | None:
        """Measures; None if nothing is measured before a step."""
        if self.probe.measure is None:
            return None
        return self._lower("head", (SplitHead(probe=self.probe, carried=self.split.carried),), own_outputs=0)

    @cached_property
    def full(self) -> Stage:
        """Computes everything behind the head, and returns what later steps need."""
        passes: list[Pass] = [WriteResiduals(probe=self.probe)]
        if not self.probe.span:
            passes.append(WriteCuts(branches=self.program.names))
        if self.head is not None:
            passes.append(ResumeTail(carried=self.split.carried, head=self.split.head))
        passes.append(Eliminate())  # what is kept and not read here
        return self._lower("full", passes)

    @cached_property
    def reuse(self) -> Stage:
        """Restores the trunk behind the span, or reads all cuts."""
        if not self.probe.span:
            variant = self.program.variant(self.program.reusing(self.program.reuse_row, corrects=False))
            return Stage(
                "reuse", variant.run, variant.extra_inputs, variant.extra_values, (), (), variant.flops,
                guards=variant.guards, compile_seconds=variant.compile_seconds,
            )  # fmt: skip
        work = span_work(self.program.gm, self.probe, self.split)
        passes: list[Pass] = [RestoreSpan(probe=self.probe, span=work)]
        if self.head is not None:
            passes.append(ResumeTail(carried=self.split.carried, head=self.split.head))
        return self._lower("reuse", (*passes, NarrowLinears()))

    def feed(self, stage: Stage, args: Sequence[Any], values: Mapping[str, Tensor]) -> list[Any]:
        """The inputs of one run: the model's own, then `values` by label; conditions are computed."""
        if not self.probe.span and stage.label == "reuse":
            variant = self.program.variant(self.program.reusing(self.program.reuse_row, corrects=False))
            return variant.feed(args, values)
        return [*args, *(values[label] for label in stage.extra_inputs)]

    def num_bytes(self, sizes: Sizes) -> int:
        """Bytes that a stream keeps, at these sizes."""
        depth = self.probe.depth
        return sum(sizes.num_bytes(v) * depth(label, every=every) for label, (v, every) in self.kept.items())

    @property
    def compiled(self) -> list[Stage]:
        """The stages that were compiled so far."""
        names = ("head", "full", "reuse") if self.probe.span else ("full",)  # else it is a variant of the whole graph
        made = (self.__dict__.get(name) for name in names)
        return [stage for stage in made if stage is not None]

    def _check_like(self) -> None:
        """The kept values have the shapes that the probe says."""
        gm = clone(self.program.gm)
        SplitHead(probe=self.probe, carried=self.split.carried)(gm)
        made = dict(zip(gm.meta[EXTRA_OUTPUTS], output_of(gm).args[0], strict=True))  # type: ignore[arg-type]
        for keep in self.probe.keeps:
            value, like = made[f"probe:{keep.name}"].meta["val"], self.kept[f"probe:{keep.name}"][0]
            assert tuple(map(str, value.shape)) == tuple(map(str, like.shape)), keep  # a bug of the policy's

    def _lower(self, label: str, passes: Sequence[Pass], *, own_outputs: int | None = None) -> Stage:
        program = self.program
        own_outputs = program.num_outputs if own_outputs is None else own_outputs

        def make() -> Stage:
            gm = clone(program.gm)
            run_passes(gm, passes, label=label)
            labels = tuple(gm.meta.get(EXTRA_INPUTS, ()))
            values = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
            outputs = output_of(gm).args[0]
            return Stage(
                label=label,
                run=program.lowering(gm, program.inputs, num_extra_inputs=len(labels)),
                extra_inputs=labels,
                extra_values=tuple(values[len(values) - len(labels) :]),
                extra_outputs=tuple(gm.meta.get(EXTRA_OUTPUTS, ())),
                made=tuple(node.meta["val"] for node in outputs[own_outputs:]),  # type: ignore[index,union-attr]
                flops=total_flops(gm),
            )

        start = time.perf_counter()
        stage, guards = program.guarded(make)
        return replace(stage, guards=guards, compile_seconds=time.perf_counter() - start)


__all__ = ["Stage", "Stages"]
