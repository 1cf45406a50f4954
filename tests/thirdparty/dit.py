"""DiT as its authors wrote it: adaLN-zero blocks around timm's attention and MLP, and a learned variance.

Source: Peebles and Xie, Scalable Diffusion Models with Transformers, arXiv:2212.09748.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x * (1 + scale) + shift``, with one shift and scale for each sample."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def time_features(t: Tensor, width: int) -> Tensor:
    """Cosines and sines of a timestep [B] at `width` / 2 frequencies: [B, width]."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t[:, None].float() * frequencies[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class TimestepEmbedder(nn.Module):
    """An MLP on `time_features`."""

    def __init__(self, width: int, features: int = 32) -> None:
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(time_features(t, self.features).to(self.mlp[0].weight.dtype))


class Attention(nn.Module):
    """timm's: queries, keys and values by one linear layer, and norms for queries and keys."""

    def __init__(self, width: int, heads: int, *, norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads) if norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads) if norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """timm's: linear, GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DiTBlock(nn.Module):
    """adaLN-zero: shift, scale and gate of both branches come from the conditioning."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, norm=True)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Modulated norm, then pixels of a patch."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """Latents [B, 4, 8, 8], timestep [B], label [B] -> noise and variance [B, 8, 8, 8]."""

    def __init__(self, depth: int = 2, width: int = 32, heads: int = 2, channels: int = 4) -> None:
        super().__init__()
        self.channels = 2 * channels
        self.x_embedder = nn.Conv2d(channels, width, kernel_size=2, stride=2)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = nn.Embedding(11, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, 16, width), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * 2 * self.channels)

    def unpatchify(self, x: Tensor) -> Tensor:
        """[B, 16, 4 C] -> [B, C, 8, 8]."""
        side = int(x.shape[1] ** 0.5)
        x = x.reshape(x.shape[0], side, side, 2, 2, self.channels)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(x.shape[0], self.channels, 2 * side, 2 * side)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))
