"""PredictCuts: cuts become combinations of stored values, and what only fed them dies."""

import pytest
import torch

from omnifx.errors import PassError
from omnifx.graph import EXTRA_INPUTS, EXTRA_OUTPUTS, branches_of, clone, graph_text, total_flops
from omnifx.passes.eliminate import Eliminate
from omnifx.passes.predict_cuts import PredictCuts
from tests.passes.test_read_cuts import cuts_by_name
from tests.toys import TINY, Gated, distance, gated, lively, noise, toy, toy_inputs, trace


def test_the_cut_becomes_a_combination_and_its_branch_goes() -> None:
    traced = gated()

    changed = PredictCuts(branches=("branch.mlp",), terms=2)(traced.gm)
    Eliminate(freed=("branch.mlp",))(traced.gm)

    assert changed is True
    assert traced.gm.meta[EXTRA_INPUTS] == ["cut:unsqueeze_2", "cut:unsqueeze_2@1", "predictor"]
    assert graph_text(traced.gm) == (
        "arg0_1 | arg1_1 | arg2_1 | arg3_1 | arg4_1 | cached_unsqueeze_2 | cached1_unsqueeze_2 | predictor | "
        "sigmoid = sigmoid(arg0_1) | unsqueeze = unsqueeze(sigmoid) | unsqueeze_1 = unsqueeze(unsqueeze) | "
        "select_2 = select(predictor) | mul_1 = mul(select_2, cached_unsqueeze_2) | "
        "select_3 = select(predictor) | mul_2 = mul(select_3, cached1_unsqueeze_2) | "
        "predicted_unsqueeze_2 = add(mul_1, mul_2) | mul = mul(unsqueeze_1, predicted_unsqueeze_2) | "
        "add = add(arg1_1, mul) | select_1 = select(add) | permute_2 = permute(arg4_1) | "
        "mm_2 = mm(select_1, permute_2) | unsqueeze_3 = unsqueeze(mm_2) | return(unsqueeze_3)"
    )


@pytest.mark.parametrize("terms", [1, 2, 4])
def test_with_one_whole_weight_it_has_the_bits_of_reading_the_newest_value(terms: int) -> None:
    traced = trace(toy(3, text=24), *toy_inputs(text=24))
    names = tuple(branches_of(traced.gm))
    cuts = cuts_by_name(traced)
    predicting = clone(traced.gm)

    PredictCuts(branches=names, terms=terms)(predicting)
    Eliminate(freed=names)(predicting)

    weights = torch.tensor([1.0, *[0.0] * (terms - 1)])
    extra = []
    for label in predicting.meta[EXTRA_INPUTS]:
        name, _, age = label.removeprefix("cut:").partition("@")
        extra.append(weights if label == "predictor" else (torch.randn_like(cuts[name]) if age else cuts[name]))
    assert torch.equal(traced.run(predicting, extra)[0], traced.run()[0])


@pytest.mark.parametrize("name", TINY)
def test_a_prediction_whose_weights_recover_the_cuts_is_the_full_step(name: str) -> None:
    tiny = TINY[name]()
    traced = trace(tiny.model, **tiny.inputs)
    names = tuple(branches_of(traced.gm))
    cuts = cuts_by_name(traced)
    predicting = clone(traced.gm)

    PredictCuts(branches=names, terms=3, stores=True)(predicting)
    Eliminate(freed=names)(predicting)

    extra = []
    for label in predicting.meta[EXTRA_INPUTS]:
        cut, _, age = label.removeprefix("cut:").partition("@")
        if label == "predictor":
            extra.append(torch.tensor([2.0, -0.5, 0.25]))
        else:  # 2 c / 2 - 0.5 c + 0.25 * 2 c = c
            extra.append(cuts[cut] * {"": 0.5, "1": 1.0, "2": 2.0}[age])
    outputs = traced.run(predicting, extra)
    plain = traced.run()
    for output, expected in zip(outputs, plain, strict=False):
        assert distance(output, expected) < 1e-5
    stored = dict(zip(predicting.meta[EXTRA_OUTPUTS], outputs[len(plain) :], strict=True))
    assert set(stored) == {f"cut:{cut}" for cut in cuts}
    assert all(distance(stored[f"cut:{cut}"], value) < 1e-5 for cut, value in cuts.items())


def test_what_dies_is_what_the_branches_promise() -> None:
    traced = trace(toy(2), *toy_inputs())
    names = tuple(branches_of(traced.gm))
    predicting = clone(traced.gm)

    PredictCuts(branches=names, terms=2)(predicting)
    Eliminate(freed=names)(predicting)

    assert total_flops(predicting) == traced.analysis.reuse_flops


def test_half_precision_is_combined_in_single_precision() -> None:
    traced = trace(lively(Gated()).bfloat16(), noise(1, 4, 8).bfloat16(), torch.tensor([0.5]).bfloat16())
    names = tuple(branches_of(traced.gm))
    cuts = cuts_by_name(traced)
    predicting = clone(traced.gm)

    PredictCuts(branches=names, terms=2, stores=True)(predicting)

    extra = [
        torch.tensor([1.0 / 3.0, 2.0 / 3.0]) if label == "predictor" else cuts[label[4:].partition("@")[0]]
        for label in predicting.meta[EXTRA_INPUTS]
    ]
    _, *stored = traced.run(predicting, extra)
    for label, value in zip(predicting.meta[EXTRA_OUTPUTS], stored, strict=True):
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, cuts[label.removeprefix("cut:")])  # a third and two thirds of it, not of its rounding


def test_branches_the_model_lacks_are_refused() -> None:
    with pytest.raises(PassError, match=r"PredictCuts: the graph has no branches \['blocks.9.attn'\]"):
        PredictCuts(branches=("blocks.9.attn",), terms=2)(gated().gm)


def test_a_prediction_from_nothing_is_refused() -> None:
    with pytest.raises(PassError, match=r"PredictCuts: terms must be >= 1 \(stored values\), got 0"):
        PredictCuts(branches=("branch.mlp",), terms=0)(gated().gm)


def test_without_branches_nothing_changes() -> None:
    traced = gated()
    copy = clone(traced.gm)

    assert PredictCuts(branches=(), terms=1)(copy) is False
    assert graph_text(copy) == graph_text(traced.gm)
