"""Which trunk each branch leaves and rejoins: a model with joint attention has one for the latents and one for text."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from torch import fx

from omnifx.graph import BitSets, Branch, analysis_of, node_flops


def with_trunks(gm: fx.GraphModule, branches: Sequence[Branch]) -> tuple[Branch, ...]:
    """The branches of an analysed graph, each with the numbers of its trunks; 0 is the one that carries the latents.

    A trunk is a chain of residual adds, each reached from the last one without paying FLOPs. Where two chains join, as
    streams that are concatenated, the smaller number goes on. The latents' trunk also goes on behind a projection, as
    of a skip connection; no other one gets number 0.
    """
    ends = {name: {*branch.cuts, *branch.heavy} for branch in branches for name in branch.adds}
    below, sets, main_end = _below_latents(gm), BitSets.of(gm.graph), 0
    from_latents: set[int] = set()
    last: dict[int, str] = {}  # trunk -> its latest add
    trunk_of: dict[str, int] = {}
    for node in gm.graph.nodes:
        if node.name not in ends:
            continue
        reached = _walk(trunk_operands(node, ends[node.name]), ends)
        names = {ancestor.name for ancestor in reached}
        trunks = sorted(trunk for trunk, end in last.items() if end in names)
        for joined in trunks[1:]:
            del last[joined]
        if trunks:
            trunk = trunks[0]
        else:  # a chain begins: the latents' first one, the latents' again behind a projection, or another stream's
            main = (
                reached & below if 0 not in last else {n for n in reached if sets.ancestors[sets.index[n]] & main_end}
            )
            trunk = 0 if main else max([0, *trunk_of.values()]) + 1
            if not reached.isdisjoint(below):
                from_latents.add(trunk)
        last[trunk] = node.name
        if trunk == 0:
            main_end = 1 << sets.index[node]
        trunk_of[node.name] = trunk
    final = next(reversed(trunk_of.values()), 0)
    if final in from_latents:  # a control network may stand before the trunk that it steers
        trunk_of = {name: {0: final, final: 0}.get(trunk, trunk) for name, trunk in trunk_of.items()}
    return tuple(replace(branch, trunks=tuple(trunk_of.get(name, 0) for name in branch.adds)) for branch in branches)


def trunk_operands(add: fx.Node, ends: Collection[str]) -> list[fx.Node]:
    """The operands of a residual add that do not come out of its branch."""
    operands = add.all_input_nodes
    free = [operand for operand in operands if all(node.name not in ends for node in _walk([operand], ends))]
    return free or operands


def _walk(start: Iterable[fx.Node], stops: Collection[str]) -> set[fx.Node]:
    """What reaches `start` without paying FLOPs, up to and with the nearest residual adds and heavy nodes."""
    seen: set[fx.Node] = set()
    work = list(start)
    while work:
        node = work.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name not in stops and not node_flops(node):
            work.extend(node.all_input_nodes)
    return seen


def _below_latents(gm: fx.GraphModule) -> set[fx.Node]:
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    latents = analysis_of(gm).inputs.latents
    below: set[fx.Node] = set() if latents is None else {placeholders[latents]}
    for node in gm.graph.nodes:
        if any(parent in below for parent in node.all_input_nodes):
            below.add(node)
    return below
