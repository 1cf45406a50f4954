"""ReadSpans: a range of blocks becomes its start plus an old delta, and all of its work dies."""

import itertools

import pytest
import torch

from omnifx.errors import PassError
from omnifx.graph import EXTRA_INPUTS, clone, graph_text, total_flops
from omnifx.passes.eliminate import Eliminate
from omnifx.passes.read_spans import ReadSpans
from omnifx.passes.write_spans import WriteSpans
from omnifx.plan import COMPUTE, REUSE
from omnifx.spans import Span, Spans
from tests.toys import TINY, Traced, distance, gated, toy, toy_inputs, trace


def all_spans(traced: Traced) -> list[Span]:
    """Every range of blocks that can be reused."""
    spans = Spans(traced.gm)
    bounds = itertools.combinations_with_replacement(range(len(spans.blocks)), 2)
    return [span for first, last in bounds if not (span := spans.named(f"span{first}-{last}")).reason]


def written(traced: Traced, spans: tuple[Span, ...]) -> dict[str, torch.Tensor]:
    """The deltas of this very call."""
    writing = clone(traced.gm)
    WriteSpans(spans=spans)(writing)
    outputs = traced.run(writing)
    assert torch.equal(outputs[0], traced.run()[0])
    cuts = [cut for span in spans for cut in span.cuts]
    return dict(zip(cuts, outputs[len(outputs) - len(cuts) :], strict=True))


def read(traced: Traced, *spans: Span) -> torch.Tensor:
    """The model's output when these spans read this call's own deltas."""
    deltas = written(traced, spans)
    reading = clone(traced.gm)

    ReadSpans(spans=spans)(reading)
    Eliminate()(reading)

    return traced.run(reading, [deltas[label.removeprefix("cut:")] for label in reading.meta[EXTRA_INPUTS]])[0]


def test_the_end_becomes_the_start_plus_an_input() -> None:
    traced = gated()
    (span,) = all_spans(traced)

    changed = ReadSpans(spans=(span,))(traced.gm)
    Eliminate()(traced.gm)

    assert changed is True
    assert span.name == "span0-0"
    assert traced.gm.meta[EXTRA_INPUTS] == ["cut:span0-0:add"]
    assert graph_text(traced.gm) == (
        "arg0_1 | arg1_1 | arg2_1 | arg3_1 | arg4_1 | cached_span0_0_add | add_1 = add(arg1_1, cached_span0_0_add) | "
        "select_1 = select(add_1) | permute_2 = permute(arg4_1) | mm_2 = mm(select_1, permute_2) | "
        "unsqueeze_3 = unsqueeze(mm_2) | return(unsqueeze_3)"
    )


@pytest.mark.parametrize("name", ["toy", *TINY])
def test_fed_its_own_delta_every_span_reproduces_the_step(name: str) -> None:
    traced = trace(toy(3, text=24), *toy_inputs(text=24)) if name == "toy" else trace_tiny(name)
    spans = all_spans(traced)
    assert len(spans) >= 3

    for span in spans:
        assert distance(read(traced, span), traced.run()[0]) < 1e-6, span


def trace_tiny(name: str) -> Traced:
    tiny = TINY[name]()
    return trace(tiny.model, **tiny.inputs)


def test_spans_one_behind_the_other_and_inside_each_other_are_read_together() -> None:
    traced = trace(toy(4), *toy_inputs())
    spans = {span.name: span for span in all_spans(traced)}

    for names in (
        ("span0-1", "span2-3"),
        ("span2-3", "span0-1"),
        ("span0-0", "span1-1", "span2-2"),
        ("span0-3", "span1-2"),
    ):
        assert distance(read(traced, *(spans[name] for name in names)), traced.run()[0]) < 1e-6, names


def test_what_dies_is_what_the_span_promises() -> None:
    traced = trace(toy(3, text=24), *toy_inputs(text=24))

    for span in all_spans(traced):
        reading = clone(traced.gm)
        ReadSpans(spans=(span,))(reading)
        Eliminate(freed=span.branches)(reading)
        assert total_flops(traced.gm) - total_flops(reading) == span.flops
        inside = sum(b.flops for b in traced.analysis.branches if b.name in span.branches)
        assert span.flops > inside  # gates and modulation die as well


def test_a_row_reads_spans_and_branches_and_writes_the_rest() -> None:
    traced = trace(toy(3), *toy_inputs())
    program = traced.program()
    kept = (*program.names, "span0-0", "span1-2")
    full = program.variant(program.full(measures=False, kept=kept))
    outputs = full.run(list(traced.inputs))
    cuts = dict(zip(full.extra_outputs, outputs[program.num_outputs :], strict=True))
    row = (REUSE, COMPUTE, *[REUSE] * 4, COMPUTE, REUSE)

    spec = program.reusing(row, corrects=False, kept=kept, spans=("span0-0", "span1-2"))
    variant = program.variant(spec)
    again = variant.run(variant.feed(traced.inputs, cuts))

    assert spec.reads == ("blocks.0.attn",)
    assert spec.writes == ("blocks.0.mlp", "span0-0")
    assert spec.label == "reuse5+span1-2+write"
    assert distance(again[0], outputs[0]) < 1e-6
    for label, value in zip(variant.extra_outputs, again[1:], strict=True):
        assert torch.equal(value, cuts[label])
    assert variant.flops < traced.analysis.flops / 2


def test_a_span_that_cannot_be_reused_is_refused() -> None:
    traced = gated()
    with pytest.raises(PassError, match="ReadSpans: span0-0 cannot be reused: because"):
        ReadSpans(spans=(Span(0, 0, reason="because"),))(traced.gm)
    with pytest.raises(PassError, match=r"lacks \['gone'\] of span0-0; find the spans of this graph"):
        ReadSpans(spans=(Span(0, 0, starts=("gone",), ends=("add",)),))(traced.gm)


def test_without_spans_nothing_changes() -> None:
    traced = gated()
    copy = clone(traced.gm)

    assert ReadSpans(spans=())(copy) is False
    assert graph_text(copy) == graph_text(traced.gm)
