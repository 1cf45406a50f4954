"""What FindBranches takes for a branch, what it leaves alone, and where it cuts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import omnifx
from omnifx.errors import ConfigError, PassError
from omnifx.graph import Branch, analysis_of, dead_without, graph_text, node_named
from omnifx.passes.find_branches import FindBranches
from tests.thirdparty.parallel import SingleStreamBlock
from tests.thirdparty.variants import fused_gate, norm_modulate, rms_norm
from tests.toys import TINY, Attention, Mlp, Traced, gated, lively, noise, toy, toy_inputs, trace

DIT = ["self_attention", "mlp"]
TEXT = ["self_attention", "cross_attention", "mlp"]

KINDS = {
    "dit": DIT * 2,
    "pixart": TEXT * 2,
    "sd3": ["joint_attention", "mlp", "mlp", "self_attention", "mlp"],
    "flux": ["joint_attention", "mlp", "mlp", "parallel", "parallel"],
    "wan": TEXT * 2,
    "cogvideox": ["joint_attention", "mlp"] * 2,
    "latte": (TEXT + DIT) * 2,
}
REUSE_SHARE = {"dit": 0.13, "pixart": 0.07, "sd3": 0.07, "flux": 0.05, "wan": 0.06, "cogvideox": 0.04, "latte": 0.04}
LATENTS_SHAPE = dict.fromkeys(("dit", "pixart", "sd3"), (1, 4, 8, 8)) | {
    "flux": (1, 16, 8),
    "wan": (1, 4, 2, 8, 8),
    "cogvideox": (1, 2, 4, 8, 8),
    "latte": (1, 4, 2, 8, 8),
}


class Model(nn.Module):
    """A module whose forward is a function of itself and its inputs."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


def found(
    function: Callable[..., Any], *, x: Tensor | None = None, extra: tuple[Tensor, ...] = (), **modules: nn.Module
) -> Traced:
    """Branches of ``function(model, x [1, 16, 16], t [1], *extra)``."""
    x = noise(1, 16, 16) if x is None else x
    return trace(lively(Model(function, **modules)), x, torch.tensor([0.5]), *extra)


def linear(inputs: int = 16, outputs: int = 16) -> nn.Linear:
    return nn.Linear(inputs, outputs)


def modulation(model: nn.Module, t: Tensor) -> Tensor:
    return model.time(t[:, None].expand(1, 16))[:, None]


def only(traced: Traced) -> Branch:
    (branch,) = traced.analysis.branches
    return branch


# -- real models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_the_branches_of_real_models_are_all_found(name: str) -> None:
    tiny = TINY[name]()

    traced = trace(tiny.model, **tiny.inputs)

    analysis = traced.analysis
    assert traced.kinds == KINDS[name]
    assert analysis.cacheable == analysis.branches, [branch.reason for branch in analysis.branches]
    assert [branch.module_path for branch in analysis.branches] == [
        path.removesuffix(".proj_out") for path in _in_graph_order(name, tiny.modules)
    ]
    assert analysis.reuse_flops / analysis.flops == pytest.approx(REUSE_SHARE[name], abs=0.011)
    assert sum(branch.flops for branch in analysis.branches) == pytest.approx(
        analysis.flops - analysis.reuse_flops, abs=8
    )
    assert analysis.inputs.latents is not None
    assert tuple(traced.inputs[analysis.inputs.latents].shape) == LATENTS_SHAPE[name]


def _in_graph_order(name: str, modules: tuple[str, ...]) -> list[str]:
    """Latte alternates spatial and temporal blocks."""
    if name != "latte":
        return list(modules)
    order = sorted(modules, key=lambda path: (path.split(".")[1], path.startswith("temporal")))
    return sorted(order, key=lambda path: (path.split(".")[1], path.startswith("temporal"), path.split(".")[2]))


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_joint_attention_is_one_branch_with_two_cuts(name: str) -> None:
    tiny = TINY[name]()

    joint = trace(tiny.model, **tiny.inputs).analysis.branches[0]

    assert joint.kind == "joint_attention"
    assert (len(joint.cuts), len(joint.adds)) == (2, 2)
    assert joint.cache_bytes == 4 * 32 * (16 + 6)  # float32, width 32, 16 image and 6 text tokens


