"""Ways in which people write blocks, each in the same small DiT: masks, fused and foreign operators, memory tricks.

Source: the block of Peebles and Xie, arXiv:2212.09748; each variant says where its own twist is common.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from tests.reference import Case, select
from tests.thirdparty.cases import DIT, case, times
from tests.thirdparty.dit import Attention, FinalLayer, Mlp, TimestepEmbedder, modulate
from tests.toys import noise

WIDTH, HEADS, TOKENS = 32, 2, 16


def split_heads(x: Tensor) -> Tensor:
    """[B, N, H D] -> [B, H, N, D]."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class QKV(nn.Module):
    """Attention with three projections in and one out; what happens in between is a function of q, k, v [B, H, N, D]
    and of what the model was given."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend
        self.q, self.k, self.v, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        out = self.attend(split_heads(self.q(x)), split_heads(self.k(x)), split_heads(self.v(x)), **given)
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """adaLN-zero around an attention and an MLP of any kind."""

    def __init__(self, attn: nn.Module | None = None, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attn = Attention(WIDTH, HEADS) if attn is None else attn
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.mlp = Mlp(WIDTH, 4 * WIDTH) if mlp is None else mlp
        self.ada = nn.Linear(WIDTH, 6 * WIDTH)

    def gains(self, c: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of attention, then of the MLP: [B, C] each."""
        return self.ada(F.silu(c)).chunk(6, dim=1)

    def forward(self, x: Tensor, c: Tensor, **given: Any) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.gains(c)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1), **given)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class Model(nn.Module):
    """Latents [B, 4, 8, 8], timestep [B], whatever the blocks take -> [B, 4, 8, 8]."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.x_embedder = nn.Conv2d(4, WIDTH, kernel_size=2, stride=2)
        self.pos_embed = nn.Parameter(torch.zeros(1, TOKENS, WIDTH))
        self.t_embedder = TimestepEmbedder(WIDTH)
        self.blocks = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(WIDTH, 16)

    def run_blocks(self, x: Tensor, c: Tensor, **given: Any) -> Tensor:
        """The trunk."""
        for block in self.blocks:
            x = block(x, c, **given)
        return x

    def forward(self, x: Tensor, t: Tensor, **given: Any) -> Any:
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(t)
        x = self.final_layer(self.run_blocks(x, c, **given), c).transpose(1, 2)
        return F.pixel_shuffle(x.unflatten(2, (4, 4)), 2)


def dit_case(
    model: nn.Module, *, kinds: Iterable[str] = DIT * 2, parts: Iterable[str] = ("attn", "mlp"), **given: Any
) -> Case:
    """A model of this file with its attention and MLP modules hooked; `given` are further arguments of a call."""
    moving = given.pop("moving", ())
    modules = [name for name in select(model, *parts) if "block" in name]
    return case(model, {"x": noise(2, 4, 8, 8), "t": times(2), **given}, modules, tuple(kinds), moving=moving)


def two(attend: Callable[..., Tensor], **given: Any) -> Case:
    """Two blocks with an attention of one's own."""
    return dit_case(Model(Block(QKV(attend)) for _ in range(2)), **given)


# -- masks and fused attention -----------------------------------------------------------------------------------------


def masked(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor) -> Tensor:
    """Attention with a mask that the caller gives."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def bool_mask() -> Case:
    """A mask of booleans, as for padded tokens."""
    mask = torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool)
    mask[1, ..., 12:] = False
    return two(masked, mask=mask)


def additive_mask() -> Case:
    """A bias to the scores."""
    return two(masked, mask=2.0 * noise(2, HEADS, TOKENS, TOKENS, seed=4))


def written_out_mask() -> Case:
    """Products and softmax written out, padding filled with the lowest number."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor) -> Tensor:
        scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~mask[:, None, None, :], torch.finfo(q.dtype).min)
        return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)

    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[1, 12:] = False
    return two(attend, mask=mask)


def causal() -> Case:
    """A causal DiT, as autoregressive video models have."""
    return two(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))


class TorchAttention(nn.Module):
    """nn.MultiheadAttention, with or without the weights it may return."""

    def __init__(self, *, need_weights: bool) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x, need_weights=self.need_weights)[0]


def torch_attention() -> Case:
    """nn.MultiheadAttention without weights, whose eager fast path is one operator."""
    return dit_case(Model(Block(TorchAttention(need_weights=False)) for _ in range(2)))


def torch_attention_with_weights() -> Case:
    """nn.MultiheadAttention as it is by default."""
    return dit_case(Model(Block(TorchAttention(need_weights=True)) for _ in range(2)))


