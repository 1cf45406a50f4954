"""Plausible inputs and weights for transformers of diffusers, so that `omnifx explain CLASS` needs no more than a name.

Shapes follow from the model's own config and are those of its usual resolution; nothing is computed.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from omnifx.errors import ConfigError

Size = tuple[int, ...]
Inputs = dict[str, Any]


def build_model(name: str, config: Mapping[str, Any] | None = None) -> nn.Module:
    """A model of diffusers by its class name, without weights: on the meta device, in eval mode.

    Args:
        name: Such as "PixArtTransformer2DModel".
        config: Arguments of its constructor; the rest are the class's own defaults.

    Raises: ConfigError if there is no such class, or it does not take these arguments.
    """
    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        models = [other for other in dir(diffusers) if other.endswith(("Transformer2DModel", "Transformer3DModel"))]
        near = difflib.get_close_matches(name, models, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise ConfigError(
            f"explain: diffusers {diffusers.__version__} has no model {name!r}. {hint}"
            "A model of your own is named module:factory or file.py:factory, a function that returns (model, kwargs)."
        )
    given = dict(COMPLETING.get(name, {}) if config is None else config)
    try:
        with torch.device("meta"):
            made: nn.Module = cls(**given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"explain: {name} does not take the config {given}: {error}. See its constructor.") from error
    return made.eval()


def example_inputs(model: nn.Module, *, size: Size | None = None, batch: int = 1) -> Inputs:
    """Keyword arguments of one call of `model`, on the meta device.

    Args:
        model: A model of diffusers whose class is in `RECIPES`.
        size: Latents' (height, width), or (frames, height, width) for video; None: the model's usual one.
        batch: Samples in a call.

    Raises: ConfigError for any other class.
    """
    name = type(model).__name__
    if name not in RECIPES:
        raise ConfigError(
            f"explain: no inputs are known for {name}; known are {', '.join(RECIPES)}. "
            "Give --inputs file.py:function, which takes the model and returns the keyword arguments of one call."
        )
    config: Any = model.config
    with torch.device("meta"):
        return RECIPES[name](config, size, batch) | {"return_dict": False}


@torch.no_grad()
def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a model random weights that matter everywhere: weights N(0, 1/fan_in), norm weights 1 + 0.2 N, the rest
    0.3 N.

    Default initialisation zeroes gates, so that a wrong cache could not be seen.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() >= 2:
            values = values / math.sqrt(parameter[0].numel())
        elif "norm" in name and "weight" in name:
            values = 1.0 + 0.2 * values
        else:
            values = 0.3 * values
        parameter.copy_(values)
    return model.eval()


def _dit(config: Any, size: Size | None, batch: int) -> Inputs:
    height, width = _sides(size, (config.sample_size, config.sample_size))
    if height != width:
        raise ConfigError(f"explain: DiTTransformer2DModel takes squares only, got {height}x{width}.")
    return {
        "hidden_states": torch.empty(batch, config.in_channels, height, width),
        "timestep": _timestep(batch),
        "class_labels": torch.zeros(batch, dtype=torch.int64),
    }


def _pixart(config: Any, size: Size | None, batch: int) -> Inputs:
    height, width = _sides(size, (config.sample_size, config.sample_size))
    extra = config.use_additional_conditions
    if extra is None:
        extra = config.sample_size == 128  # the model's own rule
    return {
        "hidden_states": torch.empty(batch, config.in_channels, height, width),
        "encoder_hidden_states": torch.empty(batch, 120, config.caption_channels or config.cross_attention_dim),
        "timestep": _timestep(batch),
        "added_cond_kwargs": {
            "resolution": torch.empty(batch, 2) if extra else None,
            "aspect_ratio": torch.empty(batch, 1) if extra else None,
        },
    }


def _sd3(config: Any, size: Size | None, batch: int) -> Inputs:
    height, width = _sides(size, (config.sample_size, config.sample_size))
    return {
        "hidden_states": torch.empty(batch, config.in_channels, height, width),
        "encoder_hidden_states": torch.empty(batch, 333, config.joint_attention_dim),  # 77 of CLIP and 256 of T5
        "pooled_projections": torch.empty(batch, config.pooled_projection_dim),
        "timestep": _timestep(batch),
    }


def _flux(config: Any, size: Size | None, batch: int) -> Inputs:
    height, width = _sides(size, (128, 128))  # 1024 pixels; the model itself sees tokens of 2 x 2
    tokens = math.ceil(height / 2) * math.ceil(width / 2)
    return {
        "hidden_states": torch.empty(batch, tokens, config.in_channels),
        "encoder_hidden_states": torch.empty(batch, 512, config.joint_attention_dim),
        "pooled_projections": torch.empty(batch, config.pooled_projection_dim),
        "timestep": torch.empty(batch),
        "img_ids": torch.empty(tokens, len(config.axes_dims_rope)),
        "txt_ids": torch.empty(512, len(config.axes_dims_rope)),
        "guidance": torch.empty(batch) if config.guidance_embeds else None,
    }


def _wan(config: Any, size: Size | None, batch: int) -> Inputs:
    frames, height, width = _sides(size, (21, 60, 104))  # 81 frames of 480 x 832
    inputs: Inputs = {
        "hidden_states": torch.empty(batch, config.in_channels, frames, height, width),
        "timestep": _timestep(batch),
        "encoder_hidden_states": torch.empty(batch, 512, config.text_dim),
    }
    if config.image_dim is not None:
        inputs["encoder_hidden_states_image"] = torch.empty(batch, 257, config.image_dim)
    return inputs


def _cogvideox(config: Any, size: Size | None, batch: int) -> Inputs:
    latent_frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
    frames, height, width = _sides(size, (latent_frames, config.sample_height, config.sample_width))
    inputs: Inputs = {
        "hidden_states": torch.empty(batch, frames, config.in_channels, height, width),
        "encoder_hidden_states": torch.empty(batch, config.max_text_seq_length, config.text_embed_dim),
        "timestep": _timestep(batch),
    }
    if config.use_rotary_positional_embeddings:
        patches = (height // config.patch_size) * (width // config.patch_size)
        table = (frames // (config.patch_size_t or 1)) * patches, config.attention_head_dim
        inputs["image_rotary_emb"] = (torch.empty(table), torch.empty(table))
    if config.ofs_embed_dim is not None:
        inputs["ofs"] = torch.empty(1)
    return inputs


def _latte(config: Any, size: Size | None, batch: int) -> Inputs:
    frames, height, width = _sides(size, (config.video_length, config.sample_size, config.sample_size))
    return {
        "hidden_states": torch.empty(batch, config.in_channels, frames, height, width),
        "timestep": _timestep(batch),
        "encoder_hidden_states": torch.empty(batch, 120, config.caption_channels),
    }


def _hidream(config: Any, size: Size | None, batch: int) -> Inputs:
    height, width = _sides(size, (128, 128))  # 1024 pixels
    if height != width:
        raise ConfigError(f"explain: HiDreamImageTransformer2DModel is shown for squares only, got {height}x{width}.")
    t5, llama = config.caption_channels
    return {
        "hidden_states": torch.empty(batch, config.in_channels, height, width),
        "timesteps": _timestep(batch),
        "encoder_hidden_states_t5": torch.empty(batch, 128, t5),
        "encoder_hidden_states_llama3": torch.empty(max(config.llama_layers) + 1, batch, 128, llama),
        "pooled_embeds": torch.empty(batch, config.text_emb_dim),
    }


def _sides(size: Size | None, usual: Size) -> Size:
    if size is None:
        return usual
    if len(size) == 1:
        return (*usual[:-2], size[0], size[0])
    if len(size) == 2:
        return (*usual[:-2], *size)
    if len(size) == len(usual):
        return size
    raise ConfigError(f"explain: size {'x'.join(map(str, size))} names {len(size)} sides, this model has {len(usual)}.")


def _timestep(batch: int) -> Tensor:
    return torch.zeros(batch, dtype=torch.int64)


RECIPES: dict[str, Callable[[Any, Size | None, int], Inputs]] = {
    "CogVideoXTransformer3DModel": _cogvideox,
    "DiTTransformer2DModel": _dit,
    "FluxTransformer2DModel": _flux,
    "HiDreamImageTransformer2DModel": _hidream,
    "LatteTransformer3DModel": _latte,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "WanTransformer3DModel": _wan,
}

COMPLETING: dict[str, dict[str, Any]] = {
    # HiDream's own defaults are no model that could be built; these are the published HiDream-I1.
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 16,
        "num_single_layers": 32,
        "attention_head_dim": 128,
        "num_attention_heads": 20,
        "caption_channels": [4096, 4096],
        "text_emb_dim": 2048,
        "axes_dims_rope": [64, 32, 32],
        "max_resolution": [128, 128],
        "llama_layers": [*range(32), *([31] * 16)],
    },
    # Latte's own defaults are no model that could be built; these are the published Latte-1.
    "LatteTransformer3DModel": {
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 28,
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "sample_size": 64,
        "patch_size": 2,
        "caption_channels": 4096,
        "cross_attention_dim": 1152,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "video_length": 16,
    },
}
