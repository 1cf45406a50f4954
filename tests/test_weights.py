"""Weights that users really run: adapters, quantised and parametrised weights, tied ones, and such as hooks bring."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import omnifx
from omnifx.runlog import GenerationLog
from omnifx.session import find_session
from omnifx.weights import FORGIVEN, HABIT, WeightWatch
from tests.reference import first_tensor
from tests.toys import EAGER, TINY, Pattern, Reference, Tiny, ToyDiT, distance, generate, letters_of, noise, toy

STEPS = 5
PLAN = "FrrFr"
FULL = "F" * STEPS
CHANGED = "the weights changed since the caches were made"
OTHER_GRAPH = "the model runs another graph than this generation began with"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def play(
    model: Callable[..., Any], tiny: Tiny, *, seed: int, before: Callable[[int], object] = lambda step: None
) -> Tensor:
    """One generation of a tiny model; `before` is called before each step."""
    latents, start = noise(*tiny.inputs[tiny.latents[0]].shape, seed=seed), tiny.inputs[tiny.times[0]]
    for step in range(STEPS):
        before(step)
        time = (start * (1 - step / STEPS)).to(start.dtype)
        with torch.no_grad():
            output = first_tensor(model(**{**tiny.inputs, tiny.latents[0]: latents, tiny.times[0]: time}))
        output = output[:, : latents.shape[1]]  # some predict variances, too
        latents = latents - 0.2 / STEPS * latents.norm() / output.norm() * output
    return latents


def reference(tiny: Tiny, letters: str) -> Reference:
    """The eager model whose attention and MLP modules give old outputs in reuse steps."""
    return Reference(tiny.model, letters, tiny.modules, stream_of=lambda **kwargs: 0)


def compiled(model: nn.Module, backend: str = "omnicache", **options: Any) -> Any:
    if backend != "omnicache":
        return torch.compile(model, backend=backend)
    return torch.compile(model, backend=backend, options={**EAGER, "policy": Pattern(pattern="Frr"), **options})


def calibrated(tiny: Tiny, **options: Any) -> Any:
    """A tiny model, compiled, after one measured generation."""
    fast = compiled(tiny.model, **options)
    with omnifx.generation(fast):
        play(fast, tiny, seed=100)
    return fast


def last(fast: Any) -> GenerationLog:
    return omnifx.stats(fast).generations[-1]


def graphs() -> int:
    """Graphs that Dynamo has captured in this test."""
    return int(counters["stats"]["unique_graphs"])


def assert_exact(fast: Any, tiny: Tiny, *, letters: str = PLAN, seed: int = 1) -> None:
    """A generation runs these letters, and its image is the one that eager hooks make of them."""
    image = play(fast, tiny, seed=seed)
    assert letters_of(last(fast)) == letters, last(fast).reasons
    assert distance(image, play(reference(tiny, letters), tiny, seed=seed)) < 1e-5


def test_the_reference_sees_reuse() -> None:
    tiny = TINY["pixart"]()

    kept, full = (play(reference(tiny, letters), tiny, seed=1) for letters in (PLAN, FULL))

    assert distance(kept, full) > 1e-4


# -- LoRA --------------------------------------------------------------------------------------------------------------


def lora(rank: int = 4, targets: list[str] = ATTENTION) -> Any:
    """peft's configuration of a LoRA whose matrices are not zero at first."""
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=False)


def add(name: str, *, rank: int = 4, seed: int = 0, targets: list[str] = ATTENTION) -> Callable[[Any], object]:
    def change(model: Any) -> None:
        torch.manual_seed(seed)
        model.add_adapter(lora(rank, targets), name)

    return change


def adapters(**scales: float) -> Callable[[Any], object]:
    return lambda model: model.set_adapters(list(scales), list(scales.values()))