# -- the toy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "kinds"), [(0, DIT), (24, TEXT)])
def test_the_toy_has_its_branches_by_name(text: int, kinds: list[str]) -> None:
    traced = trace(toy(3, text=text), *toy_inputs(text=text))

    parts = ("attn", "cross", "mlp") if text else ("attn", "mlp")
    assert [branch.name for branch in traced.analysis.branches] == [
        f"blocks.{i}.{part}" for i in range(3) for part in parts
    ]
    assert traced.kinds == kinds * 3
    assert all(branch.dependence == "latent" for branch in traced.analysis.branches)


def test_inputs_are_told_apart_by_role() -> None:
    traced = trace(toy(1, text=2000), *toy_inputs(text=2000))

    roles = traced.analysis.inputs
    shapes = [tuple(value.shape) for value in traced.inputs]
    assert shapes[roles.latents] == (1, 4, 8, 8)  # type: ignore[index]
    assert sorted(shapes[i] for i in roles.small) == [(1,), (1,)]
    assert [shapes[i] for i in roles.large] == [(1, 5, 2000)]
    assert len(roles.static) == len(list(toy(1, text=2000).parameters()))


def test_the_analysis_only_reads_the_graph() -> None:
    traced = gated()
    before = graph_text(traced.gm)

    changed = FindBranches(static=frozenset(traced.static))(traced.gm)

    assert changed is False
    assert graph_text(traced.gm) == before


def test_the_cut_is_what_comes_before_the_gate() -> None:
    traced = gated()

    branch = only(traced)

    assert (branch.cuts, branch.adds, branch.heavy) == (("unsqueeze_2",), ("add",), ("mm", "mm_1"))
    assert branch.flops == 2 * 4 * 8 * 16 * 2
    assert branch.cache_bytes == 4 * 8 * 4


@pytest.mark.parametrize(
    "gate",
    [
        lambda m, x, t: x + modulation(m, t) * m.ff(x),
        lambda m, x, t: torch.addcmul(x, m.ff(x), modulation(m, t).expand(1, 16, 16)),
        lambda m, x, t: x - modulation(m, t) * m.ff(x) / 2.0,
        lambda m, x, t: x + modulation(m, t) * torch.tanh(m.norm(m.ff(x))),
    ],
    ids=["mul", "addcmul", "sub", "norm_before_gate"],
)
def test_a_cut_never_holds_what_changes_with_the_timestep(gate: Callable[..., Any]) -> None:
    traced = found(gate, time=linear(), ff=Mlp(16, 64), norm=nn.LayerNorm(16))

    branch = only(traced)

    gm = traced.gm
    (cut,) = (node_named(gm, name) for name in branch.cuts)
    ancestors, work = {cut}, [cut]
    while work:
        new = set(work.pop().all_input_nodes) - ancestors
        ancestors |= new
        work += new
    timestep = next(
        node for node in ancestors | set(gm.graph.nodes) if node.name == traced.analysis.inputs.names[_time(traced)]
    )
    assert timestep not in ancestors
    assert branch.flops == 2 * 2 * 16 * 16 * 64


def _time(traced: Traced) -> int:
    return next(i for i, value in enumerate(traced.inputs) if i not in traced.static and tuple(value.shape) == (1,))


# -- what is no branch -------------------------------------------------------------------------------------------------


def _rope(m: Any, x: Tensor, t: Tensor) -> Tensor:
    q = m.q(x)
    angle = torch.arange(16.0)[:, None].expand(16, 16)
    return m.out(q * angle.cos() + torch.cat([-q[..., 8:], q[..., :8]], -1) * angle.sin())


def _experts(m: Any, x: Tensor, t: Tensor) -> Tensor:
    share = torch.softmax(m.router(x), -1)
    return m.out(m.one(x) * share[..., :1] + m.two(x) * share[..., 1:])


