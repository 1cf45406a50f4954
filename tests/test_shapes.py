"""Other resolutions, frame counts and batch sizes: the plan is kept, caches are not, and nothing is compiled more often
than by plain torch.compile."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import omnifx
from omnifx.errors import OmnifxWarning
from omnifx.plan import Correction
from omnifx.profile import Profile
from omnifx.runlog import GenerationLog
from omnifx.session import find_session
from tests.reference import OldOutputs, first_tensor
from tests.toys import (
    EAGER,
    TINY,
    Block,
    FreeDiT,
    Pattern,
    Reference,
    Tiny,
    ToyDiT,
    distance,
    free_toy,
    generate,
    letters_of,
    lively,
    noise,
    sampling,
    timesteps,
)
from tests.zoo.entry import grid

Shape = tuple[int, ...]

STEPS = 4
PLAN = "FrrF"
FULL = "F" * STEPS
SHAPES: tuple[Shape, ...] = ((1, 4, 8, 12), (1, 4, 12, 8), (2, 4, 16, 8), (1, 4, 8, 12))
"""Latents of one generation after another: other sides, another batch, and the first shape again."""

MORE_SHAPES: tuple[Shape, ...] = (*SHAPES[:2], (1, 4, 8, 8), (2, 4, 8, 12), (3, 4, 16, 8), SHAPES[0])

DYNAMIC = pytest.mark.parametrize("dynamic", [None, True, False], ids=["automatic", "dynamic", "static"])


@pytest.fixture(autouse=True)
def _fresh_counters() -> Iterator[None]:
    counters.clear()
    yield
    counters.clear()


def compiled(model: nn.Module, pattern: str = "Frr", *, dynamic: bool | None = True, **options: Any) -> Any:
    options = {**EAGER, "policy": Pattern(pattern=pattern), **options}
    return torch.compile(model, backend="omnicache", dynamic=dynamic, options=options)


def image_of(model: Callable[..., Any], shape: Shape, *, seed: int = 0) -> Tensor:
    return generate(model, seed=seed, steps=STEPS, latents=noise(*shape, seed=seed))


def assert_is_reference(image: Tensor, model: ToyDiT, letters: str, shape: Shape, *, seed: int = 0) -> None:
    assert len(letters) == STEPS
    assert distance(image, image_of(Reference(model, letters), shape, seed=seed)) < 1e-5


def plain_graphs(model: nn.Module, *, dynamic: bool | None, backend: str = "eager", shapes: Iterable[Shape]) -> int:
    """Graphs that plain torch.compile needs for one generation of each shape."""
    torch._dynamo.reset()
    counters.clear()
    plain = torch.compile(model, backend=backend, dynamic=dynamic)
    for shape in shapes:
        image_of(plain, shape)
    number = counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    counters.clear()
    return int(number)


def logs(fast: Any) -> list[GenerationLog]:
    return omnifx.stats(fast).generations


# -- one shape after another -------------------------------------------------------------------------------------------


def follow_the_plan(dynamic: bool | None, *, lowering: str, shapes: tuple[Shape, ...]) -> None:
    model = free_toy()
    backend = "inductor" if lowering == "inductor" else "aot_eager"
    allowed = plain_graphs(model, dynamic=dynamic, backend=backend, shapes=shapes)
    fast = compiled(model, dynamic=dynamic, lowering=lowering)

    images = [image_of(fast, shape, seed=seed) for seed, shape in enumerate(shapes)]

    assert counters["stats"]["unique_graphs"] <= allowed
    assert [letters_of(log) for log in logs(fast)] == [FULL, *[PLAN] * (len(shapes) - 1)]
    assert all(log.reasons == {} for log in logs(fast)[1:])
    for seed, (image, shape) in enumerate(zip(images, shapes, strict=True)):
        assert_is_reference(image, model, PLAN if seed else FULL, shape, seed=seed)


@DYNAMIC
def test_a_plan_measured_at_one_shape_serves_the_others_and_nothing_is_compiled_more_often(
    dynamic: bool | None,
) -> None:
    follow_the_plan(dynamic, lowering="eager", shapes=SHAPES)


def test_one_inductor_graph_serves_other_shapes() -> None:
    follow_the_plan(True, lowering="inductor", shapes=((1, 4, 8, 12), (1, 4, 12, 8)))


@pytest.mark.slow
@DYNAMIC
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_more_shapes_in_both_lowerings(dynamic: bool | None, lowering: str) -> None:
    follow_the_plan(dynamic, lowering=lowering, shapes=MORE_SHAPES)


def test_the_first_shape_is_served_as_before_when_it_comes_back() -> None:
    model = free_toy()
    fast = compiled(model, dynamic=None)
    for shape in (*SHAPES[:2], SHAPES[0]):
        image_of(fast, shape)
    graphs, variants = counters["stats"]["unique_graphs"], omnifx.stats(fast).variants_compiled

    image = image_of(fast, SHAPES[0], seed=9)

    assert counters["stats"]["unique_graphs"] == graphs
    assert omnifx.stats(fast).variants_compiled == variants
    assert_is_reference(image, model, PLAN, SHAPES[0], seed=9)


def test_a_plan_learned_at_a_later_shape_serves_the_earlier_graph_as_well() -> None:
    model = free_toy()
    fast = compiled(model, dynamic=False)
    with torch.no_grad():
        fast(noise(*SHAPES[0]), torch.full((1,), 500.0), torch.full((1,), 3))  # no whole generation
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OmnifxWarning)
        image_of(fast, SHAPES[1])
        find_session(fast).finish()

    image = image_of(fast, SHAPES[0], seed=1)

    assert_is_reference(image, model, PLAN, SHAPES[0], seed=1)
    assert letters_of(logs(fast)[-1]) == PLAN


def test_a_profile_of_the_very_shape_comes_before_one_of_another() -> None:
    model = free_toy()
    fast = compiled(model, dynamic=True)
    image_of(fast, SHAPES[0])
    find_session(fast).finish()
    (conductor,) = find_session(fast).conductors
    (known,) = conductor.entries
    meta = known.profile.meta.model_copy(update={"latent_shape": SHAPES[1]})
    conductor.add_profile(
        Profile(meta=meta, grams=known.profile.grams, moves=known.profile.moves), _all_full(known.plan)
    )

    assert_is_reference(image_of(fast, SHAPES[0]), model, PLAN, SHAPES[0])
    assert_is_reference(image_of(fast, SHAPES[1]), model, FULL, SHAPES[1])
    assert [letters_of(log) for log in logs(fast)[1:]] == [PLAN, FULL]


def _all_full(plan: omnifx.Plan) -> omnifx.Plan:
    steps = tuple(step.model_copy(update={"variant": plan.steps[0].variant}) for step in plan.steps)
    return plan.model_copy(update={"steps": steps})


def test_a_profile_kept_on_disk_serves_another_process_at_another_shape() -> None:
    model = free_toy()
    image_of(first := compiled(model, dynamic=False, profile_cache=True), SHAPES[0])
    find_session(first).finish()
    torch._dynamo.reset()
    again = compiled(model, dynamic=True, profile_cache=True, speedup=2.0)  # other options: a session of its own

    image = image_of(again, SHAPES[1], seed=1)

    assert letters_of(logs(again)[0]) == PLAN
    assert_is_reference(image, model, PLAN, SHAPES[1], seed=1)


# -- corrections -------------------------------------------------------------------------------------------------------


class Filtered(Pattern):
    """A pattern whose corrections subtract low frequencies alone, where the profile tells them apart."""

    name = "filtered"
    uses_noise = True

    def plan(self, profile: Profile, *, speedup: float | None = None) -> omnifx.Plan:
        plan = super().plan(profile, speedup=speedup)
        if not profile.meta.filter_axes:
            return plan
        low = Correction(gamma=self.gamma, filter="low", cutoff=0.5)
        steps = tuple(step.model_copy(update={"correction": low if step.correction else None}) for step in plan.steps)
        return plan.model_copy(update={"steps": steps})


def test_corrections_are_filtered_at_the_size_of_the_call() -> None:
    model = free_toy()
    policy = Filtered(pattern="FFcc")
    fast = compiled(model, policy=policy)
    image_of(fast, SHAPES[0])
    find_session(fast).finish()
    ((profile, plan),) = omnifx.plans(fast)[:1]
    image = image_of(fast, (1, 4, 12, 16), seed=2)
    torch._dynamo.reset()

    static = compiled(model, policy=policy, dynamic=False, profile=profile, plan=plan)
    expected = image_of(static, (1, 4, 12, 16), seed=2)

    assert [step.variant for step in logs(fast)[-1].steps] == ["full+write"] * 2 + ["reuse+correct"] * 2
    assert [step.variant for step in logs(static)[-1].steps] == ["full+write"] * 2 + ["reuse+correct"] * 2
    assert distance(image, expected) < 1e-5
    assert distance(image, image_of(Reference(model, "FFrr"), (1, 4, 12, 16), seed=2)) > 1e-3  # it was corrected


class _Tokens(nn.Module):
    """A block on tokens [B, N, 32], which are a picture's if N is a square."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 32)
        self.block = Block(32, 2, text=0)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.block(x, self.time(t[:, None] / 1000), None)


