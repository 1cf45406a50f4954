"""The eager lowering: variants run operator by operator, wherever their values lie in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel

import omnifx
from omnifx.example_inputs import lively
from omnifx.policies.magcache import MagCache
from omnifx.policies.teacache import TeaCache
from omnifx.policy import Policy


@pytest.mark.parametrize("policy", [TeaCache(threshold=10.0), MagCache()], ids=["teacache", "magcache"])
def test_blocks_whose_input_is_transposed_can_be_skipped(policy: Policy) -> None:
    """The patches of a DiT come transposed out of a convolution; without blocks they reach the last layers like that,
    whose views then cannot be views."""
    made: Any = DiTTransformer2DModel(  # type: ignore[no-untyped-call]
        num_layers=2, num_attention_heads=2, attention_head_dim=8, sample_size=4, patch_size=1, out_channels=4
    )
    options: Any = {"policy": policy, "lowering": "eager", "profile_cache": False}
    compiled: Any = torch.compile(lively(made), backend="omnicache", options=options)
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for _ in range(2):
            x = noise
            with omnifx.generation(compiled, steps=6):
                for step in range(6):
                    time = torch.full((2,), 900 - 100 * step)
                    x = x - 0.01 * compiled(x, timestep=time, class_labels=torch.tensor([1, 2])).sample

    last = omnifx.stats(compiled).generations[-1]
    assert len(last.steps) == 6
    assert any(not step.variant.startswith("full") for step in last.steps)
