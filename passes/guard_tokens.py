"""Compute a branch for some of its tokens only: choose them, gather what the branch reads, scatter what it makes.

Before:  trunk [B, N, D] -> norm -> linear -> gelu -> linear (the cut) -> mul(gate) -> add(trunk)
After:   score, stamp, age (inputs) -> topk -> index [B, k]
         trunk -> gather(index) -> norm -> linear -> gelu -> linear [B, k, D] -> scatter(cached cut, index)
         scatter -> mul(gate) -> add(trunk); the new cut and the new stamp are further outputs
Numerics: close (1e-5 relative in float32: fewer rows may be multiplied in another order) when fed this step's own cuts,
whichever tokens are chosen; otherwise approximate, as the plan decides.

`prove` says which nodes are computed for k tokens, and what each of them reads. These are copied, with the number of
tokens in the literal sizes of views replaced, and traced again with fake tensors. Keys and values of a cross-attention,
modulations and the rest stay whole. A cross-attention that is scored by its entropy has the new tokens' entropies
scattered into the score. Source: ToCa, arXiv:2410.05317; how a branch is split in the graph is ours.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from omnifx.errors import PassError
from omnifx.flops import is_attention, tensors_in
from omnifx.graph import (
    Branch,
    Pass,
    TokenSource,
    append_output,
    branches_of,
    inline,
    insert_input,
    nodes_by_name,
)
from omnifx.passes.prove_tokens import Layout, Proof, prove, shape_with
from omnifx.passes.score_tokens import attention_inputs, scorer, source_of
from omnifx.passes.write_cuts import require_branches
from omnifx.tokens import NEEDS_QUERIES, Selection, choose

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class GuardTokens(Pass):
    """Make branches partial. They read ``cut:<node>``, ``stamp:<branch>``, ``score:<attention>`` and ``age:``, and
    return what changes of these."""

    partial: tuple[tuple[str, int], ...]  # branches, and how many tokens of each sample are computed
    selection: Selection | None  # None: the tokens are inputs ``index:<branch>`` [B, k]

    def requires(self, gm: fx.GraphModule) -> None:
        require_branches(self, gm, tuple(name for name, _ in self.partial))
        proofs = prove(gm, [branches_of(gm)[name] for name, _ in self.partial])
        for name, k in self.partial:
            proof = proofs[name]
            if isinstance(proof, str):
                raise PassError(
                    f"{self.name}: {name} cannot be computed for some tokens alone: {proof}. Reuse it whole."
                )
            if not 1 <= k <= proof.number:
                raise PassError(
                    f"{self.name}: {name} has {proof.number} tokens, of which 1 to all can be computed, got {k}."
                )

    def call(self, gm: fx.GraphModule) -> bool:
        state = _State(gm, self.selection)
        branches = branches_of(gm)
        proofs = prove(gm, [branches[name] for name, _ in self.partial])
        replaced: dict[fx.Node, fx.Node] = {}  # cuts of earlier branches
        for name, k in sorted(self.partial, key=lambda entry: list(branches).index(entry[0])):
            proof = proofs[name]
            assert isinstance(proof, Proof)  # `requires` saw to it
            index = state.index(branches[name], proof, k)
            copies = _copy(gm, proof, index, k, replaced)
            state.score_again(branches[name], proof, copies, index)
            replaced[proof.cut] = _scatter(gm, proof, copies[proof.cut], index)
        state.write()
        return bool(self.partial)

    def ensures(self, gm: fx.GraphModule) -> None:
        nodes = nodes_by_name(gm)
        cuts = [cut for name, _ in self.partial for cut in branches_of(gm)[name].cuts]
        if used := [cut for cut in cuts if cut in nodes and nodes[cut].users]:
            raise PassError(f"{self.name}: the cuts {used} are still used after they were replaced.")


class _State:
    """The scores, stamps and the age that a partial graph reads and writes."""

    def __init__(self, gm: fx.GraphModule, selection: Selection | None) -> None:
        self.gm = gm
        self.selection = selection
        self.age: fx.Node | None = None
        self.scores: dict[str, fx.Node] = {}
        self.written: dict[str, fx.Node] = {}

    def index(self, branch: Branch, proof: Proof, k: int) -> fx.Node:
        """[B, k], int64: the tokens to compute."""
        gm, selection = self.gm, self.selection
        like: Tensor = proof.cut.meta["val"]
        if selection is None:
            label = f"index:{branch.name}"
            return insert_input(
                gm, f"index_{proof.cut.name}", label=label, like=like.new_empty((proof.batch, k), dtype=torch.int64)
            )
        floats = like.new_empty((proof.batch, proof.number), dtype=torch.float32)
        if self.age is None:
            self.age = insert_input(gm, "age", label="age:", like=floats.new_empty(()))
        stamp = insert_input(gm, f"stamp_{proof.cut.name}", label=f"stamp:{branch.name}", like=floats)
        source = source_of(branch, selection)
        start, grid = (source.start if source else 0), (branch.tokens.grid if branch.tokens else None)

        def chosen(stamp: Tensor, age: Tensor, *score: Tensor) -> Tensor:
            own = score[0][:, start : start + proof.number] if score else None
            return choose(selection, own, stamp, age, k, grid)

        def stamped(stamp: Tensor, age: Tensor, index: Tensor) -> Tensor:
            return stamp.scatter(1, index, (age + 1.0).expand(index.shape))

        scores = [self.score(source, floats)] if source is not None else []
        index = inline(gm, chosen, [stamp, self.age, *scores], before=proof.cut)
        fresh = inline(gm, stamped, [stamp, self.age, index], before=proof.cut)
        self.written[f"stamp:{branch.name}"] = fresh
        return index

    def score(self, source: TokenSource, like: Tensor) -> fx.Node:
        """[B, total], float32: how important an attention's tokens are."""
        if source.node not in self.scores:
            value = like.new_empty((like.shape[0], source.total))
            self.scores[source.node] = insert_input(
                self.gm, f"score_{source.node}", label=f"score:{source.node}", like=value
            )
        return self.scores[source.node]

    def score_again(self, branch: Branch, proof: Proof, copies: dict[fx.Node, fx.Node], index: fx.Node) -> None:
        """Where the branch computes the cross-attention that its tokens are scored by: score those it computes."""
        selection = self.selection
        source = source_of(branch, selection) if selection is not None else None
        if selection is None or source is None or selection.score not in NEEDS_QUERIES:
            return
        made = next((copy for node, copy in copies.items() if is_attention(node) and node.name == source.node), None)
        if made is None:
            return
        start = source.start

        def updated(score: Tensor, index: Tensor, fresh: Tensor) -> Tensor:
            return score.scatter(1, index + start if start else index, fresh)

        fresh = inline(self.gm, scorer(selection, made), attention_inputs(made), before=proof.cut)
        again = inline(self.gm, updated, [self.scores[source.node], index, fresh], before=proof.cut)
        self.scores[source.node] = self.written[f"score:{source.node}"] = again

    def write(self) -> None:
        """Return what changed."""
        for label, node in self.written.items():
            append_output(self.gm, node, label=label)


