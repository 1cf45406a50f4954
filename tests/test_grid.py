"""Grids: which axes have frequencies, and the cosine bases that tell them apart."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnifx.grid import Grid, cosine_basis, low_pass, part_index
from omnifx.profile import NUM_BANDS, NUM_HALVES
from tests.toys import noise


@pytest.mark.parametrize(
    ("shape", "frame_axis", "grid"),
    [
        ((2, 4, 8, 6), None, Grid((2, 4, 8, 6), (2, 3))),
        ((1, 4, 3, 8, 8), 2, Grid((1, 4, 3, 8, 8), (2, 3, 4))),
        ((1, 3, 4, 8, 8), 1, Grid((1, 3, 4, 8, 8), (1, 3, 4))),
        ((1, 3, 4, 8, 8), None, Grid((1, 3, 4, 8, 8), (3, 4))),
        ((1, 16, 5), None, Grid((1, 4, 4, 5), (1, 2))),
        ((1, 15, 5), None, Grid((1, 15, 5), ())),
        ((1, 1, 5), None, Grid((1, 1, 5), ())),
        ((7, 9), None, Grid((7, 9), ())),
    ],
)
def test_the_grid_follows_from_the_shape(shape: tuple[int, ...], frame_axis: int | None, grid: Grid) -> None:
    found = Grid.of(shape, frame_axis=frame_axis)

    assert found == grid
    assert found.sizes == tuple(grid.shape[axis] for axis in grid.axes)


@given(size=st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_cosine_bases_are_orthonormal(size: int) -> None:
    basis = cosine_basis(size)

    assert torch.allclose(basis @ basis.T, torch.eye(size), atol=1e-5)


@given(size=st.integers(1, 24), cutoff=st.sampled_from([0.25, 0.5, 0.75, 1.0]))
@settings(max_examples=30, deadline=None)
def test_low_passes_are_projections_that_keep_the_mean(size: int, cutoff: float) -> None:
    matrix = low_pass(size, cutoff)

    assert torch.allclose(matrix @ matrix, matrix, atol=1e-5)
    assert torch.allclose(matrix, matrix.T, atol=1e-6)
    assert torch.allclose(matrix @ torch.ones(size), torch.ones(size), atol=1e-5)
    assert torch.allclose(low_pass(size, 1.0), torch.eye(size), atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 8, 6), (1, 16, 5), (7, 9)])
def test_a_spectrum_keeps_inner_products(shape: tuple[int, ...]) -> None:
    values = noise(4, *shape)
    grid = Grid.of(shape)

    spectrum = grid.spectrum(values.reshape(4, *grid.shape))

    flat = values.reshape(4, -1)
    assert spectrum.shape == flat.shape
    assert torch.allclose(spectrum @ spectrum.T, flat @ flat.T, rtol=1e-4, atol=1e-3)


def test_a_constant_lies_in_the_lowest_band_and_a_checkerboard_in_the_highest() -> None:
    grid = Grid.of((1, 1, 8, 8))
    checkers = (-1.0) ** (torch.arange(8)[:, None] + torch.arange(8))
    bands = part_index(grid) % NUM_BANDS

    def shares(image: torch.Tensor) -> list[float]:
        energy = grid.spectrum(image.reshape(1, 1, 8, 8)) ** 2
        return [float(energy[bands == band].sum() / energy.sum()) for band in range(NUM_BANDS)]

    assert shares(torch.ones(8, 8))[0] == pytest.approx(1.0, abs=1e-5)
    assert shares(checkers)[-1] > 0.9


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (1, 4, 2, 8, 8), (1, 15, 5)])
def test_every_coefficient_has_one_part_and_both_halves_are_used(shape: tuple[int, ...]) -> None:
    grid = Grid.of(shape, frame_axis=2 if len(shape) == 5 else None)

    parts = part_index(grid)

    assert parts.numel() == torch.Size(shape).numel()
    assert 0 <= int(parts.min()) <= int(parts.max()) < NUM_HALVES * NUM_BANDS
    counts = torch.bincount(parts // NUM_BANDS, minlength=NUM_HALVES)
    assert float(counts.min()) >= 0.8 * float(counts.max())
