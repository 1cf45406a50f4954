"""GuardTokens: a branch is computed for some tokens, and its other rows come from the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from omnifx.errors import PassError
from omnifx.graph import (
    EXTRA_INPUTS,
    EXTRA_OUTPUTS,
    append_output,
    branches_of,
    clone,
    graph_text,
    nodes_by_name,
    total_flops,
)
from omnifx.passes.eliminate import Eliminate
from omnifx.passes.guard_tokens import GuardTokens
from omnifx.passes.prove_tokens import ProveTokens
from omnifx.passes.score_tokens import ScoreTokens
from omnifx.tokens import Selection
from tests.toys import TINY, Traced, distance, gated, noise, toy, toy_inputs, trace
from tests.zoo.models import ZOO


def traced_tiny(name: str) -> Traced:
    tiny = (TINY[name] if name in TINY else ZOO[name].make)()
    traced = trace(tiny.model, **tiny.inputs)
    ProveTokens()(traced.gm)
    return traced


def values_of(traced: Traced, names: list[str]) -> dict[str, Tensor]:
    """What some nodes compute on the traced inputs."""
    telling, nodes = clone(traced.gm), None
    nodes = nodes_by_name(telling)
    for name in names:
        append_output(telling, nodes[name], label=name)
    telling.recompile()
    return dict(zip(names, traced.run(telling)[-len(names) :], strict=True))


def guarded(traced: Traced, branch: str, k: int) -> Any:
    gm = clone(traced.gm)
    assert GuardTokens(partial=((branch, k),), selection=None)(gm) is True
    Eliminate()(gm)
    return gm


@pytest.mark.parametrize(
    "name", ["dit", "pixart", "sd3", "flux", "wan", "cogvideox", "latte", "SanaTransformer2DModel"]
)
def test_chosen_rows_are_computed_and_the_others_are_the_cached_ones(name: str) -> None:
    traced = traced_tiny(name)
    partial = {n: b for n, b in branches_of(traced.gm).items() if b.tokens is not None}
    assert partial
    for branch in partial.values():
        assert branch.tokens is not None
        batch, number = branch.tokens.batch, branch.tokens.number
        k = max(1, number // 3)
        (cut,), held = branch.cuts, branch.tokens.held
        true = values_of(traced, [cut, *held])
        index = torch.stack(
            [torch.randperm(number, generator=torch.Generator().manual_seed(b))[:k] for b in range(batch)]
        )
        old = noise(*true[cut].shape, seed=5)
        fed = {f"cut:{n}": v for n, v in true.items()} | {f"index:{branch.name}": index, f"cut:{cut}": old}

        gm = guarded(traced, branch.name, k)
        new = traced.run(gm, [fed[label] for label in gm.meta[EXTRA_INPUTS]])[-1]

        assert gm.meta[EXTRA_OUTPUTS] == [f"cut:{cut}"]
        rows, old_rows, true_rows = (v.reshape(batch, number, -1) for v in (new, old, true[cut]))
        for sample, chosen in enumerate(index):
            kept = [token for token in range(number) if token not in chosen]
            assert torch.equal(rows[sample, kept], old_rows[sample, kept])
            assert distance(rows[sample, chosen], true_rows[sample, chosen]) < 1e-5
        saved = branch.tokens.spared_flops + branch.tokens.flops * (1 - k / number)
        assert total_flops(traced.gm) - total_flops(gm) == pytest.approx(saved, rel=1e-3)


@pytest.mark.parametrize("name", ["dit", "pixart", "flux"])
def test_fed_its_own_cuts_a_partial_graph_computes_the_same(name: str) -> None:
    traced = traced_tiny(name)
    partial = [(n, b) for n, b in branches_of(traced.gm).items() if b.tokens is not None]
    names = [cut for _, b in partial for cut in (*b.cuts, *(b.tokens.held if b.tokens else ()))]
    true = values_of(traced, names)
    gm = clone(traced.gm)

    GuardTokens(partial=tuple((n, 3) for n, _ in partial), selection=None)(gm)
    Eliminate()(gm)

    fed = {f"cut:{n}": v for n, v in true.items()}
    for n, branch in partial:
        assert branch.tokens is not None
        fed[f"index:{n}"] = torch.arange(3).expand(branch.tokens.batch, -1)
    output = traced.run(gm, [fed[label] for label in gm.meta[EXTRA_INPUTS]])[0]
    assert distance(output, traced.run()[0]) < 1e-5


def test_a_branch_gathers_its_tokens_and_scatters_them_into_the_cached_cut() -> None:
    traced = gated()
    ProveTokens()(traced.gm)

    GuardTokens(partial=(("branch.mlp", 2),), selection=None)(traced.gm)
    Eliminate()(traced.gm)

    assert traced.gm.meta[EXTRA_INPUTS] == ["index:branch.mlp", "cut:unsqueeze_2"]
    assert traced.gm.meta[EXTRA_OUTPUTS] == ["cut:unsqueeze_2"]
    assert graph_text(traced.gm) == (
        "arg0_1 | arg1_1 | arg2_1 | arg3_1 | arg4_1 | index_unsqueeze_2 | cached_unsqueeze_2 | "
        "sigmoid = sigmoid(arg0_1) | unsqueeze = unsqueeze(sigmoid) | unsqueeze_1 = unsqueeze(unsqueeze) | "
        "permute = permute(arg2_1) | permute_1 = permute(arg3_1) | "
        "view = view(arg1_1) | view_1 = view(index_unsqueeze_2) | index = index(view, view_1) | view_2 = view(index) | "
        "select_2 = select(view_2) | mm_3 = mm(select_2, permute) | relu_1 = relu(mm_3) | "
        "mm_4 = mm(relu_1, permute_1) | unsqueeze_4 = unsqueeze(mm_4) | "
        "view_3 = view(unsqueeze_4) | view_4 = view(cached_unsqueeze_2) | view_5 = view(index_unsqueeze_2) | "
        "index_put = index_put(view_4, view_5, view_3) | view_6 = view(index_put) | "
        "mul = mul(unsqueeze_1, view_6) | add = add(arg1_1, mul) | select_1 = select(add) | "
        "permute_2 = permute(arg4_1) | mm_2 = mm(select_1, permute_2) | unsqueeze_3 = unsqueeze(mm_2) | "
        "return(unsqueeze_3, view_6)"
    )


def test_a_guarded_mlp_reads_scores_and_stamps_and_returns_its_cut_and_new_stamps() -> None:
    traced = trace(toy(1), *toy_inputs())
    ProveTokens()(traced.gm)
    selection = Selection(score="v-norm", staleness=0.1)

    GuardTokens(partial=(("blocks.0.mlp", 4),), selection=selection)(traced.gm)
    Eliminate()(traced.gm)

    (source,) = {b.tokens.keys.node for b in branches_of(traced.gm).values() if b.tokens and b.tokens.keys}
    (cut,) = branches_of(traced.gm)["blocks.0.mlp"].cuts
    assert traced.gm.meta[EXTRA_INPUTS] == ["age:", "stamp:blocks.0.mlp", f"score:{source}", f"cut:{cut}"]
    assert traced.gm.meta[EXTRA_OUTPUTS] == [f"cut:{cut}", "stamp:blocks.0.mlp"]
    text = graph_text(traced.gm)
    assert text.index("topk(") < text.index("= index(") < text.index("index_put(")


def test_a_graph_that_scores_returns_one_number_for_each_token() -> None:
    traced = trace(toy(2, text=24), *toy_inputs(2, text=24))
    ProveTokens()(traced.gm)

    changed = ScoreTokens(branches=tuple(branches_of(traced.gm)), selection=Selection(score="kv-norm", staleness=0.1))(
        traced.gm
    )

    assert changed is True
    labels = traced.gm.meta[EXTRA_OUTPUTS]
    assert len(labels) == 2
    assert all(label.startswith("score:") for label in labels)
    for score in traced.run()[-2:]:
        assert (score.shape, score.dtype) == ((2, 16), torch.float32)


def test_without_a_score_nothing_is_appended() -> None:
    traced = trace(toy(1), *toy_inputs())
    ProveTokens()(traced.gm)
    before = graph_text(traced.gm)

    changed = ScoreTokens(branches=tuple(branches_of(traced.gm)), selection=Selection(score="none", staleness=0.1))(
        traced.gm
    )

    assert changed is False
    assert graph_text(traced.gm) == before


def test_a_self_attention_is_refused() -> None:
    traced = traced_tiny("dit")

    with pytest.raises(PassError, match=r"attn1 cannot be computed for some tokens alone: .* is a self-attention"):
        GuardTokens(partial=(("transformer_blocks.0.attn1", 3),), selection=None)(traced.gm)


@pytest.mark.parametrize("k", [0, 17])
def test_as_many_tokens_as_there_are_none_of_are_refused(k: int) -> None:
    traced = traced_tiny("dit")

    with pytest.raises(PassError, match=rf"has 16 tokens, of which 1 to all can be computed, got {k}"):
        GuardTokens(partial=(("transformer_blocks.0.ff", k),), selection=None)(traced.gm)


def test_branches_the_model_lacks_are_refused() -> None:
    traced = traced_tiny("dit")

    with pytest.raises(PassError, match=r"no branches \['nowhere'\]"):
        GuardTokens(partial=(("nowhere", 3),), selection=None)(traced.gm)


def test_without_branches_nothing_changes() -> None:
    traced = traced_tiny("dit")
    before = graph_text(traced.gm)

    assert GuardTokens(partial=(), selection=None)(traced.gm) is False
    assert graph_text(traced.gm) == before
