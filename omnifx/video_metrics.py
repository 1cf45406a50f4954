"""How far videos are from the uncached run's: frame by frame, and in what changes between frames.

A video may keep each frame and still flicker, so a figure for frames stands beside one for changes. Neither needs
optical flow or a trained network. Videos are [B, C, T, H, W], as the transformers and decoders of diffusers have them.
"""

import torch
from torch import Tensor

from omnifx.errors import ConfigError
from omnifx.metrics import check_pair, psnr


def frames_of(videos: Tensor) -> Tensor:
    """Fold the frames of videos [B, C, T, H, W] into the batch: [B * T, C, H, W], frames of a video side by side.

    Metrics of images, such as `omnifx.metrics.ssim`, take what this returns.
    Raises: ConfigError if `videos` has other than five dimensions.
    """
    _check_videos("frames_of", videos, least_frames=1)
    return videos.transpose(1, 2).flatten(0, 1)


def frame_psnr(samples: Tensor, reference: Tensor, *, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio of each frame against its reference.

    Args:
        samples: [B, C, T, H, W], any floating dtype; computed in float64.
        reference: Same shape: the uncached samples of the same seeds.
        data_range: Largest possible value minus the smallest; 2 for videos in [-1, 1].

    Returns: [B, T] float64, in dB; infinite where a frame equals its reference. The least over T is the worst frame.
    Raises: ConfigError if the shapes differ or are not five-dimensional, or `data_range` is not positive.
    """
    check_pair("frame_psnr", samples, reference, data_range)
    batch, _, frames, _, _ = _check_videos("frame_psnr", samples, least_frames=1)
    return psnr(frames_of(samples), frames_of(reference), data_range=data_range).reshape(batch, frames)


def change_psnr(samples: Tensor, reference: Tensor, *, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio of the changes from frame to frame against those of the reference: is the motion kept?

    An error that stays the same from frame to frame does not count, however large. Errors that know nothing of each
    other give 3 dB less than `psnr`; flicker, whose sign turns with each frame, gives 6 dB less.

    Args:
        samples: [B, C, T, H, W], T >= 2, any floating dtype; computed in float64.
        reference: Same shape: the uncached samples of the same seeds.
        data_range: Largest possible value (not change) minus the smallest; 2 for videos in [-1, 1].

    Returns: [B] float64, in dB; infinite where all changes are those of the reference.
    Raises: ConfigError if the shapes differ, are not five-dimensional or have one frame, or `data_range` is not
        positive.
    Source: dtSSD, the root mean square of the same difference of changes, is what video matting reports: Erofeev et al.
        2015, doi:10.5244/C.29.99. Here it is taken over the whole video and in dB, so that it reads beside PSNR.
    """
    check_pair("change_psnr", samples, reference, data_range)
    _check_videos("change_psnr", samples, least_frames=2)
    return psnr(samples.double().diff(dim=2), reference.double().diff(dim=2), data_range=data_range)


def flickering(videos: Tensor) -> Tensor:
    """Mean absolute change from a frame to the next; needs no reference.

    It does not tell motion from flicker, so compare it with the figure of the uncached samples of the same seeds: more
    is flicker, less is motion lost.

    Args:
        videos: [B, C, T, H, W], T >= 2, any floating dtype; computed in float64.

    Returns: [B] float64, in units of the videos; 0 for a still picture.
    Raises: ConfigError if `videos` has other than five dimensions, or one frame.
    Source: the temporal flickering of VBench, arXiv:2311.17982, which reports (255 - this) / 255 on 8-bit frames.
    """
    _check_videos("flickering", videos, least_frames=2)
    return videos.double().diff(dim=2).abs().flatten(1).mean(dim=1)


def _check_videos(who: str, videos: Tensor, *, least_frames: int) -> torch.Size:
    if videos.ndim != 5 or videos.shape[2] < least_frames or videos.numel() == 0:
        frames = "" if least_frames == 1 else f" with T >= {least_frames}"
        raise ConfigError(
            f"{who}: expected videos [B, C, T, H, W]{frames}, got shape {list(videos.shape)}. Pipelines of diffusers "
            "return [B, T, C, H, W] with output_type='pt': transpose dimensions 1 and 2."
        )
    return videos.shape
