"""Compute only those columns of a linear layer that something still uses.

Before:  temb -> addmm(weight [D, 6D]) -> split in 6 -> gate_msa, gate_mlp   (the four shifts and scales are dead)
After:   temb -> addmm(weight[:, 2D:3D]) -> gate_msa ; temb -> addmm(weight[:, 5D:6D]) -> gate_mlp
Numerics: close (1e-6 relative in float32): a narrower matrix product may add up in another order.

In a reuse step the modulation layers are most of the weights that are still read, and two thirds of them are for norms
of branches that are gone. The weight's slices are views: nothing is copied, and a changed parameter is seen.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from omnifx.errors import PassError
from omnifx.flops import hint
from omnifx.graph import Pass, inline
from omnifx.passes.eliminate import has_effects

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class NarrowLinears(Pass):
    """Split products whose result is only used in parts along its last axis."""

    def call(self, gm: fx.GraphModule) -> bool:
        changed = False
        for node in list(gm.graph.nodes):
            parts = _parts(node)
            if parts is None or sum(stop - start for _, start, stop in parts) >= hint(node.meta["val"].shape[1]):
                continue
            for part, start, stop in parts:
                narrow = inline(gm, _columns(node.target, start, stop), list(node.all_input_nodes), before=part)
                narrow.meta = {**part.meta, "val": narrow.meta["val"]}
                part.replace_all_uses_with(narrow)
            changed = True
        if changed:
            gm.graph.eliminate_dead_code(has_effects)
        return changed

    def ensures(self, gm: fx.GraphModule) -> None:
        wasted = [n.name for n in gm.graph.nodes if (parts := _parts(n)) is not None and not parts]
        if wasted:
            raise PassError(f"{self.name}: {wasted} compute columns that nothing uses.")


def _parts(node: fx.Node) -> list[tuple[fx.Node, int, int]] | None:
    """The used parts of a matrix product's columns, as (node that holds the part, start, stop); None if used whole."""
    if node.op != "call_function" or node.target not in (aten.addmm.default, aten.mm.default):
        return None
    if node.kwargs or len(set(node.all_input_nodes)) != len(node.args) or not node.users:
        return None
    width = node.meta["val"].shape[1]
    if not isinstance(width, int):  # which columns a part holds would be true of one size only
        return None
    if node.target is aten.addmm.default and node.args[0].meta["val"].dim() != 1:  # type: ignore[union-attr]
        return None
    found: list[tuple[fx.Node, int, int]] = []
    for user in node.users:
        if user.target is aten.slice.Tensor and user.args[0] is node and user.args[1:2] in ((1,), (-1,)):
            start, stop, step = (*user.args[2:], None, None, None)[:3]
            if step not in (None, 1) or not isinstance(start, int | None) or not isinstance(stop, int | None):
                return None
            first, last, _ = slice(start, stop).indices(width)
            found.append((user, first, last))
        elif user.target is aten.split.Tensor and user.args[0] is node and user.args[2:3] in ((1,), (-1,)):
            size = user.args[1]
            if not isinstance(size, int) or any(part.target is not operator.getitem for part in user.users):
                return None
            for part in user.users:
                first = size * int(part.args[1])  # type: ignore[arg-type]
                found.append((part, first, min(first + size, width)))
        else:
            return None
    return found


def _columns(target: object, start: int, stop: int) -> Callable[..., Tensor]:
    def product(*operands: Tensor) -> Tensor:
        *bias, left, right = operands
        right = right[:, start:stop]
        return torch.addmm(bias[0][start:stop], left, right) if bias else left @ right

    return product
