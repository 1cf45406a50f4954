"""Find what may be reused from step to step: the branches ``f`` in ``x + f(x)``, and the values to cache for each.

Before:  a functional ATen graph with shapes (``node.meta["val"]``)
After:   the same graph; ``gm.meta`` holds an `Analysis`: inputs by role, branches with kinds, cuts, FLOPs and bytes
Numerics: bitwise equal; the graph is only read.

How. A node is *heavy* if it costs FLOPs and depends on an input that is not a parameter; all others are light. A
*trunk path* runs through light nodes and never broadcasts its operand. An addition ``a + b`` is a residual add if
some node r reaches a on a trunk path, and reaches b, but only through heavy nodes: one operand has r for free, the
other only by paying FLOPs. The latest such r is where the branch leaves the trunk. That rejects rotary embeddings and
activations (both sides light), adaLN's shift (it does not descend from x), biases and position tables, and sums of
experts (both heavy). What is cached is a minimum-bytes vertex cut between the last heavy nodes of a branch and its
add, never behind the first join with a value that does not descend from r (the gate): so caches hold attention and
MLP outputs before timestep-only modulation. An operator from outside torch is heavy, as nobody can look through it;
but one that is no attention and joins such a value at a branch's end is taken for a gate and computed at every step,
and so is a product with what follows from the timestep alone. Additions that share heavy nodes or a cut (joint
attention) are one branch.
"""

from __future__ import annotations

import operator
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx
import torch
from torch import fx

from omnifx.errors import ConfigError, PassError
from omnifx.flops import is_attention, is_opaque
from omnifx.graph import (
    ANALYSIS,
    ARGUMENT,
    PLAIN_NAME,
    SETTING,
    SMALL,
    Analysis,
    BitSets,
    Branch,
    Inputs,
    Pass,
    dead_without,
    float_outputs,
    hint,
    node_flops,
    num_bytes,
    numel,
    output_of,
    tensors_in,
)
from omnifx.sizes import free_symbols, symbols_of

aten = torch.ops.aten

ADDITIONS = {aten.add, aten.sub, aten.addcmul, aten.rsub}
STRUCTURAL = {
    aten.cat, aten.stack, aten.slice, aten.select, aten.split, aten.split_with_sizes, aten.chunk, aten.unbind,
    aten.constant_pad_nd, aten.slice_scatter, aten.select_scatter, aten.index_put, aten.index, aten.index_select,
    aten.gather, aten.scatter, aten.masked_scatter, aten.roll, aten.flip, aten.narrow,
}  # fmt: skip
"""Operators that move values and may change how many there are: a trunk path may cross them."""

MOVES = {
    aten.view, aten._unsafe_view, aten.reshape, aten.permute, aten.transpose, aten.t, aten.unsqueeze, aten.squeeze,
    aten.expand, aten.clone, aten.alias, aten._to_copy, torch.ops.prims.convert_element_type,
}  # fmt: skip
"""Operators that give the same values in another layout or type."""

AFFINE = {aten.add, aten.sub, aten.mul, aten.div}
"""Operators that are affine in one operand, if the others are parameters: biases and scales."""


