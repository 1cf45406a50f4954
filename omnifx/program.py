"""A program: one captured graph, what was found in it, and its variants, each compiled when it is first needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

import sympy
import torch
from torch import Tensor, fx

from omnifx.backends.lowering import Lowering, Runnable
from omnifx.conditions import Conditions, laid_out
from omnifx.errors import CacheError, PlanError
from omnifx.graph import (
    CONDITIONS,
    EXTRA_INPUTS,
    EXTRA_OUTPUTS,
    Analysis,
    Branch,
    analysis_of,
    clone,
    hint,
    nodes_by_name,
    num_bytes,
    output_of,
    run_passes,
    side_effects,
    total_flops,
)
from omnifx.grid import Grid
from omnifx.passes.bind_sizes import BindSizes
from omnifx.passes.combine_output import Combinable, combinable
from omnifx.passes.find_branches import FindBranches
from omnifx.passes.measure_noise import noisy_outputs
from omnifx.passes.pipeline import VariantSpec, pipeline
from omnifx.passes.prove_tokens import ProveTokens
from omnifx.passes.score_tokens import source_of
from omnifx.plan import COMPUTE, PREDICT, REUSE, Row, partial_tokens
from omnifx.prior import cut_key
from omnifx.profile import BlockMeta, BranchMeta, SpanMeta
from omnifx.sizes import SizeInputs, Sizes, late_guards, shapes_of
from omnifx.spans import Span, Spans, span_name
from omnifx.tokens import Selection

_Made = TypeVar("_Made")


@dataclass
class Variant:
    """One lowered graph, with what it takes and gives beside the model's own inputs and outputs."""

    spec: VariantSpec
    run: Runnable
    extra_inputs: tuple[str, ...]
    extra_outputs: tuple[str, ...]
    extra_values: tuple[Tensor, ...]
    """Fake values of the extra inputs: shapes, strides and types that the graph was compiled for."""
    flops: int
    compile_seconds: float = 0.0
    conditions: Conditions | None = None
    """The graph that makes its ``condition:`` inputs."""
    shares: bool | None = None
    """Whether an output of the model shares memory with a cut; None until it ran."""
    guards: tuple[sympy.Basic, ...] = ()
    """What sizes must fulfil, if it was compiled when Dynamo's guards stood already."""

    @property
    def label(self) -> str:
        """Its short name."""
        return self.spec.label

    def strides_of(self, condition: str, sizes: Sizes) -> tuple[int, ...]:
        """The strides that the graph was compiled for, of one of its conditions."""
        return sizes.strides(self.extra_values[self.extra_inputs.index(f"condition:{condition}")])

    def feed(self, args: Sequence[Any], values: Mapping[str, Tensor]) -> list[Any]:
        """The inputs of one run: the model's own, then `values` by label (``cut:<node>``, ...); what is not among them
        is computed if it is a condition."""
        missing = {label.partition(":")[2] for label in self.extra_inputs if label not in values}
        made: dict[str, Tensor] = {}
        if self.conditions is not None and missing & set(self.conditions.names):
            made = {
                name: laid_out(value, self.extra_values[self.extra_inputs.index(f"condition:{name}")].stride())
                for name, value in zip(self.conditions.names, self.conditions.run(list(args)), strict=True)
            }
        return [
            *args,
            *(values[label] if label in values else made[label.partition(":")[2]] for label in self.extra_inputs),
        ]


