"""U-ViT: time and label are tokens, and early blocks reach late ones by a concatenation and a linear layer.

Source: Bao et al., All are Worth Words: A ViT Backbone for Diffusion Models, arXiv:2209.12152.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.thirdparty.dit import Mlp, time_features


class Attention(nn.Module):
    """Written out: products, a softmax, a product."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * self.scale
        x = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, tokens, width)
        return self.proj(x)


class Block(nn.Module):
    """A pre-norm block; the late ones first join the tokens of an early one."""

    def __init__(self, width: int, heads: int, *, skip: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """Latents [B, 4, 8, 8], timestep [B], label [B] -> [B, 4, 8, 8]."""

    def __init__(self, depth: int = 3, width: int = 32, heads: int = 2, channels: int = 4) -> None:
        super().__init__()
        self.width = width
        self.patch_embed = nn.Conv2d(channels, width, kernel_size=2, stride=2)
        self.label_emb = nn.Embedding(10, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, 2 + 16, width))
        self.in_blocks = nn.ModuleList(Block(width, heads, skip=False) for _ in range(depth // 2))
        self.mid_block = Block(width, heads, skip=False)
        self.out_blocks = nn.ModuleList(Block(width, heads, skip=True) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, 4 * channels)
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        time = time_features(t, self.width).to(x.dtype).unsqueeze(1)
        x = torch.cat([time, self.label_emb(y).unsqueeze(1), x], dim=1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        x = self.decoder_pred(self.norm(x))[:, 2:]
        x = F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (4, 4)), 2)
        return self.final_layer(x)
