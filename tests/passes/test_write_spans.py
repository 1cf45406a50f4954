"""WriteSpans: what a range of blocks adds to the trunk becomes an output."""

import pytest
import torch

from omnifx.errors import PassError
from omnifx.graph import EXTRA_OUTPUTS, clone, graph_text
from omnifx.passes.write_spans import WriteSpans
from omnifx.spans import Span, Spans
from tests.toys import Gated, gated, lively, noise, toy, toy_inputs, trace


def test_the_difference_of_end_and_start_is_returned() -> None:
    traced = gated()
    span = Spans(traced.gm).named("span0-0")
    before = graph_text(traced.gm).rpartition(" | ")[0]

    changed = WriteSpans(spans=(span,))(traced.gm)

    assert changed is True
    assert traced.gm.meta[EXTRA_OUTPUTS] == ["cut:span0-0:add"]
    assert graph_text(traced.gm) == f"{before} | sub = sub(add, arg1_1) | return(unsqueeze_3, sub)"


def test_outputs_keep_their_bits_and_deltas_of_neighbours_add_up() -> None:
    traced = trace(toy(3), *toy_inputs())
    spans = tuple(Spans(traced.gm).named(name) for name in ("span0-2", "span0-0", "span1-2"))
    writing = clone(traced.gm)

    WriteSpans(spans=spans)(writing)

    output, whole, first, second = traced.run(writing)
    assert torch.equal(output, traced.run()[0])
    assert torch.allclose(whole, first + second, atol=1e-5)


def test_narrow_types_are_subtracted_in_float32() -> None:
    traced = trace(lively(Gated()).bfloat16(), noise(1, 4, 8).bfloat16(), torch.tensor([0.5]).bfloat16())

    WriteSpans(spans=(Spans(traced.gm).named("span0-0"),))(traced.gm)

    _, delta = traced.run(traced.gm)
    assert delta.dtype == torch.bfloat16
    sub = next(node for node in traced.gm.graph.nodes if "sub" in node.name)
    assert sub.meta["val"].dtype == torch.float32


def test_a_span_of_another_graph_is_refused() -> None:
    with pytest.raises(PassError, match=r"WriteSpans: the graph lacks \['gone'\] of span0-0"):
        WriteSpans(spans=(Span(0, 0, starts=("gone",), ends=("add",)),))(gated().gm)


def test_without_spans_nothing_changes() -> None:
    traced = gated()
    text = graph_text(traced.gm)

    assert WriteSpans(spans=())(traced.gm) is False
    assert graph_text(traced.gm) == text
