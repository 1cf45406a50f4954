"""CombineOutput: the output becomes a sum of what is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from omnifx.errors import PassError
from omnifx.graph import EXTRA_INPUTS, EXTRA_OUTPUTS, branches_of, clone, graph_text, total_flops
from omnifx.passes.combine_output import CombineOutput, combinable
from omnifx.passes.eliminate import Eliminate
from omnifx.passes.read_cuts import ReadCuts
from omnifx.plan import Combination
from tests.passes.test_read_cuts import cuts_by_name
from tests.toys import TINY, Gated, Mlp, Traced, gated, lively, noise, toy, toy_inputs, trace

OWN = "arg0_1 | arg1_1 | arg2_1 | arg3_1 | arg4_1 | "


def combined(
    traced: Traced, combination: Combination, values: dict[str, Tensor], *, history: int = 1, noise: bool = False
) -> list[Tensor]:
    """All outputs of the graph with its output combined; what is not in `values` is NaN."""
    names = tuple(branches_of(traced.gm))
    copy, reuse = clone(traced.gm), bool(combination.reuse)
    CombineOutput(branches=names, history=history, noise=noise, reuse=reuse)(copy)
    labels = copy.meta[EXTRA_INPUTS]
    placeholders = [node for node in copy.graph.nodes if node.op == "placeholder"][-len(labels) :]
    extra = []
    for label, node in zip(labels, placeholders, strict=True):
        fake = node.meta["val"]
        unknown = torch.full(tuple(fake.shape), float("nan"), dtype=fake.dtype)
        given = torch.tensor(combination.vector(history)) if label == "combination" else values.get(label, unknown)
        extra.append(given)
    found: list[Tensor] = traced.run(copy, extra)
    return found


# -- what the graph becomes --------------------------------------------------------------------------------------------


def test_a_skipped_step_needs_nothing_of_the_network() -> None:
    traced = gated()

    changed = CombineOutput(branches=("branch.mlp",), history=1, noise=False, reuse=False)(traced.gm)
    Eliminate(freed=("branch.mlp",))(traced.gm)

    assert changed is True
    assert traced.gm.meta[EXTRA_INPUTS] == ["combination", "past_output:0", "past_latents:0"]
    assert total_flops(traced.gm) == 0
    assert graph_text(traced.gm) == OWN + (
        "combination | past_output_0 | past_latents_0 | "
        "full = full() | select_2 = select(combination) | eq = eq(select_2) | "
        "mul_1 = mul(select_2, past_output_0) | where = where(eq, full, mul_1) | "
        "select_3 = select(combination) | sub = sub(arg1_1, past_latents_0) | eq_1 = eq(select_3) | "
        "mul_2 = mul(select_3, sub) | add_1 = add(where, mul_2) | where_1 = where(eq_1, where, add_1) | return(where_1)"
    )


def test_inputs_are_those_that_the_plan_needs() -> None:
    traced = gated()

    CombineOutput(branches=("branch.mlp",), history=2, noise=True, reuse=True)(traced.gm)

    assert traced.gm.meta[EXTRA_INPUTS] == [
        *("combination", "noise:0", "past_output:0", "past_output:1", "past_latents:0", "past_latents:1")
    ]
    assert EXTRA_OUTPUTS not in traced.gm.meta


# -- whether the numbers hold ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dit", "pixart", "flux"])
def test_with_one_whole_weight_it_has_the_bits_of_the_graph_whatever_the_others_hold(name: str) -> None:
    traced = trace((tiny := TINY[name]()).model, **tiny.inputs)
    infinite = torch.full_like(traced.run()[0], float("inf"))

    again = combined(traced, Combination(reuse=1.0), {"noise:0": infinite}, history=3, noise=True)

    assert torch.equal(again[0], traced.run()[0])


def test_a_combination_is_the_sum_of_its_terms() -> None:
    traced = trace(toy(1), *toy_inputs())
    now = toy_inputs()[0]
    q, o0, o1, x0, x1 = (noise(1, 4, 8, 8, seed=seed) for seed in range(10, 15))
    known = {"noise:0": q, "past_output:0": o0, "past_output:1": o1, "past_latents:0": x0, "past_latents:1": x1}
    combination = Combination(reuse=0.5, noise=-0.25, outputs=(2.0, -1.5), latents=(0.75, 0.125))

    (got,) = combined(traced, combination, known, history=2, noise=True)

    expected = 0.5 * traced.run()[0] - 0.25 * q + 2.0 * o0 - 1.5 * o1 + 0.75 * (now - x0) + 0.125 * (now - x1)
    assert torch.allclose(got, expected, atol=1e-6)


def test_moves_of_the_latents_leave_a_predicted_variance_alone() -> None:
    traced = trace((tiny := TINY["pixart"]()).model, **tiny.inputs)
    output, then = noise(1, 8, 8, 8, seed=1), noise(1, 4, 8, 8, seed=2)
    known = {"past_output:0": output, "past_latents:0": then}

    (got,) = combined(traced, Combination(outputs=(2.0,), latents=(0.5,)), known)

    moved = 2.0 * output[:, :4] + 0.5 * (tiny.inputs["hidden_states"] - then)
    assert torch.allclose(got[:, :4], moved, atol=1e-6)
    assert torch.equal(got[:, 4:], 2.0 * output[:, 4:])


class Wide(nn.Module):
    """``head(x + sigmoid(t) * f(x))`` on tokens x [B, N, 8]; the head's width is given."""

    def __init__(self, width: int, outputs: int = 1) -> None:
        super().__init__()
        self.mlp = Mlp(8, 16)
        self.head = nn.Linear(8, width)
        self.outputs = outputs

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        x = x + torch.sigmoid(t)[:, None, None] * self.mlp(x)
        return (self.head(x), x.mean(1), t + 1)[: self.outputs]


