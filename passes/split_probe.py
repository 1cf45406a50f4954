"""Split a step at a probe: a head that measures, and tails that go on from what the head computed.

Before:  x -> embed -> block 0 -> (the probe) -> blocks 1..n (the span) -> head -> output(y)
After, `SplitHead`:   x, what was kept -> embed -> block 0 -> output(signal, what to keep, carried values)
After, `ResumeTail`:  carry_add (an input) -> blocks 1..n -> head -> output(y)
       with `WriteResiduals`: the same, and output(y, trunk behind the span - trunk before it)
       with `RestoreSpan`:    carry_add -> add(residual, an input) -> head -> output(y)
                              or a sum of several steps' residuals, weighed by the input ``predictor``
Numerics: head and tail together are *bitwise equal* to the graph where operators run one by one, *close* (1e-5 relative
in float32) where a compiler fuses them otherwise than in one graph. Restoring the span is approximate, as the policy
decides; from the step's own residuals it is close (the rounding of one subtraction and one addition).

Carried are the values of the head that the tail reads. Instead of a view the value that it shows is carried, and views
of inputs are made again: a view costs nothing, and two views of one value would be carried twice.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from omnifx.errors import PassError
from omnifx.graph import (
    EXTRA_INPUTS,
    EXTRA_OUTPUTS,
    BitSets,
    Pass,
    analysis_of,
    append_output,
    inline_all,
    insert_input,
    node_named,
    nodes_by_name,
    output_of,
)
from omnifx.passes.eliminate import Eliminate
from omnifx.passes.predict_cuts import combine
from omnifx.probes import VIEWS, Keep, Probe, Values


def aged(label: str, age: int) -> str:
    """The label of what the last computed step left (age 0), the one before it (1), and so on."""
    return f"{label}@{age}" if age else label


@dataclass(frozen=True)
class Split:
    """Where a probe splits a graph, by names of nodes."""

    head: frozenset[str]
    """What the head computes."""
    carried: tuple[str, ...]
    """What of it the tails read."""


def split_at(gm: fx.GraphModule, probe: Probe) -> Split:
    """Where `probe` splits the graph: the head is what its values and the span's start need, and nothing else."""
    sets = BitSets.of(gm.graph)
    wanted = {name for _, name in probe.reads} | {pair.start for pair in probe.span}
    nodes = nodes_by_name(gm)
    if missing := wanted - set(nodes):
        raise PassError(f"split_at: the probe reads {sorted(missing)}, which the graph has not. Find its trunk again.")
    bits = 0
    for name in wanted:
        bits |= sets.ancestors[sets.index[nodes[name]]]
    head = {sets.nodes[i] for i in sets.members(bits)}
    for node in sets.nodes:  # parts of a tuple come with it: a tuple cannot be carried
        if node.target is operator.getitem and node.args[0] in head:
            head.add(node)
    needed = {sets.nodes[i] for i in sets.members(sets.ancestors[sets.index[output_of(gm)]])}
    carried: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()
    work = [n for n in sets.nodes if n in head and any(user in needed and user not in head for user in n.users)]
    work += [nodes[pair.start] for pair in probe.span]
    while work:
        node = work.pop(0)
        if node in seen or node.op == "placeholder":
            continue
        seen.add(node)
        if _made_again(node):
            work += [parent for parent in node.all_input_nodes if parent in head]
        else:
            carried[node] = None
    order = sorted(carried, key=sets.index.__getitem__)
    return Split(frozenset(node.name for node in head), tuple(node.name for node in order))


