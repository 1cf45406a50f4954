"""Toy models for tests: a plain DiT, tiny configurations of real diffusers models, a sampler loop, and an eager
reference.

Every parameter is initialised so that every branch matters: with the zero gates of adaLN-zero a wrong cache could not
be seen.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx

from omnifx.backends.eager import EagerLowering
from omnifx.capture import state_inputs
from omnifx.graph import Analysis, analysis_of
from omnifx.passes.find_branches import FindBranches
from omnifx.plan import COMPUTE, REUSE, Action, Correction, Plan
from omnifx.policy import Policy
from omnifx.profile import Profile
from omnifx.program import Program
from omnifx.runlog import GenerationLog

EAGER = {"lowering": "eager", "profile_cache": False}
"""Options of most tests: no Inductor, and nothing kept on disk."""


@torch.no_grad()
def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Re-initialise everything: weights N(0, 1/fan_in), norm weights 1 + 0.2 N, the rest 0.3 N."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() >= 2:
            values = values / math.sqrt(parameter[0].numel())
        elif "norm" in name and "weight" in name:
            values = 1.0 + 0.2 * values
        else:
            values = 0.3 * values
        parameter.copy_(values)
    return model.eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Normal noise of a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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

    def forward(self, x: Tensor, t: Tensor, y: Tensor, text: Tensor | None = None) -> Tensor:
        batch, _, height, width = x.shape
        angles = t[:, None].float() * torch.exp(-torch.arange(self.width // 2) * 9.2 / (self.width // 2))
        c = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1)) + self.label(y)
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x, c, text)
        x = self.head(self.norm(x)).reshape(batch, height // 2, width // 2, 2, 2, 4)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, 4, height, width)


def toy(num_blocks: int = 2, *, text: int = 0, seed: int = 0) -> ToyDiT:
    """A lively toy DiT."""
    model = lively(ToyDiT(num_blocks, text=text), seed)
    assert isinstance(model, ToyDiT)
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


@dataclass(frozen=True, kw_only=True)
class Pattern(Policy):
    """Repeat a pattern of rows: F a full step, r a full reuse, a / m reuse of attention / MLP branches alone, c a
    corrected r."""

    name = "pattern"
    uses_noise = False

    pattern: str = "Frr"
    gamma: float = 0.5

    def plan(self, profile: Profile, *, speedup: float | None = None) -> Plan:
        letters = [self.pattern[k % len(self.pattern)] for k in range(profile.num_steps)]
        rows = [tuple(_action(letter, branch.kind) for branch in profile.meta.branches) for letter in letters]
        corrections = [Correction(gamma=self.gamma) if letter == "c" else None for letter in letters]
        return Plan.from_rows(profile, rows, policy=self.name, corrections=corrections)


def _action(letter: str, kind: str) -> Action:
    if letter == "F":
        return COMPUTE
    reused = {"a": "attention" in kind, "m": kind == "mlp"}.get(letter, True)
    return REUSE if reused else COMPUTE


# -- the reference -----------------------------------------------------------------------------------------------------


@dataclass
class Reference:
    """A plain implementation of reuse with forward hooks: module outputs of earlier steps instead of the modules.

    Each stream (told by the label) has its own step count and its own outputs. `letters` says what each step does, as
    in `Pattern`; it may be a mapping from label to letters.
    """

    model: nn.Module
    letters: str | Mapping[int, str]
    modules: tuple[str, ...] = ()
    """Names of the hooked modules; empty: the attention, cross-attention and MLP modules of the toy's blocks."""
    stream_of: Callable[..., Any] = field(default=lambda x, t, y, *rest: int(y.reshape(-1)[0]))

    def __post_init__(self) -> None:
        self.steps: dict[Any, int] = defaultdict(int)
        self.kept: dict[Any, dict[str, Any]] = defaultdict(dict)
        if not self.modules:
            ends = (".attn", ".cross", ".mlp")
            self.modules = tuple(name for name, _ in self.model.named_modules() if name.endswith(ends))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stream = self.stream_of(*args, **kwargs)
        letters = self.letters if isinstance(self.letters, str) else self.letters[stream]
        letter = letters[self.steps[stream]]
        self.steps[stream] += 1
        kept = self.kept[stream]
        handles = []
        for name in self.modules:
            kind = "mlp" if name.endswith(".mlp") else "attention"
            hook = _replay(kept, name) if _action(letter, kind) == REUSE else _keep(kept, name)
            handles.append(self.model.get_submodule(name).register_forward_hook(hook))
        try:
            return self.model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()


