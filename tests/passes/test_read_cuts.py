"""ReadCuts: cuts become inputs, and what only fed them dies."""

import pytest
import torch

from omnifx.errors import PassError
from omnifx.graph import EXTRA_INPUTS, branches_of, clone, graph_text, total_flops
from omnifx.passes.eliminate import Eliminate
from omnifx.passes.read_cuts import ReadCuts
from omnifx.passes.write_cuts import WriteCuts
from tests.toys import TINY, Traced, gated, toy, toy_inputs, trace


def cuts_by_name(traced: Traced) -> dict[str, torch.Tensor]:
    """The cuts of this very call."""
    writing = clone(traced.gm)
    names = tuple(branches_of(writing))
    WriteCuts(branches=names)(writing)
    _, *cuts = traced.run(writing)
    return dict(zip((c for n in names for c in branches_of(writing)[n].cuts), cuts, strict=True))


def assert_same_bits_when_fed_own_cuts(traced: Traced, branches: tuple[str, ...]) -> None:
    cuts = cuts_by_name(traced)
    reading = clone(traced.gm)

    ReadCuts(branches=branches)(reading)
    Eliminate(freed=branches)(reading)

    extra = [cuts[label.removeprefix("cut:")] for label in reading.meta[EXTRA_INPUTS]]
    assert torch.equal(traced.run(reading, extra)[0], traced.run()[0])


def test_the_cut_becomes_an_input_and_its_branch_goes() -> None:
    traced = gated()

    changed = ReadCuts(branches=("branch.mlp",))(traced.gm)
    Eliminate(freed=("branch.mlp",))(traced.gm)

    assert changed is True
    assert traced.gm.meta[EXTRA_INPUTS] == ["cut:unsqueeze_2"]
    assert graph_text(traced.gm) == (
        "arg0_1 | arg1_1 | arg2_1 | arg3_1 | arg4_1 | cached_unsqueeze_2 | sigmoid = sigmoid(arg0_1) | "
        "unsqueeze = unsqueeze(sigmoid) | unsqueeze_1 = unsqueeze(unsqueeze) | mul = mul(unsqueeze_1, "
        "cached_unsqueeze_2) | "
        "add = add(arg1_1, mul) | select_1 = select(add) | permute_2 = permute(arg4_1) | mm_2 = mm(select_1, "
        "permute_2) | "
        "unsqueeze_3 = unsqueeze(mm_2) | return(unsqueeze_3)"
    )


@pytest.mark.parametrize("ending", [".attn", ".cross", ".mlp", ""])
def test_fed_its_own_cuts_a_reuse_graph_computes_the_same_bits(ending: str) -> None:
    traced = trace(toy(3, text=24), *toy_inputs(text=24))
    names = tuple(name for name in branches_of(traced.gm) if name.endswith(ending))
    assert names

    assert_same_bits_when_fed_own_cuts(traced, names)


@pytest.mark.parametrize("name", TINY)
def test_every_single_branch_of_real_models_replays_to_the_same_bits(name: str) -> None:
    tiny = TINY[name]()
    traced = trace(tiny.model, **tiny.inputs)

    for branch in branches_of(traced.gm):
        assert_same_bits_when_fed_own_cuts(traced, (branch,))
    assert_same_bits_when_fed_own_cuts(traced, tuple(branches_of(traced.gm)))


def test_what_dies_is_what_the_branches_promise() -> None:
    traced = trace(toy(2), *toy_inputs())
    names = tuple(branches_of(traced.gm))
    reading = clone(traced.gm)

    ReadCuts(branches=names)(reading)
    Eliminate(freed=names)(reading)

    assert total_flops(reading) == traced.analysis.reuse_flops
    assert total_flops(traced.gm) - total_flops(reading) == sum(b.flops for b in traced.analysis.cacheable)


def test_branches_the_model_lacks_are_refused() -> None:
    traced = gated()

    with pytest.raises(
        PassError, match=r"ReadCuts: the graph has no branches \['blocks.9.attn'\]; it has \['branch.mlp'\]"
    ):
        ReadCuts(branches=("blocks.9.attn",))(traced.gm)


def test_without_branches_nothing_changes() -> None:
    traced = gated()
    copy = clone(traced.gm)

    assert ReadCuts(branches=())(copy) is False
    assert graph_text(copy) == graph_text(traced.gm)
