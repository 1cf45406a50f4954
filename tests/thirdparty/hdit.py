"""HDiT: an hourglass that merges tokens on the way in, splits them on the way out, and blends in the skipped ones.

Source: Crowson et al., Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass Diffusion Transformers,
arXiv:2401.11605. Neighbourhood attention of the outer level is plain attention here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.thirdparty.dit import time_features


class AdaRMSNorm(nn.Module):
    """Root-mean-square norm with a scale from the conditioning."""

    def __init__(self, width: int, cond: int) -> None:
        super().__init__()
        self.linear = nn.Linear(cond, width, bias=False)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale = self.linear(cond)[:, None, None, :] + 1
        mean = x.float().square().mean(-1, keepdim=True)
        return x * (scale.float() * torch.rsqrt(mean + 1e-6)).to(x.dtype)


class AxialRope(nn.Module):
    """Rotates half of a head's channels by row and column."""

    def __init__(self, head: int, heads: int) -> None:
        super().__init__()
        frequencies = torch.logspace(0, 1, heads * head // 8).reshape(-1, heads).T
        self.register_buffer("frequencies", frequencies)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        rows, columns = (position[..., None, i : i + 1] * self.frequencies for i in range(2))
        theta = torch.cat([rows, columns], dim=-1)
        half = theta.shape[-1]
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        cos, sin = theta.cos().to(x.dtype), theta.sin().to(x.dtype)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


class SelfAttention(nn.Module):
    """Cosine attention with a learned temperature for each head; tokens are [B, H, W, C]."""

    def __init__(self, width: int, heads: int, cond: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = AdaRMSNorm(width, cond)
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.scale = nn.Parameter(torch.full([heads], 10.0))
        self.pos_emb = AxialRope(width // heads, heads)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, position: Tensor, cond: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        qkv = self.qkv_proj(self.norm(x, cond)).unflatten(-1, (3, self.heads, -1)).flatten(1, 2)
        q, k, v = qkv.unbind(2)
        root = self.scale[:, None].abs().sqrt()
        q, k = (F.normalize(u, dim=-1) * root for u in (q, k))
        q, k = (self.pos_emb(u, position.flatten(0, 1)) for u in (q, k))
        out = F.scaled_dot_product_attention(*(u.transpose(1, 2) for u in (q, k, v)), scale=1.0)
        return self.out_proj(out.transpose(1, 2).flatten(2).unflatten(1, (height, width)))


class FeedForward(nn.Module):
    """GEGLU by one linear layer."""

    def __init__(self, width: int, hidden: int, cond: int) -> None:
        super().__init__()
        self.norm = AdaRMSNorm(width, cond)
        self.up_proj = nn.Linear(width, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        value, gate = self.up_proj(self.norm(x, cond)).chunk(2, dim=-1)
        return self.down_proj(value * F.gelu(gate))


class Layer(nn.Module):
    """Attention and feed-forward, each added to its input, without gates."""

    def __init__(self, width: int, heads: int, cond: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(width, heads, cond)
        self.ff = FeedForward(width, 3 * width, cond)

    def forward(self, x: Tensor, position: Tensor, cond: Tensor) -> Tensor:
        x = x + self.self_attn(x, position, cond)
        return x + self.ff(x, cond)


class TokenMerge(nn.Module):
    """Joins 2 x 2 tokens into one."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(4 * inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).transpose(2, 3)
        return self.proj(x.flatten(3))


class TokenSplit(nn.Module):
    """Splits a token into 2 x 2, and blends with the tokens that were skipped."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, 4 * outputs, bias=False)
        self.fac = nn.Parameter(torch.full([1], 0.5))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.proj(x).unflatten(-1, (2, 2, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return torch.lerp(skip, x.reshape(skip.shape), self.fac.to(x.dtype))


def positions(height: int, width: int) -> Tensor:
    """Row and column of each token in [-1, 1]: [H, W, 2]."""
    rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)


class HDiT(nn.Module):
    """Latents [B, 4, 16, 16], timestep [B], label [B] -> [B, 4, 16, 16]; two levels."""

    def __init__(self, widths: tuple[int, int] = (32, 64), depth: int = 1) -> None:
        super().__init__()
        outer, inner = widths
        cond = inner
        self.patch_in = TokenMerge(4, outer)
        self.time_in_proj = nn.Linear(32, cond)
        self.class_emb = nn.Embedding(10, cond)
        self.mapping = nn.Sequential(nn.Linear(cond, cond), nn.SiLU(), nn.Linear(cond, cond))
        self.down_levels = nn.ModuleList(Layer(outer, 2, cond) for _ in range(depth))
        self.merge = TokenMerge(outer, inner)
        self.mid_level = nn.ModuleList(Layer(inner, 4, cond) for _ in range(depth))
        self.split = TokenSplit(inner, outer)
        self.up_levels = nn.ModuleList(Layer(outer, 2, cond) for _ in range(depth))
        self.out_norm = nn.RMSNorm(outer)
        self.patch_out = nn.Linear(outer, 16, bias=False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.patch_in(x.movedim(-3, -1))
        fine, coarse = positions(*x.shape[1:3]), positions(x.shape[1] // 2, x.shape[2] // 2)
        cond = self.mapping(self.time_in_proj(time_features(t, 32).to(x.dtype)) + self.class_emb(y))
        for layer in self.down_levels:
            x = layer(x, fine, cond)
        skip = x
        x = self.merge(x)
        for layer in self.mid_level:
            x = layer(x, coarse, cond)
        x = self.split(x, skip)
        for layer in self.up_levels:
            x = layer(x, fine, cond)
        x = self.patch_out(self.out_norm(x))
        return F.pixel_shuffle(x.movedim(-1, -3), 2)