def _made_again(node: fx.Node) -> bool:
    """Whether the tail makes a value of the head anew: views, and sizes, which are no tensors."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return True
    packet = getattr(node.target, "overloadpacket", None)
    return packet in VIEWS and isinstance(node.all_input_nodes[0].meta.get("val"), Tensor)


@dataclass(frozen=True, kw_only=True)
class SplitHead(Pass):
    """Keep the head alone: it returns ``signal``, [signals, B] float32, and what is kept and carried."""

    probe: Probe
    carried: tuple[str, ...]

    def requires(self, gm: fx.GraphModule) -> None:
        if self.probe.measure is None:
            raise PassError(f"{self.name}: the probe measures nothing before the step, so there is no head.")
        if gm.meta.get(EXTRA_INPUTS) or gm.meta.get(EXTRA_OUTPUTS):
            raise PassError(f"{self.name}: the graph was changed already; split the captured graph.")

    def call(self, gm: fx.GraphModule) -> bool:
        end = output_of(gm)
        signal, kept = _measure(gm, self.probe, head=True, before=end)
        carried = [node_named(gm, name) for name in self.carried]
        labels = ["signal", *(f"probe:{keep.name}" for keep in self.probe.keeps)]
        end.args = ((signal, *kept, *carried),)
        gm.meta[EXTRA_OUTPUTS] = [*labels, *(f"carry:{name}" for name in self.carried)]
        end.meta.pop("output_stack_traces", None)
        if "user_visible_output_idxs" in end.meta:  # strides as the tail was compiled for
            end.meta["user_visible_output_idxs"] = list(range(len(gm.meta[EXTRA_OUTPUTS])))
        Eliminate().call(gm)
        return True

    def ensures(self, gm: fx.GraphModule) -> None:
        wanted = 1 + len(self.probe.keeps) + len(self.carried)
        if len(output_of(gm).args[0]) != wanted:  # type: ignore[arg-type]
            raise PassError(f"{self.name}: the head returns other than {wanted} values.")


@dataclass(frozen=True, kw_only=True)
class ResumeTail(Pass):
    """Take what the head computed from inputs labelled ``carry:<node name>``."""

    carried: tuple[str, ...]
    head: frozenset[str]

    def call(self, gm: fx.GraphModule) -> bool:
        nodes = nodes_by_name(gm)
        for node in [nodes[name] for name in self.carried if name in nodes]:  # others fed the skipped span alone
            name = node.name
            fed = insert_input(gm, f"carry_{name}", label=f"carry:{name}", like=node.meta["val"])
            node.replace_all_uses_with(fed)
        Eliminate().call(gm)
        return True

    def ensures(self, gm: fx.GraphModule) -> None:
        alive = [n.name for n in gm.graph.nodes if n.name in self.head and n.op == "call_function"]
        nodes = nodes_by_name(gm)
        if twice := [name for name in alive if not _made_again(nodes[name])]:
            raise PassError(f"{self.name}: {twice} are computed in the head and again in the tail.")


@dataclass(frozen=True, kw_only=True)
class WriteResiduals(Pass):
    """Return what the span added to each trunk, as ``delta:<number>``, and what the probe measures at a step's end."""

    probe: Probe

    def call(self, gm: fx.GraphModule) -> bool:
        nodes = nodes_by_name(gm)
        end = output_of(gm)
        for i, pair in enumerate(self.probe.span):
            (delta,) = inline_all(gm, self.probe.residual, [nodes[pair.end], nodes[pair.start]], before=end)
            append_output(gm, delta, label=f"delta:{i}")
        if self.probe.finish is not None:
            signal, kept = _measure(gm, self.probe, head=False, before=end)
            if self.probe.finish_signals:
                append_output(gm, signal, label="signal")
            for keep, value in zip(self.probe.finish_keeps, kept, strict=True):
                append_output(gm, value, label=f"probe:{keep.name}")
        return bool(self.probe.span) or self.probe.finish is not None


@dataclass(frozen=True, kw_only=True)
class RestoreSpan(Pass):
    """Let the trunk behind the span be restored from residuals; the span is dead, and `Eliminate` removes it."""

    probe: Probe
    span: tuple[str, ...]  # heavy nodes that must be gone afterwards

    def call(self, gm: fx.GraphModule) -> bool:
        probe, nodes = self.probe, nodes_by_name(gm)
        placed: list[tuple[fx.Node, list[fx.Node]]] = []
        marks: list[fx.Node] = []
        weights: list[fx.Node] = []
        if probe.weights is not None:
            like = _residual_like(gm, probe, nodes[probe.span[0].end], nodes[probe.span[0].start])
            with _mode_of(like):
                like = like.new_empty(probe.window, dtype=torch.float32)
            weights = [insert_input(gm, "predictor", label="predictor", like=like)]
        elif probe.keeps:
            like, label = _like(gm, probe.keeps[0]), probe.keeps[0].name
            names = [f"now:{label}", *(aged(f"probe:{label}", age) for age in range(probe.window))]
            marks = [insert_input(gm, _plain(name), label=name, like=like) for name in names]
        for i, pair in enumerate(probe.span):
            like = _residual_like(gm, probe, nodes[pair.end], nodes[pair.start])
            names = [aged(f"delta:{i}", age) for age in range(probe.window)]
            placed.append((nodes[pair.end], [insert_input(gm, _plain(name), label=name, like=like) for name in names]))
        for (end, residuals), pair in zip(placed, probe.span, strict=True):
            count = len(residuals)

            def restored(start: Tensor, *given: Tensor, count: int = count) -> Tensor:
                if probe.weights is not None:
                    return probe.restore(start, [combine(given[count], *given[:count])], ())
                return probe.restore(start, given[:count], given[count:])

            users = list(end.users)
            (value,) = inline_all(gm, restored, [nodes[pair.start], *residuals, *marks, *weights], before=end.next)
            for user in users:
                user.replace_input_with(end, value)
        Eliminate().call(gm)
        return True

    def ensures(self, gm: fx.GraphModule) -> None:
        nodes = nodes_by_name(gm)
        if alive := [name for name in self.span if name in nodes]:
            raise PassError(
                f"{self.name}: {alive} lie in the blocks that are skipped, but something behind them reads them."
            )


