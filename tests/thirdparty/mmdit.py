"""MMDiT: text and image tokens with weights of their own, attending together; and SD3.5's blocks with two attentions.

Source: Esser et al., Scaling Rectified Flow Transformers, arXiv:2403.03206, in the shape of the package mmdit: joint
attention takes and gives one tensor for each kind of token. The second attention is that of Stable Diffusion 3.5.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.thirdparty.dit import Attention, Mlp, TimestepEmbedder


class RMSNorm(nn.Module):
    """Unit norm along the last axis, for each head."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.norm_weight = nn.Parameter(torch.ones(heads, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.norm_weight * x.shape[-1] ** 0.5


class JointAttention(nn.Module):
    """Attention over the tokens of all inputs at once; each input has its own projections."""

    def __init__(self, widths: tuple[int, ...], heads: int, head: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.ModuleList(nn.Linear(width, 3 * heads * head, bias=False) for width in widths)
        self.to_out = nn.ModuleList(nn.Linear(heads * head, width, bias=False) for width in widths)
        self.q_norm = nn.ModuleList(RMSNorm(heads, head) for _ in widths)
        self.k_norm = nn.ModuleList(RMSNorm(heads, head) for _ in widths)

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        all_qkv = []
        for x, to_qkv, q_norm, k_norm in zip(inputs, self.to_qkv, self.q_norm, self.k_norm, strict=True):
            q, k, v = to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            all_qkv.append(torch.stack([q_norm(q), k_norm(k), v]))
        q, k, v = torch.cat(all_qkv, dim=3).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        parts = out.split([x.shape[1] for x in inputs], dim=1)
        return tuple(to_out(part) for part, to_out in zip(parts, self.to_out, strict=True))


class MMDiTBlock(nn.Module):
    """Joint attention, then a feed-forward layer for each kind of token; gains before and gates after each."""

    def __init__(self, text: int, image: int, cond: int, heads: int, *, dual: bool, last: bool) -> None:
        super().__init__()
        self.dual = dual
        self.last = last
        self.to_cond = nn.Linear(cond, (2 if last else 4) * text + (6 if dual else 4) * image)
        self.sizes = [text] * (2 if last else 4) + [image] * (6 if dual else 4)
        self.text_norm = nn.LayerNorm(text, elementwise_affine=False)
        self.image_norm = nn.LayerNorm(image, elementwise_affine=False)
        self.joint_attn = JointAttention((text, image), heads, image // heads)
        self.attn2 = Attention(image, heads) if dual else None
        self.text_ff = None if last else Mlp(text, 4 * text)
        self.image_ff = Mlp(image, 4 * image)

    def forward(self, text: Tensor, image: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        gains = [g.unsqueeze(1) for g in self.to_cond(F.silu(cond)).split(self.sizes, dim=-1)]
        text_gains, image_gains = gains[: 2 if self.last else 4], gains[2 if self.last else 4 :]
        normed = self.image_norm(image)
        text_out, image_out = self.joint_attn(
            (self.text_norm(text) * (1 + text_gains[0]), normed * (1 + image_gains[0]))
        )
        attended = image + image_out * image_gains[1]
        if self.attn2 is not None:
            attended = attended + self.attn2(normed * (1 + image_gains[4])) * image_gains[5]
        image = attended + self.image_ff(self.image_norm(attended) * (1 + image_gains[2])) * image_gains[3]
        if self.text_ff is None:
            return text, image
        text = text + text_out * text_gains[1]
        return text + self.text_ff(self.text_norm(text) * (1 + text_gains[2])) * text_gains[3], image


class MMDiT(nn.Module):
    """Latents [B, 4, 8, 8], timestep [B], text [B, T, 24], pooled text [B, 20] -> [B, 4, 8, 8]."""

    def __init__(self, depth: int = 2, *, dual: bool = False) -> None:
        super().__init__()
        self.patch = nn.Conv2d(4, 32, kernel_size=2, stride=2)
        self.position = nn.Parameter(torch.zeros(1, 16, 32))
        self.text_in = nn.Linear(24, 48)
        self.time = TimestepEmbedder(40)
        self.pooled = nn.Linear(20, 40)
        self.blocks = nn.ModuleList(MMDiTBlock(48, 32, 40, 2, dual=dual, last=i == depth - 1) for i in range(depth))
        self.norm = nn.LayerNorm(32, elementwise_affine=False)
        self.to_scale = nn.Linear(40, 32)
        self.out = nn.Linear(32, 16)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        image = self.patch(x).flatten(2).transpose(1, 2) + self.position
        text = self.text_in(text)
        cond = self.time(t) + self.pooled(pooled)
        for block in self.blocks:
            text, image = block(text, image, cond)
        image = self.out(self.norm(image) * (1 + self.to_scale(cond).unsqueeze(1)))
        return F.pixel_shuffle(image.transpose(1, 2).unflatten(2, (4, 4)), 2)
