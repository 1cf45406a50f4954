"""Compute what depends on small inputs alone (timesteps, labels, guidance) in a graph of its own.

Before:  timestep -> embed -> linear (modulation) -> split -> gate -> mul(cached attention) -> add(trunk)
After:   hoisted_gate (an input) -> mul(cached attention) -> add(trunk)
         and a second graph, in ``gm.meta``: timestep -> embed -> linear -> split -> gate -> output
Numerics: bitwise equal in the eager lowering, close (1e-6 relative in float32) where a compiler fuses otherwise.

In a reuse step most of the weights that are still read belong to the modulation: the same values in every generation
with the same timesteps. The second graph runs once for each timestep, and later generations read a table.

An export names the inputs that the second graph may read: the timestep alone, whose values are known by then, or what
stays the same in a generation. These graphs are made for what they save, not for the bytes they read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from omnifx.errors import PassError
from omnifx.graph import (
    CONDITIONS,
    EXTRA_INPUTS,
    EXTRA_OUTPUTS,
    Pass,
    analysis_of,
    clone,
    insert_input,
    node_flops,
    num_bytes,
    output_of,
)
from omnifx.passes.eliminate import has_effects


@dataclass(frozen=True, kw_only=True)
class HoistConditions(Pass):
    """Feed the values at the border of the conditions' graph as inputs labelled ``<kind>:<node name>``."""

    inputs: tuple[str, ...] | None = None  # names of what the conditions' graph may read; None: the small inputs
    kind: str = "condition"  # the word in the labels, and what tells several such graphs of one graph apart
    always: bool = False  # whether also where reading the values takes more bytes than reading the weights

    def requires(self, gm: fx.GraphModule) -> None:
        analysis_of(gm)

    def call(self, gm: fx.GraphModule) -> bool:
        region = _region(gm, self._sources(gm))
        if self.always:
            region = _leanest(region)
        border = _border(region)
        if not border or not all(map(_is_tensor, border)) or not (self.always or _pays(gm, region, border)):
            return False
        conditions = clone(gm)
        copies = {node.name: node for node in conditions.graph.nodes}
        end = output_of(conditions)
        end.args = (tuple(copies[node.name] for node in border),)
        for key in ("user_visible_output_idxs", "output_stack_traces"):
            end.meta.pop(key, None)
        conditions.meta[EXTRA_OUTPUTS] = [f"{self.kind}:{node.name}" for node in border]
        conditions.graph.eliminate_dead_code(_is_end)  # what checks or writes does so in the graph itself, once
        labels: list[str] = gm.meta.get(EXTRA_INPUTS, [])
        extra = [n for n in conditions.graph.nodes if n.op == "placeholder"][_own_inputs(gm) :]
        conditions.meta[EXTRA_INPUTS] = [label for n, label in zip(extra, labels, strict=True) if n.users]
        for node in extra:
            if not node.users:  # caches: no condition reads them
                conditions.graph.erase_node(node)
        conditions.graph.lint()
        conditions.recompile()
        for node in border:
            name = "hoisted" if self.kind == "condition" else self.kind
            fed = insert_input(gm, f"{name}_{node.name}", label=f"{self.kind}:{node.name}", like=node.meta["val"])
            for user in [user for user in node.users if user not in region]:
                user.replace_input_with(node, fed)
        gm.graph.eliminate_dead_code(has_effects)
        gm.meta[hoisted_key(self.kind)] = conditions
        return True

    def ensures(self, gm: fx.GraphModule) -> None:
        if (key := hoisted_key(self.kind)) not in gm.meta:
            return
        promised = gm.meta[key].meta[EXTRA_OUTPUTS]
        fed = [label for label in gm.meta[EXTRA_INPUTS] if label.startswith(f"{self.kind}:")]
        if promised != fed:
            raise PassError(f"{self.name}: the graph reads {fed}, but the conditions' graph returns {promised}.")

    def _sources(self, gm: fx.GraphModule) -> set[fx.Node]:
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        if self.inputs is None:
            return {placeholders[i] for i in analysis_of(gm).inputs.small}
        return {node for node in placeholders if node.name in self.inputs}


