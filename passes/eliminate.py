"""Remove what nothing needs: dead nodes, and cache inputs that no live node reads.

Before:  x -> proj (unused) ; cached_ff (unused input)
After:   neither; the model's own inputs all stay, in their order
Numerics: bitwise equal.
"""

from dataclasses import dataclass

import torch
from torch import fx

from omnifx.errors import PassError
from omnifx.graph import EXTRA_INPUTS, Pass, branches_of, node_flops, nodes_by_name

aten = torch.ops.aten


def has_effects(node: fx.Node) -> bool:
    """Whether a node must stay although nobody uses its value: it writes to an input, or checks or reports something.

    fx also takes operators that may draw random numbers for impure, fused attention among them; a dead one may go.
    """
    if node.op in ("placeholder", "output"):
        return True
    if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        if node.target is aten._assert_tensor_metadata.default:
            return False
        return node.target._schema.is_mutable or not node.target._schema.returns or "assert" in node.target.name()
    return node.is_impure()


@dataclass(frozen=True, kw_only=True)
class Eliminate(Pass):
    """Dead-code elimination that also drops unread cache inputs."""

    freed: tuple[str, ...] = ()  # branches that must be gone afterwards

    def call(self, gm: fx.GraphModule) -> bool:
        before = len(gm.graph.nodes)
        gm.graph.eliminate_dead_code(has_effects)
        labels = list(gm.meta.get(EXTRA_INPUTS, ()))
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        for node, label in list(zip(placeholders[len(placeholders) - len(labels) :], labels, strict=True)):
            if not node.users:
                labels.remove(label)
                gm.graph.erase_node(node)
        gm.meta[EXTRA_INPUTS] = labels
        return len(gm.graph.nodes) != before

    def ensures(self, gm: fx.GraphModule) -> None:
        nodes, branches = nodes_by_name(gm), branches_of(gm) if self.freed else {}
        alive = [h for name in self.freed for h in branches[name].heavy if h in nodes and node_flops(nodes[h])]
        if alive:
            raise PassError(f"{self.name}: {alive} should be dead, but something outside the branch uses them.")
