"""Profiles of made-up recordings, for tests of what reads profiles."""

from dataclasses import replace

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


FLOW = {steps: tuple(1000 * (1 - k / steps) for k in range(steps)) for steps in (12, 20, 50)}


def walked(steps: int, *, ddim: bool = False) -> Profile:
    """A profile of a walk through outputs that are a smooth function of time: an Euler walk, or one that scales the
    latents too, in steps that compose."""
    ways = torch.randn(4, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at = torch.tensor(FLOW[steps], dtype=torch.float64) / 1000
    outputs = ways[0] + at[:, None] * ways[1] + torch.sin(2 * at)[:, None] * ways[2]
    noises = torch.diff(at, prepend=at[:1])[:, None] * ways[3]
    shrink = torch.exp(-0.5 * at) if ddim else torch.ones_like(at)
    x, latents = 3 * ways[3], []
    for k in range(steps):
        latents.append(x)
        if k + 1 < steps:
            a = shrink[k + 1] / shrink[k]
            x = a * x + shrink[k + 1] * (at[k + 1] - at[k]) * outputs[k]
    vectors = torch.cat([torch.stack(latents), outputs, noises])
    path = torch.stack([vectors @ vectors.T / NUM_HALVES] * NUM_HALVES)[None]
    profile = make_profile(steps)
    return replace(profile, meta=profile.meta.model_copy(update={"timesteps": FLOW[steps]}), path=path)


def path(points: Tensor) -> Tensor:
    """Latents [1, 1, S, NUM_HALVES, NUM_BANDS, D] that walk along `points` [S, D]; all in one band and half."""
    x = torch.zeros(1, 1, len(points), NUM_HALVES, NUM_BANDS, points.shape[1], dtype=torch.float64)
    x[0, 0, :, 0, 0] = points.double()
    return x


def _same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    size = max(a.shape[-1], b.shape[-1])
    return tuple(torch.nn.functional.pad(v, (0, size - v.shape[-1])) for v in (a, b))  # type: ignore[return-value]