def _copy(
    gm: fx.GraphModule, proof: Proof, index: fx.Node, k: int, replaced: dict[fx.Node, fx.Node]
) -> dict[fx.Node, fx.Node]:
    """The nodes of the proof once more, for `k` tokens; all stand before the cut."""
    copies: dict[fx.Node, fx.Node] = {}
    gathered: dict[tuple[fx.Node, Layout], fx.Node] = {}
    held: dict[fx.Node, fx.Node] = {}
    for node in [node for node in gm.graph.nodes if node in proof.layouts]:
        operands = dict(copies)
        for original, layout in proof.gathered.get(node, {}).items():
            parent = replaced.get(original, original)
            if (parent, layout) not in gathered:
                if parent in proof.held and parent not in held:
                    held[parent] = _cached(gm, parent)
                source = held.get(parent, parent)
                function = _gather(layout, k)
                gathered[parent, layout] = inline(gm, function, [source, index], before=proof.cut)
            operands[parent] = gathered[parent, layout]
        if node in proof.aliases:
            copies[node] = operands[proof.aliases[node]]
            continue
        with gm.graph.inserting_before(proof.cut):
            copy = gm.graph.node_copy(node, lambda n, found=operands: found.get(n, n))  # type: ignore[misc]
        layout = proof.layouts[node]
        if getattr(node.target, "overloadpacket", None) in (aten.view, aten._unsafe_view, aten.reshape, aten.expand):
            copy.args = (copy.args[0], list(shape_with(layout, k)))
        copy.meta = {**node.meta, "val": _value(gm, copy)}
        value = copy.meta["val"]
        if isinstance(value, Tensor) and tuple(value.shape) != shape_with(layout, k):
            raise PassError(
                f"{copy.name} has the shape {tuple(value.shape)}, expected {shape_with(layout, k)}. This is a bug."
            )
        copies[node] = copy
    return copies


