"""Judge samples of the moving digits model: against the uncached run, and against real videos.

PSNR ranks. Frechet distance and class consistency are guards against broken settings, and so are the two figures of
motion: a sampler may keep each frame and still lose what happens between them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from examples.moving_digits.data import BLACK, STRIDE
from examples.moving_digits.models import VideoClassifier
from omnifx.metrics import frechet_distance, psnr, ssim
from omnifx.video_metrics import change_psnr, flickering, frame_psnr, frames_of

FAINT = 0.2
"""Ink that a sampler may leave on a black canvas."""


@dataclass(frozen=True, kw_only=True)
class VideoQualityRow:
    """One row of a quality table."""

    psnr: float  # dB, mean over samples
    psnr_p10: float  # dB, 10th percentile: one sample in ten is worse
    worst_frame: float  # dB, PSNR of each sample's worst frame, mean over samples
    ssim: float  # at most 1, mean over frames
    change_psnr: float  # dB, of the changes from frame to frame, mean over samples
    flickering: float  # mean absolute change from frame to frame, over that of the uncached samples; 1 is as much
    frechet: float  # in classifier features, against real videos; lower is better
    consistency: float  # share of samples that the classifier takes for their label


@torch.no_grad()
def class_consistency(samples: Tensor, labels: Tensor, classifier: VideoClassifier) -> float:
    """Share of samples [B, 1, 8, 16, 16] that the classifier takes for their label [B], in 0..1."""
    return float((classifier(samples).argmax(dim=1) == labels).double().mean())


@torch.no_grad()
def frechet(samples: Tensor, reference: Tensor, classifier: VideoClassifier) -> float:
    """Frechet distance of two sets of videos [N, 1, 8, 16, 16] and [M, 1, 8, 16, 16] in the classifier's 32 features.

    Both sets need far more than 32 videos, and about the same share of each class.
    """
    return frechet_distance(classifier.features(samples), classifier.features(reference))


def neighbourly_moves(samples: Tensor) -> float:
    """Share of the moves from a frame to the next that a real digit could make, in 0..1; 1 for real videos.

    A frame's digit is taken to be where the centre of its ink lies, in samples [B, 1, 8, 16, 16]. From frame to frame
    a real one goes one stride along one axis or both, and never stays; a move counts if it rounds to such a one.
    """
    ink = samples[:, 0] - BLACK
    ink = ink * (ink > FAINT)
    total = ink.sum(dim=(2, 3)).clamp(min=FAINT)
    places = torch.arange(ink.shape[-1], dtype=ink.dtype)
    centres_BF2 = torch.stack([(ink.sum(3) * places).sum(2) / total, (ink.sum(2) * places).sum(2) / total], dim=2)
    moves = (centres_BF2.diff(dim=1) / STRIDE).round().abs().amax(dim=2)
    return float((moves == 1).double().mean())


def evaluate(
    samples: Tensor, reference_samples: Tensor, labels: Tensor, classifier: VideoClassifier, real: Tensor
) -> VideoQualityRow:
    """Compare samples with the uncached samples of the same seeds and labels, and with real videos.

    Args:
        samples: [B, 1, 8, 16, 16] in [-1, 1].
        reference_samples: Same shape, from the uncached run.
        labels: [B] int64, what was asked for.
        classifier: What `load_classifier` gives.
        real: Real videos [N, 1, 8, 16, 16], such as held-out ones of `make_videos`.
    """
    per_sample = psnr(samples, reference_samples)
    return VideoQualityRow(
        psnr=float(per_sample.mean()),
        psnr_p10=float(torch.quantile(per_sample, 0.1, interpolation="lower")),  # lower: no inf - inf
        worst_frame=float(frame_psnr(samples, reference_samples).amin(dim=1).mean()),
        ssim=ssim(frames_of(samples), frames_of(reference_samples)),
        change_psnr=float(change_psnr(samples, reference_samples).mean()),
        flickering=float(flickering(samples).mean() / flickering(reference_samples).mean()),
        frechet=frechet(samples, real, classifier),
        consistency=class_consistency(samples, labels, classifier),
    )
