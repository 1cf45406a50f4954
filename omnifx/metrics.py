"""How far samples are from the uncached run's, and how far two sets of features are from each other.

PSNR and SSIM compare sample by sample, so both runs need the same seeds. PSNR orders caching methods; the Frechet
distance only catches broken settings, because its spread over seeds is larger than the differences worth ranking.
Report the 10th percentile of PSNR beside its mean: the tail lies several dB below.
"""

import torch
from torch import Tensor

from omnifx.errors import ConfigError


def psnr(samples: Tensor, reference: Tensor, *, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio of each sample against its reference.

    Args:
        samples: [B, ...], any floating dtype; computed in float64.
        reference: Same shape: the uncached samples of the same seeds.
        data_range: Largest possible value minus the smallest; 2 for images in [-1, 1].

    Returns: [B] float64, in dB; infinite where a sample equals its reference.
    Raises: ConfigError if the shapes differ, a sample is empty, or `data_range` is not positive.
    """
    check_pair("psnr", samples, reference, data_range)
    squared_error = (samples.double() - reference.double()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(data_range**2 / squared_error)


def ssim(samples: Tensor, reference: Tensor, *, data_range: float = 2.0, window: int = 5) -> float:
    """Mean structural similarity of samples to their references, with a Gaussian window.

    Args:
        samples: [B, C, H, W], any floating dtype.
        reference: Same shape: the uncached samples of the same seeds.
        data_range: Largest possible value minus the smallest; 2 for images in [-1, 1].
        window: Side of the window in pixels, odd, >= 3, at most min(H, W). The usual 11 suits images of 64 pixels and
            more; on 8x8 it would see little but padding.

    Returns: Mean over the batch, at most 1 (equal images).
    Raises: ConfigError if the shapes differ, are not four-dimensional, or `window` does not fit.
    Source: Wang et al. 2004, doi:10.1109/TIP.2003.819861. The Gaussian's width is in proportion to the window, such
        that window 11 has the 1.5 pixels of that paper.
    """
    check_pair("ssim", samples, reference, data_range)
    if samples.ndim != 4:
        raise ConfigError(
            f"ssim: expected images [B, C, H, W], got shape {list(samples.shape)}. Fold video frames into the "
            "batch: omnifx.video_metrics.frames_of."
        )
    smallest_side = min(samples.shape[-2:])
    if window < 3 or window % 2 == 0 or window > smallest_side:
        raise ConfigError(
            f"ssim: window must be odd, >= 3 and at most {smallest_side} (the smallest side of the images), "
            f"got {window!r}."
        )
    from torchmetrics.functional.image import structural_similarity_index_measure  # takes seconds to import

    similarity = structural_similarity_index_measure(
        samples.double(),
        reference.double(),
        # torchmetrics ignores kernel_size with a Gaussian: the side is 2 * int(3.5 * sigma + 0.5) + 1
        sigma=(window // 2 + 0.25) / 3.5,
        data_range=data_range,
        reduction="none",
    )
    assert isinstance(similarity, Tensor)  # a tuple only with return_full_image
    return float(similarity.mean())


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets of features.

    Args:
        features_a: [N, D], N >= 2; computed in float64.
        features_b: [M, D], M >= 2. N and M well above D, or the covariances are mostly noise.

    Returns: |mean difference|^2 + tr(A + B - 2 sqrt(AB)), in squared feature units; 0 for equal sets.
    Raises: ConfigError if the shapes do not fit, or there is a value that is not finite.
    Memory: a few D x D float64 matrices.
    Source: FID, arXiv:1706.08500. sqrt(AB) has the trace of sqrt(sqrt(A) B sqrt(A)), which is symmetric.
    """
    shapes = f"{list(features_a.shape)} and {list(features_b.shape)}"
    if features_a.ndim != 2 or features_b.ndim != 2 or features_a.shape[1] != features_b.shape[1]:
        raise ConfigError(f"frechet_distance: expected features [N, D] and [M, D], got {shapes}.")
    if len(features_a) < 2 or len(features_b) < 2:
        raise ConfigError(f"frechet_distance: a covariance needs at least 2 samples in each set, got {shapes}.")
    if not (features_a.isfinite().all() and features_b.isfinite().all()):
        raise ConfigError("frechet_distance: a feature is NaN or infinite. Look at the samples it came from.")
    a, b = features_a.double(), features_b.double()
    covariance_a, covariance_b = _covariance(a), _covariance(b)
    root_a = _square_root(covariance_a)
    overlap = torch.linalg.eigvalsh(root_a @ covariance_b @ root_a).clamp(min=0).sqrt().sum()
    means_apart = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    distance = means_apart + covariance_a.trace() + covariance_b.trace() - 2 * overlap
    return max(float(distance), 0.0)  # rounding can leave equal sets a hair below zero


def _covariance(features_ND: Tensor) -> Tensor:
    centred = features_ND - features_ND.mean(dim=0)
    return centred.T @ centred / (len(features_ND) - 1)


def _square_root(symmetric: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def check_pair(who: str, samples: Tensor, reference: Tensor, data_range: float) -> None:
    """Refuse, in the name of `who`, what cannot be compared sample by sample. Raises: ConfigError."""
    if samples.shape != reference.shape:
        raise ConfigError(
            f"{who}: samples and reference must have the same shape, got {list(samples.shape)} and "
            f"{list(reference.shape)}. Generate both with the same seeds."
        )
    if samples.ndim < 2 or samples.numel() == 0:
        raise ConfigError(f"{who}: expected a batch [B, ...] with values in it, got shape {list(samples.shape)}.")
    if not data_range > 0:
        raise ConfigError(f"{who}: data_range must be > 0 (largest minus smallest value), got {data_range!r}.")
