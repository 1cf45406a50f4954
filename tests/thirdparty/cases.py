"""The third-party models of this folder as cases: tiny, lively, with one call and what is to be found in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference import Case, select
from tests.thirdparty.audio import AudioDiT
from tests.thirdparty.dit import DiT
from tests.thirdparty.hdit import HDiT
from tests.thirdparty.maskdit import MaskDiT
from tests.thirdparty.mmdit import MMDiT
from tests.thirdparty.parallel import ParallelDiT
from tests.thirdparty.stdit3 import STDiT3
from tests.thirdparty.uvit import UViT
from tests.toys import lively, noise

DIT = ("self_attention", "mlp")
TEXT = ("self_attention", "cross_attention", "mlp")


def case(
    model: nn.Module,
    inputs: Mapping[str, Any],
    modules: Sequence[str],
    kinds: Sequence[str],
    *,
    dtype: torch.dtype = torch.float32,
    **given: Any,
) -> Case:
    """A lively model of a type; floating-point inputs follow it, but for the timestep."""
    inputs = {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() and name != "t" else value
        for name, value in inputs.items()
    }
    return Case(model=lively(model).to(dtype), inputs=inputs, modules=tuple(modules), kinds=tuple(kinds), **given)


def in_blocks(model: nn.Module, *ends: str) -> tuple[str, ...]:
    """Modules of that name within the blocks; embedders have MLPs too."""
    return tuple(name for name in select(model, *ends) if "block" in name)


def times(batch: int) -> Tensor:
    """Timesteps of a batch."""
    return torch.full((batch,), 500.0)


def labels(batch: int) -> Tensor:
    """Labels of a batch, all different."""
    return torch.arange(batch) + 3


def dit(batch: int, dtype: torch.dtype) -> Case:
    """adaLN-zero and a learned variance."""
    inputs = {"x": noise(batch, 4, 8, 8), "t": times(batch), "y": labels(batch)}
    model = DiT()
    return case(model, inputs, in_blocks(model, "attn", "mlp"), DIT * 2, dtype=dtype)


def uvit(batch: int, dtype: torch.dtype) -> Case:
    """Long skips."""
    inputs = {"x": noise(batch, 4, 8, 8), "t": times(batch), "y": labels(batch)}
    model = UViT()
    return case(model, inputs, in_blocks(model, "attn", "mlp"), DIT * 3, dtype=dtype)


def mmdit(batch: int, dtype: torch.dtype, *, dual: bool = False) -> Case:
    """Two kinds of tokens; with `dual`, images also attend to themselves."""
    inputs = {
        "x": noise(batch, 4, 8, 8),
        "t": times(batch),
        "text": noise(batch, 6, 24, seed=1),
        "pooled": noise(batch, 20, seed=2),
    }
    model = MMDiT(dual=dual)
    modules = select(model, "joint_attn", "attn2", "text_ff", "image_ff")
    second = ("self_attention",) if dual else ()
    kinds = ("joint_attention", *second, "mlp", "mlp", "self_attention", *second, "mlp")  # the last text is dropped
    return case(model, inputs, modules, kinds, dtype=dtype)


def mmdit_dual(batch: int, dtype: torch.dtype) -> Case:
    """Blocks of Stable Diffusion 3.5."""
    return mmdit(batch, dtype, dual=True)


def hdit(batch: int, dtype: torch.dtype) -> Case:
    """An hourglass of two levels."""
    inputs = {"x": noise(batch, 4, 16, 16), "t": times(batch), "y": labels(batch)}
    model = HDiT()
    return case(model, inputs, select(model, "self_attn", "ff"), DIT * 3, dtype=dtype)


def stdit3(batch: int, dtype: torch.dtype) -> Case:
    """Space and time in turn; the first frame is a still one."""
    mask, frames = torch.ones(batch, 6, dtype=torch.int64), torch.ones(batch, 3, dtype=torch.bool)
    mask[:, 4:], frames[:, 0] = 0, False
    inputs = {
        "x": noise(batch, 4, 3, 8, 8),
        "t": times(batch),
        "text": noise(batch, 6, 24, seed=1),
        "mask": mask,
        "frame_mask": frames,
    }
    model = STDiT3()
    return case(model, inputs, in_blocks(model, "attn", "cross_attn", "mlp"), TEXT * 2, dtype=dtype)


def audio(batch: int, dtype: torch.dtype) -> Case:
    """Sound, half of it known; one residual convolution is a branch, the other an affine map of the trunk."""
    inputs = {
        "x": noise(batch, 8, 24),
        "t": times(batch),
        "known": noise(batch, 8, 24, seed=3),
        "mask": (torch.arange(24) < 12).expand(batch, 24).contiguous(),
        "text": noise(batch, 5, 24, seed=1),
    }
    model = AudioDiT()
    parts = select(model, "self_attn", "cross_attn", "ff")
    return case(model, inputs, ("conv_position", *parts), ("conv", *TEXT * 2), dtype=dtype)


def maskdit(batch: int, dtype: torch.dtype, *, write: bool = False) -> Case:
    """Half of the tokens are visible to the encoder."""
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(batch)])
    inputs = {
        "x": noise(batch, 4, 8, 8),
        "t": times(batch),
        "ids_keep": order[:, :8].contiguous(),
        "ids_restore": order.argsort(1),
    }
    model = MaskDiT(write=write)
    return case(model, inputs, in_blocks(model, "attn", "mlp"), DIT * 2, dtype=dtype)


def maskdit_write(batch: int, dtype: torch.dtype) -> Case:
    """Visible tokens are written into a field of mask tokens."""
    return maskdit(batch, dtype, write=True)


def parallel_fused(batch: int, dtype: torch.dtype) -> Case:
    """Flux's single blocks."""
    model = ParallelDiT(fused=True)
    inputs = {"x": noise(batch, 4, 8, 8), "t": times(batch)}
    return case(model, inputs, select(model, "linear2"), ["parallel"] * 2, dtype=dtype)


def parallel_sum(batch: int, dtype: torch.dtype) -> Case:
    """ViT-22B's blocks."""
    model = ParallelDiT(fused=False)
    inputs = {"x": noise(batch, 4, 8, 8), "t": times(batch)}
    return case(model, inputs, in_blocks(model, "attn", "mlp"), ["parallel"] * 2, dtype=dtype)


MODELS: dict[str, Callable[[int, torch.dtype], Case]] = {
    "dit": dit,
    "uvit": uvit,
    "mmdit": mmdit,
    "mmdit_dual": mmdit_dual,
    "hdit": hdit,
    "stdit3": stdit3,
    "audio": audio,
    "maskdit": maskdit,
    "maskdit_write": maskdit_write,
    "parallel_fused": parallel_fused,
    "parallel_sum": parallel_sum,
}
"""Batch size and type -> case."""
