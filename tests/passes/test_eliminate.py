"""Eliminate: dead nodes and unread cache inputs go, the model's own inputs stay."""

import pytest
import torch
from torch import Tensor, nn

from omnifx.errors import PassError
from omnifx.graph import EXTRA_INPUTS, clone, graph_text, insert_input, node_named
from omnifx.passes.eliminate import Eliminate
from omnifx.passes.read_cuts import ReadCuts
from tests.toys import gated, trace


def test_dead_nodes_and_unread_cache_inputs_go_and_the_models_inputs_stay() -> None:
    traced = gated()
    before = graph_text(traced.gm)
    insert_input(traced.gm, "cached_nothing", label="cut:nothing", like=torch.zeros(2))
    mm = node_named(traced.gm, "mm_2")
    with traced.gm.graph.inserting_after(mm):
        traced.gm.graph.call_function(torch.ops.aten.relu.default, (mm,))

    changed = Eliminate()(traced.gm)

    assert changed is True
    assert graph_text(traced.gm) == before
    assert traced.gm.meta[EXTRA_INPUTS] == []


def test_the_bits_stay() -> None:
    traced = gated()
    copy = clone(traced.gm)
    ReadCuts(branches=("branch.mlp",))(copy)
    cut = noise_cut()
    before = traced.run(copy, [cut])[0]

    Eliminate()(copy)

    assert torch.equal(traced.run(copy, [cut])[0], before)


def noise_cut() -> Tensor:
    return torch.linspace(-1, 1, 32).reshape(1, 4, 8)


def test_dead_attention_goes_although_it_may_draw_random_numbers() -> None:
    class Attends(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + nn.functional.scaled_dot_product_attention(x, x, x)

    traced = trace(Attends(), torch.randn(1, 2, 8, 8))
    (branch,) = traced.analysis.cacheable
    ReadCuts(branches=(branch.name,))(traced.gm)

    Eliminate(freed=(branch.name,))(traced.gm)

    assert "scaled_dot_product" not in graph_text(traced.gm)


def test_writes_to_an_input_stay() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * 2

    traced = trace(Counts(), torch.randn(2, 4))
    before = graph_text(traced.gm)
    assert "copy_" in before

    Eliminate()(traced.gm)

    assert graph_text(traced.gm) == before


def test_a_branch_that_should_be_gone_but_lives_is_an_error() -> None:
    traced = gated()

    with pytest.raises(PassError, match=r"Eliminate: \['mm', 'mm_1'\] should be dead"):
        Eliminate(freed=("branch.mlp",))(traced.gm)


def test_a_clean_graph_is_left_alone() -> None:
    traced = gated()
    copy = clone(traced.gm)

    assert Eliminate()(copy) is False
    assert graph_text(copy) == graph_text(traced.gm)
