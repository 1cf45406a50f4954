"""Probes: what a run-time policy measures of a step before the step is paid for, and what stands for what it skips.

A probe splits a step in two. The *head* is the first part of the network, up to the values that the probe reads; the
*tail* is the rest. What the tail takes from the head is carried over, so nothing is computed twice. Of the tail there
are two variants: one computes it, and one restores the trunk at the end of the skipped blocks from residuals that an
earlier step left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from omnifx.errors import PassError
from omnifx.flops import hint, node_flops, numel
from omnifx.graph import BitSets, Branch, analysis_of, float_outputs, nodes_by_name, num_bytes, output_of
from omnifx.trunks import trunk_operands, with_trunks

aten = torch.ops.aten

Values = Mapping[str, Tensor]
Measured = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
"""Signals, each [B] float32, and the values to keep, both by name."""

VIEWS = {
    aten.view, aten._unsafe_view, aten.reshape, aten.permute, aten.transpose, aten.t, aten.unsqueeze, aten.squeeze,
    aten.alias, aten.expand,
}  # fmt: skip
"""Operators that give the same memory in another shape."""

COPIES = {aten.clone, aten._to_copy, torch.ops.prims.convert_element_type}
POINTWISE = {aten.add, aten.sub, aten.mul, aten.div, aten.addcmul}
PARTS = {aten.slice, aten.select, aten.split, aten.split_with_sizes, aten.cat}


@dataclass(frozen=True)
class Trunk:
    """The latents' trunk of a graph: where its blocks begin and end, by names of nodes."""

    latents: str
    """The input that holds the latents."""
    output: str
    """The largest output that is shaped like the latents up to its channels; empty if there is none."""
    other_outputs: int
    """How many further floating-point outputs there are."""
    start: str
    """The trunk before the first block."""
    modulated: str
    """The first block's modulated input: what its first heavy operator reads."""
    blocks: tuple[str, ...]
    """Paths of the modules that are blocks, in order."""
    ends: tuple[str, ...]
    """The trunk after each block."""
    attentions: tuple[tuple[str, str], ...]
    """For each self- or joint attention on the trunk, its module's path and the node that it adds to the trunk."""
    frame_axis: int | None = None
    """Which axis of the latents counts frames; None for images."""


@dataclass(frozen=True)
class Pair:
    """A trunk where skipped blocks begin and where they end: nodes whose elements correspond."""

    start: str
    end: str


@dataclass(frozen=True)
class Keep:
    """A value that a stream keeps for later steps."""

    name: str
    like: str = ""
    """The node whose shape it has; empty: one number for each sample, float32."""
    every: bool = False
    """Whether each step replaces it; else only steps that compute everything do."""


def add_residual(start: Tensor, residuals: Sequence[Tensor], marks: Sequence[Tensor]) -> Tensor:
    """The trunk at the end of skipped blocks: what it was at their start, and what they added when they last ran."""
    return start + residuals[0]


def subtract_start(end: Tensor, start: Tensor) -> Tensor:
    """What the blocks between two points of the trunk added to it."""
    return end - start


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a run-time policy reads of a graph, keeps, and skips; made by the policy from a `Trunk`.

    Args:
        reads: Nodes that the head computes, by the names that `measure` knows them by; empty: no head, and the signals
            are those of `finish`.
        measure: ``measure(values, old) -> (signals, kept)`` in plain tensor code; `values` holds what `reads` names and
            the latents, `old` what was kept. Traced into the head.
        keeps: What `measure` returns to be kept.
        signals: Names of the signals, in order.
        span: Where the skipped blocks begin and end; empty: the cuts of all branches are reused instead.
        residual: What a computed step keeps of a pair: ``residual(end, start)``.
        restore: ``restore(start, residuals, marks) -> end``. The residuals are those of the last computed steps, newest
            first; `marks` is this step's first kept value of the head, and those of the computed steps.
        window: How many computed steps are remembered.
        weights: ``weights(stored, step)``: numbers, at most `window`, by which the residuals of the computed steps
            `stored`, newest first, are multiplied at a skipped one; their sum is the one residual that `restore` gets,
            without marks. None: it gets all residuals as they are.
        ends: Nodes that `finish` reads, as `reads`.
        finish: As `measure`, traced into the variant that computes everything.
        finish_signals: Names of the signals that `finish` returns; without a head they are `signals`.
        finish_keeps: What `finish` returns to be kept.
    """

    signals: tuple[str, ...]
    reads: tuple[tuple[str, str], ...] = ()
    measure: Callable[[Values, Values], Measured] | None = None
    keeps: tuple[Keep, ...] = ()
    span: tuple[Pair, ...] = ()
    residual: Callable[[Tensor, Tensor], Tensor] = subtract_start
    restore: Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor] = add_residual
    window: int = 1
    weights: Callable[[Sequence[int], int], Sequence[float]] | None = None
    ends: tuple[tuple[str, str], ...] = ()
    finish: Callable[[Values, Values], Measured] | None = None
    finish_signals: tuple[str, ...] = ()
    finish_keeps: tuple[Keep, ...] = ()

    @property
    def all_keeps(self) -> tuple[Keep, ...]:
        """Everything that is kept but residuals."""
        return (*self.keeps, *self.finish_keeps)

    def depth(self, label: str, *, every: bool) -> int:
        """Of how many computed steps a kept value stays; `every` says that each step replaces it."""
        remembered = not every and (self.weights is None or label.startswith("delta:"))
        return self.window if remembered else 1


# -- signals -----------------------------------------------------------------------------------------------------------


def size_of(value: Tensor, latents: Tensor) -> Tensor:
    """[B], float32: the mean absolute value over each sample's elements, where the first axis holds samples, or samples
    and their frames."""
    sizes = value.float().abs()
    if hint(value.shape[0]) == hint(latents.shape[0]):  # no reshape: sizes may be symbolic
        return sizes.mean(tuple(range(1, value.dim())))
    return sizes.reshape(latents.shape[0], -1).mean(1)


def change(new: Tensor, old: Tensor, latents: Tensor) -> Tensor:
    """[B], float32: ``mean|new - old| / mean|old|`` over each sample's elements; NaN or infinity if `old` is zero."""
    return size_of(new.float() - old.float(), latents) / size_of(old, latents)