class Program:
    """One captured graph and its variants.

    Args:
        gm: Functional ATen graph with a flat output; parameters are inputs.
        inputs: Fake values of its inputs.
        static: Positions of parameters and buffers.
        lowering: Makes a variant run.
        budget: Most bytes of caches for one stream; branches that do not fit are not cached, the least saving a byte
        first.
        hoists: Whether reuse variants take what timesteps and labels alone decide from a table.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        static: Sequence[int],
        lowering: Lowering,
        *,
        budget: int,
        hoists: bool = True,
    ) -> None:
        self.inputs = list(inputs)
        self.lowering = lowering
        self.hoists = hoists
        self._lock = threading.RLock()
        self.variants: dict[VariantSpec, Variant] = {}
        self._reads: dict[VariantSpec, tuple[str, ...]] = {}
        self._specs: dict[tuple[Any, ...], VariantSpec] = {}
        run_passes(gm, (BindSizes(), FindBranches(static=frozenset(static)), ProveTokens()), label="capture")
        self.gm = gm
        self.analysis: Analysis = analysis_of(gm)
        self.side_effects = side_effects(gm)
        self.spans = Spans(gm)
        self.num_outputs = len(output_of(gm).args[0])  # type: ignore[arg-type]
        self.branches, self.over_budget = _within(self.analysis.cacheable, budget)
        self.names = tuple(branch.name for branch in self.branches)
        self._branch_names = frozenset(self.names)
        nodes = nodes_by_name(gm)
        self.cut_values: dict[str, Tensor] = {
            cut: nodes[cut].meta["val"] for branch in self.branches for cut in branch.cuts
        }
        self.held_values: dict[str, Tensor] = {
            name: nodes[name].meta["val"] for branch in self.branches if branch.tokens for name in branch.tokens.held
        }
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        self.sizes = SizeInputs(placeholders)
        self.hinted_sizes = Sizes(
            tuple((s, hint(placeholders[i].meta["val"])) for s, i in self.sizes.positions.items())
        )
        self.unsized = next((cut for cut, value in self.cut_values.items() if not self.sizes.tell(value)), "")
        self._shapes = shapes_of(self.inputs)
        self._late_guards: list[sympy.Basic] = []
        self._bytes: dict[tuple[Sizes, tuple[str, ...] | None, int], int] = {}
        self.cache_bytes = sum(map(num_bytes, self.cut_values.values()))
        outputs = output_of(gm).args[0]
        self.noisy = noisy_outputs(gm, self.names) if self.names else []
        self.frame_axis = frame_axis(gm, self.analysis)
        self.grids = tuple(
            (i, Grid.of(tuple(outputs[i].meta["val"].shape), frame_axis=self.frame_axis))  # type: ignore[index,union-attr]
            for i in self.noisy
        )
        self.main_output = max(self.noisy, key=lambda i: num_bytes(outputs[i].meta["val"]), default=None)  # type: ignore[index,union-attr]

    def cache_bytes_at(self, sizes: Sizes, kept: tuple[str, ...] | None = None, terms: int = 0) -> int:
        """Bytes of one stream's cuts at these sizes; `cache_bytes` is that of the sizes seen at capture.

        `kept` names the branches and spans whose cuts it keeps (None: all branches), and `terms` tells of how many
        values of a branch predictions are made; of a span, only the newest one is kept.
        """
        if (sizes, kept, terms) not in self._bytes:
            cuts = [cut for b in self.branches if kept is None or b.name in kept for cut in b.cuts] * max(1, terms)
            cuts += [cut for span in self.spans_in(kept or ()) for cut in span.cuts]
            self._bytes[sizes, kept, terms] = sum(sizes.num_bytes(self.cut_values[cut]) for cut in cuts)
        return self._bytes[sizes, kept, terms]

    @cached_property
    def combines(self) -> Combinable:
        """Whether the output can be a combination of older ones, and whether moves of the latents can be added."""
        found = combinable(self.gm, self.names)
        if not found.reason and not self.sizes.tell(self.output_value(found.output)):
            return Combinable(reason="the size of the output depends on values")
        return found

    @property
    def history_values(self) -> tuple[Tensor, ...]:
        """Fake values of what is kept of a full step for combinations: its output, and its latents if they can be
        added; nothing if outputs cannot be combined."""
        found, latents = self.combines, self.analysis.inputs.latents
        if found.reason or latents is None:
            return ()
        output = self.output_value(found.output)
        return (output,) if found.latents_reason else (output, self.inputs[latents])

    def output_value(self, position: int) -> Tensor:
        """The fake value of one of the outputs."""
        value: Tensor = output_of(self.gm).args[0][position].meta["val"]  # type: ignore[index,union-attr]
        return value

    def history_bytes_at(self, sizes: Sizes, *, history: int, noise: bool) -> int:
        """Bytes of the outputs and latents of `history` full steps, and of the noise, as one stream keeps them for
        combinations; 0 if nothing can be combined."""
        if not history and not noise:
            return 0
        found = [sizes.num_bytes(value) for value in self.history_values]
        return history * sum(found) + noise * sum(found[:1])

    @property
    def cut_keys(self) -> dict[str, str]:
        """What a prior calls each cut, by node name."""
        return {cut: cut_key(branch.name, i) for branch in self.branches for i, cut in enumerate(branch.cuts)}

    def token_bytes(self, selection: Selection | None) -> int:
        """Bytes that one stream needs beside its cuts so that branches may be computed in part: scores, the stamps of
        all tokens, and the attentions that parallel branches join. None without a selection."""
        if selection is None:
            return 0
        partial = [(b, b.tokens) for b in self.branches if b.tokens is not None]
        scores = {s.node: t.batch * s.total for b, t in partial if (s := source_of(b, selection)) is not None}
        stamps = sum(tokens.batch * tokens.number for _, tokens in partial)
        return 4 * (stamps + sum(scores.values())) + sum(tokens.held_bytes for _, tokens in partial)

    @property
    def filters(self) -> bool:
        """Whether the main output has a grid, along which a correction can filter."""
        return bool(dict(self.grids)[self.main_output].axes) if self.main_output is not None else True

    def cuts_of(self, spec: VariantSpec) -> tuple[str, ...]:
        """The cuts that a variant reads: node names of those of branches, names of deltas of spans, and what else it
        keeps of attentions."""
        if spec not in self._reads:
            partial = {name for name, _ in spec.partial}
            reads = {*spec.reads, *spec.predicts, *partial}
            cuts = [cut for b in self.branches if b.name in reads for cut in b.cuts]
            cuts += [cut for span in spec.reads_spans for cut in span.cuts]
            held = [name for b in self.branches if b.name in partial and b.tokens for name in b.tokens.held]
            self._reads[spec] = (*cuts, *held)
        return self._reads[spec]

    def cuts_by_column(self, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """The cuts of each of these branches and spans."""
        found = {branch.name: branch.cuts for branch in self.branches} | {s.name: s.cuts for s in self.spans_in(names)}
        return {name: found[name] for name in names}

    def span_problem(self, name: str) -> str:
        """Why this graph cannot reuse a range of blocks; empty if it can."""
        try:
            return self.spans.named(name).reason
        except PlanError as error:
            return str(error)

    def spans_in(self, names: Sequence[str]) -> tuple[Span, ...]:
        """The spans among the names of branches and spans, as far as this graph can reuse them."""
        others = [name for name in names if name not in self._branch_names]
        found = tuple(self.spans.named(name) for name in others if not self.span_problem(name))
        nodes = nodes_by_name(self.gm) if any(cut not in self.cut_values for span in found for cut in span.cuts) else {}
        for span in found if nodes else ():
            self.cut_values |= {cut: nodes[end].meta["val"] for cut, end in zip(span.cuts, span.ends, strict=True)}
        return found

    @property
    def compute_row(self) -> Row:
        """The row that computes everything."""
        return (COMPUTE,) * len(self.names)

    @property
    def reuse_row(self) -> Row:
        """The row that reuses everything that can be."""
        return (REUSE,) * len(self.names)

    @property
    def predict_row(self) -> Row:
        """The row that predicts everything that can be."""
        return (PREDICT,) * len(self.names)

    @property
    def plain(self) -> VariantSpec:
        """The captured graph, unchanged."""
        return VariantSpec(self.names, self.compute_row, writes=())

    def full(
        self, *, measures: bool, kept: tuple[str, ...] | None = None, selection: Selection | None = None
    ) -> VariantSpec:
        """Compute everything and return the cuts: of all branches, or of the branches and spans that are `kept`; with a
        selection also the scores of all tokens."""
        key = (measures, kept, selection)
        if (known := self._specs.get(key)) is not None:
            return known
        spans = self.spans_in(kept or ())
        names = tuple(name for name in self.names if kept is None or name in kept)
        spec = VariantSpec(
            self.names,
            self.compute_row + (COMPUTE,) * len(spans),
            writes=(*names, *(span.name for span in spans)),
            measures=measures and bool(self.noisy),
            spans=spans,
            selection=selection if any(branch.tokens for branch in self.branches) else None,
        )
        self._specs[key] = spec
        return spec

    def reusing(
        self,
        row: Row,
        *,
        corrects: bool,
        kept: tuple[str, ...] | None = None,
        spans: tuple[str, ...] = (),
        terms: int = 0,
        stores: bool = False,
        trend: Literal["", "scale", "shift"] = "",
        selection: Selection | None = None,
        combines: int | None = None,
        combines_noise: bool = False,
    ) -> VariantSpec:
        """Do `row`; what it computes is returned for later steps, if they may want it. `refusal_of` must be empty for
        it.

        A span that begins or ends inside of a reused one cannot be told apart from it, and is not returned.

        Args:
            row: At least one branch is reused, predicted or computed in part, or a span reused.
            corrects: Whether noise is subtracted from the outputs.
            kept: Branches and spans that later steps may want; None: all branches.
            spans: Those whose actions end the row.
            terms: Stored values that predictions read.
            stores: Whether predicted values are returned as well.
            trend: How predicted values follow the trends of a prior; empty if they do not.
            selection: How tokens are chosen here or in later steps.
            combines: Full steps whose outputs and latents its output is combined of; None: the output is what the graph
                gives. `Program.combines` must have no reason against it.
            combines_noise: Whether the noise is a term.
        """
        if PREDICT not in row:
            terms, stores, trend = 0, False, ""
        key = (row, corrects, kept, spans, terms, stores, trend, selection, combines, combines_noise)
        if (known := self._specs.get(key)) is not None:
            return known
        found = self.spans_in(spans)
        if len(found) != len(spans) or len(row) != len(self.names) + len(spans):
            raise PlanError(f"the row {row} does not fit {len(self.names)} branches and the spans {list(spans)}.")
        counted = tuple(REUSE if partial_tokens(action) == 0 else action for action in row)
        actions = dict(zip((*self.names, *spans), counted, strict=True))
        tells = any(actions[name] == COMPUTE or partial_tokens(actions[name]) for name in self.names)
        reused = [span for span in found if actions[span.name] == REUSE]
        torn = {
            span.name
            for span in found
            for other in reused
            if other.first < span.first <= other.last or other.first <= span.last < other.last
        }
        wanted = self._branch_names if kept is None else kept
        spec = VariantSpec(
            self.names,
            counted,
            writes=tuple(n for n, action in actions.items() if action == COMPUTE and n in wanted and n not in torn),
            corrects=corrects and bool(self.noisy),
            terms=terms,
            stores=stores,
            trend=trend or None,
            spans=found,
            selection=selection if tells else None,
            combines=combines,
            combines_noise=combines_noise and combines is not None,
        )
        self._specs[key] = spec
        return spec

    def refusal_of(self, row: Row, tokens: Sequence[int]) -> str:
        """Why some of this many tokens of each branch cannot be computed as a row says; empty if they can."""
        for at, (branch, action) in enumerate(zip(self.branches, row, strict=False)):  # spans end the row
            found = branch.tokens.number if branch.tokens is not None else 0
            if partial_tokens(action) and (at >= len(tokens) or tokens[at] != found):
                here = branch.token_reason or f"it has {found}"
                return (
                    f"the plan computes some of {tokens[at] if at < len(tokens) else 0} tokens of {branch.name}: {here}"
                )
        return ""

    def variant(self, spec: VariantSpec) -> Variant:
        """The compiled variant; compiles it the first time."""
        with self._lock:
            if spec not in self.variants:
                self.variants[spec] = self._compile(spec)
            return self.variants[spec]

    def _compile(self, spec: VariantSpec) -> Variant:
        start = time.perf_counter()
        variant, guards = self.guarded(lambda: self._make(spec))
        variant.guards = guards
        variant.compile_seconds = time.perf_counter() - start
        return variant

    def guarded(self, make: Callable[[], _Made]) -> tuple[_Made, tuple[sympy.Basic, ...]]:
        """Compile something of this graph; returns it, and what sizes must fulfil for it to be right."""
        with self._lock:
            with late_guards(self._shapes) as guards:
                made = make()
            self._late_guards += guards  # they also bind what is compiled later: sizes that they fix stay fixed
            return made, tuple(self._late_guards)

    def _make(self, spec: VariantSpec) -> Variant:
        gm = clone(self.gm)
        if spec != self.plain:
            run_passes(gm, pipeline(spec, self.grids, hoists=self.hoists), label=spec.label)
        labels = tuple(gm.meta.get(EXTRA_INPUTS, ()))
        values = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
        flops = total_flops(gm)
        run = self.lowering(gm, self.inputs, num_extra_inputs=len(labels))
        conditions = gm.meta.get(CONDITIONS)
        return Variant(
            spec=spec,
            run=run,
            extra_inputs=labels,
            extra_outputs=tuple(gm.meta.get(EXTRA_OUTPUTS, ())),
            extra_values=tuple(values[len(values) - len(labels) :]),
            flops=flops,
            conditions=self._lower_conditions(conditions) if conditions is not None else None,
        )

    def _lower_conditions(self, gm: fx.GraphModule) -> Conditions:
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        return Conditions(
            flops=total_flops(gm),
            names=tuple(label.partition(":")[2] for label in gm.meta[EXTRA_OUTPUTS]),
            weights=tuple(
                i
                for i in self.analysis.inputs.static
                if placeholders[i].users and i not in self.analysis.inputs.settings
            ),
            run=self.lowering(gm, self.inputs, num_extra_inputs=0),
        )

    def block_metas(self) -> tuple[BlockMeta, ...]:
        """What a profile keeps of each block."""
        return tuple(
            BlockMeta(name=block.name, branches=tuple(name for name in block.branches if name in self._branch_names))
            for block in self.spans.blocks
        )

    def span_metas(self) -> tuple[SpanMeta, ...]:
        """What a profile keeps of the ranges of blocks that begin with the first block or end with the last."""
        last = len(self.spans.blocks) - 1
        bounds = dict.fromkeys([(0, i) for i in range(last + 1)] + [(i, last) for i in range(last + 1)])
        found = [self.spans.named(span_name(*bound)) for bound in bounds]
        return tuple(
            SpanMeta(first=s.first, last=s.last, flops=s.flops, cache_bytes=s.cache_bytes, reason=s.reason)
            for s in found
        )

    @cached_property
    def reuse_flops(self) -> int:
        """FLOPs of the variant that reuses all branches: less than `Analysis.reuse_flops` where what is left of the
        network is decided by timesteps and labels alone, and comes from a table once they were seen. Unless the variant
        is there, its passes run: 4 s on the host for the graph of FLUX, once, when its first generation ends."""
        spec = self.reusing(self.reuse_row, corrects=False)
        if spec in self.variants:
            return self.variants[spec].flops

        def counted() -> int:
            gm = clone(self.gm)
            run_passes(gm, pipeline(spec, self.grids, hoists=self.hoists), label=spec.label)
            return total_flops(gm)

        return self.guarded(counted)[0]

    def branch_metas(self) -> tuple[BranchMeta, ...]:
        """What a profile keeps of each cached branch. Their FLOPs add up to what reusing all of them saves."""
        return tuple(
            BranchMeta(name=b.name, kind=b.kind, flops=b.flops, cache_bytes=b.cache_bytes, **_of_tokens(b))
            for b in self.branches
        )


def _of_tokens(branch: Branch) -> dict[str, Any]:
    """What a profile keeps of a branch's tokens."""
    tokens = branch.tokens
    if tokens is None:
        return {"tokens": 0, "token_reason": branch.token_reason}
    return {
        "tokens": tokens.number,
        "token_flops": tokens.flops,
        "spared_flops": tokens.spared_flops,
        "scores": tuple(word for word in ("keys", "queries") if getattr(tokens, word) is not None),
        "grid": tokens.grid,
    }