NO_BRANCH: dict[str, tuple[Callable[..., Any], dict[str, nn.Module]]] = {
    "adaln_shift": (
        lambda m, x, t: m.out(m.norm(x) * (1 + modulation(m, t)) + modulation(m, t)),
        {"norm": nn.LayerNorm(16), "time": linear(), "out": linear()},
    ),
    "rope": (_rope, {"q": linear(), "out": linear()}),
    "bias": (lambda m, x, t: m.out(m.e(x) + m.out.bias), {"e": linear(), "out": linear()}),
    "position": (
        lambda m, x, t: m.out(m.e(x) + m.p(torch.arange(16))),
        {"e": linear(), "p": nn.Embedding(16, 16), "out": linear()},
    ),
    "swiglu": (lambda m, x, t: m.d(F.silu(m.g(x)) * m.u(x)), {"g": linear(), "u": linear(), "d": linear()}),
    "lora": (
        lambda m, x, t: m.o(F.gelu(m.w(x) + m.b(m.a(x)))),
        {"w": linear(), "a": linear(16, 4), "b": linear(4, 16), "o": linear()},
    ),
    "experts": (_experts, {"one": linear(), "two": linear(), "router": linear(16, 2), "out": linear()}),
    "no_addition": (lambda m, x, t: m.b(F.gelu(m.a(x))), {"a": linear(), "b": linear()}),
}


@pytest.mark.parametrize("name", NO_BRANCH)
def test_additions_that_are_no_residuals_are_left_alone(name: str) -> None:
    function, modules = NO_BRANCH[name]

    assert found(function, **modules).analysis.branches == ()


@pytest.mark.parametrize(
    ("function", "modules"),
    [
        (lambda m, x, t: x + m.d(F.silu(m.g(x)) * m.u(x)), {"g": linear(), "u": linear(), "d": linear()}),
        (
            lambda m, x, t: x + m.o(F.gelu(m.w(x) + m.b(m.a(x)))),
            {"w": linear(), "a": linear(16, 4), "b": linear(4, 16), "o": linear()},
        ),
        (
            lambda m, x, t: x + _experts(m, x, t),
            {"one": linear(), "two": linear(), "router": linear(16, 2), "out": linear()},
        ),
    ],
    ids=["swiglu", "lora", "experts"],
)
def test_inner_sums_of_a_branch_make_no_branch_of_their_own(
    function: Callable[..., Any], modules: dict[str, nn.Module]
) -> None:
    branch = only(found(function, **modules))

    assert (branch.kind, len(branch.cuts), branch.cacheable) == ("mlp", 1, True)


def test_a_model_without_branches_has_an_empty_analysis() -> None:
    analysis = found(*NO_BRANCH["no_addition"][:1], **NO_BRANCH["no_addition"][1]).analysis

    assert analysis.cacheable == ()
    assert analysis.reuse_flops == analysis.flops > 0


# -- shapes of residuals -----------------------------------------------------------------------------------------------


def test_a_feed_forward_around_an_inner_residual_keeps_both_branches() -> None:
    """AuraFlow: x + FF(norm(x + attn(norm(x))))."""
    traced = found(
        lambda m, x, t: x + m.ff(m.n2(x + m.attn(m.n1(x)))),
        attn=Attention(16, 2), ff=Mlp(16, 64), n1=nn.LayerNorm(16), n2=nn.LayerNorm(16),
    )  # fmt: skip

    assert [(b.name.split(".")[-1], b.kind, b.cacheable) for b in traced.analysis.branches] == [
        ("attn", "self_attention", True),
        ("ff", "mlp", True),
    ]
    assert traced.analysis.reuse_flops == 0