@dataclass(frozen=True, kw_only=True)
class FindBranches(Pass):
    """Attach an `Analysis` to the graph."""

    static: frozenset[int]  # positions of the inputs that are parameters or buffers
    min_share: float = 0.02  # of the median branch's FLOPs: smaller ones wrap the ends of the trunk and are left alone
    keep_if_nested: float = (
        0.25  # own share of FLOPs from which a branch around another on the same trunk is one itself
    )
    keep_if_outer: float = 0.5  # own share of FLOPs from which a branch around an inner residual is kept as a whole

    def __post_init__(self) -> None:
        for name in ("min_share", "keep_if_nested", "keep_if_outer"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{self.name}.{name} must lie in [0, 1], got {getattr(self, name)!r}.")

    def requires(self, gm: fx.GraphModule) -> None:
        bare = [n.name for n in gm.graph.nodes if n.op == "call_function" and "val" not in n.meta and n.users]
        if bare:
            raise PassError(
                f"{self.name}: {len(bare)} nodes have no shapes, the first is {bare[0]}. Trace with fake tensors."
            )
        output_of(gm)

    def call(self, gm: fx.GraphModule) -> bool:
        gm.meta[ANALYSIS] = _Finder(gm, self).run()
        return False

    def ensures(self, gm: fx.GraphModule) -> None:
        names = [branch.name for branch in gm.meta[ANALYSIS].branches]
        if len(set(names)) != len(names):
            raise PassError(f"{self.name}: branch names {names} are not unique.")


def input_roles(gm: fx.GraphModule, static: Iterable[int]) -> Inputs:
    """Tell the inputs apart from shapes: the latents are the floating-point input most like the output.

    Most alike: the same shape; else the most axes (batch first, last ones next) in common; else the most elements.
    Among equals (a picture to condition on, say) it is the earliest argument of the model's forward.
    Where a model returns more than one sample (video and audio), inputs shaped like the others are further latents.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    fixed, sizes = frozenset(static), _size_inputs(placeholders)
    outputs = [output_of(gm).args[0][i].meta["val"] for i in float_outputs(gm)]  # type: ignore[index,union-attr]
    target = max(outputs, key=numel, default=None)
    candidates: list[tuple[tuple[int, int, int, int, int], int]] = []
    others: list[int] = []
    for i, node in enumerate(placeholders):
        value = node.meta.get("val")
        if i in fixed or i in sizes:
            continue
        others.append(i)
        if target is None or not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() < 2:
            continue
        same = value.dim() == target.dim()
        common = sum(hint(a) == hint(b) for a, b in zip(value.shape, target.shape, strict=False)) if same else 0
        likeness = (int(same and common == value.dim()), common, numel(value), -node.meta.get(ARGUMENT, 0), -i)
        candidates.append((likeness, i))
    latents = max(candidates)[1] if candidates else None
    further = {
        i
        for output in outputs
        if output is not target
        for _, i in candidates
        if i != latents and [*map(hint, placeholders[i].meta["val"].shape)] == [*map(hint, output.shape)]
    }
    rest = [i for i in others if i != latents]
    small = tuple(
        i
        for i in rest
        if i not in further and numel(placeholders[i].meta.get("val")) <= SMALL and _is_flat(placeholders[i])
    )
    return Inputs(
        latents=latents,
        further_latents=tuple(sorted(further)),
        small=small,
        large=tuple(i for i in rest if i not in small),
        static=tuple(sorted(fixed)),
        sizes=sizes,
        settings=tuple(i for i in sorted(fixed) if placeholders[i].meta.get(SETTING)),
        names=tuple(node.name for node in placeholders),
        plain_names=tuple(node.meta.get(PLAIN_NAME, "") for node in placeholders),
    )


def _size_inputs(placeholders: list[fx.Node]) -> tuple[int, ...]:
    """Positions of the inputs that are sizes of tensors among the inputs; other whole numbers may be timesteps."""
    used: set[Any] = set()
    for node in placeholders:
        if isinstance(value := node.meta.get("val"), torch.Tensor):
            for size in (*value.shape, *value.stride()):
                used |= free_symbols(size)
    return tuple(position for symbol, position in symbols_of(placeholders).items() if symbol in used)


def _is_flat(placeholder: fx.Node) -> bool:
    """Whether an input has at most two axes longer than 1, as timesteps per sample and per token or frame have.

    Of floating-point inputs with three axes or more, one of the two is the batch: [1, tokens, width] is a text.
    """
    value = placeholder.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return True
    batch, rest = [hint(size) > 1 for size in value.shape[:1]], [hint(size) > 1 for size in value.shape[1:]]
    return sum(batch + rest) <= 2 and not (value.is_floating_point() and value.dim() > 2 and sum(rest) > 1)


def _may_be_time(placeholder: fx.Node, latents: fx.Node) -> bool:
    """Whether a small input may be a timestep: one value for all, for each sample, or for each token of each sample.

    Masks of truth values and positions of tokens are none.
    """
    value = placeholder.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return not isinstance(value, torch.Tensor) or value.dtype != torch.bool
    batch, *axes = map(hint, value.shape)
    of_samples = batch in (1, hint(latents.meta["val"].shape[0]))
    return value.dtype != torch.bool and of_samples and sum(size > 1 for size in axes) <= 1


@dataclass
class _Candidate:
    """A residual add while it is being judged."""

    add: int
    trunk: int  # r
    side: int  # b, the operand that holds the branch
    region: int  # bit set
    heavy: list[int] = field(default_factory=list)  # of the whole region
    own: list[int] = field(default_factory=list)  # heavy nodes that belong to no nested residual
    reach: int = 0  # bit set: what reaches b past no heavy node but the gates
    cuts: list[int] = field(default_factory=list)


class _Finder:
    """One analysis; holds the bit sets while it runs."""

    def __init__(self, gm: fx.GraphModule, options: FindBranches) -> None:
        self.gm = gm
        self.options = options
        self.inputs = input_roles(gm, options.static)
        self.sets = BitSets.of(gm.graph)
        self.nodes = self.sets.nodes
        self.flops = [node_flops(node) for node in self.nodes]
        self._mark()

    def _mark(self) -> None:
        """Bit sets of kinds of nodes, and the light and trunk ancestors of each node."""
        index, nodes = self.sets.index, self.nodes
        placeholders = [node for node in nodes if node.op == "placeholder"]
        static = {placeholders[i] for i in self.inputs.static}
        small = {placeholders[i] for i in self.inputs.small}
        fixed = static | {placeholders[i] for i in self.inputs.sizes}
        self.data = self.sized = self.heavy = self.timed = 0
        moving = 1 << index[placeholders[self.inputs.latents]] if self.inputs.latents is not None else 0
        clocks = sum(1 << index[node] for node in small)
        self.light_ancestors: list[int] = []
        self.trunk_ancestors: list[int] = []
        for i, node in enumerate(nodes):
            bit = 1 << i
            parents = [index[parent] for parent in node.all_input_nodes]
            if node.op == "placeholder":
                self.data |= bit * (node not in fixed)
                self.sized |= bit * (node not in fixed and node not in small)
            else:
                self.data |= bit * any(self.data >> p & 1 for p in parents)
                self.sized |= bit * any(self.sized >> p & 1 for p in parents)
            if self.sets.ancestors[i] & clocks and not self.sets.ancestors[i] & moving:
                self.timed |= bit
            light = trunk = bit
            if self.flops[i] and self.data & bit:
                self.heavy |= bit
            elif node.op == "call_function":
                size, structural = numel(node.meta.get("val")), _packet(node) in STRUCTURAL
                for p in parents:
                    light |= self.light_ancestors[p]
                    if structural or numel(nodes[p].meta.get("val")) >= size:
                        trunk |= self.trunk_ancestors[p]
            self.light_ancestors.append(light)
            self.trunk_ancestors.append(trunk)

    def run(self) -> Analysis:
        candidates = self._drop_composites(self._residual_adds())
        self._find_cuts(candidates)
        groups = self._group(candidates)
        together = self._dead(c for group in groups for c in group)
        branches = self._name([self._branch(group, together) for group in groups])
        cuts = [self._node(name) for branch in branches if branch.cacheable for name in branch.cuts]
        total = sum(self.flops)
        saved = sum(self.flops[self.sets.index[node]] for node in dead_without(cuts))
        return Analysis(inputs=self.inputs, branches=tuple(branches), flops=total, reuse_flops=total - saved)

    def _node(self, name: str) -> fx.Node:
        if not hasattr(self, "_by_name"):
            self._by_name = {node.name: node for node in self.nodes}
        return self._by_name[name]

    # -- residual adds -------------------------------------------------------------------------------------------------

    def _residual_adds(self) -> list[_Candidate]:
        index, sets = self.sets.index, self.sets
        found = []
        for i, node in enumerate(self.nodes):
            if _packet(node) not in ADDITIONS:
                continue
            operands = [index[arg] for arg in node.args[:2] if isinstance(arg, fx.Node)]
            if _packet(node) is aten.addcmul:  # x + value * t1 * t2: the products stand for b
                operands = [index[node.args[0]], *(index[arg] for arg in node.args[1:3] if isinstance(arg, fx.Node))]  # type: ignore[index]
            best: tuple[int, int] | None = None
            for a in operands:
                for b in operands:
                    if a == b or not (self.data >> a & 1 and self.data >> b & 1):
                        continue
                    common = self.trunk_ancestors[a] & sets.ancestors[b] & ~self.light_ancestors[b] & self.sized
                    if common and (best is None or common.bit_length() - 1 > best[0]):
                        best = (common.bit_length() - 1, b)
            if best is not None:
                trunk, side = best
                region = sets.descendants[trunk] & sets.ancestors[side] & ~(1 << trunk)
                heavy = list(sets.members(region & self.heavy))
                found.append(_Candidate(add=i, trunk=trunk, side=side, region=region, heavy=heavy))
        return found

    def _drop_composites(self, candidates: list[_Candidate]) -> list[_Candidate]:
        """Of nested residual adds keep those that are branches; what wraps whole stages is not one."""
        dropped: set[int] = set()
        for outer in sorted(candidates, key=lambda c: c.region.bit_count()):
            nested = [inner for inner in candidates if inner is not outer and outer.region >> inner.add & 1]
            covered = 0
            for inner in nested:
                covered |= inner.region
            outer.own = [h for h in outer.heavy if not covered >> h & 1]
            if not nested:
                continue
            total = self._cost(outer.heavy)
            share = self._cost(outer.own) / total if total else 0.0
            same_trunk = [c for c in nested if self.trunk_ancestors[c.trunk] >> outer.trunk & 1]
            inner_trunk = [c for c in nested if c not in same_trunk]
            if same_trunk and share < self.options.keep_if_nested:
                dropped.add(outer.add)
            elif inner_trunk and not same_trunk:
                if share >= self.options.keep_if_outer:
                    dropped.update(inner.add for inner in inner_trunk)
                    outer.own = outer.heavy
                else:
                    dropped.add(outer.add)
        return [c for c in candidates if c.add not in dropped and c.own]

    def _cost(self, nodes: Iterable[int]) -> int:
        return sum(self.flops[i] for i in nodes)

    # -- cuts ----------------------------------------------------------------------------------------------------------

    def _find_cuts(self, candidates: list[_Candidate]) -> None:
        """Minimum-bytes vertex cut between the last heavy nodes and the adds: one flow for each connected group of
        branches."""
        sets = self.sets
        flow: nx.DiGraph[Any] = nx.DiGraph()
        for c in candidates:
            passed = self._pass_gates(c)
            own = sum(1 << h for h in c.own)
            sources = list(sets.members(c.reach & own))
            if not sources:
                continue
            behind = 0
            for h in sources:
                behind |= sets.descendants[h]
            tail = list(sets.members(c.reach & ~(self.heavy & ~passed) & behind))
            members = {*sources, *tail}
            tainted: set[int] = set()
            for h in sources:
                size = num_bytes(self.nodes[h].meta["val"]) if _is_tensor(self.nodes[h]) else None
                self._add_value(flow, h, size)
                flow.add_edge("source", (h, "in"))
            for t in tail:
                parents = [sets.index[p] for p in self.nodes[t].all_input_nodes]
                foreign = any(
                    p not in members and self.data >> p & 1 and not sets.descendants[c.trunk] >> p & 1 for p in parents
                )
                if foreign or any(p in tainted for p in parents):
                    tainted.add(t)
                size = num_bytes(self.nodes[t].meta["val"]) if _is_tensor(self.nodes[t]) and t not in tainted else None
                self._add_value(flow, t, size)
                for p in parents:
                    if p in members:
                        flow.add_edge((p, "out"), (t, "in"))
            flow.add_edge((c.side, "out"), ("add", c.add))
            flow.add_edge(("add", c.add), "sink")
        parts = flow.copy()
        parts.remove_nodes_from([n for n in ("source", "sink") if n in parts])
        chosen: set[int] = set()
        for part in nx.connected_components(parts.to_undirected(as_view=True)):
            chosen.update(_minimum_cut(flow.subgraph({*part, "source", "sink"})))
        for c in candidates:
            own = sum(1 << h for h in c.own)
            c.cuts = [v for v in sets.members(c.reach & ~(self.heavy & ~own)) if v in chosen]

    def _pass_gates(self, c: _Candidate) -> int:
        """Let the branch end before heavy gates, and before opaque operators behind them; returns these nodes.

        An opaque gate with no work of the branch before it may itself hold all of that work: then nothing is cached.
        """
        ancestors = self.sets.ancestors
        own = sum(1 << h for h in c.own)
        gates = sum(1 << h for h in c.own if self._is_gate(h, c.trunk))
        late = sum(1 << g for g in self.sets.members(gates) if ancestors[g] & own & ~gates)
        passed, c.reach = 0, self.light_ancestors[c.side]
        while new := c.reach & own & ~passed:
            if any(self._is_unknown(h, c.trunk) for h in self.sets.members(new & gates & ~late)):
                c.reach = 0
                return 0
            ends = [
                h
                for h in self.sets.members(new)
                if late >> h & 1 or (self._is_unknown(h, c.trunk) and late & self._above(h, own, c.trunk))
            ]
            if not ends:
                break
            for h in ends:
                passed |= 1 << h
                for parent in self.nodes[h].all_input_nodes:
                    c.reach |= self.light_ancestors[self.sets.index[parent]]
        c.own = [h for h in c.own if not passed >> h & 1]
        return passed

    def _above(self, h: int, own: int, trunk: int) -> int:
        """What reaches a node past no heavy node but opaque ones of the branch that are no attention."""
        found, work = 0, [h]
        seen = 1 << h
        while work:
            above = 0
            for parent in self.nodes[work.pop()].all_input_nodes:
                above |= self.light_ancestors[self.sets.index[parent]]
            found |= above
            new = [i for i in self.sets.members(above & own & ~seen) if self._is_unknown(i, trunk)]
            seen |= sum(1 << i for i in new)
            work += new
        return found

    def _is_unknown(self, h: int, trunk: int) -> bool:
        return is_opaque(self.nodes[h]) and not self._mixes(h, trunk)

    def _is_gate(self, h: int, trunk: int) -> bool:
        """Whether a heavy node joins a value of the trunk's with a foreign one as gates do: an opaque operator that is
        no attention, or a product with what follows from the timestep alone."""
        below = self.sets.descendants[trunk]
        parents = [self.sets.index[p] for p in self.nodes[h].all_input_nodes]
        foreign = [p for p in parents if self.data >> p & ~below >> p & 1]
        if not foreign or not any(below >> p & 1 for p in parents):
            return False
        timed = not is_attention(self.nodes[h]) and any(self.timed >> p & 1 for p in foreign)
        return timed or self._is_unknown(h, trunk)

    def _mixes(self, h: int, trunk: int) -> bool:
        """Whether a heavy node lets tokens see each other: a product of two data operands, or an attention.

        An opaque operator counts as attention by its name, or if it takes three operands in the shapes of queries, keys
        and values, none of which is the trunk itself (or its norm).
        """
        node = self.nodes[h]
        operands = self._mixed_operands(node)
        if is_attention(node) or not is_opaque(node):
            return is_attention(node) or len(operands) >= 2
        if len(operands) < 3 or any(self.light_ancestors[self.sets.index[o]] >> trunk & 1 for o in operands):
            return False
        query, key, value = (operand.meta["val"] for operand in operands)
        return (
            all(isinstance(v, torch.Tensor) and v.dim() == query.dim() >= 3 for v in (query, key, value))
            and hint(query.shape[-1]) == hint(key.shape[-1])
            and all(hint(a) == hint(b) for a, b in zip(key.shape[:-1], value.shape[:-1], strict=True))
            and numel(key) > hint(key.shape[0]) * hint(key.shape[-1])  # one token for each sample is a modulation
        )

    @staticmethod
    def _add_value(flow: nx.DiGraph[Any], value: int, size: int | None) -> None:
        if flow.has_edge((value, "in"), (value, "out")):
            if size is None:  # a value that one branch may not cut is not cut for the other either
                flow[(value, "in")][(value, "out")].pop("capacity", None)
            return
        flow.add_edge((value, "in"), (value, "out"), **({} if size is None else {"capacity": size}))

    # -- branches ------------------------------------------------------------------------------------------------------

    def _group(self, candidates: list[_Candidate]) -> list[list[_Candidate]]:
        """Additions that share own heavy nodes or a cut are one branch."""
        shared = nx.utils.UnionFind(c.add for c in candidates)
        owner: dict[tuple[str, int], int] = {}
        for c in candidates:
            for key in [("heavy", h) for h in c.own] + [("cut", v) for v in c.cuts]:
                shared.union(owner.setdefault(key, c.add), c.add)
        groups: dict[int, list[_Candidate]] = defaultdict(list)
        for c in candidates:
            groups[shared[c.add]].append(c)
        return sorted(groups.values(), key=lambda group: group[0].add)

    def _dead(self, candidates: Iterable[_Candidate]) -> set[int]:
        """What nothing needs once the cuts of these additions are read."""
        cuts = {v for c in candidates for v in c.cuts}
        return {self.sets.index[node] for node in dead_without(self.nodes[v] for v in cuts)}

    def _branch(self, group: list[_Candidate], together: set[int]) -> Branch:
        """The branch of a group of additions; `together` is what dies when all branches are reused.

        A product that only other branches use as well (keys and values that two attentions share) does not keep the
        branch from being cached, but dies only with the last of them.
        """
        own = sorted({h for c in group for h in c.own})
        cuts = sorted({v for c in group for v in c.cuts})
        dead = self._dead(group)
        reason = ""
        if any(not c.cuts for c in group):
            reason = "no single tensor separates it from the trunk before a value that changes with the step joins"
        elif alive := [self.nodes[h].name for h in own if h not in together]:
            reason = f"{alive[0]} is also used outside the branch, so reuse would not free it"
        elif self._is_affine(group, own):
            reason = f"{self.nodes[own[0]].name} alone is no attention or MLP, but an affine map of the trunk"
        dependence = self._dependence(group)
        if not reason and dependence == "timestep":
            reason = (
                "depends on the timestep and the conditioning only, not on the latents: cheap, and computed each step"
            )
        freed = sum(self.flops[i] for i in dead)
        path = _common_path([_module_paths(self.nodes[h]) for h in own])
        return Branch(
            name=path,
            kind=self._kind(group, own),
            dependence=dependence,
            module_path=path,
            adds=tuple(self.nodes[c.add].name for c in group),
            heavy=tuple(self.nodes[h].name for h in own if reason or h in dead),
            cuts=tuple(self.nodes[v].name for v in cuts),
            flops=freed if cuts else self._cost(own),
            cache_bytes=sum(num_bytes(self.nodes[v].meta["val"]) for v in cuts),
            cacheable=not reason,
            reason=reason,
        )

    def _is_affine(self, group: list[_Candidate], own: list[int]) -> bool:
        """Whether a branch is one product and nothing else, as in ``x + conv(x)`` at the ends of a trunk."""
        if len(group) > 1 or len(own) > 1:
            return False
        return all(
            len(self._mixed_operands(self.nodes[i])) == 1
            and (i == own[0] or _packet(self.nodes[i]) in MOVES or _packet(self.nodes[i]) in AFFINE)
            for i in self.sets.members(group[0].region)
        )

    def _dependence(self, group: list[_Candidate]) -> str:
        placeholders = [node for node in self.nodes if node.op == "placeholder"]
        ancestors = 0
        for c in group:
            ancestors |= self.sets.ancestors[c.side]
        reached = {i for i, node in enumerate(placeholders) if ancestors >> self.sets.index[node] & 1}
        if self.inputs.latents is None or reached & {self.inputs.latents, *self.inputs.further_latents}:
            return "latent"
        latents = placeholders[self.inputs.latents]
        if any(_may_be_time(placeholders[i], latents) for i in reached.intersection(self.inputs.small)):
            return "timestep"
        return "invariant"

    def _kind(self, group: list[_Candidate], own: list[int]) -> str:
        index, sets = self.sets.index, self.sets
        trunk = 0
        for c in group:
            trunk |= sets.descendants[c.trunk]
        mixing: list[int] = []
        crosses = sees_itself = False
        for h in own:
            if not any(self._mixes(h, c.trunk) for c in group):
                continue
            operands = self._mixed_operands(self.nodes[h])
            mixing.append(h)
            foreign = [p for p in operands if not trunk >> index[p] & 1]
            crosses |= bool(foreign)
            sees_itself |= not foreign and is_attention(self.nodes[h])
        if not mixing:
            known = [h for h in own if not is_opaque(self.nodes[h])]
            return "conv" if known and all(_packet(self.nodes[h]) is aten.convolution for h in known) else "mlp"
        if self._runs_beside(group, own, mixing):
            return "parallel"
        roots = [c.trunk for c in group]
        if any(
            not (self.trunk_ancestors[a] >> b & 1 or self.trunk_ancestors[b] >> a & 1) for a in roots for b in roots
        ):
            return "joint_attention"
        if crosses:
            return "cross_attention+self_attention" if sees_itself else "cross_attention"
        return "self_attention"

    def _runs_beside(self, group: list[_Candidate], own: list[int], mixing: list[int]) -> bool:
        """Whether products that bypass the mixing operators are added to, or concatenated with, what those made.

        One that is multiplied with it is a gate, and part of the attention. A concatenation may also join parts of one
        product that feeds both sides (the fused projections of Flux 2).
        """
        sets = self.sets
        products = sum(1 << h for h in own)
        region = before = after = 0
        for c in group:
            region |= c.region
        for m in mixing:
            before |= sets.ancestors[m]
            after |= sets.descendants[m]
        for i in sets.members(region & after & ~self.heavy):
            packet = _packet(self.nodes[i])
            if packet is aten.cat:
                aside = products
            elif packet in ADDITIONS:
                aside = products & ~before
            else:
                continue
            operands = [sets.index[parent] for parent in self.nodes[i].all_input_nodes]
            if any(not after >> p & 1 and self.light_ancestors[p] & aside for p in operands):
                return True
        return False

    def _mixed_operands(self, node: fx.Node) -> list[fx.Node]:
        """Floating-point operands that depend on data; those of attention without its mask."""
        known = is_attention(node) and not is_opaque(node)
        found = [
            arg
            for arg in (node.args[:3] if known else node.all_input_nodes)
            if isinstance(arg, fx.Node)
            and self.data >> self.sets.index[arg] & 1
            and any(leaf.is_floating_point() for leaf in tensors_in(arg.meta.get("val")))
        ]
        return found[:3] if is_opaque(node) else found

    def _name(self, branches: list[Branch]) -> list[Branch]:
        """Unique names; FLOPs shared by several branches are split; what is too small to pay is refused."""
        counts: dict[str, int] = defaultdict(int)
        for branch in branches:
            counts[branch.name] += 1
        seen: dict[str, int] = defaultdict(int)
        named = []
        for branch in branches:
            name = branch.name or "branch"
            if counts[branch.name] > 1 or not branch.name:
                name = f"{name}.{branch.kind}"
            seen[name] += 1
            named.append(replace(branch, name=name if seen[name] == 1 else f"{name}.{seen[name]}"))
        costs = self._exclusive_flops(named)
        named = [replace(branch, flops=costs[branch.name]) for branch in named]
        usable = [branch.flops for branch in named if branch.cacheable]
        floor = self.options.min_share * statistics.median(usable) if usable else 0.0
        return [
            replace(
                b,
                cacheable=False,
                reason=f"only {b.flops:,} FLOPs, under {self.options.min_share:.0%} of the median branch",
            )
            if b.cacheable and b.flops < floor
            else b
            for b in named
        ]

    def _exclusive_flops(self, branches: list[Branch]) -> dict[str, int]:
        """FLOPs that die with each branch, so that they add up to what dies with all of them."""
        usable = [branch for branch in branches if branch.cacheable]
        owner = {name: branch.name for branch in branches for name in branch.heavy}
        claims: dict[fx.Node, list[str]] = defaultdict(list)
        for branch in usable:
            for node in dead_without(self._node(cut) for cut in branch.cuts):
                if owner.get(node.name, branch.name) == branch.name:
                    claims[node].append(branch.name)
        costs: dict[str, float] = {branch.name: 0.0 if branch.cacheable else float(branch.flops) for branch in branches}
        together = dead_without(self._node(cut) for branch in usable for cut in branch.cuts)
        for node in together:
            flops = self.flops[self.sets.index[node]]
            users = claims.get(node) or [branch.name for branch in usable]
            for name in users:
                costs[name] += flops / len(users)
        return {name: round(cost) for name, cost in costs.items()}


def _minimum_cut(flow: nx.DiGraph[Any]) -> set[int]:
    """The values of the minimum cut that lies nearest to the sink; empty if no finite cut exists."""
    try:
        residual = nx.algorithms.flow.preflow_push(flow, "source", "sink", value_only=False)
    except nx.NetworkXUnbounded:
        return set()
    reaches_sink: set[Any] = {"sink"}
    work: list[Any] = ["sink"]
    while work:
        node = work.pop()
        for before in residual.predecessors(node):
            edge = residual[before][node]
            if before not in reaches_sink and edge["flow"] < edge["capacity"]:
                reaches_sink.add(before)
                work.append(before)
    return {
        node[0]
        for node in flow.nodes
        if isinstance(node, tuple) and node[1] == "out" and node in reaches_sink and (node[0], "in") not in reaches_sink
    }


def _packet(node: fx.Node) -> object:
    return getattr(node.target, "overloadpacket", node.target) if node.op == "call_function" else None


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor) and node.target is not operator.setitem


def _module_paths(node: fx.Node) -> list[str]:
    """Paths of the modules that a node's call stack runs through, outermost first, as `named_modules` prints them."""
    return [_clean_path(str(entry[0])) for entry in (node.meta.get("nn_module_stack") or {}).values()]


def _clean_path(path: str) -> str:
    path = re.sub(r"\['([^']+)'\]|\[(\d+)\]", lambda m: "." + next(filter(None, m.groups())), path)
    parts = [part for part in path.split(".") if part not in ("", "L", "self", "L__self__", "_modules", "__dict__")]
    return ".".join(parts)


def _common_path(stacks: list[list[str]]) -> str:
    """The innermost module that all of these call stacks run through; empty if unknown."""
    known = [stack for stack in stacks if stack]
    shared = [path for path in (known[0] if known else []) if all(path in stack for stack in known)]
    return shared[-1] if shared else ""
