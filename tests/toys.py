"""Toy models for tests: a plain DiT, some of the zoo's models by short names, a sampler loop, and captured graphs.

What tests of both toys and zoo need comes from `tests.reuse`.

Every parameter is initialised so that every branch matters: with the zero gates of adaLN-zero a wrong cache could not
be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx

from omnifx.backends.eager import EagerLowering
from omnifx.capture import state_inputs
from omnifx.example_inputs import lively
from omnifx.graph import Analysis, analysis_of
from omnifx.passes.find_branches import FindBranches
from omnifx.program import Program
from tests.reuse import EAGER, Pattern, Reference, distance, letters_of, noise
from tests.zoo.entry import Tiny

__all__ = [
    "EAGER",
    "Pattern",
    "Reference",
    "Tiny",
    "distance",
    "letters_of",
    "lively",
    "noise",
]  # what tests import from here

# -- the toy -----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention, or attention on a context."""

    def __init__(self, width: int, heads: int, context: int = 0) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(context or width, width)
        self.v = nn.Linear(context or width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        q, k, v = (
            layer(value).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, value in ((self.q, x), (self.k, source), (self.v, source))
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """A DiT block: x + gate * attn(norm(x)), optionally x + cross(x, text), x + gate * mlp(norm(x))."""

    def __init__(self, width: int, heads: int, text: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attn = Attention(width, heads)
        self.cross = Attention(width, heads, context=text) if text else None
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = Mlp(width, 4 * width)
        self.ada = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, c: Tensor, text: Tensor | None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(F.silu(c))[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        if self.cross is not None:
            x = x + self.cross(x, text)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class ToyDiT(nn.Module):
    """Latents [B, 4, 8, 8], timestep [B], label [B], optional text [B, T, text] -> [B, 4, 8, 8]."""

    def __init__(self, num_blocks: int = 2, width: int = 32, heads: int = 2, text: int = 0) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Conv2d(4, width, 2, 2)
        self.position = nn.Parameter(torch.zeros(1, 16, width))
        self.time = Mlp(width, width)
        self.label = nn.Embedding(10, width)
        self.blocks = nn.ModuleList(Block(width, heads, text) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.head = nn.Linear(width, 4 * 4)

    def positions(self, rows: int, columns: int) -> Tensor:
        """[1, rows * columns, width], or what broadcasts to it."""
        return self.position

    def forward(self, x: Tensor, t: Tensor, y: Tensor, text: Tensor | None = None) -> Tensor:
        batch, _, height, width = x.shape
        angles = t[:, None].float() * torch.exp(-torch.arange(self.width // 2) * 9.2 / (self.width // 2))
        c = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1)) + self.label(y)
        x = self.embed(x).flatten(2).transpose(1, 2) + self.positions(height // 2, width // 2)
        for block in self.blocks:
            x = block(x, c, text)
        x = self.head(self.norm(x)).reshape(batch, height // 2, width // 2, 2, 2, 4)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, 4, height, width)


class FreeDiT(ToyDiT):
    """The toy for latents of any even height and width: [B, 4, H, W]; its positions are waves along both."""

    def positions(self, rows: int, columns: int) -> Tensor:
        """[1, rows * columns, width]."""
        frequencies = torch.exp(-0.3 * torch.arange(self.width // 4))
        down = torch.arange(rows)[:, None, None] * frequencies.expand(rows, columns, -1)
        along = torch.arange(columns)[None, :, None] * frequencies.expand(rows, columns, -1)
        waves = torch.cat([down.sin(), down.cos(), along.sin(), along.cos()], dim=-1)
        return waves.reshape(1, -1, self.width)


def free_toy(num_blocks: int = 1, *, text: int = 0, seed: int = 0) -> FreeDiT:
    """A lively toy for any size."""
    model = lively(FreeDiT(num_blocks, text=text), seed)
    assert isinstance(model, FreeDiT)
    return model


def toy(num_blocks: int = 2, *, text: int = 0, seed: int = 0) -> ToyDiT:
    """A lively toy DiT."""
    model = lively(ToyDiT(num_blocks, text=text), seed)
    assert isinstance(model, ToyDiT)
    return model


class ToyInParts(ToyDiT):
    """A toy whose graph breaks before it begins, so that it is captured in parts."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, text: Tensor | None = None) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x, t, y, text)


def toy_in_parts(num_blocks: int = 2) -> ToyInParts:
    """The toy of so many blocks, with a graph break."""
    model = ToyInParts(num_blocks)
    model.load_state_dict(toy(num_blocks).state_dict())
    return model


def toy_inputs(batch: int = 1, *, text: int = 0, seed: int = 0) -> tuple[Tensor, ...]:
    """Arguments of one call of the toy."""
    given = (noise(batch, 5, text, seed=7),) if text else ()
    return (noise(batch, 4, 8, 8, seed=seed), torch.full((batch,), 500.0), torch.arange(batch) % 10, *given)


# -- the sampler -------------------------------------------------------------------------------------------------------


def timesteps(steps: int) -> list[float]:
    """Descending, evenly spaced in [1, 981]."""
    return [float(round(981 - k * 980 / max(1, steps - 1))) for k in range(steps)]


def sampling(
    model: Callable[..., Any],
    *,
    seed: int,
    steps: int,
    label: int = 3,
    text: Tensor | None = None,
    cfg: int | None = None,
    start: int = 0,
    latents: Tensor | None = None,
    before: Callable[[int, Tensor], Tensor] | None = None,
) -> Iterator[Tensor]:
    """The steps of one generation, one by one: an Euler-like loop whose latents drift by some percent a step.

    `cfg` is the label of a second, unconditional call; `start` is the step to begin at (image to image); `before` may
    change the latents, or anything else, before a step.
    """
    x = noise(1, 4, 8, 8, seed=seed) if latents is None else latents
    given = () if text is None else (text,)
    for k, time in enumerate(timesteps(steps)):
        if k < start:
            continue
        if before is not None:
            x = before(k, x)
        t = torch.full((x.shape[0],), time)
        with torch.no_grad():
            v = model(x, t, torch.full((x.shape[0],), label), *given)
            if cfg is not None:
                base = model(x, t, torch.full((x.shape[0],), cfg), *given)
                v = base + 2.0 * (v - base)
        x = x - v / (4 * steps)
        yield x


def generate(model: Callable[..., Any], *, seed: int, steps: int = 6, **kwargs: Any) -> Tensor:
    """One whole generation; see `sampling`."""
    *_, last = sampling(model, seed=seed, steps=steps, **kwargs)
    return last


# -- capture -----------------------------------------------------------------------------------------------------------


@dataclass
class Traced:
    """A captured and analysed ATen graph, and the values it was called with."""

    gm: fx.GraphModule
    inputs: list[Any]
    """Real values of all inputs, parameters included."""
    fake_inputs: list[Any]
    static: tuple[int, ...]

    @property
    def analysis(self) -> Analysis:
        """What FindBranches found."""
        return analysis_of(self.gm)

    @property
    def kinds(self) -> list[str]:
        """Kinds of the branches, in graph order."""
        return [branch.kind for branch in self.analysis.branches]

    def run(self, gm: fx.GraphModule | None = None, extra: Sequence[Any] = ()) -> list[Any]:
        """Outputs of the graph, or of a changed copy of it, on these inputs."""
        with torch.no_grad():
            return list((gm or self.gm).forward(*self.inputs, *extra))

    def program(self, budget: int = 2**62) -> Program:
        """A program on the graph, lowered eagerly."""
        return Program(self.gm, self.fake_inputs, self.static, EagerLowering(), budget=budget)


def trace(model: nn.Module, *args: Any, **kwargs: Any) -> Traced:
    """Capture the ATen graph of one call as the backend does, and analyse it."""
    found: list[Traced] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        static, _ = state_inputs(gm)

        def inner(graph: fx.GraphModule, inputs: Sequence[Any], **arguments: Any) -> Any:
            fixed = {*static, *(arguments.get("static_input_idxs") or ())}
            traced = Traced(graph, [], list(inputs), tuple(sorted(fixed)))
            found.append(traced)

            def run(*values: Any) -> Any:
                traced.inputs[:] = values
                return graph.forward(*values)

            return make_boxed_func(run)

        with functorch_config.patch(enable_autograd_cache=False):
            return compile_fx(gm, list(example_inputs), inner_compile=inner)

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(*args, **kwargs)
    (traced,) = found
    FindBranches(static=frozenset(traced.static))(traced.gm)
    return traced


# -- diffusers ---------------------------------------------------------------------------------------------------------


def _from_zoo(name: str) -> Tiny:
    from tests.zoo.models import ZOO  # late: it imports every model of diffusers, and a process may want toys alone

    return ZOO[name].make()


TINY: dict[str, Callable[[], Tiny]] = {
    "dit": partial(_from_zoo, "DiTTransformer2DModel"),
    "pixart": partial(_from_zoo, "PixArtTransformer2DModel"),
    "sd3": partial(_from_zoo, "SD3Transformer2DModel"),
    "flux": partial(_from_zoo, "FluxTransformer2DModel"),
    "wan": partial(_from_zoo, "WanTransformer3DModel"),
    "cogvideox": partial(_from_zoo, "CogVideoXTransformer3DModel"),
    "latte": partial(_from_zoo, "LatteTransformer3DModel"),
}
"""Some of the zoo's models, by short names."""


# -- one branch, for golden graphs -------------------------------------------------------------------------------------


class Gated(nn.Module):
    """``x + sigmoid(t) * f(x)`` on x [1, 4, 8], with f two matrix products; the head is another one."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16, bias=False)
        self.down = nn.Linear(16, 8, bias=False)
        self.head = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x + torch.sigmoid(t)[:, None, None] * self.down(torch.relu(self.up(x[0])))[None]
        return self.head(x[0])[None]


def gated() -> Traced:
    """The captured graph of `Gated`: one MLP branch named "down", whose cut is its last matrix product."""
    return trace(lively(Gated()), noise(1, 4, 8), torch.tensor([0.5]))