def _cached(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    return insert_input(gm, f"cached_{node.name}", label=f"cut:{node.name}", like=node.meta["val"])


def _value(gm: fx.GraphModule, node: fx.Node) -> Any:
    """The fake value of a new node; a view that its operand's strides do not allow gets a contiguous operand."""
    values: Any = fx.node.map_arg((node.args, node.kwargs), lambda arg: arg.meta["val"])
    args, kwargs = values
    mode = next((t.fake_mode for t in tensors_in((args, kwargs)) if hasattr(t, "fake_mode")), None)
    assert mode is not None  # captured graphs hold fake values
    if node.target is operator.getitem:
        return args[0][args[1]]
    with mode:
        try:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, ValueError):
            if node.target is not aten.view.default:
                raise
            operand = node.args[0]
            assert isinstance(operand, fx.Node)
            with gm.graph.inserting_before(node):
                dense = gm.graph.call_function(
                    aten.clone.default, (operand,), {"memory_format": torch.contiguous_format}
                )
            dense.meta = {**operand.meta, "val": operand.meta["val"].clone(memory_format=torch.contiguous_format)}
            node.args = (dense, *node.args[1:])
            return dense.meta["val"].view(node.args[1])


class _Rows:
    """A layout taken apart: values as rows, one for each token of each sample, and back."""

    def __init__(self, layout: Layout) -> None:
        self.factors = [factor for axis in layout for factor in axis]
        tags = [factor.tag for factor in self.factors]
        first = [tags.index(tag) for tag in ("batch", "token") if tag in tags]
        self.order = first + [i for i in range(len(tags)) if i not in first]
        self.token = self.factors[tags.index("token")]
        self.batch = self.factors[tags.index("batch")] if "batch" in tags else None

    @property
    def rest(self) -> list[int]:
        """The sizes of a row."""
        return [self.factors[i].of for i in self.order if self.factors[i].tag == ""]

    def rows(self, value: Tensor, tokens: int) -> Tensor:
        """[samples * tokens, *rest] of a value that has this many tokens."""
        if self.order != sorted(self.order):
            sizes = [tokens if factor.tag == "token" else factor.of for factor in self.factors]
            value = value.reshape(sizes).permute(self.order)
        return value.reshape(-1, *self.rest)

    def value(self, rows: Tensor, tokens: int, shape: Sequence[int]) -> Tensor:
        """The value of a shape whose rows these are."""
        if self.order != sorted(self.order):
            back = [self.order.index(i) for i in range(len(self.order))]
            samples = [self.batch.size] if self.batch is not None else []
            rows = rows.reshape(*samples, tokens, *self.rest).permute(back)
        return rows.reshape(shape)

    def numbers(self, index: Tensor) -> Tensor:
        """The numbers of the rows of some tokens [B, k]; samples that share one row each have the same."""
        if self.token.start:
            index = index + self.token.start
        if self.batch is not None and self.batch.of == self.batch.size:
            index = index + self.token.of * torch.arange(self.batch.size, device=index.device)[:, None]
        return index.reshape(-1)


def _gather(layout: Layout, k: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Takes a value and tokens [B, k], and gives the value with these tokens alone, in the same layout."""
    rows = _Rows(layout)

    def gather(value: Tensor, index: Tensor) -> Tensor:
        found = rows.rows(value, rows.token.of).index_select(0, rows.numbers(index))
        return rows.value(found, k, shape_with(layout, k))

    return gather


def _scatter(gm: fx.GraphModule, proof: Proof, fresh: fx.Node, index: fx.Node) -> fx.Node:
    """Let everything behind the cut read the cached one with the fresh tokens in it, which also is an output."""
    rows = _Rows(proof.layouts[proof.cut])

    def scatter(cached: Tensor, fresh: Tensor, index: Tensor) -> Tensor:
        new = rows.rows(fresh, index.shape[1])
        mixed = rows.rows(cached, proof.number).index_put((rows.numbers(index),), new)
        return rows.value(mixed, proof.number, cached.shape)

    whole = inline(gm, scatter, [_cached(gm, proof.cut), fresh, index], before=proof.cut)
    proof.cut.replace_all_uses_with(whole)
    append_output(gm, whole, label=f"cut:{proof.cut.name}")
    return whole


__all__ = ["GuardTokens"]
