"""The graphs of a bundle: variants as the plan asks for them, without what is known before a step.

From every variant two things are taken out. What the timestep alone decides is computed now, for each step that needs
it, and becomes a constant of that step. What step-invariant inputs alone decide goes to the prologue, a graph that runs
once for each stream. Of variants that reuse anything, what both decide together (modulation by timestep and label)
becomes a graph of its own, if that saves reading weights: it runs before the variant, in the same step.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from omnifx.errors import ExportError
from omnifx.export_capture import Captured
from omnifx.graph import (
    EXTRA_INPUTS,
    EXTRA_OUTPUTS,
    clone,
    nodes_by_name,
    num_bytes,
    output_of,
    run_passes,
    total_flops,
)
from omnifx.passes.eliminate import Eliminate
from omnifx.passes.hoist_conditions import HoistConditions, hoisted_key
from omnifx.passes.pipeline import VariantSpec, pipeline
from omnifx.plan import reuses
from omnifx.prior import cut_key
from omnifx.program import Program

TIMESTEP, INVARIANT, CONDITION = "timestep", "invariant", "condition"
MOST_TOKENS = 3840
"""Most values that TensorRT chooses at once."""


@dataclass(frozen=True)
class Port:
    """An input or output of a graph."""

    name: str
    """What the exported file calls it."""
    label: str
    """``call:<path>``, ``output:<position>``, or as the passes label it."""
    value: Tensor
    """Fake: shape and type."""


@dataclass(frozen=True, eq=False)
class Graph:
    """One static graph of a bundle. Its module takes the model's parameters, then `inputs`."""

    name: str
    gm: fx.GraphModule
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    label: str = ""
    spec: VariantSpec | None = None
    dropped: tuple[str, ...] = ()
    conditions: Graph | None = None
    """What must run before it in the same step."""
    state: tuple[tuple[str, Tensor], ...] = ()
    """The parameters that the module takes, by name; those that it does not use among them."""

    @property
    def flops(self) -> int:
        """FLOPs of one run."""
        return total_flops(self.gm)

    @property
    def params(self) -> tuple[str, ...]:
        """Names of the parameters that it reads."""
        placeholders = [node for node in self.gm.graph.nodes if node.op == "placeholder"]
        pairs = zip(self.state, placeholders, strict=False)
        return tuple(name for (name, _), node in pairs if node.users)

    @property
    def params_bytes(self) -> int:
        """Bytes of these."""
        used = set(self.params)
        return sum(num_bytes(tensor) for name, tensor in self.state if name in used)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run it in PyTorch, operator by operator; values by the names of the ports."""
        with torch.no_grad():
            values = self.gm(*(tensor for _, tensor in self.state), *(inputs[port.name] for port in self.inputs))
        return {port.name: value for port, value in zip(self.outputs, values, strict=True)}


@dataclass
class GraphMaker:
    """Makes the graphs of one captured model.

    Args:
        program: What was found in the captured graph.
        captured: The capture itself.
        times: Paths of the arguments that hold the timestep.
        varying: Paths of further arguments that change from step to step, beside the latents.
        conditions: Whether variants that reuse may get a graph of conditions.
    """

    program: Program
    captured: Captured
    times: tuple[str, ...]
    varying: tuple[str, ...] = ()
    conditions: bool = True
    graphs: dict[VariantSpec, Graph] = field(default_factory=dict)
    _invariants: dict[str, None] = field(default_factory=dict)
    _timed: dict[str, fx.GraphModule] = field(default_factory=dict)
    _tables: dict[tuple[str, float], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        inputs = self.program.analysis.inputs
        names, plain = inputs.names, inputs.plain_names
        moving = {i for i in (inputs.latents, *inputs.further_latents) if i is not None}
        own = [i for i in range(len(names)) if i not in self.captured.static]
        self._time_nodes = tuple(names[i] for i in own if plain[i] in self.times)
        self._invariant_nodes = tuple(
            names[i] for i in own if i not in moving and plain[i] not in (*self.times, *self.varying)
        )
        held = {
            name: f"{branch.name}:held{i}"
            for branch in self.program.branches
            if branch.tokens is not None
            for i, name in enumerate(branch.tokens.held)
        }
        self._keys = held | self.program.cut_keys

    @property
    def invariants(self) -> tuple[str, ...]:
        """Paths of the arguments that must not change in a generation."""
        inputs = self.program.analysis.inputs
        plain = dict(zip(inputs.names, inputs.plain_names, strict=True))
        return tuple(plain[name] for name in self._invariant_nodes)

    def make(self, spec: VariantSpec) -> Graph:
        """The variant's graph; made once.

        Raises: ExportError if it chooses more tokens than targets can.
        """
        if spec not in self.graphs:
            if (most := max((k for _, k in spec.partial), default=0)) > MOST_TOKENS:
                raise ExportError(
                    f"export: the plan computes {most} tokens of a branch; TensorRT chooses {MOST_TOKENS} at most. "
                    "Plan with fewer tokens, or reuse the branch whole."
                )
            self.graphs[spec] = self._make(spec)
        return self.graphs[spec]

    def _make(self, spec: VariantSpec) -> Graph:
        gm = clone(self.program.gm)
        folds = (
            HoistConditions(inputs=self._time_nodes, kind=TIMESTEP, always=True),
            HoistConditions(inputs=self._invariant_nodes, kind=INVARIANT, always=True),
        )
        run_passes(gm, pipeline(spec, self.program.grids, hoists=False, folds=folds), label=spec.label)
        if (spec.cached or spec.partial) and not spec.skips and self.conditions:
            known = (*self._time_nodes, *self._invariant_nodes, *_hoisted_nodes(gm))
            run_passes(gm, (HoistConditions(inputs=known, kind=CONDITION),), label=spec.label)
        Eliminate()(gm)
        if (timed := gm.meta.get(hoisted_key(TIMESTEP))) is not None:
            for label in timed.meta[EXTRA_OUTPUTS]:
                self._timed.setdefault(label.partition(":")[2], timed)
        if (fixed := gm.meta.get(hoisted_key(INVARIANT))) is not None:
            self._invariants |= dict.fromkeys(label.partition(":")[2] for label in fixed.meta[EXTRA_OUTPUTS])
        before = gm.meta.get(hoisted_key(CONDITION))
        name = self._name(spec)
        conditions = None
        if before is not None:
            conditions = self.finish(before, f"{name}.conditions", label=f"conditions of {spec.label}", outputs=0)
        return self.finish(
            gm, name, label=spec.label, outputs=self.program.num_outputs, spec=spec, conditions=conditions
        )

    def prologue(self) -> Graph | None:
        """What all variants made so far read of step-invariant inputs; None if nothing."""
        if not self._invariants:
            return None
        gm = clone(self.program.gm)
        nodes = nodes_by_name(gm)
        output_of(gm).args = (tuple(nodes[name] for name in self._invariants),)
        gm.meta[EXTRA_OUTPUTS] = [f"{INVARIANT}:{name}" for name in self._invariants]
        gm.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        gm.recompile()
        return self.finish(gm, "prologue", label="prologue", outputs=0)

    def table(self, node: str, timestep: float) -> Tensor:
        """What a node holds that the timestep alone decides, contiguous."""
        if (node, timestep) not in self._tables:
            gm = self._timed[node]
            values = {leaf.name: leaf.value for leaf in self.captured.leaves}
            args = [torch.full_like(values[name], timestep) if name in self.times else None for name in values]
            with torch.no_grad():
                found = gm(*(tensor for _, tensor in self.captured.state), *args)
            for label, value in zip(gm.meta[EXTRA_OUTPUTS], found, strict=True):
                self._tables[label.partition(":")[2], timestep] = value.contiguous()
        return self._tables[node, timestep]

    def finish(
        self,
        gm: fx.GraphModule,
        name: str,
        *,
        label: str,
        outputs: int,
        spec: VariantSpec | None = None,
        conditions: Graph | None = None,
    ) -> Graph:
        """Name the inputs and outputs of a graph, and drop the arguments that it does not read."""
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        first = len(self.captured.state)
        own = placeholders[first : first + len(self.captured.leaves)]
        inputs, dropped = [], []
        for node, leaf in zip(own, self.captured.leaves, strict=True):
            if node.users:
                inputs.append(Port(leaf.name, f"call:{leaf.name}", node.meta["val"]))
            else:
                dropped.append(leaf.name)
                gm.graph.erase_node(node)
        extra = placeholders[first + len(own) :]
        for node, tag in zip(extra, gm.meta.get(EXTRA_INPUTS, ()), strict=True):
            name_here = self._named(tag)
            twins = sum(port.label == tag for port in inputs)  # a square grid has one low pass for both axes
            inputs.append(Port(f"{name_here}#{twins}" if twins else name_here, tag, node.meta["val"]))
        given: Sequence[fx.Node] = output_of(gm).args[0]  # type: ignore[assignment]
        tags = [*(f"output:{i}" for i in range(outputs)), *gm.meta.get(EXTRA_OUTPUTS, ())]
        found = [
            Port(tag if i < outputs else f"new {self._named(tag)}", tag, node.meta["val"])
            for i, (tag, node) in enumerate(zip(tags, given, strict=True))
        ]
        gm.recompile()
        return Graph(
            name, gm, tuple(inputs), tuple(found), label, spec, tuple(dropped), conditions, self.captured.state
        )

    def cut_name(self, cut: str) -> str:
        """What users call a cached value: its branch and number."""
        return self._keys.get(cut, cut)

    def _named(self, label: str) -> str:
        kind, _, rest = label.partition(":")
        cut, at, age = rest.partition("@")
        return f"{kind}:{self.cut_name(cut)}{at}{age}" if rest else kind

    def _name(self, spec: VariantSpec) -> str:
        """A name for files: the label, numbered where several variants share it."""
        plain = "".join(c if c.isalnum() or c in "-." else "_" for c in (spec.label if reuses(spec.row) else "full"))
        taken = {graph.name for graph in self.graphs.values()}
        numbered = (f"{plain}_{i}" for i in itertools.count(2))
        return next(name for name in itertools.chain((plain,), numbered) if name not in taken)


def _hoisted_nodes(gm: fx.GraphModule) -> list[str]:
    """Names of the inputs that hold what was hoisted before."""
    labels: list[str] = gm.meta.get(EXTRA_INPUTS, [])
    extra = [node for node in gm.graph.nodes if node.op == "placeholder"][-len(labels) :] if labels else []
    kinds = (f"{TIMESTEP}:", f"{INVARIANT}:")
    return [node.name for node, label in zip(extra, labels, strict=True) if label.startswith(kinds)]


def difference_graph(like: Tensor) -> Graph:
    """The graph ``a - b`` for two values like this one: the noise of a replayed step."""
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    difference = graph.call_function(torch.ops.aten.sub.Tensor, (a, b))
    for node in (a, b, difference):
        node.meta["val"] = like
    graph.output((difference,))
    shape = "x".join(map(str, like.shape))
    ports = [Port(name, name, like) for name in ("a", "b", "a - b")]
    gm = fx.GraphModule(torch.nn.Module(), graph)
    return Graph(f"difference_{shape}", gm, (ports[0], ports[1]), (ports[2],), "difference")


__all__ = [
    "CONDITION",
    "INVARIANT",
    "MOST_TOKENS",
    "TIMESTEP",
    "Graph",
    "GraphMaker",
    "Port",
    "cut_key",
    "difference_graph",
]
