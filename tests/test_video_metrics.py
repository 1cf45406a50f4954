import math

import pytest
import torch

from omnifx.errors import ConfigError
from omnifx.metrics import psnr, ssim
from omnifx.video_metrics import change_psnr, flickering, frame_psnr, frames_of


def videos(batch=3, channels=2, frames=4, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, channels, frames, size, size, generator=generator) * 2 - 1


def test_frames_of_lays_the_frames_of_a_video_side_by_side():
    video = videos()

    frames = frames_of(video)

    assert frames.shape == (12, 2, 8, 8)
    assert frames[5].equal(video[1, :, 1])
    assert ssim(frames, frames) == pytest.approx(1.0)


def test_frame_psnr_finds_the_one_frame_that_is_wrong():
    reference = videos()
    samples = reference.clone()
    samples[1, :, 2] += 0.2

    measured = frame_psnr(samples, reference)

    assert measured.shape == (3, 4)
    assert measured[1, 2].item() == pytest.approx(20.0, abs=1e-4)
    assert measured.isinf().sum() == 11


def test_frame_psnr_of_equally_wrong_frames_is_psnr():
    reference = videos()
    signs = torch.ones_like(reference)
    signs[..., ::2] = -1

    measured = frame_psnr(reference + 0.02 * signs, reference)

    assert measured.flatten().tolist() == pytest.approx([40.0] * 12, abs=1e-4)


def test_an_error_that_does_not_change_leaves_the_changes_as_they_were():
    reference = videos().double()

    measured = change_psnr(reference + 0.5, reference)

    assert psnr(reference + 0.5, reference).max() < 13
    assert measured.min() > 290


def test_flicker_costs_the_changes_six_db_more_than_the_frames():
    reference = videos(frames=9)
    flicker = 0.02 * (-1.0) ** torch.arange(9)[None, None, :, None, None]

    assert psnr(reference + flicker, reference).tolist() == pytest.approx([40.0] * 3, abs=1e-3)
    assert change_psnr(reference + flicker, reference).tolist() == pytest.approx(
        [40 - 20 * math.log10(2)] * 3, abs=1e-3
    )


def test_noise_costs_the_changes_three_db_more_than_the_frames():
    reference = videos(frames=33, size=32)
    noise = 0.02 * torch.randn(reference.shape, generator=torch.Generator().manual_seed(1))

    lost = psnr(reference + noise, reference) - change_psnr(reference + noise, reference)

    assert lost.tolist() == pytest.approx([10 * math.log10(2)] * 3, abs=0.1)


def test_the_units_of_the_data_do_not_matter():
    samples, reference = videos(seed=0).double(), videos(seed=1).double()

    for metric in (frame_psnr, change_psnr):
        torch.testing.assert_close(
            metric(127.5 * samples, 127.5 * reference, data_range=255), metric(samples, reference)
        )


def test_flickering_is_the_mean_absolute_change():
    still = videos(frames=1).expand(-1, -1, 5, -1, -1)
    steady = still + 0.25 * torch.arange(5)[None, None, :, None, None]

    assert flickering(still).tolist() == [0.0] * 3
    assert flickering(steady).tolist() == pytest.approx([0.25] * 3, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frames_of(videos()[0]), r"frames_of: expected videos \[B, C, T, H, W\], got shape \[2, 4, 8, 8\]"),
        (lambda: frame_psnr(videos(3), videos(2)), r"frame_psnr: .*same shape"),
        (lambda: frame_psnr(videos()[0], videos()[0]), r"frame_psnr: expected videos"),
        (lambda: frame_psnr(videos(), videos(), data_range=-1), r"frame_psnr: data_range must be > 0"),
        (lambda: change_psnr(videos(frames=1), videos(frames=1)), r"T >= 2, got shape \[3, 2, 1, 8, 8\].*transpose"),
        (lambda: change_psnr(videos(3), videos(2)), r"change_psnr: .*same shape"),
        (lambda: flickering(videos(frames=1)), r"flickering: .* with T >= 2"),
        (lambda: flickering(videos(batch=0)), r"flickering: expected videos"),
    ],
)
def test_what_is_no_pair_of_videos_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
