"""What the zoo keeps of a model: how to make it tiny, how to call it, and what omnifx must find in it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from omnifx.example_inputs import lively
from tests.reuse import noise

Inputs = dict[str, Any]

USUAL = (
    r"(?:.*\.)?\d+\.(?:\w*block\.)?"
    r"(?:(?:self_|cross_|audio_|audio_to_video_|video_to_audio_)?attn[12]?|(?:self_|(?:av_|va_)?cross_)?attention"
    r"|(?:audio_|txt_)?ff|ff_context|ffn|feed_forward|(?:img_|txt_)?mlp|mlp_moe_gen)"
    r"|single_transformer_blocks\.\d+\.proj_out"
)
"""Names of attention and feed-forward modules in most models; Flux's single blocks end both with one `proj_out`."""


def grid(height: int, width: int, axes: int = 3) -> Tensor:
    """Positions [height * width, axes] of image tokens, as Flux takes them: rows on axis 1, columns on axis 2."""
    ids = torch.zeros(height * width, axes)
    ids[:, 1] = torch.arange(height).repeat_interleave(width)
    ids[:, 2] = torch.arange(width).repeat(height)
    return ids


def text_ids(tokens: int, axes: int = 4) -> Tensor:
    """Positions [tokens, axes] of text tokens, as Flux 2 takes them: counted on the last axis."""
    ids = torch.zeros(tokens, axes)
    ids[:, -1] = torch.arange(tokens)
    return ids


@dataclass
class Tiny:
    """A tiny model and the calls of one generation."""

    model: nn.Module
    inputs: Inputs
    """The first step's call."""
    modules: tuple[str, ...]
    """Attention and feed-forward modules whose outputs a reuse step takes from an earlier one."""
    latents: tuple[str, ...] = ("hidden_states",)
    times: tuple[str, ...] = ("timestep",)

    def step(self, number: int) -> Inputs:
        """A later step's call: other latents and timesteps, the same conditioning."""
        moved = {name: _moved(self.inputs[name], number) for name in self.latents}
        return {**self.inputs, **moved, **{name: _later(self.inputs[name], number) for name in self.times}}

    def next_inputs(self) -> Inputs:
        """The second step's call."""
        return self.step(1)


def _moved(latents: Any, step: int) -> Any:
    if isinstance(latents, list):
        return [_moved(each, step) for each in latents]
    return 0.9**step * latents + (0.2 * step * noise(*latents.shape, seed=99 + step) if step else 0.0)


def _later(time: Tensor, step: int) -> Tensor:
    return (time * 0.8**step).to(time.dtype)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model of the zoo, and its pinned row of docs/models.md."""

    name: str
    """The class in diffusers; variants of one class after a slash."""
    config: dict[str, Any]
    inputs: Callable[[], Inputs]
    """Keyword arguments of the first step."""
    branches: str
    """Branches by kind, over all graphs; those left alone count."""
    dependence: str
    """Branches by what they depend on: latent, timestep or invariant."""
    left: float
    """Share of the FLOPs that a step which reuses everything still costs."""
    graphs: int = 1
    """Graphs that the model is captured as; more than 1 means graph breaks."""
    left_alone: int = 0
    """Branches that are found but not cached."""
    modules: str = USUAL
    """Pattern of the names of all modules that a reuse step replaces by their old outputs."""
    latents: tuple[str, ...] = ("hidden_states",)
    times: tuple[str, ...] = ("timestep",)
    in_full: str = ""
    """Why omnifx reuses nothing in a generation of this model; empty if it does reuse."""
    note: str = ""
    """What is left alone, and why."""

    @property
    def cls(self) -> str:
        """Name of the class."""
        return self.name.partition("/")[0]

    def make(self) -> Tiny:
        """The model with random weights that matter everywhere, and its inputs."""
        model: nn.Module = lively(getattr(diffusers, self.cls)(**self.config))
        names = [name for name, _ in model.named_modules() if re.fullmatch(self.modules, name)]
        ends = {name.removesuffix(".proj_out") for name in names if name.endswith(".proj_out")}
        modules = tuple(name for name in names if name.rpartition(".")[0] not in ends or name.endswith(".proj_out"))
        return Tiny(model, self.inputs(), modules, self.latents, self.times)
