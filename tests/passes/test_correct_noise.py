"""CorrectNoise: y - F(gamma q) at the output of a reuse graph."""

import pytest
import torch

from omnifx.errors import PassError
from omnifx.graph import EXTRA_INPUTS, branches_of, clone, graph_text
from omnifx.grid import Grid, low_pass
from omnifx.passes.correct_noise import CorrectNoise
from omnifx.passes.read_cuts import ReadCuts
from tests.toys import gated, noise, toy, toy_inputs, trace

NO_GRID = ((0, Grid((1, 4, 8), ())),)
TOY_GRID = Grid((1, 4, 8, 8), (2, 3))


def corrected_toy(
    coefficients: tuple[float, float], q: torch.Tensor, cutoff: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The toy's output without and with the correction."""
    traced = trace(toy(1), *toy_inputs())
    copy = clone(traced.gm)
    CorrectNoise(branches=tuple(branches_of(copy)), grids=((0, TOY_GRID),))(copy)
    assert copy.meta[EXTRA_INPUTS] == ["coefficients", "noise:0", "low_pass:8", "low_pass:8"]
    matrix = low_pass(8, cutoff)
    return traced.run()[0], traced.run(copy, [torch.tensor(coefficients), q, matrix, matrix])[0]


def test_the_noise_is_subtracted_at_the_output() -> None:
    traced = gated()
    before = graph_text(traced.gm)

    changed = CorrectNoise(branches=("branch.mlp",), grids=NO_GRID)(traced.gm)

    assert changed is True
    assert graph_text(traced.gm) == before.replace("arg4_1 | ", "arg4_1 | noise_coefficients | noise_0 | ", 1).replace(
        "return(unsqueeze_3)",
        "select_2 = select(noise_coefficients) | mul_1 = mul(select_2, noise_0) | sub = sub(unsqueeze_3, "
        "mul_1) | return(sub)",
    )


def test_zero_coefficients_leave_every_bit() -> None:
    plain, corrected = corrected_toy((0.0, 0.0), noise(1, 4, 8, 8, seed=5), 0.5)

    assert torch.equal(corrected, plain)


@pytest.mark.parametrize("cutoff", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("part", ["all", "low", "high"])
def test_each_part_of_the_spectrum_can_be_subtracted(part: str, cutoff: float) -> None:
    q, gamma = noise(1, 4, 8, 8, seed=5), 0.7
    pair = {"all": (gamma, 0.0), "low": (0.0, gamma), "high": (gamma, -gamma)}[part]

    plain, corrected = corrected_toy(pair, q, cutoff)

    keep = torch.zeros(8, 8)
    keep[: int(8 * cutoff), : int(8 * cutoff)] = 1.0
    spectrum = TOY_GRID.spectrum(q).reshape(4, 8, 8)
    expected = {"all": spectrum, "low": spectrum * keep, "high": spectrum * (1 - keep)}[part]
    removed = TOY_GRID.spectrum(plain - corrected).reshape(4, 8, 8)
    assert torch.allclose(removed, gamma * expected, atol=2e-5)


def test_after_the_cuts_are_gone_it_is_refused() -> None:
    traced = gated()
    ReadCuts(branches=("branch.mlp",))(traced.gm)

    with pytest.raises(PassError, match="the cuts were already replaced; run it before ReadCuts"):
        CorrectNoise(branches=("branch.mlp",), grids=NO_GRID)(traced.gm)


def test_without_branches_nothing_changes() -> None:
    traced = gated()
    copy = clone(traced.gm)

    assert CorrectNoise(branches=(), grids=NO_GRID)(copy) is False
    assert graph_text(copy) == graph_text(traced.gm)