def hoisted_key(kind: str) -> str:
    """Where in ``gm.meta`` the graph of what was hoisted is left."""
    return CONDITIONS if kind == "condition" else f"{CONDITIONS}_{kind}"


def _is_end(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output")


def _own_inputs(gm: fx.GraphModule) -> int:
    """How many of the inputs are the model's own, not caches."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    labels: list[str] = gm.meta.get(EXTRA_INPUTS, [])
    return len(placeholders) - len(labels)


def _region(gm: fx.GraphModule, conditions: set[fx.Node]) -> dict[fx.Node, None]:
    """Nodes that depend on some inputs and parameters alone, from the first that costs FLOPs on; in graph order.

    A light node whose value is larger than what it is made from stays behind: it is cheaper made again than read.
    """
    inputs = analysis_of(gm).inputs
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    known = conditions | {placeholders[i] for i in (*inputs.static, *inputs.sizes)}
    varying, below = set(conditions), set()
    region: dict[fx.Node, None] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function" or has_effects(node) or _draws(node):
            continue
        parents = node.all_input_nodes
        if not all(parent in known for parent in parents):
            continue
        known.add(node)
        if any(parent in varying for parent in parents):
            varying.add(node)
            if node_flops(node) or any(parent in below for parent in parents):
                below.add(node)
                region[node] = None
    while larger := [node for node in region if _grows(node, region)]:
        for node in larger:
            del region[node]
    return region


def _draws(node: fx.Node) -> bool:
    """Whether the operator draws random numbers."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _border(region: dict[fx.Node, None]) -> list[fx.Node]:
    """The nodes of a region that something outside of it reads."""
    return [node for node in region if any(user not in region for user in node.users)]


def _leanest(region: dict[fx.Node, None]) -> dict[fx.Node, None]:
    """The region, or what of it leads to nodes that cost FLOPs, whichever gives fewer bytes."""
    kept: dict[fx.Node, None] = {}
    for node in reversed(region):
        if node_flops(node) or any(user in kept for user in node.users):
            kept[node] = None
    kept = dict.fromkeys(reversed(kept))
    sizes = [sum(num_bytes(node.meta.get("val")) for node in _border(nodes)) for nodes in (kept, region)]
    return kept if sizes[0] < sizes[1] and all(map(_is_tensor, _border(kept))) else region


def _grows(node: fx.Node, region: dict[fx.Node, None]) -> bool:
    """Whether a node at the border is light, and its value is no tensor or larger than the region's values it reads."""
    if all(user in region for user in node.users) or node_flops(node):
        return False
    value = node.meta.get("val")
    inside = [parent for parent in node.all_input_nodes if parent in region]
    return not isinstance(value, torch.Tensor) or num_bytes(value) > sum(num_bytes(p.meta.get("val")) for p in inside)


def _pays(gm: fx.GraphModule, region: dict[fx.Node, None], border: list[fx.Node]) -> bool:
    """Whether reading the border's values takes fewer bytes than reading the weights that make them."""
    static = set(analysis_of(gm).inputs.static)
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    weights = [p for i, p in enumerate(placeholders) if i in static and p.users and _only_in(p, region)]
    return sum(num_bytes(node.meta["val"]) for node in border) < sum(num_bytes(w.meta["val"]) for w in weights)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _only_in(weight: fx.Node, region: dict[fx.Node, None]) -> bool:
    """Whether everything made from a weight alone ends in the region."""
    work, seen = list(weight.users), set()
    while work:
        node = work.pop()
        if node in region or node in seen:
            continue
        seen.add(node)
        if node.op == "output" or not set(node.all_input_nodes) <= seen | {weight}:
            return False
        work += node.users
    return True