def test_attention_and_mlp_side_by_side_are_two_branches_if_added_apart() -> None:
    traced = found(
        lambda m, x, t: x + m.attn(m.norm(x)) + m.ff(m.norm(x)),
        attn=Attention(16, 2),
        ff=Mlp(16, 64),
        norm=nn.LayerNorm(16),
    )

    assert traced.kinds == ["self_attention", "mlp"]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x, t: x + (m.attn(m.norm(x)) + m.ff(m.norm(x))),
        lambda m, x, t: x + m.out(torch.cat([m.attn(m.norm(x)), F.gelu(m.up(m.norm(x)))], -1)),
    ],
    ids=["sum", "concatenation"],
)
def test_attention_and_mlp_fused_are_one_parallel_branch(function: Callable[..., Any]) -> None:
    branch = only(
        found(
            function,
            attn=Attention(16, 2),
            ff=Mlp(16, 64),
            up=linear(16, 64),
            out=linear(80, 16),
            norm=nn.LayerNorm(16),
        )
    )

    assert (branch.kind, len(branch.cuts)) == ("parallel", 1)


def test_hidden_values_beside_attention_make_a_branch_parallel_though_one_product_makes_both() -> None:
    traced = found(lambda m, x, t: m.block(x, m.time(t[:, None].expand(1, 16))), time=linear(), block=single_stream())

    assert traced.kinds == ["parallel"]


def single_stream() -> SingleStreamBlock:
    return SingleStreamBlock(16, 2)


@pytest.mark.parametrize("tokens", [4, 400])
def test_a_parallel_branch_is_one_however_many_tokens_it_attends_to(tokens: int) -> None:
    def fused(m: Any, x: Tensor, t: Tensor) -> Tensor:
        return x + m.out(torch.cat([m.attn(m.norm(x)), F.gelu(m.up(m.norm(x)))], -1))

    modules = {"attn": Attention(16, 2), "up": linear(16, 16), "out": linear(32, 16), "norm": nn.LayerNorm(16)}
    traced = found(fused, x=noise(1, tokens, 16), **modules)

    assert only(traced).kind == "parallel"


def test_an_mlp_that_shares_its_projection_with_the_attention_is_parallel_to_it() -> None:
    """Flux 2: one linear layer makes queries, keys, values and the MLP's input."""

    def fused(m: Any, x: Tensor, t: Tensor) -> Tensor:
        q, k, v, up = m.all(m.norm(x)).split([16, 16, 16, 64], -1)
        heads = (value.unflatten(-1, (2, 8)).transpose(1, 2) for value in (q, k, v))
        attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return x + m.out(torch.cat([attended, F.gelu(up)], -1))

    traced = found(fused, all=linear(16, 112), out=linear(80, 16), norm=nn.LayerNorm(16))

    assert only(traced).kind == "parallel"


def test_a_gate_on_the_attention_is_part_of_it() -> None:
    """Krea 2: sigmoid(W x) * attention(x), whose gate costs as much as a projection."""
    traced = found(
        lambda m, x, t: x + m.out(torch.sigmoid(m.gate(x)) * m.attn(x)),
        attn=Attention(16, 2),
        gate=linear(),
        out=linear(),
    )

    assert only(traced).kind == "self_attention"


@pytest.mark.parametrize(
    "product",
    [
        lambda m, x: m.affine(x),
        lambda m, x: F.linear(x, m.affine.weight) * 0.5 + m.affine.bias,
        lambda m, x: (x.transpose(1, 2).float().transpose(1, 2).double() @ m.affine.weight.double()).float(),
    ],
    ids=["linear", "scale_and_bias", "layout_and_type"],
)
def test_a_product_and_nothing_else_is_left_alone(product: Callable[[Any, Tensor], Tensor]) -> None:
    """StableAudio: x + conv(x) at both ends of the trunk is a linear layer of the trunk, however much it costs."""

    def ends(m: Any, x: Tensor, t: Tensor) -> Tensor:
        x = x + product(m, x)
        return x + m.ff(x)

    affine, mlp = found(ends, affine=linear(), ff=Mlp(16, 16)).analysis.branches

    assert (affine.cacheable, mlp.cacheable) == (False, True)
    assert affine.reason == f"{affine.heavy[0]} alone is no attention or MLP, but an affine map of the trunk"


