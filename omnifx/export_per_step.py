"""One graph for each step: the numbers and constants of every step move into graphs of its own.

For targets that take no further inputs, and for looking at a step. Weights are shared as before.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from omnifx.bundle import Run, Source
from omnifx.export_graphs import Graph
from omnifx.export_schedule import Schedule
from omnifx.graph import clone


def one_graph_a_step(schedule: Schedule) -> Schedule:
    """The same schedule, with the constants of every step inside of graphs of its own."""
    graphs = {name: schedule.graphs[name] for name in dict.fromkeys(run.variant for run in schedule.prologue)}
    steps = []
    for k, step in enumerate(schedule.steps):
        runs = []
        for number, run in enumerate(step.runs):
            graph = schedule.graphs[run.variant]
            fixed = {name: source for name, source in run.inputs.items() if _is_fixed(source)}
            name = f"step{k:03d}_{number}_{graph.name}" if fixed else graph.name
            if fixed:
                values = {
                    p.name: _fixed_value(fixed[p.name], p.value, schedule) for p in graph.inputs if p.name in fixed
                }
                graph = _bake(graph, values, name)
            graphs[name] = graph
            inputs = {key: source for key, source in run.inputs.items() if key not in fixed}
            runs.append(Run(variant=name, inputs=inputs, outputs=run.outputs))
        steps.append(step.model_copy(update={"runs": tuple(runs)}))
    return Schedule(schedule.prologue, tuple(steps), graphs, schedule.buffers, {})


def _is_fixed(source: Source) -> bool:
    return source.constant is not None or source.numbers is not None or source.fill is not None


def _fixed_value(source: Source, like: Tensor, schedule: Schedule) -> Tensor:
    if source.constant is not None:
        return schedule.constants[source.constant]
    if source.numbers is not None:
        return torch.tensor(source.numbers, dtype=like.dtype)
    return torch.full(tuple(like.shape), source.fill or 0.0, dtype=like.dtype)


def _bake(graph: Graph, values: Mapping[str, Tensor], name: str) -> Graph:
    """The graph with some inputs among its parameters."""
    gm = clone(graph.gm)
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    own = dict(zip((port.name for port in graph.inputs), placeholders[len(graph.state) :], strict=True))
    first = placeholders[len(graph.state)]
    state = list(graph.state)
    for port in graph.inputs:
        if port.name in values:
            with gm.graph.inserting_before(first):
                fixed = gm.graph.placeholder(f"baked_{own[port.name].name}")
            fixed.meta = dict(own[port.name].meta)
            own[port.name].replace_all_uses_with(fixed)
            if own[port.name] is first:
                first = first.next
            gm.graph.erase_node(own[port.name])
            device = own[port.name].meta["val"].device
            state.append((f"baked.{own[port.name].name}", values[port.name].to(device)))
    gm.recompile()
    inputs = tuple(port for port in graph.inputs if port.name not in values)
    return Graph(name, gm, inputs, graph.outputs, graph.label, graph.spec, graph.dropped, None, tuple(state))


__all__ = ["one_graph_a_step"]
