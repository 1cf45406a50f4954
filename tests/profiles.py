"""Profiles of made-up recordings, for tests of what reads profiles."""

import torch
from torch import Generator, Tensor

from omnifx.profile import NUM_BANDS, NUM_HALVES, BranchMeta, Profile, ProfileMeta


def make_profile(
    steps: int,
    *,
    x: Tensor | None = None,
    q: Tensor | None = None,
    runs: int = 1,
    streams: int = 1,
    branch_flops: tuple[int, ...] = (60, 40),
    flops: int = 100,
    filter_axes: tuple[int, ...] = (-2, -1),
    seed: int = 0,
) -> Profile:
    """A profile of latents `x` and noises `q`, each [runs, streams, steps, NUM_HALVES, NUM_BANDS, N]; None is random.

    By default the branches are the whole model, so that a reuse step costs nothing.
    """
    generator = Generator().manual_seed(seed)

    def vectors(given: Tensor | None) -> Tensor:
        size = (runs, streams, steps, NUM_HALVES, NUM_BANDS, 16)
        return torch.randn(size, generator=generator, dtype=torch.float64) if given is None else given.double()

    families = [vectors(x), vectors(None), vectors(q)]
    blocks = [[torch.einsum("rtihbn,rtjhbn->rthbij", *_same_size(a, b)) for b in families] for a in families]
    grams = torch.cat([torch.cat(row, dim=-1) for row in blocks], dim=-2).float()
    meta = ProfileMeta(
        model="Toy",
        fingerprint="0123",
        versions={"torch": "2"},
        timesteps=tuple(float(steps - k) for k in range(steps)),
        num_streams=streams,
        num_runs=runs,
        flops=flops,
        branches=tuple(
            BranchMeta(name=f"blocks.{i}.attn", kind="self_attention", flops=f, cache_bytes=8)
            for i, f in enumerate(branch_flops)
        ),
        latent_shape=(1, 4, 8, 8),
        output_shape=(1, 4, 8, 8),
        filter_axes=filter_axes,
    )
    return Profile(meta=meta, grams=grams, moves=torch.rand(runs, steps, generator=generator))


def path(points: Tensor) -> Tensor:
    """Latents [1, 1, S, NUM_HALVES, NUM_BANDS, D] that walk along `points` [S, D]; all in one band and half."""
    x = torch.zeros(1, 1, len(points), NUM_HALVES, NUM_BANDS, points.shape[1], dtype=torch.float64)
    x[0, 0, :, 0, 0] = points.double()
    return x


def _same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    size = max(a.shape[-1], b.shape[-1])
    return tuple(torch.nn.functional.pad(v, (0, size - v.shape[-1])) for v in (a, b))  # type: ignore[return-value]
