"""The shape of a trajectory: coordinates from inner products, curvature of circles, lines and degenerate paths."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from omnifx.errors import ConfigError
from omnifx.trajectory import coordinates, curvature

METHODS = ["menger", "fit"]


def embedded(points: Tensor, *, dims: int = 40, seed: int = 0, offset: float = 1.0) -> Tensor:
    """`points` [S, D], turned and moved in a space of `dims` dimensions."""
    generator = Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(dims, points.shape[1], generator=generator, dtype=torch.float64))
    return points.double() @ basis.T + offset * torch.randn(dims, generator=generator, dtype=torch.float64)


def arc(steps: int, *, turn: float = math.pi, radius: float = 1.0) -> Tensor:
    angles = torch.linspace(0, turn, steps, dtype=torch.float64)
    return radius * torch.stack([angles.cos(), angles.sin()], dim=1)


def distances(points: Tensor) -> Tensor:
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")


@given(steps=st.integers(3, 60), seed=st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_a_path_of_three_dimensions_keeps_all_its_distances(steps: int, seed: int) -> None:
    points = torch.randn(steps, 3, generator=Generator().manual_seed(seed), dtype=torch.float64)
    latents = embedded(points, seed=seed)

    found = coordinates(latents @ latents.T)

    torch.testing.assert_close(distances(found), distances(points), atol=1e-6, rtol=1e-6)
    assert found[0].tolist() == [0.0, 0.0, 0.0]


def test_the_first_axis_runs_from_the_start_to_the_end() -> None:
    latents = torch.randn(12, 30, generator=Generator().manual_seed(0), dtype=torch.float64)

    found = coordinates(latents @ latents.T)

    length = torch.linalg.vector_norm(latents[-1] - latents[0])
    torch.testing.assert_close(found[-1], torch.stack([length, length * 0, length * 0]), atol=1e-8, rtol=0)


def test_inner_products_in_float32_are_enough_when_the_path_is_as_long_as_its_points() -> None:
    angles = torch.linspace(0, 1.5, 50, dtype=torch.float64)
    latents = embedded(torch.stack([angles.cos(), angles.sin(), 0.1 * angles**2], dim=1), offset=0.2)
    gram = latents @ latents.T

    exact, rounded = (curvature(coordinates(g)) for g in (gram, gram.float()))

    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.0)


@pytest.mark.parametrize("method", METHODS)
@given(steps=st.integers(8, 60), radius=st.floats(1e-3, 1e3), turn=st.floats(0.5, 2.8))
@settings(max_examples=30, deadline=None)
def test_a_circle_bends_the_same_everywhere(method: str, steps: int, radius: float, turn: float) -> None:
    found = curvature(arc(steps, turn=turn, radius=radius), method=method)

    torch.testing.assert_close(found, torch.full_like(found, turn), rtol=0.05, atol=0.0)


@pytest.mark.parametrize("method", METHODS)
def test_curvature_has_no_unit_and_survives_the_way_through_inner_products(method: str) -> None:
    latents = embedded(arc(30, turn=2.0, radius=7.0))

    found = curvature(coordinates(latents @ latents.T), method=method)

    torch.testing.assert_close(found, torch.full_like(found, 2.0), rtol=0.02, atol=0.0)


@pytest.mark.parametrize("method", METHODS)
def test_a_corner_is_where_the_path_bends_most(method: str) -> None:
    leg = torch.linspace(0, 1, 11, dtype=torch.float64)
    points = torch.cat([torch.stack([leg, leg * 0], 1), torch.stack([leg[1:] * 0 + 1, leg[1:]], 1)])

    found = curvature(points, method=method)

    assert abs(int(found.argmax()) - 10) <= (0 if method == "menger" else 1)
    assert float(found[0]) == float(found[1])
    assert float(found[-1]) == float(found[-2])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 30])
def test_straight_still_and_short_paths_do_not_bend(method: str, steps: int) -> None:
    line = torch.linspace(0, 1, steps, dtype=torch.float64)[:, None] * torch.tensor([1.0, 2.0, 3.0])
    for points in (line, torch.zeros(steps, 3), torch.ones(steps, 3)):
        gram = points.double() @ points.double().T
        assert curvature(points, method=method).tolist() == pytest.approx([0.0] * steps, abs=1e-6)
        found = coordinates(gram)
        assert found.shape == (steps, 3)
        assert torch.isfinite(found).all()
        assert curvature(found, method=method).tolist() == pytest.approx([0.0] * steps, abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_repeated_points_and_closed_paths_stay_finite(method: str) -> None:
    points = arc(20, turn=2 * math.pi).repeat_interleave(2, dim=0)

    found = curvature(coordinates(points @ points.T), method=method)

    assert torch.isfinite(found).all()
    assert (found >= 0).all()


@pytest.mark.parametrize("shape", [(3,), (3, 4), (0, 0)])
def test_what_is_no_gram_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="expected \\[S, S\\] with S >= 1"):
        coordinates(torch.zeros(shape))


def test_wrong_arguments_of_curvature_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected \[S, 2\] or \[S, 3\]"):
        curvature(torch.zeros(5, 7))
    with pytest.raises(ConfigError, match=r"one of \['menger', 'fit'\], got 'spline'"):
        curvature(torch.zeros(5, 3), method="spline")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="odd number of points >= 3, got 4"):
        curvature(torch.zeros(5, 3), window=4)
