"""A one-dimensional DiT for sound: masked conditioning at the input, prepended tokens, rotary positions, SwiGLU.

Source: Evans et al., Stable Audio Open, arXiv:2407.14358 (prepended tokens, SwiGLU, partial rotary positions), and
Chen et al., F5-TTS, arXiv:2410.06885 (the masked sound as an input, positions by a grouped convolution).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.thirdparty.dit import TimestepEmbedder


class ConvPosition(nn.Module):
    """Positions from a grouped convolution over time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 7, groups=4, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        return F.mish(self.conv(x.transpose(1, 2))).transpose(1, 2)


def rotate_some(x: Tensor, channels: int) -> Tensor:
    """Rotary positions on the first `channels` of a head."""
    frequencies = 1.0 / 10000 ** (torch.arange(0, channels, 2).float() / channels)
    angles = torch.outer(torch.arange(x.shape[-2]).float(), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    turned, rest = x[..., :channels].float(), x[..., channels:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


class Attention(nn.Module):
    """Self-attention, or cross-attention with fewer heads for keys and values."""

    def __init__(self, width: int, heads: int, *, context: int = 0, kv_heads: int = 0) -> None:
        super().__init__()
        self.heads = heads
        self.kv_heads = kv_heads or heads
        kv_width = self.kv_heads * (width // heads)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(context or width, 2 * kv_width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.to_kv(x if context is None else context).chunk(2, dim=-1)
        k, v = (u.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for u in (k, v))
        if context is None:
            q, k = rotate_some(q, q.shape[-1] // 2), rotate_some(k, k.shape[-1] // 2)
        else:
            k, v = (u.repeat_interleave(self.heads // self.kv_heads, dim=1) for u in (k, v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """One projection to value and gate, and one back."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return self.out(value * F.silu(gate))


class Block(nn.Module):
    """Pre-norm self-attention, cross-attention and SwiGLU, each added to its input."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.pre_norm = nn.LayerNorm(width)
        self.self_attn = Attention(width, heads)
        self.cross_attend_norm = nn.LayerNorm(width)
        self.cross_attn = Attention(width, heads, context=context, kv_heads=1)
        self.ff_norm = nn.LayerNorm(width)
        self.ff = SwiGLU(width, 4 * width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.self_attn(self.pre_norm(x))
        x = x + self.cross_attn(self.cross_attend_norm(x), context)
        return x + self.ff(self.ff_norm(x))


class AudioDiT(nn.Module):
    """Latents [B, 8, N], timestep [B], known sound [B, 8, N] with its mask [B, N], text [B, T, 24] -> [B, 8, N]."""

    def __init__(self, depth: int = 2, width: int = 32, heads: int = 2, channels: int = 8) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(channels))
        self.project_in = nn.Linear(2 * channels, width)
        self.conv_position = ConvPosition(width)
        self.to_timestep_embed = TimestepEmbedder(width)
        self.to_cond_embed = nn.Sequential(nn.Linear(24, width, bias=False), nn.SiLU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(Block(width, heads, width) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width)
        self.project_out = nn.Linear(width, channels, bias=False)
        self.postprocess_conv = nn.Conv1d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor, t: Tensor, known: Tensor, mask: Tensor, text: Tensor) -> Tensor:
        sound = torch.where(mask[..., None], known.transpose(1, 2), self.mask_token)
        x = self.project_in(torch.cat([x.transpose(1, 2), sound], dim=-1))
        x = self.conv_position(x) + x
        x = torch.cat([self.to_timestep_embed(t)[:, None], x], dim=1)
        context = self.to_cond_embed(text)
        for layer in self.layers:
            x = layer(x, context)
        x = self.project_out(self.norm_out(x))[:, 1:].transpose(1, 2)
        return self.postprocess_conv(x) + x
