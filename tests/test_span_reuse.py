"""Reuse of ranges of blocks where things are not plain: Inductor, other sizes, graph breaks, bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import omnifx
from omnifx.errors import OmnifxWarning
from omnifx.policies.magcache import MagCache
from omnifx.session import find_session
from tests.policies.stacks import Stacks
from tests.test_breaks import BrokenDiT
from tests.toys import EAGER, distance, free_toy, generate, noise, toy

STEPS = 6
WHOLE = (0, 1)


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="omnicache", options={**EAGER, "policy": "delta-dit", **options})


def play(fast: Any, seed: int, **kwargs: Any) -> torch.Tensor:
    with omnifx.generation(fast):
        return generate(fast, seed=seed, steps=STEPS, **kwargs)


def variants(fast: Any) -> list[str]:
    return [step.variant for step in omnifx.stats(fast).generations[-1].steps]


@pytest.mark.slow
def test_with_inductor_it_is_the_eager_reference() -> None:
    model = toy(2)
    fast = compiled(model, lowering="inductor", policy=MagCache(threshold=1e9))
    play(fast, 0)

    image = play(fast, 1)

    reference = Stacks(model, lambda step: WHOLE if step else None, (WHOLE,))
    assert distance(image, generate(reference, seed=1, steps=STEPS)) < 1e-4
    assert variants(fast) == ["full+write", *["reuse+span0-1"] * 5]


def test_one_variant_serves_all_sizes() -> None:
    model = free_toy(4)
    fast = torch.compile(model, backend="omnicache", options={**EAGER, "policy": "delta-dit"}, dynamic=True)
    play(fast, 0, latents=noise(1, 4, 8, 8))

    for height, width in ((8, 8), (12, 12)):
        latents = noise(1, 4, height, width, seed=3)
        image = play(fast, 1, latents=latents)
        assert variants(fast) == [
            "full+write",
            *["reuse6+span1-3"] * 2,
            "full+write",
            *["reuse6+span0-2"] * 2,
        ]
        reference = Stacks(model, lambda k: ((1, 3) if k < 3 else (0, 2)) if k % 3 else None, ((1, 3), (0, 2)))
        assert distance(image, generate(reference, seed=1, steps=STEPS, latents=latents)) < 1e-5
    assert omnifx.stats(fast).graphs == 1


@pytest.mark.parametrize("policy", ["delta-dit", "magcache"])
def test_a_model_in_parts_says_that_it_has_no_ranges(policy: str) -> None:
    fast = compiled(BrokenDiT(num_blocks=2), policy=policy)
    with pytest.warns(OmnifxWarning, match="it knows none, as the model is not one graph"):
        [play(fast, seed) for seed in range(3)]
    assert all(variant.startswith("full") for variant in variants(fast))


def test_the_budget_counts_residuals_only_once_they_are_all_that_is_kept() -> None:
    """Four branches of a residual's size are kept while it is recorded, and the residual twice: now, and a step ago."""
    model = toy(2)
    fast = compiled(model, policy="magcache")
    play(fast, 0)
    play(fast, 1)

    (runner,) = find_session(fast).runners
    program = runner.program
    assert program.cache_bytes_at(program.hinted_sizes, ("span0-1",)) * 4 == program.cache_bytes
    first, second = omnifx.stats(fast).generations
    assert first.peak_cache_bytes > program.cache_bytes
    assert second.peak_cache_bytes * 4 == program.cache_bytes