LIFE: tuple[tuple[str, Callable[[Any], object]], ...] = (
    ("none", lambda model: None),
    ("add a", add("a")),
    ("scale a once", adapters(a=0.5)),
    ("scale a twice", adapters(a=0.3)),
    ("scale a again", adapters(a=0.7)),
    ("add b of another rank", add("b", rank=8, seed=1)),
    ("back to a", lambda model: model.set_adapter("a")),
    ("a and b", adapters(a=1.0, b=0.5)),
    ("delete b", lambda model: model.delete_adapters("b")),
    ("fuse a", lambda model: model.fuse_lora()),
    ("unfuse a", lambda model: model.unfuse_lora()),
    ("disable", lambda model: model.disable_lora()),
    ("enable", lambda model: model.enable_lora()),
    ("unload", lambda model: model.unload_lora()),
)
"""What can happen to a model of diffusers and its adapters."""


SHORT_LIFE = tuple(LIFE[at] for at in (1, 2, 3, 4, 13))
"""A LoRA that is added, scaled and unloaded."""


def graphs_by_change(
    tiny: Tiny, backend: str, life: Sequence[tuple[str, Callable[[Any], object]]], after: Callable[[Any, str], object]
) -> dict[str, int]:
    """Graphs captured by the generations after each change of `life`; `after` runs them."""
    fast = compiled(tiny.model, backend)
    counts = {}
    for what, change in life:
        change(tiny.model)
        before = graphs()
        after(fast, what)
        counts[what] = graphs() - before
    return counts


@pytest.mark.parametrize(
    ("name", "life"),
    [
        ("sd3", SHORT_LIFE),
        pytest.param("sd3", LIFE, marks=pytest.mark.slow),
        pytest.param("flux", LIFE, marks=pytest.mark.slow),
    ],
    ids=["sd3 in short", "sd3", "flux"],
)
def test_adapters_come_and_go_between_generations_as_cheaply_as_with_plain_compile(
    name: str, life: Sequence[tuple[str, Callable[[Any], object]]]
) -> None:
    pytest.importorskip("peft")
    tiny, twin = TINY[name](), TINY[name]()

    def planned(fast: Any, what: str) -> None:
        with omnifx.generation(fast):
            image = play(fast, tiny, seed=1)
        assert distance(image, play(reference(tiny, letters_of(last(fast))), tiny, seed=1)) < 1e-5, what
        assert last(fast).steps[0].variant.startswith("full"), what
        with omnifx.generation(fast):
            image = play(fast, tiny, seed=2)
        assert letters_of(last(fast)) == PLAN, what
        assert distance(image, play(reference(tiny, PLAN), tiny, seed=2)) < 1e-5, what

    with torch._dynamo.config.patch(recompile_limit=64):  # by default Dynamo gives up after 8
        ours = graphs_by_change(tiny, "omnicache", life, planned)
        torch._dynamo.reset()
        plain = graphs_by_change(twin, "eager", life, lambda fast, what: play(fast, twin, seed=1))

    assert ours == plain
    assert not any(ours[what] for what in ours if what in ("scale a twice", "scale a again"))


