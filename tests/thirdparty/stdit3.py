"""STDiT3: a video DiT whose blocks attend over space and over time in turn, and all to the text.

Source: Zheng et al., Open-Sora: Democratizing Efficient Video Production for All, arXiv:2412.20404, release 1.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.thirdparty.dit import Mlp, TimestepEmbedder


def t2i_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x * (1 + scale) + shift``, on [B, tokens, C] and [B, 1, C]."""
    return x * (1 + scale) + shift


def by_frame(mask: Tensor, moving: Tensor, still: Tensor, frames: int) -> Tensor:
    """`moving` in the frames of `mask` [B, T], `still` in the others; both are [B, T S, C]."""
    moving, still = (v.unflatten(1, (frames, -1)) for v in (moving, still))
    return torch.where(mask[:, :, None, None], moving, still).flatten(1, 2)


def rotate(x: Tensor) -> Tensor:
    """Rotary positions over the second-to-last axis, on neighbouring pairs of channels."""
    angles = torch.arange(x.shape[-2], dtype=torch.float32)[:, None] * 10000 ** -(
        torch.arange(0, x.shape[-1], 2, dtype=torch.float32) / x.shape[-1]
    )
    cos, sin = (f.repeat_interleave(2, dim=-1).to(x.dtype) for f in (angles.cos(), angles.sin()))
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * cos + turned * sin


class SelfAttention(nn.Module):
    """Attention within a frame, or at one place over all frames (then with rotary positions)."""

    def __init__(self, width: int, heads: int, *, rope: bool) -> None:
        super().__init__()
        self.heads = heads
        self.rope = rope
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(width // heads)
        self.k_norm = nn.RMSNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            q, k = rotate(q), rotate(k)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention to the text; padding is masked out by an additive bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        q = self.q_linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv_linear(text).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(mask == 0, float("-inf"))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None, None, :])
        return self.proj(out.transpose(1, 2).flatten(2))


class STDiT3Block(nn.Module):
    """Self-attention over space or time, cross-attention, MLP; adaLN-single with a table of its own."""

    def __init__(self, width: int, heads: int, *, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attn = SelfAttention(width, heads, rope=temporal)
        self.cross_attn = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = Mlp(width, 4 * width)
        self.scale_shift_table = nn.Parameter(torch.zeros(6, width))

    def forward(
        self, x: Tensor, text: Tensor, t: Tensor, t0: Tensor, mask: Tensor, frame_mask: Tensor, frames: int
    ) -> Tensor:
        now = (self.scale_shift_table[None] + t.unflatten(1, (6, -1))).chunk(6, dim=1)
        zero = (self.scale_shift_table[None] + t0.unflatten(1, (6, -1))).chunk(6, dim=1)
        normed = self.norm1(x)
        inner = by_frame(frame_mask, t2i_modulate(normed, *now[:2]), t2i_modulate(normed, *zero[:2]), frames)
        if self.temporal:
            inner = inner.unflatten(1, (frames, -1)).transpose(1, 2).flatten(0, 1)  # B (T S) C -> (B S) T C
            inner = self.attn(inner).unflatten(0, (x.shape[0], -1)).transpose(1, 2).flatten(1, 2)
        else:
            inner = self.attn(inner.unflatten(1, (frames, -1)).flatten(0, 1))  # B (T S) C -> (B T) S C
            inner = inner.unflatten(0, (x.shape[0], -1)).flatten(1, 2)
        x = x + by_frame(frame_mask, now[2] * inner, zero[2] * inner, frames)
        x = x + self.cross_attn(x, text, mask)
        normed = self.norm2(x)
        inner = self.mlp(
            by_frame(frame_mask, t2i_modulate(normed, *now[3:5]), t2i_modulate(normed, *zero[3:5]), frames)
        )
        return x + by_frame(frame_mask, now[5] * inner, zero[5] * inner, frames)


class STDiT3(nn.Module):
    """Latents [B, 4, T, 8, 8], timestep [B], text [B, N, 24], masks of text and frames -> [B, 8, T, 8, 8]."""

    def __init__(self, depth: int = 1, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.x_embedder = nn.Conv3d(4, width, kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.t_embedder = TimestepEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = Mlp(24, width)
        self.y_proj = nn.Linear(24, width)
        self.spatial_blocks = nn.ModuleList(STDiT3Block(width, heads, temporal=False) for _ in range(depth))
        self.temporal_blocks = nn.ModuleList(STDiT3Block(width, heads, temporal=True) for _ in range(depth))
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False)
        self.table = nn.Parameter(torch.zeros(2, width))
        self.linear = nn.Linear(width, 4 * 8)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor, frame_mask: Tensor) -> Tensor:
        batch, _, frames, height, width = x.shape
        x = self.x_embedder(x).flatten(2).transpose(1, 2)
        embedded = self.t_embedder(t)
        now, zero = self.t_block(embedded), self.t_block(self.t_embedder(torch.zeros_like(t)))
        text = self.y_proj(self.y_embedder(text))
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            x = spatial(x, text, now, zero, mask, frame_mask, frames)
            x = temporal(x, text, now, zero, mask, frame_mask, frames)
        shift, scale = (self.table[None] + embedded[:, None]).chunk(2, dim=1)
        x = self.linear(t2i_modulate(self.norm_final(x), shift, scale))
        x = x.reshape(batch, frames, height // 2, width // 2, 2, 2, 8).permute(0, 6, 1, 2, 4, 3, 5)
        return x.reshape(batch, 8, frames, height, width)
