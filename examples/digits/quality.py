"""Judge samples of the digits models: against the uncached run (PSNR, SSIM), and against the real digits.

PSNR ranks. Frechet distance and class consistency are guards against broken settings: the first spreads by about .4
over seeds at 200 samples, the second saturates near 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from examples.digits.models import Classifier
from omnifx.metrics import frechet_distance, psnr, ssim


@dataclass(frozen=True, kw_only=True)
class QualityRow:
    """One row of a quality table."""

    psnr: float  # dB, mean over samples
    psnr_p10: float  # dB, 10th percentile: one sample in ten is worse
    ssim: float  # at most 1
    frechet: float  # in classifier features, against real digits; lower is better
    consistency: float  # share of samples that the classifier takes for their label


@torch.no_grad()
def class_consistency(samples: Tensor, labels: Tensor, classifier: Classifier) -> float:
    """Share of samples [B, 1, 8, 8] that the classifier takes for their label [B], in 0..1."""
    return float((classifier(samples).argmax(dim=1) == labels).double().mean())


@torch.no_grad()
def frechet(samples: Tensor, reference: Tensor, classifier: Classifier) -> float:
    """Frechet distance of two sets of images [N, 1, 8, 8] and [M, 1, 8, 8] in the classifier's 32 features.

    Both sets need far more than 32 images, and about the same share of each class.
    """
    return frechet_distance(classifier.features(samples), classifier.features(reference))


def evaluate(
    samples: Tensor, reference_samples: Tensor, labels: Tensor, classifier: Classifier, real: Tensor
) -> QualityRow:
    """Compare samples with the uncached samples of the same seeds and labels, and with real digits.

    Args:
        samples: [B, 1, 8, 8] in [-1, 1].
        reference_samples: Same shape, from the uncached run.
        labels: [B] int64, what was asked for.
        classifier: What `load_classifier` gives.
        real: Real digits [N, 1, 8, 8], such as the 500 held-out ones.
    """
    per_sample = psnr(samples, reference_samples)
    return QualityRow(
        psnr=float(per_sample.mean()),
        psnr_p10=float(torch.quantile(per_sample, 0.1, interpolation="lower")),  # lower: no inf - inf
        ssim=ssim(samples, reference_samples),
        frechet=frechet(samples, real, classifier),
        consistency=class_consistency(samples, labels, classifier),
    )
