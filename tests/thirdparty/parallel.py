"""Attention and MLP side by side: fused as in Flux's single blocks, or two modules added up as in ViT-22B.

Source: Dehghani et al., Scaling Vision Transformers to 22 Billion Parameters, arXiv:2302.05442; Black Forest Labs,
FLUX.1 (github.com/black-forest-labs/flux), class SingleStreamBlock.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.thirdparty.dit import Attention, FinalLayer, Mlp, TimestepEmbedder


class SingleStreamBlock(nn.Module):
    """One linear layer into queries, keys, values and the MLP's hidden values, and one out of both; a gate."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width = width
        self.heads = heads
        self.pre_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.linear1 = nn.Linear(width, 7 * width)
        self.q_norm = nn.RMSNorm(width // heads)
        self.k_norm = nn.RMSNorm(width // heads)
        self.linear2 = nn.Linear(5 * width, width)
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(F.silu(c))[:, None].chunk(3, dim=-1)
        inner = self.linear1((1 + scale) * self.pre_norm(x) + shift)
        qkv, hidden = inner.split([3 * self.width, 4 * self.width], dim=-1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v).transpose(1, 2).flatten(2)
        return x + gate * self.linear2(torch.cat((out, F.gelu(hidden, approximate="tanh")), 2))


class ParallelBlock(nn.Module):
    """``x + (attention(norm(x)) + mlp(norm(x)))``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = Attention(width, heads, norm=True)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        y = self.norm(x + c[:, None])
        return x + (self.attn(y) + self.mlp(y))


class ParallelDiT(nn.Module):
    """Latents [B, 4, 8, 8], timestep [B] -> [B, 4, 8, 8]."""

    def __init__(self, depth: int = 2, width: int = 32, heads: int = 2, *, fused: bool) -> None:
        super().__init__()
        block = SingleStreamBlock if fused else ParallelBlock
        self.x_embedder = nn.Conv2d(4, width, kernel_size=2, stride=2)
        self.t_embedder = TimestepEmbedder(width)
        self.pos_embed = nn.Parameter(torch.zeros(1, 16, width))
        self.blocks = nn.ModuleList(block(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, 16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(t)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c).unflatten(1, (4, 4)).unflatten(-1, (2, 2, 4))
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], 4, 8, 8)
