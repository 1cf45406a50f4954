"""The digits data: 1797 real 8x8 scans that come inside the scikit-learn wheel, so nothing is downloaded.

Source: sklearn.datasets.load_digits, the test set of the UCI "Optical Recognition of Handwritten Digits" data.
"""

from dataclasses import dataclass
from functools import cache

import torch
from sklearn.datasets import load_digits as load_sklearn_digits
from torch import Tensor

IMAGE_SIZE = 8
NUM_CLASSES = 10
NUM_TRAIN = 1297  # the other 500 are held out
SPLIT_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Images [N, 1, 8, 8] float32 in [-1, 1] (white ink on black), and their classes [N] int64 in 0..9."""

    images: Tensor
    labels: Tensor


@cache
def load_digits() -> tuple[Digits, Digits]:
    """Load the data as (train, held out): 1297 and 500 images, the same split in every process.

    Returns: Two `Digits`; treat them as read-only, they are cached.
    """
    images, classes = load_sklearn_digits(return_X_y=True)
    images_BCHW = torch.from_numpy(images).float().reshape(-1, 1, IMAGE_SIZE, IMAGE_SIZE) / 8 - 1  # ink is 0..16
    labels = torch.from_numpy(classes).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    train, held_out = order[:NUM_TRAIN], order[NUM_TRAIN:]
    return (
        Digits(images=images_BCHW[train], labels=labels[train]),
        Digits(images=images_BCHW[held_out], labels=labels[held_out]),
    )