def test_a_filter_where_tokens_may_be_no_square_is_left_out_or_the_step_is_computed() -> None:
    model = lively(_Tokens())

    def run(model: Callable[..., Any]) -> None:
        x = noise(2, 16, 32)
        for time in timesteps(STEPS):
            with torch.no_grad():
                x = x - model(x, torch.full((2,), time), torch.zeros(2)) / 100

    static = compiled(model, policy=Filtered(pattern="FFcc"), dynamic=False)
    run(static)
    find_session(static).finish()
    ((profile, plan),) = omnifx.plans(static)
    assert plan.steps[2].correction == Correction(gamma=0.5, filter="low", cutoff=0.5)
    letters = []
    for given in ({"profile": profile}, {"profile": profile, "plan": plan}):
        torch._dynamo.reset()
        fast = compiled(model, policy=Filtered(pattern="FFcc"), **given)
        run(fast)
        letters.append([step.variant for step in logs(fast)[-1].steps][2])
        reasons = list(logs(fast)[-1].reasons)

    assert letters == ["reuse+correct", "full+write"]
    assert reasons == ["the plan filters its corrections, but the output has no grid here"]


# -- shapes at once, and in the middle ---------------------------------------------------------------------------------


def test_interleaved_generations_of_two_sizes_keep_to_their_own_caches() -> None:
    model = free_toy()
    fast = compiled(model)
    for shape in SHAPES[:2]:
        image_of(fast, shape)
    running = [sampling(fast, seed=s, steps=STEPS, latents=noise(*SHAPES[s], seed=5)) for s in (0, 1)]

    images = list(zip(*running, strict=True))[-1]

    assert counters["stats"]["unique_graphs"] == 1
    for shape, image, log in zip(SHAPES, images, logs(fast)[-2:], strict=False):
        assert letters_of(log) == PLAN
        assert_is_reference(image, model, PLAN, shape, seed=5)