@pytest.mark.parametrize("name", ["pixart", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd3", "flux"))])
def test_a_lora_adds_no_branches_and_hides_none(name: str) -> None:
    peft = pytest.importorskip("peft")
    tiny = TINY[name]()
    linears = [path for path, module in tiny.model.named_modules() if isinstance(module, nn.Linear)]
    before = omnifx.explain(tiny.model, **tiny.inputs)
    peft.inject_adapter_in_model(lora(targets=linears), tiny.model)

    after = omnifx.explain(tiny.model, **tiny.inputs)

    assert after.flops > before.flops
    assert [(b.kind, b.cacheable, b.cache_bytes) for b in after.branches] == [
        (b.kind, b.cacheable, b.cache_bytes) for b in before.branches
    ]


@pytest.mark.slow
def test_an_adapter_that_peft_itself_injects_is_followed_and_merged_and_taken_out() -> None:
    peft = pytest.importorskip("peft")
    tiny = TINY["pixart"]()
    peft.inject_adapter_in_model(lora(), tiny.model, "a")
    fast = calibrated(tiny)
    layers = [module for module in tiny.model.modules() if isinstance(module, peft.tuners.lora.Linear)]

    assert_exact(fast, tiny)
    for layer in layers:
        layer.merge()
    with omnifx.generation(fast):
        play(fast, tiny, seed=2)
    assert_exact(fast, tiny, seed=3)
    for layer in layers:
        layer.unmerge()
    assert_exact(fast, tiny, seed=4)


def test_a_scale_that_changes_in_the_middle_is_a_change_of_weights() -> None:
    tiny = TINY["sd3"]()
    add("a")(tiny.model)
    fast = calibrated(tiny)
    for scale in (0.9, 0.8):  # from the second value on, Dynamo takes the scale as an input
        adapters(a=scale)(tiny.model)
        play(fast, tiny, seed=1)
    scales = {0: 0.8, 2: 0.1}

    def swap(step: int) -> None:
        if step in scales:
            adapters(a=scales[step])(tiny.model)

    count = graphs()
    image = play(fast, tiny, seed=2, before=swap)

    assert graphs() == count
    assert last(fast).reasons == {CHANGED: 1}
    assert letters_of(last(fast)) == "FrFFr"
    assert distance(image, play(reference(tiny, "FrFFr"), tiny, seed=2, before=swap)) < 1e-5


def test_a_scale_is_not_taken_for_the_timestep_though_it_is_read_first() -> None:
    tiny = TINY["sd3"]()
    add("a", targets=["context_embedder", "to_q", "linear"])(tiny.model)  # the modulation is `linear`
    fast = compiled(tiny.model)
    for scale in (0.9, 0.8):  # from the second value on, Dynamo takes the scale as an input
        adapters(a=scale)(tiny.model)
        with torch.no_grad():
            fast(**tiny.inputs)

    with omnifx.generation(fast):  # measured, with another scale in its middle
        play(fast, tiny, seed=2, before=lambda step: adapters(a=0.8 if step < 2 else 0.4)(tiny.model))
    assert_exact(fast, tiny, seed=3)
    adapters(a=0.3)(tiny.model)
    assert_exact(fast, tiny, seed=4)

    inputs = find_session(fast).runners[-1].program.analysis.inputs
    assert len(inputs.settings) > 4
    assert not set(inputs.settings) & set(inputs.small)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("another adapter", lambda model: model.set_adapter("b")),
        pytest.param("fused", lambda model: model.fuse_lora(), marks=pytest.mark.slow),
        pytest.param("disabled", lambda model: model.disable_lora(), marks=pytest.mark.slow),
        pytest.param("deleted", lambda model: model.delete_adapters("a"), marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_graph_in_the_middle_of_a_generation_computes_and_says_so(
    what: str, change: Callable[[Any], object]
) -> None:
    tiny = TINY["sd3"]()
    add("b", seed=1)(tiny.model)
    add("a")(tiny.model)
    tiny.model.set_adapter("a")
    fast = calibrated(tiny)
    play(fast, tiny, seed=1)
    weights = {name: value.clone() for name, value in tiny.model.state_dict().items()}

    image = play(fast, tiny, seed=2, before=lambda step: change(tiny.model) if step == 2 else None)

    begun, rest = omnifx.stats(fast).generations[-2:]
    assert (letters_of(begun), letters_of(rest)) == ("Fr", "FFF"), what
    assert next(iter(rest.reasons)).startswith(OTHER_GRAPH)
    twin = TINY["sd3"]()
    add("b")(twin.model)
    add("a")(twin.model)
    twin.model.set_adapter("a")
    twin.model.load_state_dict(weights)
    expected = play(
        reference(twin, "FrFFF"), twin, seed=2, before=lambda step: change(twin.model) if step == 2 else None
    )
    assert distance(image, expected) < 1e-5


@pytest.mark.parametrize(
    "prepared", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["equal ranks", "padded ranks"]
)
def test_a_hot_swapped_lora_is_seen_between_generations_and_within_one(prepared: bool, tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        model = TINY["sd3"]().model
        add(name, rank=4 if name == "a" or not prepared else 2, seed=seed)(model)
        model.save_lora_adapter(tmp_path / name, adapter_name=name)
    tiny = TINY["sd3"]()
    if prepared:
        tiny.model.enable_lora_hotswap(target_rank=4)
    load = functools.partial(tiny.model.load_lora_adapter, adapter_name="a", prefix=None, use_safetensors=True)
    load(tmp_path / "a")
    fast = calibrated(tiny)
    assert_exact(fast, tiny)
    count = graphs()

    load(tmp_path / "b", hotswap=True)
    assert_exact(fast, tiny, seed=2)

    def swap(step: int) -> None:
        if step in (0, 2):
            load(tmp_path / ("a" if step else "b"), hotswap=True)

    image = play(fast, tiny, seed=3, before=swap)
    assert last(fast).reasons == {CHANGED: 1}
    assert letters_of(last(fast)) == "FrFFr"
    assert distance(image, play(reference(tiny, "FrFFr"), tiny, seed=3, before=swap)) < 1e-5
    assert graphs() == count or prepared  # diffusers pads what it loads into scales of its own


@pytest.mark.parametrize("part", ["blocks.0.ada", "blocks.0.mlp.down", "time.up"])
def test_data_written_in_place_between_generations_reaches_tables_and_caches(part: str) -> None:
    model = toy()
    fast = compiled(model)
    for seed in (0, 1):
        with omnifx.generation(fast):
            generate(fast, seed=seed, steps=STEPS)
    before = generate(fast, seed=2, steps=STEPS)

    model.get_submodule(part).weight.data += 0.05

    image = generate(fast, seed=2, steps=STEPS)
    assert letters_of(last(fast)) == PLAN
    assert distance(image, before) > 1e-4
    assert distance(image, generate(Reference(model, PLAN), seed=2, steps=STEPS)) < 1e-5


# -- quantised weights -------------------------------------------------------------------------------------------------


def quantise(model: nn.Module, name: str) -> None:
    """Quantise the weights of all linear layers with torchao."""
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, getattr(quantization, name)())


WEIGHT_ONLY = ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"]


@pytest.mark.parametrize("config", WEIGHT_ONLY)
@pytest.mark.parametrize("name", ["pixart", pytest.param("flux", marks=pytest.mark.slow)])
def test_quantised_weights_hide_no_branch_and_replay_exactly(name: str, config: str) -> None:
    tiny = TINY[name]()
    before = omnifx.explain(tiny.model, **tiny.inputs)
    quantise(tiny.model, config)

    after = omnifx.explain(tiny.model, **tiny.inputs)
    fast = calibrated(tiny)

    assert [(b.name, b.kind, b.cacheable, b.flops, b.cache_bytes) for b in after.branches] == [
        (b.name, b.kind, b.cacheable, b.flops, b.cache_bytes) for b in before.branches
    ]
    assert (after.flops, after.reuse_flops) == (before.flops, before.reuse_flops)
    assert after.inputs == before.inputs
    assert_exact(fast, tiny)


@pytest.mark.slow
@pytest.mark.parametrize("config", WEIGHT_ONLY)
def test_quantised_weights_replay_through_inductor(config: str) -> None:
    tiny = TINY["pixart"]()
    quantise(tiny.model, config)
    fast = calibrated(tiny, lowering="inductor")

    image = play(fast, tiny, seed=1)

    assert letters_of(last(fast)) == PLAN
    assert distance(image, play(reference(tiny, PLAN), tiny, seed=1)) < 1e-4


def test_a_quantised_weight_that_is_overwritten_in_the_middle_is_noticed() -> None:
    tiny = TINY["pixart"]()
    quantise(tiny.model, "Int8WeightOnlyConfig")
    fast = calibrated(tiny)
    weight = tiny.model.transformer_blocks[0].attn1.to_q.weight
    kept = weight.qdata.clone()

    def flip(step: int) -> None:
        if step in (0, 2):
            weight.qdata.data.copy_(-kept if step else kept)

    image = play(fast, tiny, seed=1, before=flip)

    assert last(fast).reasons == {CHANGED: 1}
    assert distance(image, play(reference(tiny, "FrFFr"), tiny, seed=1, before=flip)) < 1e-5


@pytest.mark.slow
def test_a_lora_on_quantised_weights_changes_its_scale_without_a_stale_cache() -> None:
    tiny = TINY["sd3"]()
    quantise(tiny.model, "Int8WeightOnlyConfig")
    add("a")(tiny.model)
    fast = calibrated(tiny)

    assert_exact(fast, tiny)
    for seed, scale in enumerate((0.5, 0.4, 0.3), 2):
        adapters(a=scale)(tiny.model)
        assert_exact(fast, tiny, seed=seed)


# -- parametrised and tied weights -------------------------------------------------------------------------------------


class Doubled(nn.Module):
    """A parametrisation: the weight is twice what is stored."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrise(model: ToyDiT, how: str) -> None:
    for block in model.blocks:
        for layer in (block.attn.q, block.mlp.down):
            if how == "custom":
                nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
            else:
                getattr(nn.utils.parametrizations, how)(layer)
    model.eval()  # in training, spectral_norm writes to its buffers at each call


@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "custom"])
def test_parametrised_weights_are_branches_as_before_and_their_changes_are_noticed(how: str) -> None:
    plain, model = toy(), toy()
    parametrise(model, how)
    fast = compiled(model)
    with omnifx.generation(fast):
        generate(fast, seed=0, steps=STEPS)
    down = model.blocks[0].mlp.down.parametrizations.weight
    stored = down.original1 if how == "weight_norm" else down.original
    kept = stored.detach().clone()

    def overwrite(step: int, latents: Tensor) -> Tensor:
        if step in (0, 2):
            stored.data.copy_(kept.flip(0) if step else kept)
        return latents

    still = generate(fast, seed=1, steps=STEPS)
    assert letters_of(last(fast)) == PLAN
    assert distance(still, generate(Reference(model, PLAN), seed=1, steps=STEPS)) < 1e-5
    image = generate(fast, seed=1, steps=STEPS, before=overwrite)

    assert last(fast).reasons == {CHANGED: 1}
    assert distance(image, generate(Reference(model, "FrFFr"), seed=1, steps=STEPS, before=overwrite)) < 1e-5
    arguments = (noise(1, 4, 8, 8), torch.ones(1), torch.zeros(1).long())
    ours, theirs = (omnifx.explain(each, *arguments).branches for each in (model, plain))
    assert [b.kind for b in ours] == [b.kind for b in theirs]


def test_tied_weights_are_one_weight_and_a_change_is_noticed_once() -> None:
    model = toy()
    first, second = model.blocks
    second.attn.q.weight = first.attn.k.weight = first.attn.q.weight
    second.mlp = first.mlp
    fast = compiled(model)
    with omnifx.generation(fast):
        generate(fast, seed=0, steps=STEPS)
    weight = first.attn.q.weight
    kept = weight.detach().clone()

    def overwrite(step: int, latents: Tensor) -> Tensor:
        if step in (0, 2):
            weight.data.copy_(-kept if step else kept)
        return latents

    modules = ("blocks.0.attn", "blocks.0.mlp", "blocks.1.attn")
    image = generate(fast, seed=1, steps=STEPS, before=overwrite)

    assert last(fast).reasons == {CHANGED: 1}
    expected = generate(Reference(model, "FrFFr", modules), seed=1, steps=STEPS, before=overwrite)
    assert distance(image, expected) < 1e-5


# -- weights that hooks bring ------------------------------------------------------------------------------------------


def offload_root(tiny: Tiny, folder: Path) -> None:
    """accelerate brings all weights before each call, and takes them away behind it."""
    hooks = pytest.importorskip("accelerate.hooks")
    state = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    hook = hooks.AlignDevicesHook(execution_device="cpu", offload=True, weights_map=state, place_submodules=True)
    hooks.add_hook_to_module(tiny.model, hook)


def align_root(tiny: Tiny, folder: Path) -> None:
    """accelerate moves the arguments of a call."""
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(tiny.model, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))


def offload_blocks(tiny: Tiny, folder: Path, *, kind: str = "block_level", **options: Any) -> None:
    """diffusers brings the weights of each block before it runs."""
    from diffusers.hooks import apply_group_offloading

    cpu = torch.device("cpu")
    apply_group_offloading(
        tiny.model, onload_device=cpu, offload_device=cpu, offload_type=kind, num_blocks_per_group=1, **options
    )


def offload_blocks_to_disk(tiny: Tiny, folder: Path) -> None:
    """diffusers reads the weights of each block from a file, into new memory, at each call."""
    offload_blocks(tiny, folder, offload_to_disk_path=str(folder))


@pytest.mark.parametrize(
    "hook", [align_root, offload_root, pytest.param(offload_blocks, marks=pytest.mark.slow), offload_blocks_to_disk]
)
def test_weights_that_come_anew_for_each_call_with_the_same_values_keep_their_caches(
    hook: Callable[[Tiny, Path], None], tmp_path: Path
) -> None:
    tiny = TINY["pixart"]()
    hook(tiny, tmp_path)
    fast = calibrated(tiny)

    assert_exact(fast, tiny)
    assert last(fast).reasons == {}
    assert last(fast).speedup > 1.6


@pytest.mark.parametrize("whole", [True, False], ids=["root", "blocks"])
def test_a_change_of_offloaded_weights_in_the_middle_is_noticed(whole: bool, tmp_path: Path) -> None:
    tiny = TINY["pixart"]()
    (offload_root if whole else offload_blocks)(tiny, tmp_path)
    fast = calibrated(tiny)
    name = "transformer_blocks.0.ff.net.2.weight"
    weight = tiny.model._hf_hook.weights_map[name] if whole else tiny.model.get_parameter(name)
    kept = weight.detach().clone()

    def overwrite(step: int) -> None:
        if step in (0, 2):
            weight.data.copy_(-kept if step else kept)

    image = play(fast, tiny, seed=1, before=overwrite)

    assert last(fast).reasons == {CHANGED: 1}
    assert letters_of(last(fast)) == "FrFFr"
    assert distance(image, play(reference(tiny, "FrFFr"), tiny, seed=1, before=overwrite)) < 1e-5


def offload_leaves(tiny: Tiny, folder: Path) -> None:
    """diffusers brings the weights of each layer."""
    offload_blocks(tiny, folder, kind="leaf_level")


def offload_layers(tiny: Tiny, folder: Path) -> None:
    """accelerate brings the weights of each layer; between calls they are on the meta device."""
    pytest.importorskip("accelerate").cpu_offload(tiny.model, execution_device=torch.device("cpu"))


def dispatch(tiny: Tiny, folder: Path) -> None:
    """accelerate hooks every module."""
    pytest.importorskip("accelerate").dispatch_model(tiny.model, {"": "cpu"}, force_hooks=True)


def cast_layers(tiny: Tiny, folder: Path) -> None:
    """diffusers keeps weights in float8, and casts each layer's when it runs."""
    tiny.model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


@pytest.mark.parametrize(
    ("hook", "named"),
    [
        pytest.param(offload_leaves, "diffusers' group_offloading on", marks=pytest.mark.slow),
        pytest.param(offload_layers, "accelerate's AlignDevicesHook on", marks=pytest.mark.slow),
        (dispatch, "accelerate's AlignDevicesHook on"),
        pytest.param(cast_layers, "diffusers' layerwise_casting on", marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.filterwarnings("ignore::omnifx.OmnifxWarning")
def test_hooks_on_every_layer_leave_right_images_and_are_named(
    hook: Callable[[Tiny, Path], None], named: str, tmp_path: Path
) -> None:
    tiny = TINY["pixart"]()
    hook(tiny, tmp_path)
    fast = calibrated(tiny)

    image = play(fast, tiny, seed=1)

    (note,) = omnifx.stats(fast).notes
    assert "no branch of PixArtTransformer2DModel can be reused" in note
    assert named in note
    torch._dynamo.reset()
    assert distance(image, play(tiny.model, tiny, seed=1)) < 1e-5


def roam(model: nn.Module) -> None:
    """Give all weights new memory, with the same values."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def test_weights_that_move_at_every_call_are_compared_by_their_bits() -> None:
    model = toy()
    fast = compiled(model)
    kept = model.blocks[1].mlp.down.weight.detach().clone()

    def moving(step: int, latents: Tensor) -> Tensor:
        roam(model)
        return latents

    def writing(step: int, latents: Tensor) -> Tensor:
        roam(model)
        if step in (0, 2):
            model.blocks[1].mlp.down.weight.data[-1, -1] = kept[-1, -1] + step  # where no sample is taken
        return latents

    with omnifx.generation(fast):
        generate(fast, seed=0, steps=STEPS, before=moving)
    image = generate(fast, seed=1, steps=STEPS, before=moving)
    assert letters_of(last(fast)) == PLAN
    assert distance(image, generate(Reference(model, PLAN), seed=1, steps=STEPS)) < 1e-5
    image = generate(fast, seed=1, steps=STEPS, before=writing)
    assert last(fast).reasons == {CHANGED: 1}
    assert distance(image, generate(Reference(model, "FrFFr"), seed=1, steps=STEPS, before=writing)) < 1e-5


# -- the watch ---------------------------------------------------------------------------------------------------------


def test_summing_up_bits_is_a_habit_that_ends_when_the_weights_stay() -> None:
    watch, weights = WeightWatch((0, 1)), [noise(4, 4, seed=seed) for seed in range(2)]
    watch.look(weights)
    for _ in range(HABIT):
        weights = [weight.clone() for weight in weights]
        watch.look(weights)
    known = watch.version

    for _ in range(3):
        weights = [weight.clone() for weight in weights]
        watch.look(weights)
    assert watch.version == known
    weights[1].data[0, 0] += 1
    watch.look(weights)
    assert watch.version == known + 1  # the bits are summed up: neither pointers nor versions tell
    for _ in range(FORGIVEN):
        watch.look(weights)
    weights[1].data[0, 0] += 1
    watch.look(weights)
    assert watch.version == known + 1  # left to the samples again


def test_a_tensor_in_the_memory_of_another_is_another_weight() -> None:
    watch, weight = WeightWatch((0,)), noise(4, 4)
    watch.look([weight])
    known = watch.version

    watch.look([weight.view(4, 4)])

    assert watch.version == known + 1


def test_samples_are_taken_of_weights_of_all_types_and_keep_none_alive() -> None:
    weights = [
        torch.full((4, 4), 2.0),
        torch.full((4, 4), 3.0, dtype=torch.bfloat16),
        torch.full((4, 4), 4, dtype=torch.int8),
        torch.full((4, 4), 1.0).to(torch.float8_e4m3fn),
        torch.empty(4, 4, device="meta"),
        torch.full((4,), 9.0),
    ]
    watch = WeightWatch(range(len(weights)))

    read = [sample.tolist() for sample in watch.probes(weights)]

    assert read == [[2.0], [3.0], [4], [weights[3].view(torch.uint8)[0, 0].item()]]
    storages = [weakref.ref(weight.untyped_storage()) for weight in weights[:4]]
    weights.clear()
    gc.collect()
    assert [storage() for storage in storages] == [None] * 4