def _keep(kept: dict[str, Any], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        kept[name] = output

    return hook


def _replay(kept: dict[str, Any], name: str) -> Callable[..., Any]:
    return lambda module, args, output: kept[name]


def letters_of(log: GenerationLog, stream: int = 0) -> str:
    """What one stream of a generation ran, as a `Reference` takes it: F full, r reuse, m any mixture."""
    short = {"full": "F", "reuse": "r"}
    return "".join(short.get(s.variant.split("+")[0], "m") for s in log.steps if s.stream == stream)


def distance(a: Tensor, b: Tensor) -> float:
    """``||a - b|| / ||b||``."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


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


@dataclass
class Tiny:
    """A tiny diffusers model and one call of it."""

    model: nn.Module
    inputs: dict[str, Any]
    modules: tuple[str, ...]
    """Attention and feed-forward modules whose outputs a reuse step takes from an earlier one."""

    def next_inputs(self) -> dict[str, Any]:
        """Another step's call: other latents and timestep, the same conditioning."""
        x, t = self.inputs["hidden_states"], self.inputs["timestep"]
        return {**self.inputs, "hidden_states": 0.9 * x + 0.3 * noise(*x.shape, seed=99), "timestep": t * 4 / 5}


def _modules(model: nn.Module, *patterns: str) -> tuple[str, ...]:
    import re

    return tuple(n for n, _ in model.named_modules() if any(re.fullmatch(pattern, n) for pattern in patterns))


def tiny_dit() -> Tiny:
    """DiT: self-attention and MLP, adaLN-zero."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=8, norm_num_groups=8
    )
    inputs = {
        "hidden_states": noise(1, 4, 8, 8),
        "timestep": torch.tensor([500.0]),
        "class_labels": torch.tensor([3]),
        "return_dict": False,
    }
    return Tiny(lively(model), inputs, _modules(model, r"transformer_blocks\.\d+\.(attn1|ff)"))


def tiny_pixart() -> Tiny:
    """PixArt: self-attention, cross-attention, MLP; adaLN-single."""
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        norm_num_groups=8,
        cross_attention_dim=32,
        sample_size=8,
        caption_channels=24,
        use_additional_conditions=False,
    )
    inputs = {
        "hidden_states": noise(1, 4, 8, 8),
        "encoder_hidden_states": noise(1, 6, 24, seed=1),
        "timestep": torch.tensor([500.0]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }
    return Tiny(lively(model), inputs, _modules(model, r"transformer_blocks\.\d+\.(attn1|attn2|ff)"))


def tiny_sd3() -> Tiny:
    """SD3: joint attention of image and text, an MLP for each; the last block drops the text."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        out_channels=4,
        pos_embed_max_size=8,
    )
    inputs = {
        "hidden_states": noise(1, 4, 8, 8),
        "encoder_hidden_states": noise(1, 6, 24, seed=1),
        "pooled_projections": noise(1, 20, seed=2),
        "timestep": torch.tensor([500.0]),
        "return_dict": False,
    }
    return Tiny(lively(model), inputs, _modules(model, r"transformer_blocks\.\d+\.(attn|ff|ff_context)"))


def tiny_flux() -> Tiny:
    """Flux: one block with joint attention, two with attention and MLP in parallel."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 6, 6),
    )
    ids = torch.zeros(16, 3)
    ids[:, 1], ids[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    inputs = {
        "hidden_states": noise(1, 16, 8),
        "encoder_hidden_states": noise(1, 6, 24, seed=1),
        "pooled_projections": noise(1, 20, seed=2),
        "timestep": torch.tensor([0.5]),
        "img_ids": ids,
        "txt_ids": torch.zeros(6, 3),
        "return_dict": False,
    }
    blocks = (r"transformer_blocks\.\d+\.(attn|ff|ff_context)", r"single_transformer_blocks\.\d+\.proj_out")
    return Tiny(lively(model), inputs, _modules(model, *blocks))


def tiny_wan() -> Tiny:
    """Wan: video; self-attention with rotary positions, cross-attention, MLP."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        rope_max_seq_len=32,
    )
    inputs = {
        "hidden_states": noise(1, 4, 2, 8, 8),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": noise(1, 6, 24, seed=1),
        "return_dict": False,
    }
    return Tiny(lively(model), inputs, _modules(model, r"blocks\.\d+\.(attn1|attn2|ffn)"))


def tiny_cogvideox() -> Tiny:
    """CogVideoX: video; joint attention, and one MLP over text and video together."""
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=24,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        patch_size=2,
        max_text_seq_length=6,
    )
    inputs = {
        "hidden_states": noise(1, 2, 4, 8, 8),
        "encoder_hidden_states": noise(1, 6, 24, seed=1),
        "timestep": torch.tensor([500.0]),
        "return_dict": False,
    }
    return Tiny(lively(model), inputs, _modules(model, r"transformer_blocks\.\d+\.(attn1|ff)"))


def tiny_latte() -> Tiny:
    """Latte: video; spatial blocks with cross-attention, temporal blocks without."""
    from diffusers import LatteTransformer3DModel

    model = LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=24,
        video_length=2,
    )
    inputs = {
        "hidden_states": noise(1, 4, 2, 8, 8),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": noise(1, 6, 24, seed=1),
        "return_dict": False,
    }
    blocks = (r"transformer_blocks\.\d+\.(attn1|attn2|ff)", r"temporal_transformer_blocks\.\d+\.(attn1|attn2|ff)")
    return Tiny(lively(model), inputs, _modules(model, *blocks))


TINY: dict[str, Callable[[], Tiny]] = {
    "dit": tiny_dit,
    "pixart": tiny_pixart,
    "sd3": tiny_sd3,
    "flux": tiny_flux,
    "wan": tiny_wan,
    "cogvideox": tiny_cogvideox,
    "latte": tiny_latte,
}
"""Tiny diffusers models by name."""


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
