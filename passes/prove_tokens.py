"""Prove which branches work token by token, so that a step may compute them for some of their tokens only.

Before:  an analysed graph
After:   the same graph; each cacheable branch of its analysis has its `Tokens`, or the reason why it has none
Numerics: bitwise equal; the graph is only read.

How. The cut of a branch is asked for some rows of its token axis. `_demands` says for each operator which part of each
operand decides these rows: rows of an axis again (linear layers, norms over channels, elementwise work, views that keep
the axis), or all of it (weights, what is broadcast along the tokens, keys and values of an attention). The walk goes up
from the cut through those nodes that nothing else needs and that depend on the latents. It fails where such a node is
needed whole: at a self-attention's keys, a convolution, a mean over the tokens, or a view that splits their axis.
Everything else is computed for all tokens anyway (the trunk) or does not depend on them (modulations, a text's keys),
and its rows are gathered where it has any. A parallel branch joins an attention with an MLP before one projection: the
attention's output is *held* in the cache for it, as its keys need every token.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx

from omnifx.errors import PassError
from omnifx.flops import is_attention, node_flops, num_bytes
from omnifx.graph import (
    ANALYSIS,
    EXTRA_INPUTS,
    Analysis,
    BitSets,
    Branch,
    Pass,
    Tokens,
    TokenSource,
    analysis_of,
    argument_of,
    dead_without,
    nodes_by_name,
)

aten = torch.ops.aten

LOOKS_AT_ITSELF = ("self_attention", "joint_attention", "parallel")
"""Kinds of branches whose attention has a branch's tokens among its keys."""


# -- layouts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factor:
    """Part of an axis, outermost first: [B * N, D] has an axis of the factors batch and token, and one of another.

    The first of `size` entries that are asked for is the `start`-th of the `of` that are there. A batch of which one
    entry is there, but more are asked for, is broadcast.
    """

    tag: Literal["batch", "token", ""]
    size: int
    start: int
    of: int


Axis = tuple[Factor, ...]
Layout = tuple[Axis, ...]
"""The factors of each axis of a value; an axis of length 1 has none."""


class _Refused(Exception):
    """A value does not keep its tokens apart; never leaves this file."""


def _plain(size: int) -> Axis:
    return (Factor("", size, 0, size),) if size != 1 else ()


def _length(axis: Axis) -> int:
    return math.prod(factor.of for factor in axis)


def _has(layout: Sequence[Axis], tag: str) -> bool:
    return any(factor.tag == tag for axis in layout for factor in axis)


def shape_with(layout: Layout, k: int) -> tuple[int, ...]:
    """The shape of a value in which `k` tokens are left."""
    return tuple(math.prod(k if factor.tag == "token" else factor.size for factor in axis) for axis in layout)


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise _Refused(f"{node.name} is no tensor")
    if not all(isinstance(size, int) for size in value.shape):
        raise _Refused("its sizes are symbolic, but how many tokens are computed is fixed when a variant is compiled")
    return tuple(value.shape)


def _broadcast(shape: Sequence[int], layout: Layout) -> Layout | None:
    """What is asked of an operand of this shape by an elementwise operator; None if it has no token axis.

    The layout may have more axes than the operand, in front.
    """
    missing = len(layout) - len(shape)
    axes: list[Axis] = []
    for axis, size in zip(layout, (*[1] * missing, *shape), strict=True):
        if size == _length(axis):
            axes.append(axis)
        elif size == 1:
            axes.append(tuple(replace(f, start=0, of=1) for f in axis if f.tag == "batch"))
        else:
            raise _Refused("its sizes do not broadcast")
    return tuple(axes) if _has(axes, "token") else None