@pytest.mark.parametrize("dynamic", [None, False], ids=["automatic", "static"])
def test_a_shape_captured_while_another_generation_runs_never_reads_its_caches(dynamic: bool | None) -> None:
    model = free_toy()
    fast = compiled(model, dynamic=dynamic)
    image_of(fast, SHAPES[0])
    running = sampling(fast, seed=5, steps=STEPS, latents=noise(*SHAPES[0], seed=5))
    for _ in range(2):
        next(running)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OmnifxWarning)  # the rest may be taken for a generation of its own
        other = image_of(fast, SHAPES[1], seed=6)
        *_, image = running

    ran = [letters_of(log) for log in logs(fast)[1:]]
    mine = ran[0] if len(ran) == 2 else ran[0] + ran[2]  # a call may go on in the new graph, which has no caches of it
    assert_is_reference(other, model, PLAN, SHAPES[1], seed=6)
    assert_is_reference(image, model, mine, SHAPES[0], seed=5)
    assert mine[:2] == "Fr"


def _growing(model: Callable[..., Any], *, seed: int) -> Tensor:
    """A generation whose latents double their sides after two steps."""

    def grow(k: int, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0) if k == 2 else x

    return generate(model, seed=seed, steps=STEPS, latents=noise(*SHAPES[0], seed=seed), before=grow)


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "unmarked"])
def test_latents_that_grow_in_the_middle_are_computed_in_full_from_there(marked: bool) -> None:
    model = free_toy()
    fast = compiled(model)
    image_of(fast, SHAPES[0])
    find_session(fast).finish()
    sizes: list[int] = []

    def watched(*args: Tensor) -> Tensor:
        output: Tensor = fast(*args)
        sizes.append(len(list(find_session(fast).conductors[0].streams)))
        return output

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OmnifxWarning)  # two steps are too few to learn from
        if marked:
            with omnifx.generation(fast):
                image = _growing(watched, seed=1)
        else:
            image = _growing(watched, seed=1)
        after = image_of(fast, SHAPES[0], seed=2)

    assert distance(image, _growing(Reference(model, "FrFF"), seed=1)) < 1e-5
    assert [letters_of(log) for log in logs(fast)[1:]] == ["Fr", "FF", PLAN]
    assert sizes == ([1, 1, 1, 1] if marked else [1, 1, 2, 2])  # only a mark proves that the first caches are done with
    assert_is_reference(after, model, PLAN, SHAPES[0], seed=2)