# -- the trunk of a graph ----------------------------------------------------------------------------------------------


def trunk_of(gm: fx.GraphModule, *, frame_axis: int | None = None) -> Trunk:
    """Find the latents' trunk and its blocks; `frame_axis` is passed on.

    Raises: PassError if the graph has no latents or no residual adds on their trunk.
    """
    inputs = analysis_of(gm).inputs
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    adds = _adds_of(gm)
    main = [add for add in adds if add.trunk == 0]
    if inputs.latents is None or not main:
        raise PassError("no trunk that carries the latents was found in this graph, so there is nothing to probe.")
    latents = placeholders[inputs.latents]
    blocks = [(now.block, now.node) for now, after in pairwise(main) if now.block != after.block]
    blocks.append((main[-1].block, main[-1].node))
    start = _operand(gm, main[0])
    attentions = [
        (add.branch.module_path, add.side) for add in main if add.branch.kind in ("self_attention", "joint_attention")
    ]
    output, others = _main_output(gm, latents)
    return Trunk(
        latents=latents.name,
        output=output,
        other_outputs=others,
        start=start.name,
        modulated=_modulated(gm, main[0].branch, start),
        blocks=tuple(block for block, _ in blocks),
        ends=tuple(node.name for _, node in blocks),
        attentions=tuple(attentions),
        frame_axis=frame_axis,
    )


def span_of(gm: fx.GraphModule, first: int, last: int) -> tuple[Pair, ...]:
    """Where the blocks ``first`` to ``last - 1`` of the latents' trunk begin and end, on each trunk that they change
    and that something behind them reads.

    Raises: PassError if a trunk at their end does not correspond, element by element, to one at their start.
    """
    adds = _adds_of(gm)
    names: list[str] = []
    for add in adds:
        if add.trunk == 0 and (not names or names[-1] != add.block):
            names.append(add.block)
    skipped = _within_blocks(adds, names, first, last)
    if not skipped:
        raise PassError(f"the blocks {first} to {last - 1} are none of the {len(names)} blocks of this graph.")
    starts = _starts(gm, adds, skipped)
    inside = {add.node for add in skipped}
    with unset_fake_temporarily():  # a capture is under way, and these numbers are real
        places = {start: _places(gm, start) for start in starts}
    pairs: list[Pair] = []
    for end in _border(inside):
        found = _corresponding(end, places)
        if found is None:
            raise PassError(
                f"the trunk at {end.name}, behind block {names[min(last, len(names)) - 1]}, does not correspond to any "
                f"trunk before block {names[first]}; these blocks cannot be skipped as one."
            )
        pairs += found
    return tuple(pairs)


@dataclass(frozen=True)
class _Add:
    """A residual add: its trunk, its block and its branch."""

    node: fx.Node
    trunk: int
    block: str
    branch: Branch

    @property
    def side(self) -> str:
        """What it adds to the trunk; itself if no single operand holds that."""
        trunk = trunk_operands(self.node, {*self.branch.cuts, *self.branch.heavy})
        sides = [operand for operand in self.node.all_input_nodes if operand not in trunk]
        same = [s for s in sides if numel(s.meta.get("val")) == numel(self.node.meta.get("val"))]
        return same[0].name if len(sides) == len(same) == 1 else self.node.name


