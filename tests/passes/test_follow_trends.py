"""FollowTrends: what is predicted moves on by a trend of one sample, and what is stored of it too."""

import pytest
import torch
from torch import Tensor

from omnifx.errors import PassError
from omnifx.graph import EXTRA_INPUTS, EXTRA_OUTPUTS, branches_of, clone, graph_text
from omnifx.passes.eliminate import Eliminate
from omnifx.passes.follow_trends import FollowTrends, Form
from omnifx.passes.predict_cuts import PredictCuts
from tests.passes.test_read_cuts import cuts_by_name
from tests.toys import TINY, Traced, distance, gated, toy, toy_inputs, trace


def moved(
    traced: Traced, form: Form, scale: float, cuts: dict[str, Tensor], trends: dict[str, Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and stored cuts, of the graph that reads these cuts and follows these trends."""
    names = tuple(branches_of(traced.gm))
    gm = clone(traced.gm)
    PredictCuts(branches=names, terms=1, stores=True)(gm)
    FollowTrends(branches=names, form=form)(gm)
    Eliminate(freed=names)(gm)
    extra = []
    for label in gm.meta[EXTRA_INPUTS]:
        kind, _, name = label.partition(":")
        values = {"predictor": torch.ones(1), "trend_scale": torch.tensor([scale])}
        extra.append({"cut": cuts, "trend": trends}[kind][name] if name else values[kind])
    outputs = traced.run(gm, extra)
    count = len(outputs) - len(gm.meta[EXTRA_OUTPUTS])
    return outputs[:count], dict(zip(gm.meta[EXTRA_OUTPUTS], outputs[count:], strict=True))


def trends_of(cuts: dict[str, Tensor], batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(cut.shape[0] // batch, *cut.shape[1:], generator=generator) for name, cut in cuts.items()}


@pytest.mark.parametrize("form", ["scale", "shift"])
def test_a_cut_that_a_trend_made_is_found_again(form: Form) -> None:
    traced = trace(toy(2, text=24), *toy_inputs(2, text=24))
    cuts = cuts_by_name(traced)
    trends = trends_of(cuts, batch=2)
    before = {}
    for name, cut in cuts.items():
        trend = trends[name].repeat(2, *[1] * (cut.dim() - 1))  # the same for both samples
        before[name] = cut / (1 + 0.3 * trend) if form == "scale" else cut - 0.3 * trend

    (output,), stored = moved(traced, form, 0.3, before, trends)

    assert distance(output, traced.run()[0]) < 1e-5
    for name, cut in cuts.items():
        assert distance(stored[f"cut:{name}"], cut) < 1e-5


@pytest.mark.parametrize("form", ["scale", "shift"])
@pytest.mark.parametrize("name", TINY)
def test_without_a_scale_real_models_keep_their_bits(name: str, form: Form) -> None:
    tiny = TINY[name]()
    traced = trace(tiny.model, **tiny.inputs)
    cuts = cuts_by_name(traced)
    batch = tiny.inputs[tiny.latents[0]].shape[0]

    outputs, _ = moved(traced, form, 0.0, cuts, trends_of(cuts, batch))

    for output, expected in zip(outputs, traced.run(), strict=True):
        assert torch.equal(output, expected)


def test_what_is_not_predicted_is_refused() -> None:
    with pytest.raises(PassError, match=r"the cuts \['unsqueeze_2'\] are not predicted; run PredictCuts first"):
        FollowTrends(branches=("branch.mlp",), form="scale")(gated().gm)


def test_branches_the_model_lacks_are_refused() -> None:
    with pytest.raises(PassError, match=r"FollowTrends: the graph has no branches \['blocks.9.attn'\]"):
        FollowTrends(branches=("blocks.9.attn",), form="scale")(gated().gm)


def test_without_branches_nothing_changes() -> None:
    traced = gated()
    copy = clone(traced.gm)

    assert FollowTrends(branches=(), form="shift")(copy) is False
    assert graph_text(copy) == graph_text(traced.gm)