# -- bytes -------------------------------------------------------------------------------------------------------------


def test_the_bytes_of_caches_are_those_of_the_call() -> None:
    fast = compiled(free_toy())
    image_of(fast, (1, 4, 8, 12))  # measured: its caches hold the noise as well
    image_of(fast, (1, 4, 8, 12))
    image_of(fast, (1, 4, 16, 12))

    _, small, large = (log.peak_cache_bytes for log in logs(fast))

    assert large == 2 * small > 0
    assert omnifx.stats(fast).peak_cache_bytes == large  # what was reserved


def test_a_size_whose_caches_are_over_the_budget_runs_in_full() -> None:
    model = free_toy()
    need = 2 * 24 * 32 * 4  # attention and MLP, 4 x 6 tokens, width 32, float32
    fast = compiled(model, cache_budget=need)
    image_of(fast, (1, 4, 8, 12))

    images = [image_of(fast, shape, seed=1) for shape in ((1, 4, 16, 12), (1, 4, 8, 12))]

    stats = omnifx.stats(fast)
    assert [letters_of(log) for log in logs(fast)[1:]] == [FULL, PLAN]
    assert stats.generations[1].peak_cache_bytes == 0
    assert stats.peak_cache_bytes == need
    assert list(logs(fast)[1].reasons) == [
        f"at this size one stream's caches need {2 * need:,} bytes, but cache_budget is {need:,}"
    ]
    assert_is_reference(images[0], model, FULL, (1, 4, 16, 12), seed=1)
    assert_is_reference(images[1], model, PLAN, (1, 4, 8, 12), seed=1)