def _adds_of(gm: fx.GraphModule) -> list[_Add]:
    """The residual adds of a graph, in its order."""
    order = {node.name: i for i, node in enumerate(gm.graph.nodes)}
    nodes = nodes_by_name(gm)
    placed = with_trunks(gm, analysis_of(gm).branches)
    found = [
        _Add(nodes[name], trunk, block_of(branch.module_path), branch)
        for branch in placed
        for name, trunk in zip(branch.adds, branch.trunks, strict=True)
    ]
    return sorted(found, key=lambda add: order[add.node.name])


def block_of(path: str) -> str:
    """The path of the block that a module belongs to: up to its first number, or the module around it."""
    parts = path.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[: at + 1]) if at is not None else path.rpartition(".")[0]


def _within_blocks(adds: Sequence[_Add], names: Sequence[str], first: int, last: int) -> list[_Add]:
    """The adds of some blocks, on any trunk; a block that runs several times is told by the add of the main trunk that
    follows."""
    wanted = range(first, min(last, len(names)))
    number, found = -1, []
    previous = None
    pending: list[_Add] = []
    for add in adds:
        if add.trunk == 0:
            if add.block != previous:
                previous, number = add.block, number + 1
            found += [*(p for p in pending if p.block == add.block and number in wanted), *([add] * (number in wanted))]
            pending = []
        elif previous == add.block:
            found += [add] * (number in wanted)
        else:
            pending.append(add)
    return found


def _operand(gm: fx.GraphModule, add: _Add) -> fx.Node:
    """The value of the trunk that a residual add reads."""
    free = trunk_operands(add.node, {*add.branch.cuts, *add.branch.heavy})
    same = [node for node in free if numel(node.meta.get("val")) == numel(add.node.meta.get("val"))]
    sets = BitSets.of(gm.graph)
    inputs = analysis_of(gm).inputs
    static = {p.name for i, p in enumerate(n for n in gm.graph.nodes if n.op == "placeholder") if i in inputs.static}
    moving = [
        node
        for node in same
        if any(
            sets.nodes[i].op == "placeholder" and sets.nodes[i].name not in static
            for i in sets.members(sets.ancestors[sets.index[node]])
        )
    ]
    return (moving or same or free)[0]


def _starts(gm: fx.GraphModule, adds: Sequence[_Add], skipped: Sequence[_Add]) -> list[fx.Node]:
    """The values of the trunks where the skipped adds begin."""
    inside = {add.node for add in skipped}
    starts: list[fx.Node] = []
    for trunk in sorted({add.trunk for add in adds}):
        first = next((add for add in skipped if add.trunk == trunk), skipped[0])
        before = [add.node for add in adds[: adds.index(first)] if add.trunk == trunk and add.node not in inside]
        if before:
            starts.append(before[-1])  # also of a trunk that only joins another one in the skipped blocks
        elif first.trunk == trunk:
            starts.append(_operand(gm, first))
    return starts


def _border(inside: set[fx.Node]) -> list[fx.Node]:
    """The skipped adds that something behind them reads, past no other skipped add."""
    border = []
    for node in sorted(inside):
        seen: set[fx.Node] = set()
        work = list(node.users)
        while work:
            user = work.pop()
            if user in seen or user in inside:
                continue
            seen.add(user)
            if user.op == "output":
                border.append(node)
                break
            work += user.users
    return border


class _Place:
    """Where the elements of a value lie in the trunk that they come from: the same places, or a tensor of them."""

    def __init__(self, start: fx.Node) -> None:
        self.shape = [hint(size) for size in start.meta["val"].shape]
        self._all: Tensor | None = None

    @property
    def all(self) -> Tensor:
        """int32: each element's own number."""
        if self._all is None:
            self._all = torch.arange(numel_of(self.shape), dtype=torch.int32).reshape(self.shape)
        return self._all

    def is_identity(self, place: Tensor | None) -> bool:
        """Whether a value has the trunk's elements at the trunk's places."""
        return place is not None and list(place.shape) == self.shape and (place is self._all or place.equal(self.all))


def numel_of(shape: Sequence[int]) -> int:
    """The number of elements of a shape."""
    return int(torch.Size(shape).numel())


def _places(gm: fx.GraphModule, start: fx.Node) -> set[fx.Node]:
    """The nodes behind a value of the trunk that hold, element by element, the same places of it.

    Numbers are sent along the trunk in place of its values: through views, slices and concatenations as they are, and
    through sums and products of which one operand alone comes from the trunk unchanged.
    """
    place = _Place(start)
    known: dict[fx.Node, Any] = {start: place.all}
    waiting = {start: len(start.users)}
    same = {start}
    behind = False
    for node in gm.graph.nodes:
        if node is start:
            behind = True
            continue
        if not behind or node.op != "call_function" or not any(p in known for p in node.all_input_nodes):
            continue
        value = _moved(node, known)
        for parent in node.all_input_nodes:
            if parent in waiting:
                waiting[parent] -= 1
                if not waiting[parent]:
                    known.pop(parent, None)  # a trunk of a large model has many values, and each may be a copy
        if value is None:
            continue
        known[node], waiting[node] = value, len(node.users)
        if isinstance(value, Tensor) and place.is_identity(value):
            known[node] = place.all
            same.add(node)
    return same


