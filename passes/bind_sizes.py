"""Make every size in the graph from the sizes that are its inputs.

Before:  s0 (an input) ; attention -> view -> sym_size(view, 1) -> mul(s0) -> view(mlp)
After:   s0, s1 (inputs) -> mul(s0, s1) -> view(mlp)
Numerics: bitwise equal; sizes are the same whole numbers.

With dynamic shapes a size is often asked of whatever value was at hand. Such an edge says nothing about what depends on
what, yet it would keep a branch alive, or join it with the trunk, for the sake of a number. A graph with static shapes
has no such nodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sympy
import torch
from torch import fx
from torch.fx.proxy import GraphAppendingTracer, Proxy
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from omnifx.errors import PassError
from omnifx.graph import Pass
from omnifx.sizes import free_symbols, symbols_of


@dataclass(frozen=True, kw_only=True)
class BindSizes(Pass):
    """Replace every symbolic whole number that the graph's inputs decide."""

    def call(self, gm: fx.GraphModule) -> bool:
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        symbols = symbols_of(placeholders)
        found = list(_sizes(gm, set(symbols)))
        if not found:
            return False
        tracer = GraphAppendingTracer(gm.graph)
        known: dict[sympy.Basic, Proxy] = {s: Proxy(placeholders[i], tracer) for s, i in symbols.items()}
        made: dict[sympy.Basic, Proxy | int] = {}
        before = set(gm.graph.nodes)
        with gm.graph.inserting_before(next(node for node in gm.graph.nodes if node.op != "placeholder")):
            for node in found:
                expr = node.meta["val"].node.expr
                if expr not in made:
                    made[expr] = sympy_interp(PythonReferenceAnalysis, known, expr)
        for node in gm.graph.nodes:
            if node not in before:
                node.meta["val"] = node.target(*fx.node.map_arg(node.args, lambda arg: arg.meta["val"]))
        for node in found:
            size = made[node.meta["val"].node.expr]
            _replace(node, size.node if isinstance(size, Proxy) else int(size))
            gm.graph.erase_node(node)
        return True

    def ensures(self, gm: fx.GraphModule) -> None:
        symbols = symbols_of([node for node in gm.graph.nodes if node.op == "placeholder"])
        if asked := [node.name for node in _sizes(gm, set(symbols)) if _reads_tensors(node)]:
            raise PassError(f"{self.name}: {asked} still ask tensors for their sizes.")


def _sizes(gm: fx.GraphModule, symbols: set[sympy.Symbol]) -> Iterator[fx.Node]:
    """Nodes that hold a whole number made of these symbols; users come before what they use."""
    for node in reversed(gm.graph.nodes):
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, torch.SymInt) and free_symbols(value) <= symbols:
            yield node


def _reads_tensors(node: fx.Node) -> bool:
    return any(isinstance(parent.meta.get("val"), torch.Tensor) for parent in node.all_input_nodes)


def _replace(node: fx.Node, size: fx.Node | int) -> None:
    if isinstance(size, fx.Node):
        node.replace_all_uses_with(size)
        return
    for user in list(node.users):
        user.args, user.kwargs = fx.node.map_arg((user.args, user.kwargs), lambda arg: size if arg is node else arg)
