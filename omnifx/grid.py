"""The grid behind an output: along which axes it has frequencies, and the cosine bases that tell them apart."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from omnifx.profile import NUM_BANDS, NUM_HALVES


@dataclass(frozen=True)
class Grid:
    """A view of a tensor in which some axes are spatial (or frames)."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Length of each grid axis."""
        return tuple(self.shape[axis] for axis in self.axes)

    @classmethod
    def of(cls, shape: tuple[int, ...], *, frame_axis: int | None = None) -> Grid:
        """The grid of latents or outputs of `shape`.

        [B, C, H, W] has the axes H and W; [B, C, F, H, W] (or [B, F, C, H, W], as `frame_axis` tells) also F; tokens
        [B, N, C] are taken as a square image where N is a square, as packed latents of square images are; anything else
        has no grid. With dynamic shapes, sizes may be symbolic; that a symbolic N is a square is not known.
        """
        if len(shape) == 4:
            return cls(shape, (2, 3))
        if len(shape) == 5:
            return cls(shape, (*((frame_axis,) if frame_axis is not None else ()), 3, 4))
        if len(shape) == 3 and isinstance(shape[1], int) and math.isqrt(shape[1]) ** 2 == shape[1] and shape[1] > 1:
            side = math.isqrt(shape[1])
            return cls((shape[0], side, side, shape[2]), (1, 2))
        return cls(shape, ())

    def spectrum(self, values: Tensor) -> Tensor:
        """Orthonormal cosine transform along the grid axes. [..., *shape] -> [..., numel], float32."""
        lead = values.shape[: values.dim() - len(self.shape)]
        spectrum = values.float()
        for axis in self.axes:
            where = len(lead) + axis
            basis = cosine_basis(self.shape[axis]).to(values.device)
            spectrum = (spectrum.movedim(where, -1) @ basis.T).movedim(-1, where)
        return spectrum.reshape(*lead, -1)


@functools.lru_cache(maxsize=64)
def cosine_basis(size: int) -> Tensor:
    """Orthonormal DCT-II: [size, size], float32, row u is the basis vector of frequency u."""
    u = torch.arange(size, dtype=torch.float64)[:, None]
    n = torch.arange(size, dtype=torch.float64)[None, :]
    basis = torch.cos(math.pi * (n + 0.5) * u / size) * math.sqrt(2.0 / size)
    basis[0] *= math.sqrt(0.5)
    return basis.float()


@functools.lru_cache(maxsize=256)
def low_pass(size: int, cutoff: float) -> Tensor:
    """Projection onto the cosine frequencies u < cutoff * size: [size, size], float32."""
    basis = cosine_basis(size)[: max(1, math.ceil(cutoff * size - 1e-9))]
    return basis.T @ basis


@functools.lru_cache(maxsize=64)
def part_index(grid: Grid) -> Tensor:
    """For each coefficient of a grid: half * NUM_BANDS + band. [numel], int64.

    Without grid axes everything lies in band 0, and the halves alternate.
    """
    band = torch.zeros(grid.shape, dtype=torch.int64)
    parity = torch.zeros(grid.shape, dtype=torch.int64)
    for axis in grid.axes:
        size = grid.shape[axis]
        index = torch.arange(size).reshape([-1 if a == axis else 1 for a in range(len(grid.shape))])
        band = torch.maximum(band, NUM_BANDS * index // size)
        parity = parity + index
    if not grid.axes:
        parity = torch.arange(band.numel()).reshape(grid.shape)
    return ((parity % NUM_HALVES) * NUM_BANDS + band).reshape(-1)
