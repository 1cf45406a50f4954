"""A masked DiT: the encoder sees the visible tokens alone, the decoder all of them, with mask tokens in the gaps.

Source: Zheng et al., Fast Training of Diffusion Models with Masked Transformers (MaskDiT), arXiv:2306.09305; `write`
fills the gaps as MAR does (Li et al., arXiv:2406.11838), by writing visible tokens into a field of mask tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.thirdparty.dit import DiTBlock, FinalLayer, TimestepEmbedder


class MaskDiT(nn.Module):
    """Latents [B, 4, 8, 8], timestep [B], indices of visible [B, V] and of all tokens [B, 16] -> [B, 4, 8, 8]."""

    def __init__(self, depth: int = 1, width: int = 32, heads: int = 2, *, write: bool = False) -> None:
        super().__init__()
        self.write = write
        self.x_embedder = nn.Conv2d(4, width, kernel_size=2, stride=2)
        self.t_embedder = TimestepEmbedder(width)
        self.pos_embed = nn.Parameter(torch.zeros(1, 16, width))
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.decoder_embed = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 16, width))
        self.decoder_blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, 16)

    def all_tokens(self, x: Tensor, ids_keep: Tensor, ids_restore: Tensor) -> Tensor:
        """[B, V, C] -> [B, 16, C]: visible tokens back in their places, mask tokens elsewhere."""
        batch, visible, width = x.shape
        if self.write:
            field = self.mask_token.expand(batch, ids_restore.shape[1], width).clone()
            field[torch.arange(batch)[:, None], ids_keep] = x
            return field
        missing = self.mask_token.expand(batch, ids_restore.shape[1] - visible, width)
        return torch.gather(torch.cat([x, missing], dim=1), 1, ids_restore.unsqueeze(-1).expand(-1, -1, width))

    def forward(self, x: Tensor, t: Tensor, ids_keep: Tensor, ids_restore: Tensor) -> Tensor:
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(t)
        x = torch.gather(x, 1, ids_keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        for block in self.blocks:
            x = block(x, c)
        x = self.all_tokens(self.decoder_embed(x), ids_keep, ids_restore) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x, c)
        x = self.final_layer(x, c).unflatten(1, (4, 4)).unflatten(-1, (2, 2, 4))
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], 4, 8, 8)
