"""Models and blocks that are nobody's we know, without an adapter: what is found, and that every step is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from omnifx.plan import COMPUTE, REUSE
from tests.reference import STEPS, Case, Ran, replay_cuts, run
from tests.thirdparty.cases import MODELS
from tests.thirdparty.variants import VARIANTS
from tests.toys import distance

BOUND = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Relative difference from the eager model that rounding in other kernels may make: some units of the last place."""

QUICK = {
    "dit-bfloat16-3", "uvit-float16-1", "mmdit_dual-bfloat16-1", "hdit-float16-3", "stdit3-bfloat16-3",
    "maskdit_write-float32-3",
}  # fmt: skip
"""Of the models at other types and batch sizes than float32 and 1; the rest is slow together."""


def _cases() -> Iterator[object]:
    for dtype in BOUND:
        for batch in (1, 3):
            for name, make in MODELS.items():
                label = f"{name}-{str(dtype).removeprefix('torch.')}-{batch}"
                plain = dtype is torch.float32 and batch == 1
                marks = () if plain or label in QUICK else (pytest.mark.slow,)
                yield pytest.param(lambda make=make, b=batch, d=dtype: make(b, d), id=label, marks=marks)
    for name, make_variant in VARIANTS.items():
        yield pytest.param(make_variant, id=name)


@pytest.fixture(scope="module", params=_cases())
def ran(request: pytest.FixtureRequest) -> Iterator[Ran]:
    """A case after its two generations, for all tests of it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    make: Callable[[], Case] = request.param
    yield run(make())
    torch.set_num_threads(threads)


def _bound(ran: Ran) -> float:
    return BOUND[next(ran.case.model.parameters()).dtype]


def test_the_branches_are_those_of_the_design(ran: Ran) -> None:
    branches = ran.program.analysis.branches

    assert ran.kinds == ran.case.kinds, [(b.name, b.kind, b.reason) for b in branches]
    for module in ran.case.modules:
        assert any(_within(module, b.module_path) or _within(b.module_path, module) for b in branches), module


def _within(inner: str, outer: str) -> bool:
    return inner == outer or inner.startswith(f"{outer}.")


def test_a_measured_generation_is_the_uncached_one(ran: Ran) -> None:
    for step in range(STEPS):
        assert distance(ran.measured[step], ran.computed(step, seed=0)) < _bound(ran)


def test_a_planned_generation_reuses_at_every_step_but_the_first(ran: Ran) -> None:
    assert ran.log.variants == ["full+write", *["reuse"] * (STEPS - 1)]
    assert ran.log.reasons == {}
    assert (ran.stats.graphs, ran.stats.recompilations) == (1, 0)


def test_a_reuse_step_is_the_model_with_its_modules_first_outputs(ran: Ran) -> None:
    assert distance(ran.planned[0], ran.computed(0)) < _bound(ran)
    for step in range(1, STEPS):
        assert distance(ran.planned[step], ran.reused(step)) < _bound(ran)
        assert distance(ran.planned[step], ran.computed(step)) > 0.05  # else reuse could not be told from computing


def test_its_own_cuts_change_no_bit_of_a_step(ran: Ran) -> None:
    made, again = replay_cuts(ran.program, ran.arguments, ran.arguments)

    assert len(made) == len(again) >= 1
    assert all(torch.equal(a, b) for a, b in zip(made, again, strict=True))


# -- with Inductor -----------------------------------------------------------------------------------------------------

COMPILED: dict[str, Callable[[], Case]] = {
    **{name: lambda name=name: MODELS[name](1, torch.float32) for name in MODELS},  # type: ignore[misc]
    "dit-bfloat16": lambda: MODELS["dit"](3, torch.bfloat16),
    **{
        name: VARIANTS[name]
        for name in (
            "flex", "opaque_attention", "opaque_gate", "opaque_in_place", "rope_in_place", "rope_by_complex_numbers",
            "in_place", "torch_encoder_layer", "channels_last", "controlled", "named_output",
        )
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_with_inductor_reuse_steps_are_the_same(name: str) -> None:
    ran = run(COMPILED[name](), lowering="inductor")

    assert ran.kinds == ran.case.kinds
    assert ran.log.variants == ["full+write", *["reuse"] * (STEPS - 1)]
    assert (ran.stats.graphs, ran.stats.recompilations) == (1, 0)
    for step in range(STEPS):
        assert distance(ran.measured[step], ran.computed(step, seed=0)) < _bound(ran)
        expected = ran.reused(step) if step else ran.computed(step)
        assert distance(ran.planned[step], expected) < _bound(ran)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_what_feeds_a_buffer_that_is_written_again_dies_only_with_its_last_reader() -> None:
    program = run(VARIANTS["opaque_in_place"]()).program
    attention = tuple(REUSE if "attention" in b.kind else COMPUTE for b in program.branches)

    alone = program.variant(program.reusing(attention, corrects=False))
    together = program.variant(program.reusing(program.reuse_row, corrects=False))

    assert sum("norm_into" in str(n.args) or "norm_into" in str(n.target) for n in program.gm.graph.nodes) >= 4
    assert alone.flops > together.flops
    assert all(b.cacheable for b in program.analysis.branches)