def _regroup(node: fx.Node, factors: Sequence[Factor], shape: Sequence[int]) -> Layout:
    """The same factors in the same order on the axes of another shape."""
    rest, axes = list(factors), []
    for size in shape:
        axis: list[Factor] = []
        while size > 1:
            first = rest.pop(0)
            if size % first.of == 0:
                axis.append(first)
                size //= first.of
            elif not first.tag and first.of % size == 0:
                axis += _plain(size)
                rest[:0] = _plain(first.of // size)
                size = 1
            else:
                word = {"token": "the token axis", "batch": "the batch axis", "": "an axis"}[first.tag]
                raise _Refused(f"{node.name} reshapes {word}")
        axes.append(_merged(axis))
    return tuple(axes)


def _merged(axis: Sequence[Factor]) -> Axis:
    """The same axis with neighbouring factors of no tag as one: heads and their width, say."""
    found: list[Factor] = []
    for factor in axis:
        if found and not found[-1].tag and not factor.tag:
            found[-1:] = _plain(found[-1].of * factor.of)
        else:
            found.append(factor)
    return tuple(found)


def layout_of_trunk(node: fx.Node) -> Layout:
    """The layout of a residual add: [batch, tokens, channels] or [tokens, channels]."""
    shape = _shape(node)
    if len(shape) not in (2, 3):
        raise _Refused(f"its trunk {node.name} has {len(shape)} axes, expected [batch, tokens, channels]")
    *batch, tokens, channels = shape
    if tokens < 2:
        raise _Refused("it has a single token")
    first = [(Factor("batch", batch[0], 0, batch[0]),) if batch[0] != 1 else ()] if batch else []
    return (*first, (Factor("token", tokens, 0, tokens),), _plain(channels))


# -- what decides an operator's rows -----------------------------------------------------------------------------------

Demand = tuple[fx.Node, Layout | None]
"""An operand, and which of its entries are needed; None for all."""


def _demands(node: fx.Node, layout: Layout) -> list[Demand]:
    """What decides the entries `layout` of a node's value; for a node of several values, of its first operand."""
    if node.target is operator.getitem:
        return _item(node, layout)
    packet = getattr(node.target, "overloadpacket", node.target)
    if is_attention(node) and packet in _FUSED:
        return _attention(node, layout)
    if (rule := _RULES.get(packet)) is not None:
        return rule(node, layout)
    tags = getattr(node.target, "tags", ())
    if packet in _ELEMENTWISE or (torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags):
        return _elementwise(node, layout)
    if packet is aten.convolution:
        raise _Refused(f"{node.name} is a convolution, which mixes neighbouring tokens")
    raise _Refused(f"nothing proves that {packet} ({node.name}) works token by token")


def _elementwise(node: fx.Node, layout: Layout) -> list[Demand]:
    return [(parent, _broadcast(_shape(parent), layout)) for parent in node.all_input_nodes]


def _operand(node: fx.Node, at: int = 0) -> fx.Node:
    operand = node.args[at]
    if not isinstance(operand, fx.Node):
        raise _Refused(f"{node.name} has no operand at {at}")
    return operand


def _axis(node: fx.Node, at: int, rank: int) -> int:
    """The axis that a positional argument names, from the front."""
    axis: Any = node.args[at]
    return int(axis) % rank


def _axes(node: fx.Node, name: str, rank: int) -> list[int]:
    """The axes that an argument names, from the front; all if it names none."""
    given = argument_of(node, name)
    if given is None or given == []:
        return list(range(rank))
    return [axis % max(1, rank) for axis in ([given] if isinstance(given, int) else given)]


def _only_plain(node: fx.Node, axes: Sequence[Axis], doing: str) -> None:
    if _has(axes, "token") or _has(axes, "batch"):
        raise _Refused(f"{node.name} {doing} the tokens")


def _view(node: fx.Node, layout: Layout) -> list[Demand]:
    parent = _operand(node)
    return [(parent, _regroup(node, [f for axis in layout for f in axis], _shape(parent)))]


def _permute(node: fx.Node, layout: Layout) -> list[Demand]:
    parent = _operand(node)
    rank = len(layout)
    packet = getattr(node.target, "overloadpacket", node.target)
    order = list(range(rank))
    if packet is aten.permute:
        order = _axes(node, "dims", rank)
    else:
        a, b = (0, rank - 1) if packet is aten.t else (_axis(node, 1, rank), _axis(node, 2, rank))
        order[a], order[b] = order[b], order[a]
    found: list[Axis] = [()] * rank
    for axis, source in enumerate(order):
        found[source] = layout[axis]
    return [(parent, tuple(found))]


def _unsqueeze(node: fx.Node, layout: Layout) -> list[Demand]:
    axis = _axis(node, 1, len(layout))
    return [(_operand(node), layout[:axis] + layout[axis + 1 :])]


def _squeeze(node: fx.Node, layout: Layout) -> list[Demand]:
    shape = _shape(_operand(node))
    gone = {axis for axis in _axes(node, "dim", len(shape)) if shape[axis] == 1}
    rest = iter(layout)
    return [(_operand(node), tuple(() if axis in gone else next(rest) for axis in range(len(shape))))]


def _select(node: fx.Node, layout: Layout) -> list[Demand]:
    shape = _shape(_operand(node))
    axis = _axis(node, 1, len(shape))
    return [(_operand(node), (*layout[:axis], _plain(shape[axis]), *layout[axis:]))]


def _part(node: fx.Node, layout: Layout, axis: int, *, start: int, of: int) -> Layout:
    """The layout of a value of which the node is the part from `start` on along an axis of length `of`."""
    if _length(layout[axis]) == of:
        return layout
    found = _plain(of)
    if _has(layout[axis : axis + 1], "token"):
        if len(layout[axis]) != 1:
            raise _Refused(f"{node.name} takes a part of an axis that holds more than the tokens")
        (factor,) = layout[axis]
        found = (replace(factor, start=start + factor.start, of=of),)
    elif _has(layout[axis : axis + 1], "batch"):
        raise _Refused(f"{node.name} takes some samples")
    return (*layout[:axis], found, *layout[axis + 1 :])


def _slice(node: fx.Node, layout: Layout) -> list[Demand]:
    shape = _shape(_operand(node))
    axis = argument_of(node, "dim", 0) % len(shape)
    start, end, step = (argument_of(node, name) for name in ("start", "end", "step"))
    if step not in (None, 1) or not all(isinstance(bound, int | None) for bound in (start, end)):
        raise _Refused(f"{node.name} takes every {step}th entry")
    first, _, _ = slice(start, end).indices(shape[axis])
    return [(_operand(node), _part(node, layout, axis, start=first, of=shape[axis]))]


def _cat(node: fx.Node, layout: Layout) -> list[Demand]:
    axis = argument_of(node, "dim", 0) % len(layout)
    parts: Sequence[fx.Node] = node.args[0]  # type: ignore[assignment]
    if not _has(layout[axis : axis + 1], "token"):
        _only_plain(node, layout[axis : axis + 1], "joins")
        found = [(part, (*layout[:axis], _plain(_shape(part)[axis]), *layout[axis + 1 :])) for part in parts]
        return [(part, whole if _has(whole, "token") else None) for part, whole in found]
    factor, *more = layout[axis]
    before = 0
    for part in parts:
        size = _shape(part)[axis]
        if not more and before <= factor.start and factor.start + factor.size <= before + size:
            own = replace(factor, start=factor.start - before, of=size)
            return [(part, (*layout[:axis], (own,), *layout[axis + 1 :]))]
        before += size
    raise _Refused(f"{node.name} joins tokens of several values")


def _expand(node: fx.Node, layout: Layout) -> list[Demand]:
    return [(_operand(node), _broadcast(_shape(_operand(node)), layout))]


def _pad(node: fx.Node, layout: Layout) -> list[Demand]:
    parent, shape = _operand(node), _shape(_operand(node))
    padding: Any = node.args[1]
    axes = list(layout)
    for i in range(len(padding) // 2):
        axis = len(shape) - 1 - i
        if any(padding[2 * i : 2 * i + 2]):
            _only_plain(node, layout[axis : axis + 1], "pads")
            axes[axis] = _plain(shape[axis])
    return [(parent, tuple(axes))]


def _along(node: fx.Node, layout: Layout) -> list[Demand]:
    """Operators that mix what lies along some axes and give a value of the same shape: softmax."""
    for axis in _axes(node, "dim", len(layout)):
        _only_plain(node, layout[axis : axis + 1], "mixes")
    return [(_operand(node), layout)]


def _reduce(node: fx.Node, layout: Layout) -> list[Demand]:
    """A reduction: what it runs along is needed whole, so no token axis can be among it."""
    parent = _operand(node)
    shape = _shape(parent)
    gone = _axes(node, "dim", len(shape))
    rest = iter(layout)
    axes: list[Axis] = []
    for axis, size in enumerate(shape):
        if axis not in gone:
            axes.append(next(rest))
            continue
        axes.append(_plain(size))
        if argument_of(node, "keepdim", False):
            next(rest)
    return [(parent, tuple(axes))]


def _first(node: fx.Node, layout: Layout) -> list[Demand]:
    """A node of several values, each of which has the rows of its first operand."""
    return [(parent, layout if parent is node.args[0] else None) for parent in node.all_input_nodes]


def _layer_norm(node: fx.Node, layout: Layout) -> list[Demand]:
    normed = len(argument_of(node, "normalized_shape"))
    _only_plain(node, layout[len(layout) - normed :], "normalises over")
    return _first(node, layout)


def _product(node: fx.Node, layout: Layout) -> list[Demand]:
    """A [.., M, K] @ B [.., K, N], after a bias if there are three operands: rows of A decide rows of the product."""
    *bias, left, right = (_operand(node, at) for at in range(len(node.args)))
    *batches, rows, columns = layout
    _only_plain(node, [columns], "has a column for each of")
    inner = _plain(_shape(left)[-1])
    right_axes = (*batches, inner, columns)
    demands: list[Demand] = [(operand, _broadcast(_shape(operand), layout)) for operand in bias]
    demands.append((left, (*batches, rows, inner)))
    demands.append((right, right_axes if _has(batches, "token") else None))
    return demands


def _attention(node: fx.Node, layout: Layout) -> list[Demand]:
    """Fused attention over [batch, heads, tokens, width]; the layout is that of its first value."""
    if argument_of(node, "is_causal", False) or argument_of(node, "dropout_p", 0.0):
        raise _Refused(f"{node.name} is causal, or drops at random")
    query, key, value = (_operand(node, at) for at in range(3))
    samples, heads, queries, _ = layout
    by_sample = _has([samples, heads], "token")
    keys = _shape(key)[-2]
    demands: list[Demand] = [(query, (samples, heads, queries, _plain(_shape(query)[-1])))]
    for operand in (key, value):
        shape = _shape(operand)
        axes = (samples, heads if shape[1] == _length(heads) else _plain(shape[1]), _plain(keys), _plain(shape[-1]))
        demands.append((operand, axes if by_sample else None))
    for name in ("attn_mask", "attn_bias"):
        if isinstance(mask := argument_of(node, name), fx.Node):
            demands.append((mask, _broadcast(_shape(mask), (samples, heads, queries, _plain(keys)))))
    return demands


def _item(node: fx.Node, layout: Layout) -> list[Demand]:
    """One of several values: what is asked of their maker's first operand (its queries, for an attention)."""
    parent, at = _operand(node), node.args[1]
    if parent.op != "call_function" or not isinstance(at, int):
        raise _Refused(f"nothing is known of {parent.name}")
    packet = getattr(parent.target, "overloadpacket", parent.target)
    if packet in (aten.split, aten.split_with_sizes, aten.chunk):
        source = _operand(parent)
        shape = _shape(source)
        axis = argument_of(parent, "dim", 0) % len(shape)
        start = sum(int(item.shape[axis]) for item in parent.meta["val"][:at])
        whole = _part(node, layout, axis, start=start, of=shape[axis])
        return [(source if _has(layout[axis : axis + 1], "token") else parent, whole)]
    if packet is aten.unbind:
        shape = _shape(_operand(parent))
        axis = argument_of(parent, "dim", 0) % len(shape)
        return [(parent, (*layout[:axis], _plain(shape[axis]), *layout[axis:]))]
    if packet is aten.var_mean:
        return [(parent, _reduce(parent, layout)[0][1])]
    if (packet is aten.native_layer_norm or packet in _FUSED) and at == 0:
        return [(parent, layout)]
    if packet is aten.native_layer_norm:  # its means and deviations
        shape = _shape(_operand(parent))
        normed = len(argument_of(parent, "normalized_shape"))
        return [(parent, (*layout[: len(shape) - normed], *map(_plain, shape[len(shape) - normed :])))]
    raise _Refused(f"nothing proves that {packet} ({parent.name}) works token by token")


_FUSED = {
    aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_efficient_attention, aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_fused_attention_overrideable, aten.scaled_dot_product_attention,
}  # fmt: skip
_VIEWS = {aten.view, aten._unsafe_view, aten.reshape}
_ELEMENTWISE = {aten.clone, aten._to_copy, aten.alias, aten.detach, torch.ops.prims.convert_element_type}
"""Operators that are elementwise, but not tagged so."""

_RULES: dict[Any, Callable[[fx.Node, Layout], list[Demand]]] = {
    **dict.fromkeys(_VIEWS, _view),
    **dict.fromkeys((aten.permute, aten.transpose, aten.t), _permute),
    **dict.fromkeys((aten.mm, aten.addmm, aten.bmm, aten.baddbmm), _product),
    **dict.fromkeys((aten.split, aten.split_with_sizes, aten.chunk, aten.unbind, aten.var_mean), _first),
    **dict.fromkeys((aten.mean, aten.sum, aten.var, aten.std, aten.amax, aten.amin, aten.linalg_vector_norm), _reduce),
    **dict.fromkeys((aten._softmax, aten._log_softmax), _along),
    aten.native_layer_norm: _layer_norm,
    aten.unsqueeze: _unsqueeze,
    aten.squeeze: _squeeze,
    aten.select: _select,
    aten.slice: _slice,
    aten.cat: _cat,
    aten.expand: _expand,
    aten.constant_pad_nd: _pad,
}  # fmt: skip


# -- the proof ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Proof:
    """A branch that works token by token, in terms of one graph's nodes."""

    cut: fx.Node
    batch: int
    number: int
    """Tokens of a sample."""
    layouts: dict[fx.Node, Layout]
    """What is computed for some tokens alone: the cut, and nodes above it."""
    gathered: dict[fx.Node, dict[fx.Node, Layout]]
    """By node: the operands whose rows it takes, with what of each."""
    aliases: dict[fx.Node, fx.Node]
    """Nodes that only pick the token axis out of a longer one: with some tokens they are their operand."""
    held: tuple[fx.Node, ...]
    own: frozenset[fx.Node]
    """What only the branch needs: dead once its cut is read."""
    kept: frozenset[fx.Node]
    """What of it is computed whole, for however few tokens."""


def prove(gm: fx.GraphModule, branches: Sequence[Branch]) -> dict[str, Proof | str]:
    """By branch: the proof that it works token by token in this graph, or the reason why there is none."""
    inputs = analysis_of(gm).inputs
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    latents = [placeholders[i] for i in (inputs.latents, *inputs.further_latents) if i is not None]
    caches = placeholders[len(placeholders) - len(gm.meta.get(EXTRA_INPUTS, ())) :]  # cuts of reused branches
    moving = _below([*latents, *caches])
    nodes, order = nodes_by_name(gm), {node: i for i, node in enumerate(gm.graph.nodes)}
    found: dict[str, Proof | str] = {}
    for branch in branches:
        try:
            found[branch.name] = _Prover(branch, nodes, order, moving).run()
        except _Refused as refusal:
            found[branch.name] = str(refusal)
    return found


class _Prover:
    """One proof."""

    def __init__(
        self, branch: Branch, nodes: dict[str, fx.Node], order: dict[fx.Node, int], moving: dict[fx.Node, None]
    ) -> None:
        self.branch = branch
        self.nodes = nodes
        self.order = order
        self.moving = moving  # what depends on the latents
        if branch.kind == "joint_attention":
            raise _Refused("it is a joint attention, whose keys and values need every token")
        if len(branch.cuts) != 1:
            raise _Refused(f"it has {len(branch.cuts)} cuts, expected one")
        self.cut = self.nodes[branch.cuts[0]]
        self.own = dead_without([self.cut])

    def run(self) -> Proof:
        start = layout_at(self.nodes, self.branch, self.cut)
        mixed = [
            n for n in self.own if n in self.moving and getattr(n.target, "overloadpacket", None) is aten.convolution
        ]
        if mixed:
            first = min(mixed, key=self.order.__getitem__)
            raise _Refused(f"{first.name} is a convolution, which mixes neighbouring tokens")
        layouts: dict[fx.Node, Layout] = {self.cut: start}
        gathered: dict[fx.Node, dict[fx.Node, Layout]] = {}
        aliases: dict[fx.Node, fx.Node] = {}
        whole: set[fx.Node] = set()
        held: dict[fx.Node, None] = {}
        for node in sorted(self.own, key=self.order.__getitem__, reverse=True):
            if node not in layouts:
                continue
            demands = _demands(node, layouts[node])
            if _picks_tokens(node, layouts[node]):
                aliases[node] = demands[0][0]
            seen: dict[fx.Node, Layout | None] = {}
            for parent, layout in demands:
                if seen.setdefault(parent, layout) != layout:
                    raise _Refused(f"{node.name} takes {parent.name} in two ways")
            for parent, layout in seen.items():
                if layout is not None and self.branch.kind == "parallel" and self._joins_attention(parent):
                    held[parent] = None
                elif parent in self.own and parent in self.moving:
                    self._ask(layouts, node, parent, layout)
                    continue
                if layout is not None:
                    gathered.setdefault(node, {})[parent] = layout
                if parent not in held:
                    whole.add(parent)
        if not sum(node_flops(node) for node in layouts):
            raise _Refused("nothing that costs FLOPs is left to compute for some tokens")
        return Proof(
            cut=self.cut,
            batch=next((f.size for axis in start for f in axis if f.tag == "batch"), 1),
            number=next(f.size for axis in start for f in axis if f.tag == "token"),
            layouts=layouts,
            gathered=gathered,
            aliases=aliases,
            held=tuple(held),
            own=frozenset(self.own),
            kept=frozenset(_above(whole) & self.own - set(layouts)),
        )

    def _ask(self, layouts: dict[fx.Node, Layout], node: fx.Node, parent: fx.Node, layout: Layout | None) -> None:
        """Compute a value of the branch for some tokens, if that is enough."""
        if layout is None:
            if is_attention(node):
                raise _Refused(f"{node.name} is a self-attention, whose keys and values need every token")
            raise _Refused(f"{node.name} needs every token of {parent.name}")
        value = parent.meta.get("val")
        while isinstance(value, torch.Tensor) and len(layout) > value.dim() and not layout[0]:
            layout = layout[1:]
        if isinstance(value, torch.Tensor) and (len(layout) != value.dim() or _is_broadcast(layout)):
            raise _Refused(f"{parent.name} has no axis for the samples")
        if layouts.setdefault(parent, layout) != layout:
            raise _Refused(f"the tokens of {parent.name} are taken in two ways")

    def _joins_attention(self, node: fx.Node) -> bool:
        """Whether a value is an attention of the tokens to each other, but for its layout."""
        while node in self.own and node in self.moving and node.op == "call_function":
            if is_attention(node):
                return any(parent in self.moving for parent in node.all_input_nodes[1:3])
            packet = getattr(node.target, "overloadpacket", node.target)
            if packet not in _VIEWS | _ELEMENTWISE | {aten.permute, aten.transpose, operator.getitem}:
                return False
            node = _operand(node)
        return False


def layout_at(nodes: dict[str, fx.Node], branch: Branch, cut: fx.Node) -> Layout:
    """The layout of a cut, from that of the residual add which it leads to."""
    adds = {nodes[name] for name in branch.adds if name in nodes}
    below, node = {cut: None}, cut
    while node not in adds or node not in below:
        node = node.next
        if node.op == "output":
            raise _Refused("its cut leads to no residual add")
        if any(parent in below for parent in node.all_input_nodes):
            below[node] = None
    add = node
    found: dict[fx.Node, Layout] = {add: layout_of_trunk(add)}
    for node in reversed(list(below)):
        if node is cut and node in found:
            return found[node]
        if node not in found:
            continue
        for parent, layout in _demands(node, found[node]):
            if parent not in below:
                continue
            if layout is None or found.setdefault(parent, layout) != layout:
                raise _Refused(f"the tokens of {parent.name} do not stay apart behind the cut")
    raise _Refused("its cut leads to no residual add")


def _is_broadcast(layout: Layout) -> bool:
    return any(factor.tag == "batch" and factor.of != factor.size for axis in layout for factor in axis)


def _picks_tokens(node: fx.Node, layout: Layout) -> bool:
    """Whether a node only takes the tokens out of a longer axis, or joins others to them."""
    packet = getattr(node.target, "overloadpacket", node.target)
    if node.target is operator.getitem:
        parent = _operand(node)
        packet = getattr(parent.target, "overloadpacket", parent.target)
        if packet not in (aten.split, aten.split_with_sizes, aten.chunk):
            return False
        return _has(layout[(axis := argument_of(parent, "dim", 0) % len(layout)) : axis + 1], "token")
    if packet in (aten.slice, aten.cat):
        return _has(layout[(axis := argument_of(node, "dim", 0) % len(layout)) : axis + 1], "token")
    return False


def _below(nodes: Iterable[fx.Node]) -> dict[fx.Node, None]:
    """The nodes that descend from some, themselves included, in graph order."""
    found: dict[fx.Node, None] = dict.fromkeys(nodes)
    for start in list(found)[:1]:
        for node in start.graph.nodes:
            if node not in found and any(parent in found for parent in node.all_input_nodes):
                found[node] = None
    return found


def _above(nodes: set[fx.Node]) -> set[fx.Node]:
    """The ancestors of some nodes, themselves included."""
    found, work = set(nodes), list(nodes)
    while work:
        for parent in work.pop().all_input_nodes:
            if parent not in found:
                found.add(parent)
                work.append(parent)
    return found


# -- the pass ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ProveTokens(Pass):
    """Add to each cacheable branch of the analysis its `Tokens`, or why it has none."""

    def requires(self, gm: fx.GraphModule) -> None:
        analysis_of(gm)

    def call(self, gm: fx.GraphModule) -> bool:
        analysis = analysis_of(gm)
        sources = _Sources(gm, analysis)
        proofs = prove(gm, analysis.cacheable)
        branches = tuple(_proven(gm, b, proofs[b.name], sources) if b.cacheable else b for b in analysis.branches)
        gm.meta[ANALYSIS] = replace(analysis, branches=branches)
        return False

    def ensures(self, gm: fx.GraphModule) -> None:
        open_ = [b.name for b in analysis_of(gm).cacheable if (b.tokens is None) != bool(b.token_reason)]
        if open_:
            raise PassError(f"{self.name}: the branches {open_} have neither tokens nor a reason.")


def _proven(gm: fx.GraphModule, branch: Branch, proof: Proof | str, sources: _Sources) -> Branch:
    if isinstance(proof, str):
        return replace(branch, tokens=None, token_reason=proof)
    flops = sum(node_flops(node) * proof.number // _all_tokens(layout) for node, layout in proof.layouts.items())
    tokens = Tokens(
        batch=proof.batch,
        number=proof.number,
        flops=flops,
        spared_flops=sum(map(node_flops, proof.own - proof.kept)) - flops,
        held=tuple(node.name for node in proof.held),
        held_bytes=sum(num_bytes(node.meta["val"]) for node in proof.held),
        keys=sources.of(proof, LOOKS_AT_ITSELF),
        queries=sources.of(proof, ("cross_attention",)),
        grid=_grid(gm, proof.number),
    )
    return replace(branch, tokens=tokens, token_reason="")


def _all_tokens(layout: Layout) -> int:
    """How many tokens an axis has of which a branch's tokens are a part: those of the text before an image, say."""
    return next(factor.of for axis in layout for factor in axis if factor.tag == "token")


def _grid(gm: fx.GraphModule, number: int) -> tuple[int, int] | None:
    """Rows and columns of the tokens, if they are square patches of latents [B, C, H, W]."""
    at = analysis_of(gm).inputs.latents
    if at is None:
        return None
    latents = [node for node in gm.graph.nodes if node.op == "placeholder"][at].meta["val"]
    if latents.dim() != 4 or not all(isinstance(size, int) for size in latents.shape[2:]):
        return None
    height, width = latents.shape[2:]
    side = math.isqrt(height * width // number)
    fits = side > 0 and height % side == 0 and width % side == 0 and (height // side) * (width // side) == number
    return (height // side, width // side) if fits else None


@dataclass
class _Found:
    """An attention's tokens as one residual add has them."""

    kind: str
    add: fx.Node
    attention: fx.Node
    batch: int
    token: Factor


class _Sources:
    """The attentions of a graph, to tell which of them saw a branch's tokens."""

    def __init__(self, gm: fx.GraphModule, analysis: Analysis) -> None:
        self.sets = BitSets.of(gm.graph)
        self.found: list[_Found] = []
        nodes = nodes_by_name(gm)
        for branch in analysis.branches:
            for cut in branch.cuts if branch.kind in (*LOOKS_AT_ITSELF, "cross_attention") else ():
                for add in branch.adds:
                    self._look(nodes, replace(branch, adds=(add,)), nodes[cut], nodes[add])

    def _look(self, nodes: dict[str, fx.Node], branch: Branch, cut: fx.Node, add: fx.Node) -> None:
        try:
            layouts = {cut: layout_at(nodes, branch, cut)}
            for i in range(self.sets.index[cut], -1, -1):
                node = self.sets.nodes[i]
                if node not in layouts:
                    continue
                if is_attention(node):
                    self._keep(branch, node, layouts[node], add)
                    return
                for parent, layout in _demands(node, layouts[node]):
                    if layout is not None:
                        layouts.setdefault(parent, layout)
        except _Refused:
            return  # its tokens cannot be followed, so it tells nothing of them

    def _keep(self, branch: Branch, attention: fx.Node, layout: Layout, add: fx.Node) -> None:
        samples, heads, queries, _ = layout
        if (
            len(queries) != 1
            or queries[0].tag != "token"
            or any(f.tag != "batch" for f in samples)
            or _has([heads], "batch")
        ):
            return
        same = _shape(_operand(attention, 1))[-2] == queries[0].of
        if branch.kind in LOOKS_AT_ITSELF and not same:
            return
        batch = samples[0].size if samples else 1
        self.found.append(_Found(branch.kind, add, attention, batch, queries[0]))

    def of(self, proof: Proof, kinds: Sequence[str]) -> TokenSource | None:
        """The last attention of these kinds that saw the tokens of a branch before, or in, the branch."""
        above = self.sets.ancestors[self.sets.index[proof.cut]]
        behind = self.sets.descendants[self.sets.index[proof.cut]]
        fitting = [
            found
            for found in self.found
            if found.kind in kinds
            and (found.batch, found.token.size) == (proof.batch, proof.number)
            and (
                above >> self.sets.index[found.add] & 1
                or (above >> self.sets.index[found.attention] & behind >> self.sets.index[found.add] & 1)
            )
        ]
        if not fitting:
            return None
        last = max(fitting, key=lambda found: self.sets.index[found.attention])
        return TokenSource(last.attention.name, last.token.start, last.token.of)


__all__ = ["Factor", "Layout", "Proof", "ProveTokens", "prove", "shape_with"]
