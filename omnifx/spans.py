"""Spans: ranges of consecutive blocks, whose whole work is one residual for each trunk, ``delta = end - start``.

A block is the branches below one numbered module (``blocks.3``). A span takes the trunk in at its first block's first
residual adds and gives it out where a minimum-bytes vertex cut separates it from all that follows; only its residual
adds, and what moves their values, may be cut. To reuse a span is to put ``start + old delta`` in the place of its end:
everything between is dead, gates and modulation included.

A span is refused where that is not well defined: where something else in it is used behind it (the long skips of a
U-ViT), or where its ends do not have the shapes of its starts, one for one.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx
import torch
from torch import fx

from omnifx.errors import PlanError
from omnifx.graph import BitSets, Branch, analysis_of, hint, node_flops, num_bytes
from omnifx.trunks import trunk_operands

aten = torch.ops.aten

CASTS = {aten._to_copy, torch.ops.prims.convert_element_type}
SWAPS = {aten.permute, aten.transpose, aten.t}
MOVES = {
    *CASTS, *SWAPS, aten.view, aten._unsafe_view, aten.reshape, aten.unsqueeze, aten.squeeze, aten.clone, aten.alias,
    aten.cat, aten.slice, aten.select, aten.split, aten.split_with_sizes, operator.getitem,
}  # fmt: skip
"""What gives the values of a trunk in another layout, type or order."""


@dataclass(frozen=True)
class Block:
    """Consecutive branches of one numbered module."""

    name: str
    """Path of the module."""
    branches: tuple[str, ...]
    """All that depend on the latents, cacheable or not, in graph order."""


@dataclass(frozen=True)
class Span:
    """The blocks `first` to `last`, by number, both included."""

    first: int
    last: int
    branches: tuple[str, ...] = ()
    """The branches inside."""
    starts: tuple[str, ...] = ()
    """Names of the nodes that hold the trunks where it begins, one for each of `ends`."""
    ends: tuple[str, ...] = ()
    """Names of the nodes whose values ``start + delta`` replaces."""
    flops: int = 0
    """FLOPs that die when it is reused."""
    cache_bytes: int = 0
    """Bytes of its deltas, for one stream, at the sizes seen at capture."""
    reason: str = ""
    """Why it cannot be reused; empty if it can."""

    @property
    def name(self) -> str:
        """What plans call it: ``span3-9``."""
        return span_name(self.first, self.last)

    @property
    def cuts(self) -> tuple[str, ...]:
        """Names of its deltas among the caches."""
        return tuple(f"{self.name}:{end}" for end in self.ends)


def span_name(first: int, last: int) -> str:
    """The name of the span of blocks `first` to `last`."""
    return f"span{first}-{last}"


def bounds_of(name: str) -> tuple[int, int] | None:
    """The first and last block of a span's name; None if it is no such name."""
    found = re.fullmatch(r"span(\d+)-(\d+)", name)
    return (int(found.group(1)), int(found.group(2))) if found else None


def blocks_of(branches: Iterable[Branch]) -> tuple[Block, ...]:
    """The blocks of a graph's branches, in graph order. What does not depend on the latents is in none."""
    found: list[tuple[str, list[str]]] = []
    for branch in branches:
        if branch.dependence != "latent":
            continue
        path = _block_path(branch)
        if not found or found[-1][0] != path:
            found.append((path, []))
        found[-1][1].append(branch.name)
    return tuple(Block(path, tuple(names)) for path, names in found)


def _block_path(branch: Branch) -> str:
    """The branch's path up to its first number; without one, its first word."""
    parts = (branch.module_path or branch.name).split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else parts[0]


