"""Moving digits: videos in which one real 8x8 scan moves over a black canvas and bounces off its edges.

The scans are those of `examples.digits.data`, with its split, so that a held-out video shows a digit never trained on.
Source of the idea: Moving MNIST, arXiv:1502.04681.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from examples.digits.data import IMAGE_SIZE as DIGIT_SIZE
from examples.digits.data import NUM_CLASSES as NUM_CLASSES
from examples.digits.data import load_digits

NUM_FRAMES = 8
FRAME_SIZE = 16
STRIDE = 2  # pixels that a digit moves from a frame to the next, along each axis it moves along
ROOM = FRAME_SIZE - DIGIT_SIZE  # a digit's corner lies in 0..ROOM, at multiples of STRIDE
BLACK = -1.0
DIRECTIONS = torch.tensor([(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)])


@dataclass(frozen=True, kw_only=True)
class Videos:
    """Videos [N, 1, 8, 16, 16] float32 in [-1, 1], the digit in each [N] int64 in 0..9, and its motion [N, 2] int64.

    The motion is 1 where the digit moves along (y, x) and 0 where it does not, never both 0; its direction turns.
    """

    videos: Tensor
    labels: Tensor
    motions: Tensor


def make_videos(num: int, *, generator: Generator, split: Literal["train", "held out"] = "train") -> Videos:
    """Draw videos, each of a scan, a place and one of eight directions, all evenly.

    The same generator state gives the same videos.
    Raises: ValueError if `num` is not positive, or the split has another name.
    Memory: 8 KiB a video.
    """
    if num < 1:
        raise ValueError(f"make_videos: num must be >= 1, got {num!r}.")
    if split not in ("train", "held out"):
        raise ValueError(f"make_videos: split must be 'train' or 'held out', got {split!r}.")
    digits = load_digits()[0 if split == "train" else 1]
    chosen = torch.randint(len(digits.labels), (num,), generator=generator)
    starts_N2 = STRIDE * torch.randint(ROOM // STRIDE + 1, (num, 2), generator=generator)
    directions_N2 = DIRECTIONS[torch.randint(len(DIRECTIONS), (num,), generator=generator)]
    paths_NF2 = starts_N2[:, None] + STRIDE * directions_N2[:, None] * torch.arange(NUM_FRAMES)[None, :, None]
    corners_NF2 = bounce(paths_NF2)
    videos = torch.full((num, 1, NUM_FRAMES, FRAME_SIZE, FRAME_SIZE), BLACK)
    pixels = torch.arange(DIGIT_SIZE)
    rows = (corners_NF2[..., 0, None] + pixels)[:, :, :, None]  # [N, F, 8, 1]
    columns = (corners_NF2[..., 1, None] + pixels)[:, :, None, :]
    index_N, index_F = torch.arange(num)[:, None, None, None], torch.arange(NUM_FRAMES)[None, :, None, None]
    videos[index_N, 0, index_F, rows, columns] = digits.images[chosen].expand(-1, NUM_FRAMES, -1, -1)
    return Videos(videos=videos, labels=digits.labels[chosen], motions=directions_N2.abs())


def bounce(places: Tensor) -> Tensor:
    """Fold places on an endless line into 0..ROOM, as a ball between two walls moves. Integers, any shape."""
    return ROOM - (places.remainder(2 * ROOM) - ROOM).abs()