def test_keys_that_another_attention_uses_too_keep_no_branch_from_being_cached() -> None:
    """Cosmos 3: image tokens attend to the keys and values of the text's own attention."""

    def shared(m: Any, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        k, v = m.k(y), m.v(y)
        text = y + m.o1(F.scaled_dot_product_attention(m.q1(y), k, v))
        image = x + m.o2(
            F.scaled_dot_product_attention(m.q2(x), torch.cat([k, m.k2(x)], 1), torch.cat([v, m.v2(x)], 1))
        )
        return m.head(image), m.head(text)

    modules = {name: linear() for name in ("q1", "k", "v", "o1", "q2", "k2", "v2", "o2", "head")}
    traced = found(shared, extra=(noise(1, 9, 16, seed=1),), **modules)

    analysis = traced.analysis
    assert [branch.cacheable for branch in analysis.branches] == [True, True]
    assert len([name for branch in analysis.branches for name in branch.heavy]) == 10  # k and v belong to neither alone
    assert analysis.reuse_flops == 2 * 16 * 16 * (16 + 9)  # the heads
    assert sum(branch.flops for branch in analysis.branches) == analysis.flops - analysis.reuse_flops


def test_each_output_has_its_latents() -> None:
    """LTX 2: sound and pictures are denoised together."""

    def both(m: Any, x: Tensor, t: Tensor, sound: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        sound = sound + m.ff(sound) * modulation(m, t)
        x = x + m.attn(x, text + m.refine(text))
        return x, sound

    modules = {"ff": Mlp(16, 64), "time": linear(), "attn": Attention(16, 2, context=16), "refine": Mlp(16, 64)}
    traced = found(both, extra=(noise(1, 9, 16, seed=1), noise(1, 5, 16, seed=2)), **modules)

    roles = traced.analysis.inputs
    assert [tuple(traced.inputs[i].shape) for i in roles.further_latents] == [(1, 9, 16)]
    assert set(roles.further_latents) <= set(roles.large)
    assert sorted((b.name.split(".")[-1], b.dependence) for b in traced.analysis.branches) == [
        ("attn", "latent"), ("ff", "latent"), ("refine", "invariant"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("small", "dependence"),
    [
        (torch.ones(2, 5, dtype=torch.bool), "invariant"),  # a mask
        (torch.arange(15.0).reshape(5, 3), "invariant"),  # positions of tokens
        (torch.arange(15).reshape(1, 5, 3), "invariant"),
        (torch.full((2,), 0.5), "timestep"),
        (torch.full((2, 5), 0.5), "timestep"),  # of each token of each sample
        (torch.full((2, 1, 5), 0.5), "timestep"),  # of each frame of each sample
        (torch.tensor(0.5), "timestep"),
    ],
    ids=["mask", "positions", "batched_positions", "per_sample", "per_token", "per_frame", "scalar"],
)
def test_what_may_be_a_timestep_is_told_by_its_shape(small: Tensor, dependence: str) -> None:
    def refine(m: Any, x: Tensor, t: Tensor, text: Tensor, small: Tensor) -> Tensor:
        text = text + m.ff(text * small.float().mean())
        return x + m.attn(x, text)

    modules = {"ff": Mlp(16, 64), "attn": Attention(16, 2, context=16)}
    traced = found(refine, x=noise(2, 16, 16), extra=(noise(2, 5, 16, seed=1), small), **modules)

    assert [branch.dependence for branch in traced.analysis.branches] == [dependence, "latent"]


def test_a_residual_convolution_is_a_branch() -> None:
    traced = found(lambda m, x, t: x + m.c(F.silu(x)), x=noise(1, 4, 8, 8), c=nn.Conv2d(4, 4, 3, padding=1))

    assert only(traced).kind == "conv"


def test_a_branch_on_the_text_alone_is_invariant() -> None:
    def refine(m: Any, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        text = text + m.ff(text)
        return x + m.attn(x, text)

    traced = found(refine, extra=(noise(1, 5, 2000),), ff=Mlp(2000, 8), attn=Attention(16, 2, context=2000))

    assert [(b.kind, b.dependence) for b in traced.analysis.branches] == [
        ("mlp", "invariant"),
        ("cross_attention", "latent"),
    ]


def test_a_long_skip_around_blocks_is_no_branch() -> None:
    """U-ViT: the output of an early block joins a late one."""

    def uvit(m: Any, x: Tensor, t: Tensor) -> Tensor:
        early = x + m.a(x)
        late = early + m.b(early)
        joined = m.c(torch.cat([late, early], -1))
        return joined + m.d(joined)

    traced = found(uvit, a=Mlp(16, 64), b=Mlp(16, 64), c=linear(32, 16), d=Mlp(16, 64))

    assert [b.name.split(".")[-1] for b in traced.analysis.cacheable] == ["a", "b", "d"]


def test_a_branch_used_outside_is_refused_with_its_reason() -> None:
    def leaks(m: Any, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        hidden = m.up(x)
        return m.head(x + m.down(F.gelu(hidden))), hidden

    branch = only(found(leaks, up=linear(16, 64), down=linear(64, 16), head=linear()))

    assert not branch.cacheable
    assert branch.reason == f"{branch.heavy[0]} is also used outside the branch, so reuse would not free it"


def test_a_branch_whose_result_is_used_twice_is_still_freed() -> None:
    def twice(m: Any, x: Tensor, t: Tensor) -> Tensor:
        y = m.ff(x)
        return m.head(x + y) + m.other(y)

    traced = found(twice, ff=Mlp(16, 64), head=linear(), other=linear())

    branch = only(traced)
    dead = dead_without(node_named(traced.gm, cut) for cut in branch.cuts)
    assert branch.cacheable
    assert {node_named(traced.gm, name) for name in branch.heavy} <= dead


def test_a_branch_far_smaller_than_the_others_is_left_alone() -> None:
    def mixed(m: Any, x: Tensor, t: Tensor) -> Tensor:
        x = x + m.big(x)
        x = x + m.large(x)
        return x + m.b(m.a(x))

    branches = found(mixed, big=Mlp(16, 2048), large=Mlp(16, 2048), a=linear(16, 1), b=linear(1, 16)).analysis.branches

    assert [branch.cacheable for branch in branches] == [True, True, False]
    assert "of the median branch" in branches[-1].reason


# -- operators from outside torch --------------------------------------------------------------------------------------


def gain(model: nn.Module, t: Tensor) -> Tensor:
    return model.time(t[:, None].expand(1, 16))


@pytest.mark.parametrize(
    ("tail", "computed"),
    [
        (lambda m, y, t: fused_gate(y, gain(m, t)), ["gate"]),
        (lambda m, y, t: rms_norm(fused_gate(y, gain(m, t))), ["gate", "rms_norm"]),
        (lambda m, y, t: torch.tanh(norm_modulate(y, gain(m, t), gain(m, t))), ["norm_modulate"]),
        (lambda m, y, t: rms_norm(y) * gain(m, t)[:, None], []),
        (lambda m, y, t: rms_norm(y @ torch.diag_embed(gain(m, t))), ["rms_norm"]),
    ],
    ids=["gate", "norm_behind_gate", "modulated_norm", "norm_before_gate", "gate_by_a_product"],
)
def test_a_foreign_operator_that_joins_the_timestep_behind_a_branch_is_computed_at_every_step(
    tail: Callable[..., Any], computed: list[str]
) -> None:
    traced = found(
        lambda m, x, t: x + tail(m, m.ff(m.norm(x)), t), time=linear(), ff=Mlp(16, 64), norm=nn.LayerNorm(16)
    )

    branch = only(traced)

    dead = dead_without(node_named(traced.gm, cut) for cut in branch.cuts)
    foreign = [node for node in traced.gm.graph.nodes if "omnifx_tests" in str(node.target)]
    assert (branch.kind, branch.cacheable) == ("mlp", True)
    assert [str(node.target).split(".")[1] for node in foreign if node not in dead] == computed


def test_attention_to_what_follows_from_the_timestep_is_cached_behind_its_projection() -> None:
    def block(m: Any, x: Tensor, t: Tensor) -> Tensor:
        tokens = gain(m, t).unflatten(-1, (4, 4)) @ m.tokens  # keys and values that change with the timestep
        scores = (m.q(x) @ tokens.transpose(1, 2)).softmax(-1)
        return x + m.out(scores @ tokens)

    tokens = nn.Linear(16, 4, bias=False).weight
    model = Model(block, time=linear(), q=linear(), out=linear())
    model.tokens = tokens
    traced = trace(lively(model), noise(1, 16, 16), torch.tensor([0.5]))

    branch = only(traced)

    assert (branch.kind, branch.cacheable, len(branch.heavy)) == ("cross_attention", True, 4)


def test_a_modulated_norm_by_a_foreign_operator_is_part_of_its_branch_and_no_attention() -> None:
    def block(m: Any, x: Tensor, t: Tensor) -> Tensor:
        return x + m.ff(norm_modulate(x, gain(m, t), gain(m, t)))

    branch = only(found(block, time=linear(), ff=Mlp(16, 64)))

    assert (branch.kind, branch.cacheable, "norm_modulate" in branch.heavy) == ("mlp", True, True)


def test_a_foreign_projection_behind_attention_is_cached_whatever_was_joined_before_attention() -> None:
    """Rotary positions from an input and quantised products, both by custom operators."""

    def block(m: Any, x: Tensor, t: Tensor, turns: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 8)) for layer in (m.q, m.k, m.v))
        q, k = (fused_gate(u.flatten(2), turns).unflatten(-1, (2, 8)) for u in (q, k))
        out = F.scaled_dot_product_attention(*(u.transpose(1, 2) for u in (q, k, v))).transpose(1, 2).flatten(2)
        return x + rms_norm(out)

    layers = {name: linear() for name in "qkv"}
    branch = only(found(block, extra=(noise(1, 16, seed=3),), **layers))

    assert (branch.kind, branch.cacheable) == ("self_attention", True)
    assert branch.heavy[-1] == "rms_norm"


def test_a_branch_that_is_one_foreign_operator_with_the_timestep_in_it_is_refused() -> None:
    traced = found(lambda m, x, t: m.out(x + fused_gate(x, gain(m, t))), time=linear(), out=linear())

    branch = only(traced)

    assert not branch.cacheable
    assert "no single tensor separates it from the trunk before a value that changes with the step" in branch.reason


def test_among_inputs_like_the_output_the_earliest_argument_is_the_latents() -> None:
    def conditioned(m: Any, x: Tensor, t: Tensor, picture: Tensor) -> Tensor:
        y = m.enter(picture) + m.join(x)  # Dynamo sees the picture first
        return y + m.ff(y)

    model = lively(Model(conditioned, enter=linear(), join=linear(), ff=Mlp(16, 64)))

    report = omnifx.explain(model, noise(1, 16, 16), torch.tensor([0.5]), noise(1, 16, 16, seed=1))

    assert list(report.inputs.values()).count("latents") == 1
    assert report.inputs["args_0"] == "latents"


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["min_share", "keep_if_nested", "keep_if_outer"])
def test_shares_beyond_one_are_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=rf"FindBranches.{option} must lie in \[0, 1\], got 1.5"):
        FindBranches(static=frozenset(), **{option: 1.5})


def test_a_graph_without_shapes_is_refused() -> None:
    traced = gated()
    del node_named(traced.gm, "mm").meta["val"]

    with pytest.raises(PassError, match="1 nodes have no shapes, the first is mm"):
        FindBranches(static=frozenset(traced.static))(traced.gm)


def test_a_graph_that_was_not_analysed_says_so() -> None:
    traced = gated()
    traced.gm.meta.clear()

    with pytest.raises(PassError, match="run FindBranches first"):
        analysis_of(traced.gm)
