"""ProveTokens: which branches work token by token, and why the others do not."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnifx.graph import Branch, TokenSource, graph_text
from omnifx.passes.bind_sizes import BindSizes
from omnifx.passes.find_branches import FindBranches
from omnifx.passes.prove_tokens import ProveTokens
from tests.toys import TINY, Traced, free_toy, lively, noise, toy, toy_inputs, trace
from tests.zoo.models import ZOO


def proven(traced: Traced) -> dict[str, Branch]:
    """The cacheable branches by name, after the pass."""
    ProveTokens()(traced.gm)
    return {branch.name: branch for branch in traced.analysis.cacheable}


def proven_tiny(name: str) -> dict[str, Branch]:
    tiny = TINY[name]()
    return proven(trace(tiny.model, **tiny.inputs))


class Residual(nn.Module):
    """``x + sigmoid(t) * down(f(up(x)))`` on x [B, 16, 8]: what `f` does decides whether tokens stay apart."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f
        self.up, self.down, self.head = nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(8, 8)
        self.depthwise = nn.Conv1d(24, 24, 3, padding=1, groups=24)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.up(x)
        h = self.depthwise(h.mT).mT if self.f is convolved else self.f(h)
        return self.head(x + torch.sigmoid(t)[:, None, None] * self.down(h))


def convolved(h: Tensor) -> Tensor:
    """A mix of neighbouring tokens; the module has its weights."""
    raise NotImplementedError


def gated_halves(h: Tensor) -> Tensor:
    first, second = h.chunk(2, dim=-1)
    return torch.cat([second * F.gelu(first), first], dim=-1)


def by_heads(h: Tensor) -> Tensor:
    heads = h.unflatten(-1, (3, 8)).transpose(1, 2)
    return F.rms_norm(heads, (8,)).transpose(1, 2).flatten(2)


def with_positions(h: Tensor) -> Tensor:
    return h + torch.linspace(-1, 1, 16)[:, None]


KEEPS_APART = {
    "gelu": F.gelu,
    "layer norm over channels": lambda h: F.layer_norm(h, (24,)),
    "softmax over channels": lambda h: h.softmax(-1),
    "group norm of a token's channels": by_heads,
    "gated halves": gated_halves,
    "positions added to the tokens": with_positions,
    "channels padded": lambda h: F.pad(h, (2, 2))[..., 2:-2] + 1,
    "a mean over channels": lambda h: h - h.mean(-1, keepdim=True),
}

MIXES = {
    "softmax over tokens": (lambda h: h.softmax(1), "needs every token of"),
    "a mean over tokens": (lambda h: h - h.mean(1, keepdim=True), "needs every token of"),
    "a norm over tokens": (lambda h: F.layer_norm(h.mT, (16,)).mT, "needs every token of"),
    "a maximum over tokens": (lambda h: h * h.amax(1, keepdim=True), "needs every token of"),
    "tokens in two dimensions": (lambda h: h.unflatten(1, (4, 4)).roll(1, 1).flatten(1, 2), "reshapes the token axis"),
    "shifted tokens": (lambda h: torch.cat([h[:, 1:], h[:, :1]], 1), "joins tokens of several values"),
    "running sums": (lambda h: h.cumsum(1), "cumsum"),
    "samples joined with tokens": (lambda h: h.reshape(16, -1).softmax(0).reshape(h.shape), "."),
    "a convolution": (convolved, "is a convolution, which mixes neighbouring tokens"),
    "tokens multiplied with each other": (
        lambda h: (h @ h.mT) @ h / 16,
        "has a column for each of the tokens|needs every token",
    ),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("what", KEEPS_APART)
def test_what_keeps_tokens_apart_is_proven(what: str, batch: int) -> None:
    traced = trace(lively(Residual(KEEPS_APART[what])), noise(batch, 16, 8), torch.full((batch,), 0.5))
    before = graph_text(traced.gm)

    (branch,) = proven(traced).values()

    assert branch.token_reason == ""
    assert branch.tokens is not None
    assert (branch.tokens.batch, branch.tokens.number) == (batch, 16)
    assert branch.tokens.flops == 2 * batch * 16 * (8 * 24 + 24 * 8)
    assert graph_text(traced.gm) == before


@pytest.mark.parametrize("what", MIXES)
def test_what_mixes_tokens_is_refused_with_its_reason(what: str) -> None:
    f, reason = MIXES[what]
    traced = trace(lively(Residual(f)), noise(2, 16, 8), torch.full((2,), 0.5))

    branches = proven(traced)

    for branch in branches.values():
        assert branch.tokens is None
    assert any(re.search(reason, branch.token_reason) for branch in branches.values()), branches


def test_dit_has_token_wise_mlps_and_no_other() -> None:
    branches = proven_tiny("dit")

    assert {b.kind: b.tokens is not None for b in branches.values()} == {"self_attention": False, "mlp": True}
    refused = branches["transformer_blocks.0.attn1"]
    assert refused.token_reason.endswith("is a self-attention, whose keys and values need every token")
    tokens = branches["transformer_blocks.0.ff"].tokens
    assert tokens is not None
    assert (tokens.number, tokens.grid, tokens.queries) == (16, (4, 4), None)


def test_a_cross_attention_keeps_the_keys_of_its_text_whole() -> None:
    branch = proven(trace(toy(1, text=24), *toy_inputs(2, text=24)))["blocks.0.cross"]

    assert branch.tokens is not None
    keys_and_values = 2 * (2 * 2 * 5 * 24 * 32)
    assert branch.tokens.flops == branch.flops - keys_and_values
    assert branch.tokens.queries is not None


def test_flux_tokens_are_parts_of_its_joint_attention_and_singles_hold_theirs() -> None:
    branches = proven_tiny("flux")

    image, text = (branches[f"transformer_blocks.0.{name}"].tokens for name in ("ff", "ff_context"))
    assert image is not None
    assert image.keys is not None
    assert text is not None
    assert image.keys == TokenSource(image.keys.node, start=6, total=22)
    assert text.keys == TokenSource(image.keys.node, start=0, total=22)
    assert "joint attention" in branches["transformer_blocks.0.attn"].token_reason
    single = branches["single_transformer_blocks.1"].tokens
    assert single is not None
    assert len(single.held) == 1
    assert single.held_bytes == 4 * 22 * 32
    assert single.spared_flops > 0


def test_the_convolutions_of_a_mixing_mlp_are_refused() -> None:
    tiny = ZOO["SanaTransformer2DModel"].make()
    branches = proven(trace(tiny.model, **tiny.inputs))

    convs = [branch for branch in branches.values() if branch.kind == "conv"]
    assert len(convs) == 2
    for branch in convs:
        assert "is a convolution, which mixes neighbouring tokens" in branch.token_reason


def test_symbolic_sizes_are_refused() -> None:
    traced = trace_dynamic(free_toy(), *toy_inputs())

    BindSizes()(traced.gm)
    FindBranches(static=frozenset(traced.static))(traced.gm)
    reasons = {branch.token_reason.split(",")[0] for branch in proven(traced).values()}
    assert "its sizes are symbolic" in reasons


def trace_dynamic(model: nn.Module, *args: Tensor) -> Traced:
    """The graph with symbolic heights and widths."""
    torch._dynamo.mark_dynamic(args[0], 2)
    torch._dynamo.mark_dynamic(args[0], 3)
    return trace(model, *args)
