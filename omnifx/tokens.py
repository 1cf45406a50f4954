"""Which tokens of a branch a step computes: how important and how old each is, and the choice of the first `k`.

All functions are plain tensor code on one branch's tokens, traced into the variants' graphs. Everything is float32.
Source: ToCa, arXiv:2410.05317, section 3.2 and its released code; DuCa, arXiv:2412.18911 (`kv-norm`).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

Score = Literal["none", "attention", "entropy", "kv-norm", "k-norm", "v-norm"]

NEEDS_QUERIES = ("entropy",)
"""Scores that are made from a cross-attention; the others come from an attention of the tokens to each other."""


class Selection(BaseModel):
    """How the tokens of a partial branch are chosen; one for a whole plan."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    score: Score
    """What makes a token important: the attention it received ("attention", s1), the entropy of its cross-attention
    ("entropy", s2), a small norm of its values, summed over the heads ("kv-norm"), a large mean norm of its keys or
    values ("k-norm", "v-norm"), or nothing."""
    staleness: float = Field(ge=0.0)
    """Added for each partial step since the token was last computed (s3); the papers' w3 / N."""
    bonus: float = Field(default=0.0, ge=0.0)
    """Share of its score that the first token of each window gets on top (s4)."""
    window: int = Field(default=1, ge=1)
    """Side of these windows, in tokens of an image."""
    shares_halves: bool = False
    """Whether both halves of a batch (conditional and unconditional samples) compute the same tokens."""


def importance(
    selection: Selection, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor | None:
    """A number for each token, before it is normalised over the tokens; None if the selection has no score.

    Args:
        selection: Its `score` says which number.
        query: [B, heads, N, width]; keys and values [B, heads, M, width].
        mask: Truth values or summands that broadcast to [B, heads, N, M].
        scale: Of the products; None: 1 / sqrt(width).

    Returns: [B, M], or [B, N] for "entropy"; float32.
    Memory: for "attention" the whole map [B, heads, N, M] in float32, which fused attention never makes, and
        2 B heads N M width FLOPs, half of what the attention itself costs. For "entropy" the same with few keys.
    """
    if selection.score == "none":
        return None
    if selection.score in ("kv-norm", "k-norm", "v-norm"):
        norms: Tensor = torch.linalg.vector_norm((key if selection.score == "k-norm" else value).float(), dim=-1)
        return (1.0 - norms).sum(1) if selection.score == "kv-norm" else norms.mean(1)
    attention = _attention_map(query, key, mask, scale)
    if selection.score == "attention":
        return attention.sum(1)
    if selection.shares_halves and attention.shape[0] % 2 == 0:
        attention = attention.unflatten(0, (2, -1)).mean(0).repeat(2, 1, 1)
    return 1.0 - (attention * (attention + 1e-7).log()).sum(-1)


def _attention_map(query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """The mean over the heads of the softmax, [B, N, M]."""
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    products = query.float() @ key.float().transpose(-2, -1) * scale
    if mask is not None:
        products = products.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else products + mask.float()
    return products.softmax(-1).mean(1)


def choose(
    selection: Selection, score: Tensor | None, stamp: Tensor, age: Tensor, k: int, grid: tuple[int, int] | None
) -> Tensor:
    """The tokens to compute: the `k` with the largest sum of importance, staleness and bonus.

    Args:
        score: [B, N], as `importance` made it; None: all tokens are as important.
        stamp: [B, N]: the age at which each token was computed last.
        age: []: partial steps since the last full one, before this one; ``age - stamp`` is a token's count (s3).
        grid: Rows and columns of the tokens; None: no bonus is given.

    Returns: [B, k], int64, in no order.
    """
    total = selection.staleness * (age - stamp)
    if score is not None:
        total = total + score / torch.linalg.vector_norm(score, dim=1, keepdim=True).clamp_min(1e-12)
    if gives_bonus(selection, grid):
        assert grid is not None
        total = _with_bonus(total, selection.bonus, selection.window, grid)
    if selection.shares_halves and total.shape[0] % 2 == 0:
        total = total.unflatten(0, (2, -1)).mean(0).repeat(2, 1)
    return total.topk(k, dim=1, sorted=False).indices


def gives_bonus(selection: Selection, grid: tuple[int, int] | None) -> bool:
    """Whether the selection's windows divide a grid of tokens."""
    wanted = selection.bonus > 0 and selection.window > 1 and grid is not None
    return wanted and not any(size % selection.window for size in grid or ())


def _with_bonus(total: Tensor, bonus: float, window: int, grid: tuple[int, int]) -> Tensor:
    rows, columns = (size // window for size in grid)
    windows = (
        total.reshape(-1, rows, window, columns, window).permute(0, 1, 3, 2, 4).reshape(-1, rows, columns, window**2)
    )
    best = windows.argmax(-1, keepdim=True) == torch.arange(window**2, device=total.device)
    windows = windows + bonus * windows * best
    return windows.reshape(-1, rows, columns, window, window).permute(0, 1, 3, 2, 4).reshape(total.shape)


__all__ = ["NEEDS_QUERIES", "Score", "Selection", "choose", "gives_bonus", "importance"]
