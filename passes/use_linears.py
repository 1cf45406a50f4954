"""Turn matrix products with transposed weights back into linear layers, and compute what parameters alone decide.

Before:  weight -> permute -> slice -> addmm(bias, x)        pos_embed -> mul(2)
After:   weight[a:b] (a new parameter) -> linear(x, bias)    doubled (a new parameter)
Numerics: bitwise equal, but for products whose operand is laid out in another way: close (1e-6 relative in float32).

A converter makes one Gemm of a linear layer, which reads the weight as the model holds it. Of a transposed weight it
makes a second copy, for every graph another one. What would be larger than what it is made from stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from omnifx.graph import SMALL, Pass, num_bytes, numel

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class UseLinears(Pass):
    """Runs on a graph whose parameters are attributes (`get_attr`) of the module."""

    def call(self, gm: fx.GraphModule) -> bool:
        changed = False
        for node in list(gm.graph.nodes):
            if node.op == "call_function" and node.target in (aten.addmm.default, aten.mm.default):
                changed |= self._linear(gm, node)
        return self._fold(gm) or changed

    def _linear(self, gm: fx.GraphModule, node: fx.Node) -> bool:
        """``addmm(bias, x, right)`` as ``linear(x, right.T, bias)``, where `right` is made from parameters."""
        *bias, left, right = node.args
        assert isinstance(right, fx.Node)
        if node.kwargs or not _static(right) or not all(isinstance(b, fx.Node) and _is_vector(b) for b in bias):
            return False
        with gm.graph.inserting_before(node):
            weight = _transposed(gm, right)
            linear = gm.graph.call_function(aten.linear.default, (left, weight, *bias))
        linear.meta = dict(node.meta)
        node.replace_all_uses_with(linear)
        gm.graph.erase_node(node)
        return True

    def _fold(self, gm: fx.GraphModule) -> bool:
        """Replace what parameters alone decide by new parameters."""
        known: set[fx.Node] = set()
        for node in gm.graph.nodes:
            plain = node.op == "get_attr" or (node.op == "call_function" and _is_plain(node))
            if plain and all(parent in known for parent in node.all_input_nodes):
                known.add(node)
        ends = [n for n in known if n.op == "call_function" and any(user not in known for user in n.users)]
        folded = [node for node in ends if _fits(node)]
        for number, node in enumerate(sorted(folded, key=list(gm.graph.nodes).index)):
            value = _evaluate(gm, node)
            name = f"folded_{number}_{node.name}"
            gm.register_buffer(name, value)
            with gm.graph.inserting_before(node):
                constant = gm.graph.create_node("get_attr", name, name=name)
            constant.meta = {"val": node.meta["val"]}
            for user in [user for user in node.users if user not in known or user in ends]:
                user.replace_input_with(node, constant)
        gm.graph.eliminate_dead_code()
        return bool(folded)


def _transposed(gm: fx.GraphModule, right: fx.Node) -> fx.Node:
    """The transpose of a matrix; of one that was transposed, and perhaps cut in columns, what it was made from."""
    operand = right.args[0] if right.args else None
    if right.target is aten.permute.default and isinstance(operand, fx.Node):
        return operand
    if right.target is aten.slice.Tensor and isinstance(operand, fx.Node) and right.args[1:2] == (1,):
        rows = gm.graph.call_function(aten.slice.Tensor, (_transposed(gm, operand), 0, *right.args[2:]))
        rows.meta = {"val": right.meta["val"].t()}
        return rows
    weight = gm.graph.call_function(aten.permute.default, (right, [1, 0]))
    weight.meta = {"val": right.meta["val"].t()}
    return weight


def _static(node: fx.Node) -> bool:
    return node.op == "get_attr" or (
        node.op == "call_function" and _is_plain(node) and bool(node.args) and all(map(_static, node.all_input_nodes))
    )


def _is_plain(node: fx.Node) -> bool:
    """Whether an operator gives one tensor, and the same one every time."""
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded not in target.tags
        and isinstance(node.meta.get("val"), Tensor)
        and not target._schema.is_mutable
    )


def _is_vector(node: fx.Node) -> bool:
    value: Tensor = node.meta["val"]
    return value.dim() == 1


def _fits(node: fx.Node) -> bool:
    value = node.meta["val"]
    if numel(value) <= SMALL:
        return True
    seen, work, size = set(), [node], 0
    while work:
        current = work.pop()
        if current in seen:
            continue
        seen.add(current)
        size += num_bytes(current.meta["val"]) if current.op == "get_attr" else 0
        work += current.all_input_nodes
    return num_bytes(value) <= size


def _evaluate(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    """The value of a node that parameters alone decide."""
    if node.op == "get_attr":
        found: Tensor = (
            gm.get_parameter(str(node.target)) if _is_parameter(gm, node) else gm.get_buffer(str(node.target))
        )
        return found.detach()
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: _evaluate(gm, arg))
    with torch.no_grad():
        value: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return value


def _is_parameter(gm: fx.GraphModule, node: fx.Node) -> bool:
    path, _, name = str(node.target).rpartition(".")
    return name in gm.get_submodule(path)._parameters


__all__ = ["UseLinears"]
