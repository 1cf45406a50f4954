"""Remove what `torch.export` leaves behind and no target wants: checks, copies that copy nothing, work done twice.

Before:  x -> _assert_tensor_metadata ; x -> clone -> squeeze (an axis that is not 1) -> linear ; x -> view, x -> view
After:   x -> linear ; x -> view
Numerics: bitwise equal.

Checks of metadata and dropout at rest count as uses, so that a cut would free nothing. A squeeze that squeezes nothing
becomes an ONNX Squeeze that onnxruntime refuses. Equal nodes are computed once, as in a graph that went through
Inductor's joint passes, so that branches have the same names and cuts there and here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch.compile_utils import fx_graph_cse

from omnifx.graph import Pass, argument_of

aten = torch.ops.aten

_CHECKS = {aten._assert_tensor_metadata, aten._assert_async, aten._assert_scalar, aten.sym_constrain_range_for_size}
_SAME_IF_SHAPED = {
    aten.clone, aten.alias, aten.detach, aten.view, aten._unsafe_view, aten.reshape, aten.expand, aten.squeeze,
    aten.slice, aten._to_copy, aten.lift_fresh_copy,
}  # fmt: skip
"""Operators that give their operand, if that has the shape, type and strides of the result."""


@dataclass(frozen=True, kw_only=True)
class CleanCapture(Pass):
    """Drop checks and operators without effect, and compute equal nodes once."""

    def call(self, gm: fx.GraphModule) -> bool:
        before = len(gm.graph.nodes)
        for node in list(gm.graph.nodes):
            if _packet(node) in _CHECKS and not node.users:
                gm.graph.erase_node(node)
            elif _does_nothing(node):
                node.replace_all_uses_with(node.args[0])
                gm.graph.erase_node(node)
        gm.graph = fx_graph_cse(gm.graph)
        return len(gm.graph.nodes) != before


def _packet(node: fx.Node) -> object:
    return getattr(node.target, "overloadpacket", None) if node.op == "call_function" else None


def _does_nothing(node: fx.Node) -> bool:
    """Whether a node's value is its first operand."""
    packet, operand = _packet(node), node.args[0] if node.args else None
    if not isinstance(operand, fx.Node) or operand.op == "output":
        return False
    value, given = node.meta.get("val"), operand.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(given, Tensor):
        return False
    if (value.shape, value.dtype, value.device) != (given.shape, given.dtype, given.device):
        return False
    if packet in (aten.mul, aten.div):
        return len(node.args) == 2 and _is_one(node.args[1]) and not node.kwargs
    if packet is aten.permute:
        return [int(d) % value.dim() for d in argument_of(node, "dims")] == list(range(value.dim()))
    if packet is aten.slice and argument_of(node, "step", 1) != 1:
        return False
    return packet in _SAME_IF_SHAPED and value.stride() == given.stride()


def _is_one(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == 1


__all__ = ["CleanCapture"]
