"""WriteCuts: one more output for each cut."""

import pytest
import torch

from omnifx.errors import PassError
from omnifx.graph import EXTRA_OUTPUTS, branches_of, clone, graph_text, node_named
from omnifx.passes.write_cuts import WriteCuts, cuts_of
from tests.toys import gated, toy, toy_inputs, trace


def test_the_cut_is_returned_beside_the_output() -> None:
    traced = gated()
    before = graph_text(traced.gm)

    changed = WriteCuts(branches=("branch.mlp",))(traced.gm)

    assert changed is True
    assert graph_text(traced.gm) == before.replace("return(unsqueeze_3)", "return(unsqueeze_3, unsqueeze_2)")
    assert traced.gm.meta[EXTRA_OUTPUTS] == ["cut:unsqueeze_2"]


def test_the_outputs_that_were_there_keep_their_bits() -> None:
    traced = trace(toy(2, text=24), *toy_inputs(text=24))
    names = tuple(branches_of(traced.gm))
    (before,) = traced.run()

    WriteCuts(branches=names)(traced.gm)

    after, *cuts = traced.run()
    assert torch.equal(after, before)
    assert [tuple(cut.shape) for cut in cuts] == [
        tuple(node_named(traced.gm, name).meta["val"].shape) for name in cuts_of(traced.gm, names)
    ]


def test_branches_the_model_lacks_are_refused() -> None:
    traced = gated()

    with pytest.raises(
        PassError, match=r"WriteCuts: the graph has no branches \['blocks.9.attn'\]; it has \['branch.mlp'\]"
    ):
        WriteCuts(branches=("blocks.9.attn",))(traced.gm)


def test_without_branches_nothing_changes() -> None:
    traced = gated()
    copy = clone(traced.gm)

    assert WriteCuts(branches=())(copy) is False
    assert graph_text(copy) == graph_text(traced.gm)
