"""Scores of tokens and the choice among them, against loops in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omnifx.tokens import Score, Selection, choose, gives_bonus, importance
from tests.reuse import noise

HEADS, WIDTH = 3, 4


def queries_keys_values(batch: int = 2, tokens: int = 6, others: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    return (
        noise(batch, HEADS, tokens, WIDTH, seed=1),
        noise(batch, HEADS, others, WIDTH, seed=2),
        noise(batch, HEADS, others, WIDTH, seed=3),
    )


def scored(score: Score, *, shares: bool = False, others: int = 6, mask: Tensor | None = None) -> Tensor:
    selection = Selection(score=score, staleness=0.0, shares_halves=shares)
    found = importance(selection, *queries_keys_values(others=others), mask, None)
    assert found is not None
    assert found.dtype == torch.float32
    return found


def map_of(sample: int, others: int = 6) -> list[list[float]]:
    """Mean over the heads of softmax(q k / sqrt(width)), entry by entry."""
    query, key, _ = queries_keys_values(others=others)
    rows = []
    for i in range(query.shape[2]):
        row = [0.0] * others
        for head in range(HEADS):
            products = [float(query[sample, head, i] @ key[sample, head, j]) / math.sqrt(WIDTH) for j in range(others)]
            total = sum(map(math.exp, products))
            row = [r + math.exp(p) / total / HEADS for r, p in zip(row, products, strict=True)]
        rows.append(row)
    return rows


def test_attention_received_is_the_column_sum_of_the_mean_map() -> None:
    for sample, got in enumerate(scored("attention")):
        expected = [sum(row[j] for row in map_of(sample)) for j in range(6)]
        assert got.tolist() == pytest.approx(expected, rel=1e-5)


def test_entropy_is_that_of_each_row_of_the_mean_map() -> None:
    for sample, got in enumerate(scored("entropy", others=5)):
        expected = [1 - sum(p * math.log(p + 1e-7) for p in row) for row in map_of(sample, 5)]
        assert got.tolist() == pytest.approx(expected, rel=1e-5)


def test_halves_that_share_have_the_entropy_of_their_mean_map() -> None:
    first, second = (map_of(sample, 5) for sample in (0, 1))
    mean = [[(a + b) / 2 for a, b in zip(x, y, strict=True)] for x, y in zip(first, second, strict=True)]
    expected = [1 - sum(p * math.log(p + 1e-7) for p in row) for row in mean]

    for got in scored("entropy", shares=True, others=5):
        assert got.tolist() == pytest.approx(expected, rel=1e-5)


def test_norms_are_over_the_width_of_each_head() -> None:
    _, key, value = queries_keys_values()
    for got, vectors in ((scored("k-norm"), key), (scored("v-norm"), value)):
        expected = [sum(math.dist(vectors[1, h, j], [0.0] * WIDTH) for h in range(HEADS)) / HEADS for j in range(6)]
        assert got[1].tolist() == pytest.approx(expected, rel=1e-5)
    expected = [sum(1 - math.dist(value[0, h, j], [0.0] * WIDTH) for h in range(HEADS)) for j in range(6)]
    assert scored("kv-norm")[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_masked_keys_receive_nothing() -> None:
    mask = torch.ones(1, 1, 1, 6, dtype=torch.bool)
    mask[..., 2] = False
    summand = torch.zeros(1, 1, 1, 6).masked_fill(~mask, -math.inf)

    assert scored("attention", mask=mask)[:, 2].tolist() == [0.0, 0.0]
    assert torch.equal(scored("attention", mask=mask), scored("attention", mask=summand))


def test_without_a_score_there_is_no_importance() -> None:
    assert importance(Selection(score="none", staleness=0.0), *queries_keys_values(), None, None) is None


def chosen(
    selection: Selection, score: Tensor | None, counts: Tensor, k: int, grid: tuple[int, int] | None
) -> list[set[int]]:
    """Tokens by sample; counts are ages minus stamps."""
    age = torch.tensor(7.0)
    return [set(row.tolist()) for row in choose(selection, score, age - counts, age, k, grid)]


@given(
    seed=st.integers(0, 2**20), k=st.integers(1, 16), bonus=st.sampled_from([0.0, 0.4]), staleness=st.floats(0.0, 0.3)
)
@settings(max_examples=60, deadline=None)
def test_the_k_largest_sums_are_chosen(seed: int, k: int, bonus: float, staleness: float) -> None:
    score, counts = noise(2, 16, seed=seed).abs(), noise(2, 16, seed=seed + 1).abs().mul(3).floor()
    selection = Selection(score="k-norm", staleness=staleness, bonus=bonus, window=2)

    got = chosen(selection, score, counts, k, (2, 8))

    for sample in range(2):
        norm = math.sqrt(sum(float(s) ** 2 for s in score[sample]))
        total = [float(s) / norm + staleness * float(c) for s, c in zip(score[sample], counts[sample], strict=True)]
        for first in (0, 2, 4, 6) if bonus else ():
            window = [first, first + 1, first + 8, first + 9]
            best = max(window, key=lambda token: total[token])
            total[best] *= 1 + bonus
        worst_in = min(total[token] for token in got[sample])
        best_out = max((total[token] for token in range(16) if token not in got[sample]), default=-math.inf)
        assert len(got[sample]) == k
        assert worst_in >= best_out - 1e-5


def test_halves_that_share_compute_the_same_tokens() -> None:
    score = noise(4, 16).abs()

    alone = chosen(Selection(score="k-norm", staleness=0.0), score, torch.zeros(4, 16), 4, None)
    shared = chosen(Selection(score="k-norm", staleness=0.0, shares_halves=True), score, torch.zeros(4, 16), 4, None)

    assert shared[:2] == shared[2:]
    assert alone[:2] != alone[2:]


def test_without_a_score_the_oldest_are_chosen() -> None:
    counts = torch.tensor([[0.0, 3.0, 1.0, 2.0]])

    assert chosen(Selection(score="none", staleness=0.1), None, counts, 2, None) == [{1, 3}]


@pytest.mark.parametrize(("grid", "expected"), [((4, 4), True), ((4, 6), True), ((5, 4), False), (None, False)])
def test_a_bonus_needs_windows_that_divide_the_grid(grid: tuple[int, int] | None, expected: bool) -> None:
    assert gives_bonus(Selection(score="none", staleness=0.1, bonus=0.5, window=2), grid) is expected