def _within(branches: Sequence[Branch], budget: int) -> tuple[tuple[Branch, ...], tuple[Branch, ...]]:
    """Split branches into those whose cuts fit the budget together, and the rest; most FLOPs a byte first."""
    if sum(b.cache_bytes for b in branches) <= budget:
        return tuple(branches), ()
    chosen: set[str] = set()
    used = 0
    for branch in sorted(branches, key=lambda b: b.flops / max(1, b.cache_bytes), reverse=True):
        if used + branch.cache_bytes <= budget:
            chosen.add(branch.name)
            used += branch.cache_bytes
    if branches and not chosen:
        least = min(b.cache_bytes for b in branches)
        raise CacheError(
            f"cache_budget leaves {budget:,} bytes for one stream, but the smallest branch needs {least:,}. Raise "
            "cache_budget."
        )
    return tuple(b for b in branches if b.name in chosen), tuple(b for b in branches if b.name not in chosen)


def frame_axis(gm: fx.GraphModule, analysis: Analysis) -> int | None:
    """Which axis of video latents counts frames: 2 for [B, C, F, H, W], 1 for [B, F, C, H, W]; None if unclear.

    The first convolution over the latents tells: one over three axes takes [B, C, F, H, W]; one over two takes frames
    apart, and the axis that has its input channels is not the frames'.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    if analysis.inputs.latents is None:
        return None
    latents = placeholders[analysis.inputs.latents]
    value = latents.meta["val"]
    if value.dim() != 5:
        return None
    below = {latents}
    for node in gm.graph.nodes:
        if not any(parent in below for parent in node.all_input_nodes):
            continue
        below.add(node)
        if node.target is torch.ops.aten.convolution.default:
            kernel = node.args[1].meta["val"]
            if kernel.dim() == 5:
                return 2
            channels = hint(kernel.shape[1])
            fits = [axis for axis in (1, 2) if hint(value.shape[axis]) == channels]
            return {1: 2, 2: 1}[fits[0]] if len(fits) == 1 else None
    return 2
