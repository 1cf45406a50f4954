"""Compute what depends on small inputs alone (timesteps, labels, guidance) in a graph of its own.

Before:  timestep -> embed -> linear (modulation) -> split -> gate -> mul(cached attention) -> add(trunk)
After:   hoisted_gate (an input) -> mul(cached attention) -> add(trunk)
         and a second graph, in ``gm.meta``: timestep -> embed -> linear -> split -> gate -> output
Numerics: bitwise equal in the eager lowering, close (1e-6 relative in float32) where a compiler fuses otherwise.

In a reuse step most of the weights that are still read belong to the modulation: the same values in every generation
with the same timesteps. The second graph runs once for each timestep, and later generations read a table.
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
    """Feed the values at the border of the conditions' graph as inputs labelled ``condition:<node name>``."""

    def requires(self, gm: fx.GraphModule) -> None:
        analysis_of(gm)

    def call(self, gm: fx.GraphModule) -> bool:
        region = _region(gm)
        border = [node for node in region if any(user not in region for user in node.users)]
        if not border or not _pays(gm, region, border):
            return False
        conditions = clone(gm)
        copies = {node.name: node for node in conditions.graph.nodes}
        end = output_of(conditions)
        end.args = (tuple(copies[node.name] for node in border),)
        for key in ("user_visible_output_idxs", "output_stack_traces"):
            end.meta.pop(key, None)
        conditions.meta[EXTRA_OUTPUTS] = [f"condition:{node.name}" for node in border]
        conditions.graph.eliminate_dead_code(_is_end)  # what checks or writes does so in the graph itself, once
        conditions.meta[EXTRA_INPUTS] = []
        for node in reversed([n for n in conditions.graph.nodes if n.op == "placeholder"][_own_inputs(gm) :]):
            conditions.graph.erase_node(node)  # caches: no condition reads them
        conditions.graph.lint()
        conditions.recompile()
        for node in border:
            fed = insert_input(gm, f"hoisted_{node.name}", label=f"condition:{node.name}", like=node.meta["val"])
            for user in [user for user in node.users if user not in region]:
                user.replace_input_with(node, fed)
        gm.graph.eliminate_dead_code(has_effects)
        gm.meta[CONDITIONS] = conditions
        return True

    def ensures(self, gm: fx.GraphModule) -> None:
        if CONDITIONS not in gm.meta:
            return
        promised = gm.meta[CONDITIONS].meta[EXTRA_OUTPUTS]
        fed = [label for label in gm.meta[EXTRA_INPUTS] if label.startswith("condition:")]
        if promised != fed:
            raise PassError(f"{self.name}: the graph reads {fed}, but the conditions' graph returns {promised}.")


def _is_end(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output")


def _own_inputs(gm: fx.GraphModule) -> int:
    """How many of the inputs are the model's own, not caches."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    labels: list[str] = gm.meta.get(EXTRA_INPUTS, [])
    return len(placeholders) - len(labels)


def _region(gm: fx.GraphModule) -> dict[fx.Node, None]:
    """Nodes that depend on small inputs and parameters alone, from the first that costs FLOPs on; in graph order.

    A light node whose value is larger than what it is made from stays behind: it is cheaper made again than read.
    """
    inputs = analysis_of(gm).inputs
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    conditions = {placeholders[i] for i in inputs.small}
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


def _grows(node: fx.Node, region: dict[fx.Node, None]) -> bool:
    """Whether a node at the border is light, and its value is no tensor or larger than the region's values it reads."""
    if all(user in region for user in node.users) or node_flops(node):
        return False
    value = node.meta.get("val")
    inside = [parent for parent in node.all_input_nodes if parent in region]
    return not isinstance(value, torch.Tensor) or num_bytes(value) > sum(num_bytes(p.meta.get("val")) for p in inside)


def _pays(gm: fx.GraphModule, region: dict[fx.Node, None], border: list[fx.Node]) -> bool:
    """Whether reading the border's values takes fewer bytes than reading the weights that make them."""
    if not all(isinstance(node.meta.get("val"), torch.Tensor) for node in border):
        return False
    static = set(analysis_of(gm).inputs.static)
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    weights = [p for i, p in enumerate(placeholders) if i in static and p.users and _only_in(p, region)]
    return sum(num_bytes(node.meta["val"]) for node in border) < sum(num_bytes(w.meta["val"]) for w in weights)


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
