"""MeasureNoise: a full step also tells what a reuse step would have got wrong."""

import pytest
import torch

from omnifx.errors import PassError
from omnifx.graph import EXTRA_INPUTS, EXTRA_OUTPUTS, branches_of, clone, graph_text, total_flops
from omnifx.passes.eliminate import Eliminate
from omnifx.passes.measure_noise import MeasureNoise, noisy_outputs
from omnifx.passes.read_cuts import ReadCuts
from omnifx.passes.write_cuts import WriteCuts
from tests.toys import gated, noise, toy, toy_inputs, trace


def test_what_descends_from_the_cut_is_computed_twice_and_the_rest_is_shared() -> None:
    traced = gated()
    before = graph_text(traced.gm)

    changed = MeasureNoise(branches=("branch.mlp",))(traced.gm)

    assert changed is True
    assert traced.gm.meta[EXTRA_INPUTS] == ["cut:unsqueeze_2"]
    assert traced.gm.meta[EXTRA_OUTPUTS] == ["noise:0"]
    assert graph_text(traced.gm) == before.replace("arg4_1 | ", "arg4_1 | cached_unsqueeze_2 | ", 1).replace(
        "return(unsqueeze_3)",
        "mul_1 = mul(unsqueeze_1, cached_unsqueeze_2) | add_1 = add(arg1_1, mul_1) | select_2 = select(add_1) | "
        "mm_3 = mm(select_2, permute_2) | unsqueeze_4 = unsqueeze(mm_3) | sub_tensor = sub(unsqueeze_4, unsqueeze_3) | "
        "return(unsqueeze_3, sub_tensor)",
    )


@pytest.mark.parametrize("ending", [".attn", ".mlp", ""])
def test_the_noise_is_what_the_reuse_graph_gets_wrong(ending: str) -> None:
    traced = trace(toy(2, text=24), *toy_inputs(text=24))
    names = tuple(name for name in branches_of(traced.gm) if name.endswith(ending))
    reading, measuring = clone(traced.gm), clone(traced.gm)
    ReadCuts(branches=names)(reading)
    Eliminate(freed=names)(reading)

    MeasureNoise(branches=names)(measuring)

    old = {label: noise(1, 16, 32, seed=i) for i, label in enumerate(reading.meta[EXTRA_INPUTS])}
    true, measured = traced.run(measuring, [old[label] for label in measuring.meta[EXTRA_INPUTS]])
    (reused,) = traced.run(reading, [old[label] for label in reading.meta[EXTRA_INPUTS]])
    assert torch.equal(true, traced.run()[0])
    assert float((measured - (reused - true)).norm() / reused.norm()) < 1e-5


def test_own_cuts_cause_no_noise() -> None:
    traced = trace(toy(2), *toy_inputs())
    names = tuple(branches_of(traced.gm))
    writing, measuring = clone(traced.gm), clone(traced.gm)
    WriteCuts(branches=names)(writing)
    MeasureNoise(branches=names)(measuring)
    cuts = dict(zip(writing.meta[EXTRA_OUTPUTS], traced.run(writing)[1:], strict=True))

    _, measured = traced.run(measuring, [cuts[label] for label in measuring.meta[EXTRA_INPUTS]])

    assert torch.equal(measured, torch.zeros_like(measured))


def test_the_second_run_costs_no_more_than_a_reuse_step() -> None:
    traced = trace(toy(2), *toy_inputs())
    names = tuple(branches_of(traced.gm))

    MeasureNoise(branches=names)(traced.gm)

    assert total_flops(traced.gm) <= traced.analysis.flops + traced.analysis.reuse_flops


def test_only_outputs_below_the_branches_are_noisy() -> None:
    traced = gated()

    assert noisy_outputs(traced.gm, ("branch.mlp",)) == [0]
    assert noisy_outputs(traced.gm, ()) == []


def test_a_graph_that_already_reads_cuts_is_refused() -> None:
    traced = gated()
    ReadCuts(branches=("branch.mlp",))(traced.gm)

    with pytest.raises(PassError, match=r"already reads \['cut:unsqueeze_2'\]; it measures full graphs only"):
        MeasureNoise(branches=("branch.mlp",))(traced.gm)


def test_branches_the_model_lacks_are_refused() -> None:
    with pytest.raises(PassError, match=r"MeasureNoise: the graph has no branches \['blocks.9.attn'\]"):
        MeasureNoise(branches=("blocks.9.attn",))(gated().gm)


def test_without_branches_nothing_changes() -> None:
    traced = gated()
    copy = clone(traced.gm)

    assert MeasureNoise(branches=())(copy) is False
    assert graph_text(copy) == graph_text(traced.gm)