@pytest.mark.parametrize("width", [4, 8, 12])
def test_channels_of_tokens_are_the_last_axis_and_only_common_ones_move(width: int) -> None:
    traced = trace(lively(Wide(width)), now := noise(1, 5, 8), torch.tensor([0.5]))
    output, then = noise(1, 5, width, seed=1), noise(1, 5, 8, seed=2)
    known = {"past_output:0": output, "past_latents:0": then}

    (got,) = combined(traced, Combination(outputs=(1.0,), latents=(0.5,)), known)

    expected = output.clone()
    common = min(width, 8)
    expected[..., :common] += 0.5 * (now - then)[..., :common]
    assert torch.allclose(got, expected, atol=1e-6)


def test_half_precision_is_combined_in_single_precision() -> None:
    traced = trace(lively(Gated()).bfloat16(), noise(1, 4, 8).bfloat16(), torch.tensor([0.5]).bfloat16())
    output = noise(1, 4, 8, seed=1).bfloat16()
    known = {f"past_output:{j}": output for j in range(3)}

    (got,) = combined(traced, Combination(outputs=(1.0 / 3.0,) * 3), known, history=3)

    assert got.dtype == torch.bfloat16
    assert torch.equal(got, output)  # three thirds of it, not of their rounding


def test_read_cuts_finds_what_it_replaces() -> None:
    traced = trace(toy(2), *toy_inputs())
    names, cuts = tuple(branches_of(traced.gm)), cuts_by_name(traced)
    copy = clone(traced.gm)

    CombineOutput(branches=names, history=1, noise=False, reuse=True)(copy)
    ReadCuts(branches=names)(copy)
    Eliminate(freed=names)(copy)

    weights, *past = torch.tensor([1.0, 0.0, 0.0, 0.0]), noise(1, 4, 8, 8), noise(1, 4, 8, 8)
    extra = [weights, *past, *(cuts[label[4:]] for label in copy.meta[EXTRA_INPUTS][3:])]
    assert torch.equal(traced.run(copy, extra)[0], traced.run()[0])
    assert total_flops(copy) == traced.analysis.reuse_flops


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_model_of_several_outputs_is_refused() -> None:
    traced = trace(lively(Wide(8, outputs=3)), noise(1, 5, 8), torch.tensor([0.5]))
    names = tuple(branches_of(traced.gm))

    found = combinable(traced.gm, names)

    assert found.reason == "2 outputs of the model depend on its latents; it must be one, in floating point"
    with pytest.raises(PassError, match="CombineOutput: the output cannot be combined: 2 outputs of the model"):
        CombineOutput(branches=names, history=1, noise=False, reuse=True)(traced.gm)


class Summed(Wide):
    """Tokens [B, N, 8] in, one vector for each sample out."""

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return (super().forward(x, t)[0].mean(1),)


def test_latents_of_another_shape_are_not_added() -> None:
    traced = trace(lively(Summed(8)), noise(1, 5, 8), torch.tensor([0.5]))
    names = tuple(branches_of(traced.gm))

    found = combinable(traced.gm, names)
    CombineOutput(branches=names, history=1, noise=False, reuse=False)(traced.gm)

    assert found.reason == ""
    assert found.latents_reason == "its output [1, 8] and its latents [1, 5, 8] differ in more than channels"
    assert traced.gm.meta[EXTRA_INPUTS] == ["combination", "past_output:0"]


def test_after_the_cuts_are_gone_it_is_refused() -> None:
    traced = gated()
    ReadCuts(branches=("branch.mlp",))(traced.gm)

    with pytest.raises(PassError, match="the cuts were already replaced; run it before ReadCuts"):
        CombineOutput(branches=("branch.mlp",), history=1, noise=False, reuse=True)(traced.gm)


@pytest.mark.parametrize(("history", "reuse"), [(-1, True), (0, False)])
def test_a_sum_of_nothing_is_refused(history: int, reuse: bool) -> None:
    with pytest.raises(PassError, match=rf"history must be >= 0 \(full steps\), and >= 1 without .* got {history}"):
        CombineOutput(branches=("branch.mlp",), history=history, noise=False, reuse=reuse)(gated().gm)


def test_branches_the_model_lacks_are_refused() -> None:
    with pytest.raises(PassError, match=r"CombineOutput: the graph has no branches \['blocks.9.attn'\]"):
        CombineOutput(branches=("blocks.9.attn",), history=1, noise=False, reuse=True)(gated().gm)