def _moved(node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
    """The places of a node's value; None if it holds none."""
    packet = getattr(node.target, "overloadpacket", node.target)
    if getattr(packet, "__name__", "") == "getitem":
        number: Any = node.args[1]
        whole = known.get(node.args[0])  # type: ignore[arg-type]
        return whole[number] if isinstance(whole, list | tuple) else None
    shape = [hint(size) for size in value.shape] if isinstance(value := node.meta.get("val"), Tensor) else None
    if packet in POINTWISE or packet in COPIES:
        operands = [known[parent] for parent in node.all_input_nodes if parent in known]
        if len(operands) == 1 and isinstance(operands[0], Tensor) and list(operands[0].shape) == shape:
            return operands[0]
        return None
    if packet not in VIEWS and packet not in PARTS:
        return None

    def real(arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            if arg in known:
                return known[arg]
            value = arg.meta.get("val")
            if isinstance(value, Tensor):
                return torch.full([hint(size) for size in value.shape], -1, dtype=torch.int32)
            return hint(value)
        return arg

    target = aten.reshape.default if packet in (aten.view, aten._unsafe_view) else node.target
    return target(*fx.node.map_aggregate(node.args, real), **node.kwargs)  # type: ignore[operator]


def _corresponding(end: fx.Node, places: Mapping[fx.Node, set[fx.Node]]) -> list[Pair] | None:
    """What of a value behind the skipped blocks corresponds to a trunk before them: itself, or the parts of it that are
    read."""
    for start, same in places.items():
        if end in same:
            return [Pair(start.name, end.name)]
    packet = getattr(end.target, "overloadpacket", end.target)
    is_part = packet in PARTS or packet in VIEWS or packet in POINTWISE or getattr(packet, "__name__", "") == "getitem"
    if not end.users or not is_part or node_flops(end):
        return None
    pairs: list[Pair] = []
    for user in end.users:
        moves = getattr(user.target, "overloadpacket", user.target)
        if user.op != "call_function" or not (
            moves in PARTS or moves in VIEWS or moves in COPIES or getattr(moves, "__name__", "") == "getitem"
        ):
            return None
        found = _corresponding(user, places)
        if found is None:
            return None
        pairs += found
    return pairs


def _modulated(gm: fx.GraphModule, branch: Branch, start: fx.Node) -> str:
    """What the first heavy operator of a branch reads of the trunk, before views of it."""
    nodes = nodes_by_name(gm)
    below = {start}
    for node in gm.graph.nodes:
        if any(parent in below for parent in node.all_input_nodes):
            below.add(node)
    heavy = [nodes[name] for name in branch.heavy if nodes[name] in below]
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    first = min(heavy, key=order.__getitem__)
    value = next(parent for parent in first.all_input_nodes if parent in below)
    while getattr(value.target, "overloadpacket", None) in VIEWS and value is not start:
        value = value.all_input_nodes[0]
    return value.name


def _main_output(gm: fx.GraphModule, latents: fx.Node) -> tuple[str, int]:
    """The output that is a sample like the latents, and how many other floating-point outputs there are."""
    outputs = [output_of(gm).args[0][i] for i in float_outputs(gm)]  # type: ignore[index]
    value = latents.meta["val"]
    alike = [
        node
        for node in outputs
        if _is_sample(node.meta["val"], value)  # type: ignore[union-attr]
    ]
    if not alike:
        return "", len(outputs)
    largest: Any = max(alike, key=lambda node: num_bytes(node.meta["val"]))  # type: ignore[union-attr]
    return largest.name, len(outputs) - 1


def _is_sample(value: Tensor, latents: Tensor) -> bool:
    """Whether an output has the shape of the latents, but perhaps other channels on the axis behind the batch."""
    shape, other = (list(map(hint, tensor.shape)) for tensor in (value, latents))
    return shape == other or (len(shape) == len(other) > 3 and shape[:1] + shape[2:] == other[:1] + other[2:])


__all__ = [
    "COPIES",
    "VIEWS",
    "Keep",
    "Measured",
    "Pair",
    "Probe",
    "Trunk",
    "Values",
    "add_residual",
    "block_of",
    "change",
    "size_of",
    "span_of",
    "subtract_start",
    "trunk_of",
]
