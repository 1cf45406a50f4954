"""Paths of made-up samplers that remember, or add noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from omnifx.path import Array


def remembering(
    steps: int, *, past: Sequence[tuple[float, float]] = (), noise: float = 0.0, size: int = 60, seed: int = 0
) -> tuple[Array, Array]:
    """[steps, size] latents and outputs of a sampler x' = a x - .2 o + sum_j (c_j x_j + d_j o_j) + fresh noise.

    The pairs (c_j, d_j) of `past` are for the steps before, newest first. All weights of latents add up to .95; as long
    as a step is not there yet, its weights are those of the oldest one.
    """
    rng = np.random.default_rng(seed)
    ways, at = rng.normal(size=(3, size)), np.linspace(0.0, 1.0, steps)[:, None]
    o = ways[0] + at * ways[1] + np.sin(5 * at) * ways[2] + 0.2 * rng.normal(size=(steps, size))
    x, weights = [3 * rng.normal(size=size)], [(0.95 - sum(c for c, _ in past), -0.2), *past]
    for k in range(steps - 1):
        made = [c * x[max(0, k - j)] + d * o[max(0, k - j)] for j, (c, d) in enumerate(weights)]
        x.append(np.sum(made, axis=0) + noise * rng.normal(size=size))
    return np.stack(x), o