def span_work(gm: fx.GraphModule, probe: Probe, split: Split) -> tuple[str, ...]:
    """The heavy nodes that skipping a probe's span frees: those of branches all of whose adds lie in it."""
    if not probe.span:
        return ()
    sets, nodes = BitSets.of(gm.graph), nodes_by_name(gm)
    behind = 0
    for pair in probe.span:
        behind |= sets.descendants[sets.index[nodes[pair.end]]] & ~(1 << sets.index[nodes[pair.end]])
    before = 0
    for pair in probe.span:
        before |= sets.ancestors[sets.index[nodes[pair.end]]]
    return tuple(
        name
        for branch in analysis_of(gm).branches
        if all(before >> sets.index[nodes[add]] & 1 and not behind >> sets.index[nodes[add]] & 1 for add in branch.adds)
        for name in branch.heavy
        if name not in split.head
    )


def _measure(gm: fx.GraphModule, probe: Probe, *, head: bool, before: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The signals as one node, [signals, B], and the values to keep, before a node."""
    function = probe.measure if head else probe.finish
    assert function is not None  # the passes ask before
    keeps = probe.keeps if head else probe.finish_keeps
    nodes = nodes_by_name(gm)
    latents = [n for n in gm.graph.nodes if n.op == "placeholder"][analysis_of(gm).inputs.latents or 0]
    reads = [("latents", latents), *((role, nodes[name]) for role, name in (probe.reads if head else probe.ends))]
    old = [
        (keep.name, insert_input(gm, _plain(keep.name), label=f"probe:{keep.name}", like=_like(gm, keep)))
        for keep in probe.all_keeps
    ]
    signals = probe.signals if head else probe.finish_signals
    returned = set(output_of(gm).args[0])  # type: ignore[arg-type]
    others = [
        n.op == "placeholder" or n in returned or _made_again(n) for n in (*(n for _, n in reads), *(n for _, n in old))
    ]

    def measured(*values: Tensor) -> list[Tensor]:
        given: Values = dict(zip((role for role, _ in reads), values, strict=False))
        kept: Values = dict(zip((name for name, _ in old), values[len(reads) :], strict=True))
        made, keep = function(given, kept)
        first = torch.stack([made[name].float() for name in signals]) if signals else values[0]
        fresh = [keep[k.name] for k in keeps]
        taken = [value for value, other in zip(values, others, strict=True) if other]  # its owner may write to it
        return [first, *(v.clone() if any(v is value for value in taken) else v for v in fresh)]

    signal, *values = inline_all(gm, measured, [node for _, node in (*reads, *old)], before=before)
    return signal, values


def _like(gm: fx.GraphModule, keep: Keep) -> Tensor:
    """A fake value of the shape that is kept."""
    if keep.like:
        value: Any = node_named(gm, keep.like).meta["val"]
    else:
        latents = [n for n in gm.graph.nodes if n.op == "placeholder"][analysis_of(gm).inputs.latents or 0]
        value = latents.meta["val"]
        with _mode_of(value):
            value = value.new_empty((value.shape[0],), dtype=torch.float32)
    assert isinstance(value, Tensor)  # the policy named a tensor
    return value


def _residual_like(gm: fx.GraphModule, probe: Probe, end: fx.Node, start: fx.Node) -> Tensor:
    value = end.meta["val"]
    with _mode_of(value), torch.no_grad():
        return probe.residual(value, start.meta["val"])


def _mode_of(value: Any) -> Any:
    mode = getattr(value, "fake_mode", None)
    return mode if mode is not None else contextlib.nullcontext()


def _plain(label: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in f"probe_{label}")


def kept_values(gm: fx.GraphModule, probe: Probe) -> Sequence[tuple[str, Tensor, bool]]:
    """What a stream keeps between steps: label, a fake value, and whether each step replaces it."""
    nodes = nodes_by_name(gm)
    found = [(f"probe:{keep.name}", _like(gm, keep), keep.every) for keep in probe.all_keeps]
    for i, pair in enumerate(probe.span):
        found.append((f"delta:{i}", _residual_like(gm, probe, nodes[pair.end], nodes[pair.start]), False))
    return found
