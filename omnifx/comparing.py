"""Where samples differ from the uncached ones: in which steps of the trajectory, and in which spatial frequencies.

A trail is what a model was called with, step by step; two trails of the same seeds tell how far one way to sample has
drifted from another.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from omnifx.errors import ConfigError
from omnifx.metrics import frechet_distance, psnr, ssim

NUM_BANDS = 8
TRAIL_BYTES = 256 * 2**20
"""Most bytes of the latents that are kept to compare with, on the host."""


@dataclass
class Trail:
    """What a model was called with in one generation."""

    latents: list[Tensor] = field(default_factory=list)
    """Of each step, float32 on the host; calls of one step that share latents (streams of guidance) count once."""
    calls: int = 0

    @property
    def num_bytes(self) -> int:
        """What it holds."""
        return sum(latents.numel() * latents.element_size() for latents in self.latents)


@contextlib.contextmanager
def watched(model: nn.Module, *, keep: bool = True) -> Iterator[Trail]:
    """Follow the calls of a model, compiled or not, from outside of its graph.

    Args:
        model: What is called.
        keep: Whether to keep the latents; else the calls are only counted.
    """
    trail = Trail()
    signature = inspect.signature(getattr(model, "_orig_mod", model).forward)

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trail.calls += 1
        if keep and (latents := _latents_of(signature, args, kwargs)) is not None:
            now = latents.detach().to("cpu", torch.float32, copy=True)
            last = trail.latents[-1] if trail.latents else None
            if last is None or last.shape != now.shape or not last.equal(now):
                trail.latents.append(now)

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield trail
    finally:
        handle.remove()


def drift(
    trails: Sequence[Trail], reference: Sequence[Trail], samples: Tensor, reference_samples: Tensor
) -> tuple[float, ...]:
    """How far the latents after each step are from the uncached ones, over the norm of these.

    Args:
        trails: One for each generation.
        reference: The uncached ones of the same seeds.
        samples: Of these generations, [N, C, (T,) H, W]; where latents have this shape, they are those after the last
            step, and otherwise nothing is told of it.
        reference_samples: The uncached ones.

    Returns: One number a step, no unit, 0 for equal latents; none at all if steps or shapes differ.
    """
    pairs = list(zip(trails, reference, strict=True))
    shapes = [([x.shape for x in a.latents], [x.shape for x in b.latents]) for a, b in pairs]
    if not pairs or any(ours != theirs or ours != shapes[0][0] for ours, theirs in shapes):
        return ()
    steps = [[(a.latents[k], b.latents[k]) for a, b in pairs] for k in range(1, len(pairs[0][0].latents))]
    if samples.shape[1:] == pairs[0][0].latents[0].shape[1:]:
        steps.append([(samples, reference_samples)])
    return tuple(_relative(step) for step in steps)


def bands(samples: Tensor, reference: Tensor, num_bands: int = NUM_BANDS) -> tuple[float, ...]:
    """For equal bands of spatial frequency, lowest first: amplitude of the error over that of the reference.

    Args:
        samples: [N, C, (T,) H, W]; frames of a video count as images.
        reference: Same shape.
        num_bands: At most; small images have fewer, so that each band holds some frequency. Frequencies are in units
            of each axis's highest one, and beyond 1 (the corners) belong to the last band.

    Returns: One number a band, no unit. The lowest band holds the mean.
    Memory: the transforms of both, twice the samples' bytes each.
    """
    height, width = samples.shape[-2:]
    count = max(1, min(num_bands, min(height, width) // 2))
    rows, columns = (torch.fft.fftfreq(side, dtype=torch.float64) * 2 for side in (height, width))
    radius = (rows[:, None].square() + columns[None].square()).sqrt()
    band = (radius * count).long().clamp(max=count - 1).reshape(-1)

    def power(values: Tensor) -> Tensor:
        per_frequency = torch.fft.fft2(values.float()).abs().square().flatten(0, -3).double().sum(dim=0)
        return torch.zeros(count, dtype=torch.float64).index_add_(0, band, per_frequency.reshape(-1))

    own, error = power(reference), power(samples.float() - reference.float())
    floor = own.sum() * 1e-12 + 1e-30  # a band without any amplitude of its own
    return tuple((error / own.clamp(min=float(floor))).sqrt().tolist())


def compare(samples: Tensor, reference: Tensor, *, data_range: float) -> dict[str, float]:
    """PSNR (mean and 10th percentile over samples, dB) and SSIM of samples [N, C, (T,) H, W] to the uncached ones."""
    per_sample = psnr(samples, reference, data_range=data_range)
    found = {"psnr": float(per_sample.mean()), "p10": float(per_sample.quantile(0.1, interpolation="lower"))}
    side = min(samples.shape[-2:])
    if side >= 3:
        window = 11 if side >= 64 else 5 if side >= 5 else 3
        pair = (_frames(samples), _frames(reference))
        found["ssim"] = ssim(*pair, data_range=data_range, window=window)
    return found


def features_of(samples: Tensor, extract: Callable[[Tensor], object]) -> Tensor:
    """What a user's function makes of samples: [N, D], on the host.

    Raises: ConfigError if it gives anything else.
    """
    with torch.no_grad():
        found = extract(samples)
    if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(samples):
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError(f"bench: the features of {len(samples)} samples must be [{len(samples)}, D], got {shape}.")
    return found.detach().to("cpu", torch.float64)


def frechet(samples: Tensor, reference: Tensor, extract: Callable[[Tensor], object]) -> float:
    """Frechet distance of samples to the uncached ones in a user's features."""
    return frechet_distance(features_of(samples, extract), features_of(reference, extract))


def _latents_of(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first floating-point tensor with three axes, or else two, in the order of the signature."""
    try:
        values: Any = dict(signature.bind(*args, **kwargs).arguments)
    except TypeError:
        values = (args, kwargs)
    tensors = [v for v in tree_leaves(values) if isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1]
    return min(tensors, key=lambda tensor: tensor.dim() < 3, default=None)


def _relative(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    apart = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    norm = sum(float(b.double().square().sum()) for _, b in pairs)
    return math.sqrt(apart / norm) if norm else 0.0


def _frames(samples: Tensor) -> Tensor:
    """A video's frames as images [N T, C, H, W]."""
    return samples.transpose(1, 2).flatten(0, 1) if samples.dim() == 5 else samples


__all__ = ["NUM_BANDS", "TRAIL_BYTES", "Trail", "bands", "compare", "drift", "features_of", "frechet", "watched"]
