"""The shape of a sampling trajectory: its path in three dimensions, and how sharply the path turns at each step.

A sampler's latents x_0 .. x_{S-1} run almost straight from noise to data, and what bends does so in very few
directions, in much the same way for every seed and prompt. So three coordinates describe the path: along the line from
its start to its end, and along the two directions in which it leaves that line most. All of it follows from the inner
products of the latents; no vector is needed.

Source: OmniCache, arXiv:2508.16212, section 3.2: the subspace (u, w1, w2) and the curvature of the path in it. The
windowed fit in arc length follows the analysis of sampling trajectories in github.com/zju-pi/diff-sampler.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from omnifx.errors import ConfigError

CurvatureMethod = Literal["menger", "fit"]

_TINY = 1e-9  # shares of the length below this are rounding, not movement
_FIT_ORDER = 3


def coordinates(gram_x: Tensor) -> Tensor:
    """Coordinates of a trajectory in the subspace (u, w1, w2), from the inner products of its points.

    u is the unit vector from the first point to the last; w1 and w2 are the first two principal components of what is
    left of the path in the orthogonal complement of u. The signs of w1 and w2 are fixed by their largest coordinate,
    which is positive. Inner products in float32 are precise enough for paths about as long as their points, as those of
    samplers are (the digits models: the same curvature as from float64, to three digits).

    Args:
        gram_x: [S, S], entry (i, j) is <x_i, x_j>, symmetric; S >= 1.

    Returns: [S, 3], float64, in the units of x; the first point is the origin. A coordinate whose direction does not
        exist (a closed path has no u, a straight one no w1) is 0 everywhere.
    Raises: ConfigError if `gram_x` is not a square matrix.
    """
    if gram_x.ndim != 2 or gram_x.shape[0] != gram_x.shape[1] or not gram_x.shape[0]:
        raise ConfigError(f"coordinates: gram_x has shape {tuple(gram_x.shape)}, expected [S, S] with S >= 1.")
    gram = gram_x.double()
    gram = (gram + gram.T) / 2
    start = gram - gram[:1] - gram[:, :1] + gram[0, 0]  # <x_i - x_0, x_j - x_0>
    scale = gram.diagonal().abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    points = torch.zeros(len(gram), 3, dtype=torch.float64)

    length = start[-1, -1].clamp_min(0.0).sqrt()
    if length > _TINY * scale.sqrt():
        points[:, 0] = start[:, -1] / length
    rest = start - torch.outer(points[:, 0], points[:, 0])
    rest = rest - rest.mean(0, keepdim=True)
    rest = rest - rest.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh((rest + rest.T) / 2)
    for axis, rank in ((1, -1), (2, -2)):
        if len(gram) >= -rank and values[rank] > (_TINY * scale.sqrt()) ** 2:
            along = values[rank].sqrt() * vectors[:, rank]
            points[:, axis] = along * torch.sign(along[along.abs().argmax()])
    return points - points[:1]


def curvature(points: Tensor, *, method: CurvatureMethod = "menger", window: int = 5) -> Tensor:
    """How sharply a path turns at each of its points, times the length of the whole path.

    The product has no unit, so it compares between models, samplers and step counts: a straight path has 0 everywhere,
    a full circle 2 pi.

    Args:
        points: [S, D], D of 2 or 3, the path in order.
        method: "menger": one over the radius of the circle through three successive points. "fit":
            |r' x r''| / |r'|^3 of a Taylor polynomial of third order in arc length, fitted by least squares to the
            `window` points around each point; smoother, but blind to turns shorter than the window.
        window: For "fit", number of points, odd, >= 3; shrinks to the number there are.

    Returns: [S], float64, >= 0. Points with too few neighbours on one side (the ends) take the value of the nearest
        point that has them. 0 everywhere when S < 3, and where the path stands still or runs back to where it was.
    Raises: ConfigError if an argument is out of its range.
    """
    if points.ndim != 2 or points.shape[1] not in (2, 3):
        raise ConfigError(f"curvature: points have shape {tuple(points.shape)}, expected [S, 2] or [S, 3].")
    if method not in get_args(CurvatureMethod):
        raise ConfigError(f"curvature: method must be one of {list(get_args(CurvatureMethod))}, got {method!r}.")
    if window < 3 or window % 2 != 1:
        raise ConfigError(f"curvature: window must be an odd number of points >= 3, got {window!r}.")
    path = torch.zeros(len(points), 3, dtype=torch.float64)
    path[:, : points.shape[1]] = points.double()
    arc = torch.linalg.vector_norm(path.diff(dim=0), dim=1)
    length = float(arc.sum())
    if len(path) < 3 or length <= 0.0:
        return torch.zeros(len(path), dtype=torch.float64)
    path, arc = path / length, arc / length
    inner = _menger(path) if method == "menger" else _fitted(path, arc, min(window, len(path) - (len(path) + 1) % 2))
    missing = (len(path) - len(inner)) // 2
    return torch.cat([inner[:1].expand(missing), inner, inner[-1:].expand(missing)])


def _menger(path: Tensor) -> Tensor:
    before, after, across = path[1:-1] - path[:-2], path[2:] - path[1:-1], path[2:] - path[:-2]
    twice_area = torch.linalg.vector_norm(torch.linalg.cross(before, after), dim=1)
    sides = [torch.linalg.vector_norm(side, dim=1) for side in (before, after, across)]
    still = torch.stack(sides).amin(0) < _TINY
    return torch.where(still, 0.0, 2.0 * twice_area / torch.where(still, 1.0, sides[0] * sides[1] * sides[2]))


def _fitted(path: Tensor, arc: Tensor, window: int) -> Tensor:
    at = torch.cat([arc.new_zeros(1), arc.cumsum(0)])
    half = window // 2
    order = min(_FIT_ORDER, window - 1)
    out = torch.zeros(len(path) - 2 * half, dtype=torch.float64)
    for i in range(len(out)):
        here = slice(i, i + window)
        s = at[here] - at[i + half]
        reach = s.abs().max()
        if reach < _TINY:
            continue
        s = s / reach
        basis = torch.stack([s, s**2 / 2, s**3 / 6][:order], dim=1)
        fit = torch.linalg.lstsq(basis, path[here] - path[i + half], driver="gelsd").solution
        speed = torch.linalg.vector_norm(fit[0])
        if speed > _TINY:
            turn = torch.linalg.vector_norm(torch.linalg.cross(fit[0], fit[1]))
            out[i] = turn / speed**3  # the scale of s cancels
    return out