class Spans:
    """The spans of one analysed graph; each is looked for when it is first asked for."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.branches = {branch.name: branch for branch in analysis_of(gm).branches}
        self.blocks = blocks_of(self.branches.values())
        self._known: dict[tuple[int, int], Span] = {}

    def named(self, name: str) -> Span:
        """The span of that name, which may have a `reason` not to be reused.

        Raises: PlanError if it is no name of a span of this model.
        """
        bounds = bounds_of(name)
        if bounds is None or not bounds[0] <= bounds[1] < len(self.blocks):
            raise PlanError(
                f"{name!r} is no span of this model, whose blocks are 0 to {len(self.blocks) - 1}; a span is "
                "span<first>-<last>."
            )
        if bounds not in self._known:
            self._known[bounds] = self._find(*bounds)
        return self._known[bounds]

    # -- one span ------------------------------------------------------------------------------------------------------

    @cached_property
    def _sets(self) -> BitSets:
        return BitSets.of(self.gm.graph)

    @cached_property
    def _adds(self) -> dict[fx.Node, Branch]:
        nodes = {node.name: node for node in self._sets.nodes}
        return {nodes[add]: branch for branch in self.branches.values() for add in branch.adds}

    @cached_property
    def _light(self) -> list[int]:
        """For each node, what reaches it without paying FLOPs, as a bit set."""
        found: list[int] = []
        for i, node in enumerate(self._sets.nodes):
            bits = 1 << i
            if not node_flops(node):
                for parent in node.all_input_nodes:
                    bits |= found[self._sets.index[parent]]
            found.append(bits)
        return found

    def _find(self, first: int, last: int) -> Span:
        sets = self._sets
        names = {name for block in self.blocks[first : last + 1] for name in block.branches}
        adds = [node for node, branch in self._adds.items() if branch.name in names]
        adds.sort(key=sets.index.__getitem__)
        heavy = {name for branch in names for name in self.branches[branch].heavy}
        below = above = 0
        for node in sets.nodes:
            if node in adds or node.name in heavy:
                below |= sets.descendants[sets.index[node]]
                above |= sets.ancestors[sets.index[node]]
        inside = {sets.nodes[i] for i in sets.members(below & above)}
        starts = self._starts(adds, below)
        ends = self._ends(inside, adds, starts)
        if isinstance(ends, str):
            return Span(first, last, reason=ends)
        pairs = self._pairs(starts, ends)
        if isinstance(pairs, str):
            return Span(first, last, reason=pairs)
        dead = _dead_without(ends, alive=set(pairs))
        flops = sum(map(node_flops, dead))
        if alive := [node.name for node in sets.nodes if node.name in heavy and node not in dead]:
            return Span(first, last, reason=f"{alive[0]} is also used outside of it")
        return Span(
            first,
            last,
            branches=tuple(name for name in self.branches if name in names),
            starts=tuple(node.name for node in pairs),
            ends=tuple(node.name for node in ends),
            flops=flops,
            cache_bytes=sum(num_bytes(node.meta["val"]) for node in ends),
        )

    def _starts(self, adds: list[fx.Node], below: int) -> list[fx.Node]:
        """The trunks before the span's first adds, before they were cast to another type: those that nothing of its
        work leads to, which is the bit set `below`."""
        found: dict[fx.Node, None] = {}
        for add in adds:
            branch = self._adds[add]
            operands = [
                operand
                for operand in trunk_operands(add, {*branch.cuts, *branch.heavy})
                if _shape(operand) == _shape(add)
            ]
            if not operands or below >> self._sets.index[operands[0]] & 1:
                continue
            start = operands[0]
            while _packet(start) in CASTS:
                start = start.all_input_nodes[0]
            found[start] = None
        return list(found)

    def _ends(self, inside: set[fx.Node], adds: list[fx.Node], starts: list[fx.Node]) -> list[fx.Node] | str:
        """The fewest bytes of trunk values that separate the span from all that follows, nearest to the span; or why
        there are none."""
        shapes = {_shape(start) for start in starts}
        movable = set(adds)
        flow: nx.DiGraph[Any] = nx.DiGraph()  # its edges run against the graph's: the cut nearest to the span is found
        flow.add_nodes_from(("span", "rest"))
        leaks: list[fx.Node] = []
        work = sorted((n for n in inside if any(u not in inside for u in n.users)), key=self._sets.index.__getitem__)
        for node in work:
            flow.add_edge((node, "in"), "span")
            if node not in movable:
                leaks.append(node)
        seen = set(work)
        for node in (n for n in self._sets.nodes if n in seen or any(p in seen for p in n.all_input_nodes)):
            if node not in seen:
                if node in inside or self._stops(node):
                    continue
                seen.add(node)
                tensors = [
                    parent for parent in node.all_input_nodes if isinstance(parent.meta.get("val"), torch.Tensor)
                ]
                if _packet(node) in MOVES and all(parent in movable for parent in tensors or node.all_input_nodes):
                    movable.add(node)
            value = node.meta.get("val")
            cuttable = node in movable and isinstance(value, torch.Tensor) and _shape(node) in shapes
            capacity = {"capacity": num_bytes(value)} if cuttable else {}
            flow.add_edge((node, "out"), (node, "in"), **capacity)
            for user in node.users:
                if user not in inside:
                    flow.add_edge("rest" if self._stops(user) else (user, "in"), (node, "out"))
        try:
            _, (_, near) = nx.minimum_cut(flow, "rest", "span")
        except nx.NetworkXUnbounded:
            if leaks:
                return f"{leaks[0].name} in it is also used behind it"
            return "nothing behind it has the shape of the trunk where it begins"
        return [
            node
            for node in self._sets.nodes
            if (node, "in") in near and (node, "out") in flow and (node, "out") not in near
        ]

    def _stops(self, node: fx.Node) -> bool:
        return node.op == "output" or node in self._adds or bool(node_flops(node))

    def _pairs(self, starts: list[fx.Node], ends: list[fx.Node]) -> list[fx.Node] | str:
        """For each end, the start of the same trunk; or why there is none."""
        found = []
        for end in ends:
            light = self._light[self._sets.index[end]]
            fits = [start for start in starts if _shape(start) == _shape(end)]
            if len(fits) > 1:
                fits = [start for start in fits if light >> self._sets.index[start] & 1]
            if len(fits) != 1:
                return f"the trunk {end.name} behind it is that of {len(fits)} values where it begins"
            if self._swapped(fits[0], light):
                return f"axes of the same size are swapped between {fits[0].name} and {end.name}"
            found.append(fits[0])
        if not found:
            return "nothing behind it depends on it"
        if (twice := Counter(found).most_common(1)[0])[1] > 1:
            return f"{twice[1]} values behind it continue the trunk {twice[0].name}; a long skip leaves it"
        return found

    def _swapped(self, start: fx.Node, light: int) -> bool:
        """Whether the trunk changes its layout behind `start` in a way that its shape would not show."""
        sizes = [size for size in _shape(start)[:-1] if size > 1]
        if len(set(sizes)) == len(sizes):
            return False
        at, nodes = self._sets.index[start], self._sets.nodes
        return any(_packet(nodes[i]) in SWAPS and self._light[i] >> at & 1 for i in self._sets.members(light) if i > at)


def _dead_without(ends: Iterable[fx.Node], *, alive: set[fx.Node]) -> set[fx.Node]:
    """What nothing needs once the values of `ends` come from elsewhere and those of `alive` are needed for that."""
    dead = set(ends)
    work = list(dead)
    while work:
        for parent in work.pop().all_input_nodes:
            if parent in dead or parent in alive or parent.op == "placeholder":
                continue
            if all(user in dead for user in parent.users):
                dead.add(parent)
                work.append(parent)
    return dead


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(map(hint, value.shape)) if isinstance(value, torch.Tensor) else ()


def _packet(node: fx.Node) -> object:
    return getattr(node.target, "overloadpacket", node.target) if node.op == "call_function" else None


__all__ = ["Block", "Span", "Spans", "blocks_of", "bounds_of", "span_name"]