def test_a_generation_over_the_budget_is_not_learned_from() -> None:
    model = free_toy()
    fast = compiled(model, cache_budget=2 * 24 * 32 * 4)
    with torch.no_grad():
        fast(noise(1, 4, 8, 12), torch.full((1,), 500.0), torch.full((1,), 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OmnifxWarning)
        image_of(fast, (1, 4, 16, 12))
        find_session(fast).finish()

    assert omnifx.plans(fast) == []


def test_a_variant_compiled_for_other_sizes_is_not_run() -> None:
    model = free_toy()
    fast = compiled(model)
    image_of(fast, SHAPES[0])
    (runner,) = find_session(fast).runners
    symbol = next(iter(runner.program.sizes.positions))
    (variant,) = (v for v in runner.program.variants.values() if v.spec.label == "reuse")
    variant.guards = (sympy.Eq(symbol, 8),)

    images = [image_of(fast, shape, seed=1) for shape in SHAPES[:2]]

    assert [letters_of(log) for log in logs(fast)[1:]] == [PLAN, FULL]
    assert list(logs(fast)[2].reasons) == ["the variant reuse was compiled for other sizes than these"]
    for image, letters, shape in zip(images, (PLAN, FULL), SHAPES, strict=False):
        assert_is_reference(image, model, letters, shape, seed=1)


# -- real classes ------------------------------------------------------------------------------------------------------


def _flux_sizes(tiny: Tiny, rows: int, columns: int, batch: int = 1) -> dict[str, Any]:
    channels = tiny.inputs["hidden_states"].shape[-1]
    return {
        "hidden_states": noise(batch, rows * columns, channels, seed=rows),
        "img_ids": grid(rows, columns, tiny.inputs["img_ids"].shape[-1]),
    }


def _picture_sizes(tiny: Tiny, rows: int, columns: int, batch: int = 1) -> dict[str, Any]:
    channels = tiny.inputs["hidden_states"].shape[1]
    return {"hidden_states": noise(batch, channels, rows, columns, seed=rows)}


def _video_sizes(tiny: Tiny, frames: int, rows: int, columns: int) -> dict[str, Any]:
    channels = tiny.inputs["hidden_states"].shape[1]
    return {"hidden_states": noise(1, channels, frames, rows, columns, seed=rows)}


SIZES: dict[str, tuple[Callable[..., dict[str, Any]], tuple[Shape, ...]]] = {
    "pixart": (_picture_sizes, ((8, 8), (8, 12), (12, 8), (16, 12))),
    "sd3": (_picture_sizes, ((8, 8), (8, 12), (12, 8), (4, 8))),
    "flux": (_flux_sizes, ((4, 4), (4, 6), (6, 4), (3, 5))),
    "wan": (_video_sizes, ((2, 8, 8), (3, 8, 8), (5, 8, 8), (3, 8, 12))),
}


def run(model: Callable[..., Any], tiny: Tiny, inputs: dict[str, Any]) -> list[Tensor]:
    """The outputs of one generation of the calls that the zoo makes, at the size of `inputs`."""
    at_size = Tiny(tiny.model, inputs, tiny.modules, tiny.latents, tiny.times)
    with torch.no_grad():
        return [first_tensor(model(**at_size.step(k))).clone() for k in range(STEPS)]


def real_classes(name: str, dynamic: bool | None, *, lowering: str) -> None:
    tiny = TINY[name]()
    make, sizes = SIZES[name]
    calls = [{**tiny.inputs, **make(tiny, *size)} for size in sizes]
    plain = torch.compile(tiny.model, backend="aot_eager" if lowering == "eager" else "inductor", dynamic=dynamic)
    for inputs in calls:
        run(plain, tiny, inputs)
    allowed = counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    counters.clear()
    fast = compiled(tiny.model, dynamic=dynamic, lowering=lowering)

    outputs = [run(fast, tiny, inputs) for inputs in calls]

    assert counters["stats"]["unique_graphs"] <= allowed
    assert [letters_of(log) for log in logs(fast)] == [FULL, *[PLAN] * (len(sizes) - 1)]
    for inputs, given in zip(calls[1:], outputs[1:], strict=True):
        reference = OldOutputs(tiny.model, tiny.modules)
        at_size = Tiny(tiny.model, inputs, tiny.modules, tiny.latents, tiny.times)
        for k, letter in enumerate(PLAN):
            assert distance(given[k], reference(at_size.step(k), reuse=letter == "r")) < 1e-4


@pytest.mark.slow
@DYNAMIC
@pytest.mark.parametrize("name", SIZES)
def test_real_classes_keep_their_plan_at_other_sizes(name: str, dynamic: bool | None) -> None:
    real_classes(name, dynamic, lowering="eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_real_classes_keep_their_plan_at_other_sizes_with_inductor(name: str) -> None:
    real_classes(name, None, lowering="inductor")


def test_inputs_go_by_their_names_where_a_larger_picture_has_too_many_positions_to_count_as_small() -> None:
    fast = compiled(model := _Placed(), dynamic=False)

    images = []
    for rows, columns in ((4, 6), (30, 48)):
        ids = grid(rows, columns)
        images.append(image_of(lambda *args, ids=ids: fast(ids, *args), (1, 4, 2 * rows, 2 * columns)))

    small, large = (runner.program.analysis.inputs for runner in find_session(fast).runners)
    assert (small.small[0], len(small.small), len(large.small)) == (0, 3, 2)  # the positions stand before the timestep
    assert [letters_of(log) for log in logs(fast)] == [FULL, PLAN]
    reference = Reference(model, PLAN, modules=("inner.blocks.0.attn", "inner.blocks.0.mlp"), stream_of=lambda *args: 0)
    assert distance(images[1], image_of(lambda *args: reference(grid(30, 48), *args), (1, 4, 60, 96))) < 1e-5


def test_a_table_that_one_size_alone_reads_does_not_make_another_model() -> None:
    fast = compiled(_Tabled(), dynamic=False)

    for shape in SHAPES[:2]:
        image_of(fast, shape)

    assert [letters_of(log) for log in logs(fast)] == [FULL, PLAN]


class _Tabled(FreeDiT):
    """A toy that keeps the positions of its first size, as models of diffusers do."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__(num_blocks=1)
        lively(self)
        self.register_buffer("table", super().positions(4, 6))

    def positions(self, rows: int, columns: int) -> Tensor:
        return self.table if (rows, columns) == (4, 6) else super().positions(rows, columns)


class _Placed(nn.Module):
    """A toy that is told the positions of its tokens [N, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = free_toy()

    def forward(self, ids: Tensor, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.inner(ids.mean() / 100 + x, t, y)