class EncoderLayer(nn.Module):
    """nn.TransformerEncoderLayer, whose eager fast path is one operator for the whole layer."""

    def __init__(self, *, norm_first: bool) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, batch_first=True, norm_first=norm_first)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.layer(x + c[:, None])


def torch_encoder_layer() -> Case:
    """torch's own layers before a norm, as small diffusion models use them."""
    return dit_case(Model(EncoderLayer(norm_first=True) for _ in range(2)), parts=("self_attn", "linear2"))


def torch_post_norm_layer() -> Case:
    """torch's own layers by default, with norms on the trunk: the motion diffusion model (MDM) has them."""
    return dit_case(Model(EncoderLayer(norm_first=False) for _ in range(2)), parts=("self_attn", "linear2"))


def _near(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score - 0.1 * (q - k).abs()


def _within_frame(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q // 8 == k // 8


class FlexAttention(nn.Module):
    """flex_attention with a bias by distance and a mask by frame."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.mask: BlockMask = create_block_mask(_within_frame, None, None, TOKENS, TOKENS, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part) for part in self.qkv(x).chunk(3, dim=-1))
        out = flex_attention(q, k, v, score_mod=_near, block_mask=self.mask)
        return self.proj(out.transpose(1, 2).flatten(2))


def flex() -> Case:
    """flex_attention with score_mod and block_mask."""
    return dit_case(Model(Block(FlexAttention()) for _ in range(2)))


# -- foreign operators -------------------------------------------------------------------------------------------------


@torch.library.custom_op("omnifx_tests::memory_efficient", mutates_args=())
def memory_efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention on [B, N, H, D], as xFormers and FlashAttention lay it out."""
    q, k, v = (u.transpose(1, 2) for u in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


@memory_efficient.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@torch.library.custom_op("omnifx_tests::flash_attn_packed", mutates_args=())
def packed(qkv: Tensor) -> Tensor:
    """Attention on [B, N, 3, H, D]."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


@packed.register_fake
def _(qkv: Tensor) -> Tensor:
    batch, tokens, _, heads, head = qkv.shape
    return qkv.new_empty(batch, tokens, heads, head)


@torch.library.custom_op("omnifx_tests::norm_modulate", mutates_args=())
def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN as one kernel."""
    return modulate(F.layer_norm(x, x.shape[-1:]), shift, scale)


@norm_modulate.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("omnifx_tests::rms_norm", mutates_args=())
def rms_norm(x: Tensor) -> Tensor:
    """A norm as one kernel."""
    return F.rms_norm(x, x.shape[-1:])


@rms_norm.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("omnifx_tests::gate", mutates_args=())
def fused_gate(x: Tensor, gate: Tensor) -> Tensor:
    """A gate as one kernel."""
    return x * gate[:, None]


@fused_gate.register_fake
def _(x: Tensor, gate: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("omnifx_tests::add_norm", mutates_args=())
def add_norm(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The residual add and the next norm as one kernel: the sum, and its norm."""
    total = x + y
    return total, F.layer_norm(total, total.shape[-1:])


@add_norm.register_fake
def _(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("omnifx_tests::norm_into", mutates_args=("out",))
def norm_into(x: Tensor, out: Tensor) -> None:
    """A norm that writes into a buffer of the caller's."""
    out.copy_(F.layer_norm(x, x.shape[-1:]))


@norm_into.register_fake
def _(x: Tensor, out: Tensor) -> None:
    return None


@torch.library.custom_op("omnifx_tests::mlp", mutates_args=())
def whole_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A whole MLP as one kernel."""
    return F.linear(F.gelu(F.linear(x, up)), down)


@whole_mlp.register_fake
def _(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("omnifx_tests::attention_into", mutates_args=("out",))
def attention_into(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Attention that writes into a buffer of the caller's."""
    out.copy_(F.scaled_dot_product_attention(q, k, v))


@attention_into.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    return None


def opaque_attention_in_place() -> Case:
    """Attention without a result, as inference engines have it."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        attention_into(q, k, v, out)
        return out

    return two(attend)


def opaque_cross_attention() -> Case:
    """xFormers-like attention to a text."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return memory_efficient(*(u.transpose(1, 2) for u in (q, k, v))).transpose(1, 2)

    model = Model(TextBlock(attend) for _ in range(2))
    return dit_case(model, kinds=("cross_attention", "mlp") * 2, text=noise(2, 200, WIDTH, seed=5))


class TextBlock(Block):
    """A block that attends to a text alone."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__(attn=CrossQKV(attend))

    def forward(self, x: Tensor, c: Tensor, **given: Any) -> Tensor:
        _, scale1, gate1, _, scale2, gate2 = self.gains(c)
        x = x + gate1[:, None] * self.attn(self.norm1(x) * (1 + scale1[:, None]), given["text"])
        return x + gate2[:, None] * self.mlp(self.norm2(x) * (1 + scale2[:, None]))


class CrossQKV(QKV):
    """Keys and values from another sequence."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        out = self.attend(split_heads(self.q(x)), split_heads(self.k(text)), split_heads(self.v(text)))
        return self.proj(out.transpose(1, 2).flatten(2))


def opaque_attention() -> Case:
    """xFormers-like attention."""
    return two(lambda q, k, v: memory_efficient(*(u.transpose(1, 2) for u in (q, k, v))).transpose(1, 2))


def opaque_packed_attention() -> Case:
    """FlashAttention's function of one packed operand, told by its name alone."""
    return two(lambda q, k, v: packed(torch.stack([u.transpose(1, 2) for u in (q, k, v)], dim=2)).transpose(1, 2))


class OpaqueNormBlock(Block):
    """adaLN by a foreign operator, for attention and MLP."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.gains(c)
        x = x + gate1[:, None] * self.attn(norm_modulate(x, shift1, scale1))
        return x + gate2[:, None] * self.mlp(norm_modulate(x, shift2, scale2))


def opaque_norm() -> Case:
    """A fused adaLN: three operands, and yet no attention."""
    return dit_case(Model(OpaqueNormBlock() for _ in range(2)))


class SandwichBlock(Block):
    """A foreign norm also after each branch, before its gate."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        _, scale1, gate1, _, scale2, gate2 = self.gains(c)
        x = x + gate1[:, None] * rms_norm(self.attn(rms_norm(x) * (1 + scale1[:, None])))
        return x + gate2[:, None] * rms_norm(self.mlp(rms_norm(x) * (1 + scale2[:, None])))


def opaque_sandwich() -> Case:
    """Norms of Lumina and Z-Image, by a foreign operator."""
    return dit_case(Model(SandwichBlock() for _ in range(2)))


class OpaqueGateBlock(Block):
    """Gates by a foreign operator, which nobody can look into: they change with the timestep."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.gains(c)
        x = x + fused_gate(self.attn(modulate(self.norm1(x), shift1, scale1)), gate1)
        return x + fused_gate(self.mlp(modulate(self.norm2(x), shift2, scale2)), gate2)


def opaque_gate() -> Case:
    """A fused gate."""
    return dit_case(Model(OpaqueGateBlock() for _ in range(2)))


class ProductGateBlock(Block):
    """Gates by products with matrices that the timestep makes: heavy, but gates all the same."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.gains(c)
        x = x + self.attn(modulate(self.norm1(x), shift1, scale1)) @ torch.diag_embed(gate1)
        return x + self.mlp(modulate(self.norm2(x), shift2, scale2)) @ torch.diag_embed(gate2)


def product_gate() -> Case:
    """Channels mixed by the timestep behind each branch."""
    return dit_case(Model(ProductGateBlock() for _ in range(2)))


class OpaqueModulatedSandwichBlock(Block):
    """The branch's own output is normed and modulated by a foreign operator, and so changes with the timestep."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.gains(c)
        x = x + rms_norm(norm_modulate(self.attn(self.norm1(x)), shift1, scale1)) * gate1[:, None]
        return x + norm_modulate(self.mlp(self.norm2(x)), shift2, scale2) * gate2[:, None]


def opaque_modulated_sandwich() -> Case:
    """A fused adaLN behind the branches."""
    return dit_case(Model(OpaqueModulatedSandwichBlock() for _ in range(2)))


class AddNormBlock(Block):
    """The add around attention happens in a foreign operator; that around the MLP is an addition."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, _, _, gate2 = self.gains(c)
        x, normed = add_norm(x, gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1)))
        return x + gate2[:, None] * self.mlp(normed)


def opaque_add_norm() -> Case:
    """Only the MLPs can be seen."""
    return dit_case(Model(AddNormBlock() for _ in range(2)), kinds=("mlp",) * 2, parts=("mlp",))


class NormIntoBlock(Block):
    """A foreign norm that writes into an empty tensor."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.gains(c)
        normed = torch.empty_like(x)
        norm_into(x, normed)
        x = x + gate1[:, None] * self.attn(modulate(normed, shift1, scale1))
        norm_into(x, normed)
        return x + gate2[:, None] * self.mlp(modulate(normed, shift2, scale2))


def opaque_in_place() -> Case:
    """vLLM's style: operators without a result. The second one writes over what the first one wrote, and might read it:
    what feeds attention dies only with the MLP."""
    return dit_case(Model(NormIntoBlock() for _ in range(2)))


class OpaqueMlp(nn.Module):
    """One operator, with the weights as its operands."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(4 * WIDTH, WIDTH))
        self.down = nn.Parameter(torch.zeros(WIDTH, 4 * WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return whole_mlp(x, self.up, self.down)


def opaque_mlp() -> Case:
    """A whole branch in one operator."""
    return dit_case(Model(Block(mlp=OpaqueMlp()) for _ in range(2)))


# -- positions, writes in place ----------------------------------------------------------------------------------------


def _angles(head: int) -> Tensor:
    return torch.outer(torch.arange(TOKENS).float(), 100.0 ** -(torch.arange(0, head, 2) / head))


def rope_by_writes() -> Case:
    """Rotary positions written into an empty tensor, as Wan has them."""

    def rotate(x: Tensor) -> Tensor:
        angles = _angles(x.shape[-1])
        out = torch.empty_like(x)
        out[..., 0::2] = x[..., 0::2] * angles.cos() - x[..., 1::2] * angles.sin()
        out[..., 1::2] = x[..., 0::2] * angles.sin() + x[..., 1::2] * angles.cos()
        return out

    return two(lambda q, k, v: F.scaled_dot_product_attention(rotate(q), rotate(k), v))


def rope_in_place() -> Case:
    """Rotary positions written over queries and keys, but for the first tokens, by index."""

    def rotate(x: Tensor) -> Tensor:
        angles = _angles(x.shape[-1])[4:]
        places = torch.arange(4, TOKENS)
        even, odd = x[:, :, places, 0::2].clone(), x[:, :, places, 1::2].clone()
        x[:, :, places, 0::2] = even * angles.cos() - odd * angles.sin()
        x[:, :, places, 1::2] = even * angles.sin() + odd * angles.cos()
        return x

    return two(lambda q, k, v: F.scaled_dot_product_attention(rotate(q), rotate(k), v))


def rope_by_complex_numbers() -> Case:
    """Rotary positions as products of complex numbers, as Lumina and Z-Image have them; the caller gives them."""

    def rotate(x: Tensor, freqs: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * freqs).flatten(-2).type_as(x)

    def attend(q: Tensor, k: Tensor, v: Tensor, *, freqs: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(rotate(q, freqs), rotate(k, freqs), v)

    angles = _angles(WIDTH // HEADS)
    return two(attend, freqs=torch.polar(torch.ones_like(angles), angles))


class InPlaceBlock(Block):
    """Saves memory by writing over its values."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (gain[:, None] for gain in self.gains(c))
        y = self.attn(self.norm1(x).mul_(1 + scale1).add_(shift1))
        x += y.mul_(gate1)
        y = self.norm2(x)
        y *= 1 + scale2
        y += shift2
        return x.add_(self.mlp(y).mul_(gate2))


def in_place() -> Case:
    """Residual adds in place."""
    return dit_case(Model(InPlaceBlock() for _ in range(2)))


# -- MLPs --------------------------------------------------------------------------------------------------------------


class MixFFN(nn.Module):
    """Convolutions on the grid of tokens with a group norm: Sana's GLUMBConv."""

    def __init__(self) -> None:
        super().__init__()
        self.inverted = nn.Conv2d(WIDTH, 4 * WIDTH, 1)
        self.depth = nn.Conv2d(4 * WIDTH, 4 * WIDTH, 3, padding=1, groups=4 * WIDTH)
        self.norm = nn.GroupNorm(4, 2 * WIDTH)
        self.point = nn.Conv2d(2 * WIDTH, WIDTH, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        grid = x.transpose(1, 2).unflatten(2, (4, 4))
        value, gate = self.depth(F.silu(self.inverted(grid))).chunk(2, dim=1)
        return self.point(self.norm(value * F.silu(gate))).flatten(2).transpose(1, 2)


def mix_ffn() -> Case:
    """Depthwise convolution and group norm within the MLP; the convolutions alone make no other kind."""
    return dit_case(Model(Block(mlp=MixFFN()) for _ in range(2)), kinds=("self_attention", "conv") * 2)


class Experts(nn.Module):
    """Every expert computes every token; the two best ones and a shared one count."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, count, bias=False)
        self.experts = nn.ModuleList(Mlp(WIDTH, WIDTH) for _ in range(count))
        self.shared = Mlp(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        best, places = self.router(x).softmax(-1).topk(2, dim=-1)
        shares = torch.zeros(*x.shape[:-1], len(self.experts), dtype=x.dtype).scatter(-1, places, best)
        out = self.shared(x)
        for i, expert in enumerate(self.experts):
            out = out + shares[..., i : i + 1] * expert(x)
        return out


def experts() -> Case:
    """A mixture of experts with dense routing."""
    return dit_case(Model(Block(mlp=Experts()) for _ in range(2)))


# -- trunks, inputs and outputs ----------------------------------------------------------------------------------------


class CheckpointedModel(Model):
    """Training code that samples: checkpointing was left on."""

    def run_blocks(self, x: Tensor, c: Tensor, **given: Any) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, c, use_reentrant=False)
        return x


def checkpointed() -> Case:
    """Gradient checkpointing left on."""
    return dit_case(CheckpointedModel(Block() for _ in range(2)))


class TiedModel(Model):
    """One block applied several times, as in universal transformers."""

    def run_blocks(self, x: Tensor, c: Tensor, **given: Any) -> Tensor:
        for _ in range(3):
            x = self.blocks[0](x, c)
        return x


def tied() -> Case:
    """Each application has a cache of its own."""
    return dit_case(TiedModel([Block()]), kinds=DIT * 3)


class ControlledModel(Model):
    """Adds what a ControlNet gives after each block; in the last block within the MLP's own sum."""

    def run_blocks(self, x: Tensor, c: Tensor, **given: Any) -> Tensor:
        x = self.blocks[0](x, c) + given["control0"]
        x = self.blocks[1](x, c)
        return x + (self.blocks[2].mlp(x) + given["control1"])


def controlled() -> Case:
    """ControlNet residuals that differ at every step."""
    control = {f"control{i}": noise(2, TOKENS, WIDTH, seed=10 + i) for i in range(2)}
    model = ControlledModel(Block() for _ in range(3))
    made = dit_case(model, kinds=[*DIT, *DIT, "mlp"], moving=tuple(control), **control)
    modules = tuple(name for name in made.modules if name != "blocks.2.attn")
    return Case(model=made.model, inputs=made.inputs, modules=modules, kinds=made.kinds, moving=made.moving)


class ConvModel(Model):
    """Keeps the trunk as an image [B, C, H, W]; blocks see it as tokens."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        grid = self.x_embedder(x)
        c = self.t_embedder(t)
        for block in self.blocks:
            tokens = block(grid.permute(0, 2, 3, 1).flatten(1, 2), c)
            grid = tokens.unflatten(1, (4, 4)).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        x = self.final_layer(grid.flatten(2).transpose(1, 2), c).transpose(1, 2)
        return F.pixel_shuffle(x.unflatten(2, (4, 4)), 2)


def channels_last() -> Case:
    """Latents and trunk in channels-last memory."""
    made = dit_case(ConvModel(Block() for _ in range(2)))
    inputs = {**made.inputs, "x": made.inputs["x"].contiguous(memory_format=torch.channels_last)}
    return Case(model=made.model, inputs=inputs, modules=made.modules, kinds=made.kinds)


@dataclass
class Output:
    """What a model returns by name."""

    sample: Tensor
    embedding: Tensor | None = None


class NamedModel(Model):
    """Returns a dataclass."""

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return Output(sample=super().forward(x, t), embedding=self.t_embedder(t))


class PairModel(Model):
    """Returns a tuple: its result, tokens before the head, and None."""

    def run_blocks(self, x: Tensor, c: Tensor, **given: Any) -> Tensor:
        self.tokens = super().run_blocks(x, c, **given)
        return self.tokens

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return super().forward(x, t), None, {"tokens": self.tokens.mean(1)}


def named_output() -> Case:
    """A dataclass as output."""
    return dit_case(NamedModel(Block() for _ in range(2)))


def tuple_output() -> Case:
    """A tuple with further values as output."""
    return dit_case(PairModel(Block() for _ in range(2)))


VARIANTS: dict[str, Callable[[], Case]] = {
    made.__name__: made
    for made in (
        bool_mask, additive_mask, written_out_mask, causal, torch_attention, torch_attention_with_weights,
        torch_encoder_layer, torch_post_norm_layer, flex, opaque_attention, opaque_packed_attention, opaque_norm,
        opaque_sandwich,
        opaque_attention_in_place, opaque_cross_attention, opaque_gate, product_gate, opaque_modulated_sandwich,
        opaque_add_norm, opaque_in_place, opaque_mlp, rope_by_writes, rope_in_place, rope_by_complex_numbers,
        in_place, mix_ffn, experts, checkpointed, tied, controlled, channels_last, named_output, tuple_output,
    )
}  # fmt: skip
"""Cases by name."""
