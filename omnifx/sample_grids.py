"""Samples as pictures: a strip of images or of frames for each way, and its difference from the uncached ones.

All differences of a case are multiplied by one factor, so that ways can be compared by eye.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib.image
import torch
from torch import Tensor
from torch.nn import functional

from omnifx.errors import ResultsError
from omnifx.results import Case, Row
from omnifx.verdicts import uncached_of

IMAGES = 8
"""Samples shown of each way."""
VIDEOS, FRAMES = 3, 8
LARGEST = 192
"""Pixels of a side: larger samples are shown reduced."""
FACTORS = (1, 2, 5, 10, 20, 50, 100, 200)

_RED, _BLUE = (0.84, 0.20, 0.16), (0.13, 0.42, 0.86)


@dataclass(frozen=True)
class Strip:
    """One way: its samples in a row (of videos: a row of frames each), and what differs from the uncached ones."""

    row: Row
    samples: Any
    """uint8 [H, W, 4], as all pictures."""
    difference: Any | None
    """None for the uncached samples."""


@dataclass(frozen=True)
class Grid:
    """All ways of a case that kept samples, the uncached one first."""

    strips: tuple[Strip, ...]
    factor: int
    """What differences are multiplied by."""
    side: int
    """Of a sample as shown, in pixels."""
    colour: bool
    """Whether samples have three channels."""
    notes: tuple[str, ...]


def grid_of(case: Case, samples: Mapping[str, Tensor]) -> Grid | None:
    """The pictures of a case; None without samples of the uncached run.

    Args:
        case: Its rows say which samples are theirs.
        samples: [N, C, H, W] or [N, C, T, H, W] by key.

    Raises: ResultsError if the samples of a row have another shape than the uncached ones, or are no images.
    """
    plain = uncached_of(case)
    first = samples.get(plain.samples or "") if plain is not None else None
    if plain is None or first is None:
        return None
    if first.ndim not in (4, 5) or not first.numel():
        raise ResultsError(
            f"case {case.name}: samples {plain.samples!r} have shape {list(first.shape)}, expected [N, C, H, W] or "
            "[N, C, T, H, W], none of them 0. Measure them anew."
        )
    base = _shown(first)
    shown = [(row, _shown(own)) for row in _in_order(case) if (own := _samples(case, row, samples, first)) is not None]
    differences = [(images - base) * (2 / case.data_range) for _, images in shown]
    factor = factor_of(differences)
    strips = [Strip(plain, _picture(base, case), None)]
    for (row, images), difference in zip(shown, differences, strict=True):
        strips.append(Strip(row, _picture(images, case), _tiled(_signed(difference * factor))))
    return Grid(tuple(strips), factor, max(base.shape[-2:]), base.shape[2] == 3, _notes(first, base))


def factor_of(differences: Iterable[Tensor]) -> int:
    """The largest factor that keeps 99% of the differences of half of the ways within [-1, 1]."""
    large = [torch.quantile(difference.abs().flatten()[:1_000_000], 0.99) for difference in differences]
    if not large:
        return 1
    middle = float(torch.stack(large).median())
    return max((factor for factor in FACTORS if factor * middle <= 1.0), default=1)


def png_of(picture: Any) -> bytes:
    """A picture as a PNG file."""
    written = io.BytesIO()
    matplotlib.image.imsave(written, picture, format="png")
    return written.getvalue()


def data_uri(picture: Any) -> str:
    """A picture as the address of itself, for a page that needs no other file."""
    return f"data:image/png;base64,{base64.b64encode(png_of(picture)).decode('ascii')}"


def _in_order(case: Case) -> list[Row]:
    order = {"ours": 0, "peer": 1, "solver": 2, "policy": 3}
    rows = [row for row in case.rows if row.family != "uncached"]
    return sorted(rows, key=lambda row: (-(row.target or 0.0), order[row.family]))


def _samples(case: Case, row: Row, samples: Mapping[str, Tensor], first: Tensor) -> Tensor | None:
    found = samples.get(row.samples or "")
    if found is not None and found.shape != first.shape:
        raise ResultsError(
            f"case {case.name}: samples {row.samples!r} have shape {list(found.shape)}, the uncached ones "
            f"{list(first.shape)}. Measure both with the same seeds."
        )
    return found


def _picture(images: Tensor, case: Case) -> Any:
    return _tiled(_coloured((images - case.lowest) / case.data_range))


def _shown(samples: Tensor) -> Tensor:
    """The first samples [R, K, C, h, w] in R rows of K: images in one row, videos in a row of frames each."""
    found = samples.detach().float()
    if found.ndim == 4:
        found = found[:IMAGES][None]
    else:
        at = torch.linspace(0, found.shape[2] - 1, min(FRAMES, found.shape[2])).round().long()
        found = found[:VIDEOS].index_select(2, at).transpose(1, 2)
    found = found[:, :, :3] if found.shape[2] >= 3 else found[:, :, :1]
    height, width = found.shape[-2:]
    if max(height, width) <= LARGEST:
        return found
    ratio = LARGEST / max(height, width)
    size = (max(1, round(height * ratio)), max(1, round(width * ratio)))
    reduced: Tensor = functional.interpolate(found.flatten(0, 1), size=size, mode="area")
    return reduced.view(*found.shape[:3], *size)


def _notes(samples: Tensor, shown: Tensor) -> tuple[str, ...]:
    notes = [f"The first {min(IMAGES, len(samples))} of {len(samples)} samples, on the same seeds for every way."]
    if samples.ndim == 5:
        frames = f"{shown.shape[1]} of {samples.shape[2]} frames, evenly spaced"
        notes = [f"The first {shown.shape[0]} of {len(samples)} videos, one in a row: {frames}."]
    if samples.shape[1] not in (1, 3):
        notes.append(f"Of {samples.shape[1]} channels, the first {shown.shape[2]} are shown.")
    if shown.shape[-2:] != samples.shape[-2:]:
        notes.append(f"Reduced from {samples.shape[-1]}x{samples.shape[-2]} to {shown.shape[-1]}x{shown.shape[-2]}.")
    return tuple(notes)


def _coloured(images: Tensor) -> Tensor:
    """Images in [0, 1], [R, K, C, h, w], as opaque RGBA [R, K, 4, h, w]."""
    images = images.nan_to_num().clamp(0, 1)
    images = images.expand(-1, -1, 3, -1, -1) if images.shape[2] == 1 else images
    return torch.cat([images, torch.ones_like(images[:, :, :1])], dim=2)


def _signed(differences: Tensor) -> Tensor:
    """Differences in [-1, 1] as RGBA: grey images in red and blue that fade where they are equal, on any background;
    colours around a middle grey."""
    differences = differences.nan_to_num(1.0).clamp(-1, 1)
    if differences.shape[2] == 3:
        return _coloured(0.5 + differences / 2)
    red, blue = (torch.tensor(colour).view(1, 1, 3, 1, 1) for colour in (_RED, _BLUE))
    colours = torch.where(differences > 0, red, blue)
    return torch.cat([colours, differences.abs()], dim=2)


def _tiled(images: Tensor) -> Any:
    """RGBA [R, K, 4, h, w] in [0, 1] as one picture, uint8 [H, W, 4], with clear gaps."""
    rows, columns, channels, height, width = images.shape
    gap = max(1, height // 24)
    out = images.new_zeros(channels, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for r in range(rows):
        for k in range(columns):
            y, x = r * (height + gap), k * (width + gap)
            out[:, y : y + height, x : x + width] = images[r, k]
    return (out * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
