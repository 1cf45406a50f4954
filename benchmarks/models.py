"""The medium models of the speed benchmarks: real diffusers classes at about 12 x 384 and 256 tokens, with random
weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omnifx.example_inputs import lively


@dataclass(frozen=True)
class Case:
    """A model and how to call it."""

    name: str
    model: nn.Module
    inputs: Callable[[int], dict[str, Any]]
    """Keyword arguments of one call with latents of a seed; the sampler replaces latents and timestep."""
    channels: int
    batch: int


def pixart(depth: int = 12, width: int = 384, tokens: int = 256, batch: int = 1) -> Case:
    """PixArt-like: self-attention, cross-attention on 32 text tokens, MLP; adaLN-single."""
    from diffusers import PixArtTransformer2DModel

    side = math.isqrt(tokens) * 2
    model = PixArtTransformer2DModel(
        num_attention_heads=width // 64,
        attention_head_dim=64,
        num_layers=depth,
        cross_attention_dim=width,
        caption_channels=width,
        sample_size=side,
        in_channels=4,
        out_channels=4,
        use_additional_conditions=False,
    )
    text = torch.randn(batch, 32, width, generator=torch.Generator().manual_seed(7))

    def inputs(seed: int) -> dict[str, Any]:
        return {
            "hidden_states": noise((batch, 4, side, side), seed),
            "encoder_hidden_states": text,
            "timestep": torch.zeros(batch, dtype=torch.int64),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "return_dict": False,
        }

    return Case("pixart-like", lively(model), inputs, 4, batch)


def dit(depth: int = 12, width: int = 384, tokens: int = 256, batch: int = 1) -> Case:
    """DiT-like: self-attention and MLP, adaLN-zero, class labels."""
    from diffusers import DiTTransformer2DModel

    side = math.isqrt(tokens) * 2
    model = DiTTransformer2DModel(
        num_attention_heads=width // 64,
        attention_head_dim=64,
        num_layers=depth,
        sample_size=side,
        in_channels=4,
        out_channels=4,
    )
    labels = torch.arange(batch) % 1000

    def inputs(seed: int) -> dict[str, Any]:
        return {
            "hidden_states": noise((batch, 4, side, side), seed),
            "class_labels": labels,
            "timestep": torch.zeros(batch, dtype=torch.int64),
            "return_dict": False,
        }

    return Case("dit-like", lively(model), inputs, 4, batch)


CASES: dict[str, Callable[..., Case]] = {"pixart": pixart, "dit": dit}


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Latents of a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def timesteps(steps: int) -> list[int]:
    """Descending, evenly spaced in [1, 981]."""
    return [round(981 - k * 980 / max(1, steps - 1)) for k in range(steps)]


@torch.no_grad()
def generate(
    model: Callable[..., Any], case: Case, *, seed: int, steps: int, each: Callable[[], object] = lambda: None
) -> Tensor:
    """An Euler-like loop around any callable with the model's convention; the latents drift by a few percent a step.

    `each` is called after every step.
    """
    inputs = case.inputs(seed)
    latents = inputs["hidden_states"]
    for time in timesteps(steps):
        inputs["hidden_states"] = latents
        inputs["timestep"] = torch.full_like(inputs["timestep"], time)
        output = model(**inputs)[0]
        latents = latents - (1.0 / steps) * output[:, : case.channels]
        each()
    return latents
