"""Where samples differ: trails of latents, and bands of frequency."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omnifx.comparing import Trail, bands, compare, drift, features_of, frechet, watched
from omnifx.errors import ConfigError


def wave(cycles: int, amplitude: float, size: int = 16) -> Tensor:
    """An image [1, 1, H, W] of one horizontal frequency, with a mean."""
    x = torch.arange(size) / size
    return (amplitude * torch.cos(2 * torch.pi * cycles * x)).expand(1, 1, size, size)


def test_an_error_lies_in_the_band_of_its_frequency() -> None:
    reference = sum((wave(k, 1.0) for k in range(8)), torch.zeros(1, 1, 16, 16))
    error = wave(5, 0.1)  # 5 of 8 cycles: band 5 of 8

    found = bands(reference + error, reference)

    assert len(found) == 8
    assert found[5] == pytest.approx(0.1, rel=1e-4)
    assert max(found[:5] + found[6:]) < 1e-5


def test_small_images_have_fewer_bands_and_videos_count_frame_by_frame() -> None:
    torch.manual_seed(0)
    video = torch.randn(2, 3, 4, 8, 6)
    noisy = video + 0.1 * torch.randn_like(video)

    found = bands(noisy, video)

    assert len(found) == 3
    assert all(0.05 < band < 0.2 for band in found)
    frames = [x.transpose(1, 2).flatten(0, 1) for x in (noisy, video)]
    assert found == pytest.approx(bands(*frames), rel=1e-5)


def test_a_band_without_any_amplitude_is_no_division_by_zero() -> None:
    blank = torch.zeros(1, 1, 8, 8)
    assert bands(blank, blank) == (0.0,) * 4
    assert all(map(math.isfinite, bands(blank + 1, blank)))


class Model(nn.Module):
    """Called with its latents in any place."""

    def forward(self, text: Tensor, latents: Tensor, scale: float = 1.0) -> Tensor:
        return latents * scale + text.sum()


def test_a_trail_holds_the_latents_of_each_step_once() -> None:
    model, text = Model(), torch.zeros(2)
    x = torch.arange(12.0).reshape(1, 3, 2, 2)

    with watched(model) as trail:
        for step in range(3):
            for _ in ("unconditional", "conditional"):  # two streams, the same latents
                model(text, latents=x + step)
    model(text, x)

    assert trail.calls == 6
    assert [float((latents - x).mean()) for latents in trail.latents] == [0.0, 1.0, 2.0]
    assert trail.num_bytes == 3 * 12 * 4
    assert not model._forward_pre_hooks


def test_a_compiled_model_is_watched_from_outside_and_not_compiled_anew() -> None:
    compiled: Any = torch.compile(Model(), backend="eager")
    text, x = torch.zeros(2), torch.zeros(1, 1, 2, 2)
    compiled(text, x)
    with torch.compiler.set_stance("fail_on_recompile"), watched(compiled) as trail:
        compiled(text, x + 1)
    assert [float(latents.mean()) for latents in trail.latents] == [1.0]
    with watched(compiled, keep=False) as counted:
        compiled(text, x)
    assert (counted.calls, counted.latents) == (1, [])


def test_drift_is_relative_and_needs_equal_steps() -> None:
    x = torch.ones(2, 1, 2, 2)
    reference = Trail([x, 2 * x, 4 * x], 3)
    ours = Trail([x, 2.2 * x, 4 * x], 3)

    assert drift([ours], [reference], 8.4 * x, 8 * x) == pytest.approx((0.1, 0.0, 0.05), abs=1e-6)
    images = torch.ones(2, 3, 16, 16)
    assert drift([ours], [reference], images, images) == pytest.approx((0.1, 0.0), abs=1e-6)
    assert drift([Trail([x], 1)], [reference], x, x) == ()


def test_images_videos_and_tiny_images_are_compared() -> None:
    torch.manual_seed(0)
    for shape in ((4, 3, 64, 64), (2, 3, 4, 16, 16), (4, 1, 8, 8), (4, 1, 2, 2)):
        reference = torch.rand(shape)
        found = compare(reference + 0.1, reference, data_range=1.0)
        assert found["psnr"] == pytest.approx(20.0, abs=1e-3)
        assert ("ssim" in found) == (min(shape[-2:]) >= 3)


def test_features_are_checked() -> None:
    samples = torch.rand(4, 1, 2, 2)
    assert frechet(samples, samples, lambda x: x.flatten(1)) == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ConfigError, match=r"must be \[4, D\], got \[16\]"):
        features_of(samples, lambda x: x.flatten())
    with pytest.raises(ConfigError, match="got float"):
        features_of(samples, lambda x: 3.0)
