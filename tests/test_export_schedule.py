"""Schedules of exports: run in PyTorch, they do what a compiled model does by the same plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import omnifx
from omnifx.errors import BundleError, ConfigError, ExportError, PlanError
from omnifx.exporter import prepare
from omnifx.plan import Plan
from tests.exporting import Planned, in_torch, plan_by_hand, planned
from tests.toys import distance, generate, noise, sampling, timesteps, toy, toy_inputs

STEPS = 9
TEXT = noise(1, 5, 8, seed=7)
EXAMPLE = toy_inputs(text=8)


def guided(model: Any, seed: int) -> Tensor:
    """A generation of two streams."""
    return generate(model, seed=seed, steps=STEPS, text=TEXT, cfg=0)


def names_of(model: torch.nn.Module, *example: Any) -> tuple[str, ...]:
    return tuple(branch.name for branch in omnifx.explain(model, *example).branches if branch.cacheable)


@pytest.mark.parametrize(
    ("policy", "speedup"),
    [
        ("fora", None),
        ("taylorseer", None),
        ("omnicache", 1.6),
        ("auto", 1.8),
        ("toca", None),
        ("goc", None),
        ("eoc", None),
        ("delta-dit", None),
        ("pab", None),
    ],
)
def test_a_schedule_gives_what_the_compiled_model_gives(policy: str, speedup: float | None, tmp_path: Path) -> None:
    case = planned(toy(2, text=8), guided, policy, speedup=speedup)
    runner = in_torch(case.model, EXAMPLE, case.plan, profile=case.profile)
    compiled = case.compiled(tmp_path)

    true, got = guided(compiled, 5), guided(runner, 5)

    assert omnifx.stats(compiled).generations[-1].reasons == {}, "the compiled model left its plan"
    assert distance(got, true) < 1e-6
    assert distance(true, guided(case.model, 5)) > 1e-5, "nothing was reused"
    assert runner.stats.live_streams == 0
    assert runner.stats.generations == 2


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return toy(2, text=8)


@pytest.fixture(scope="module")
def plan(model: torch.nn.Module) -> Plan:
    return plan_by_hand(model, names_of(model, *EXAMPLE), "FrFr", timesteps(4))


@pytest.fixture(scope="module")
def runner(model: torch.nn.Module, plan: Plan) -> Any:
    return in_torch(model, EXAMPLE, plan)


def test_reuse_reads_no_weights_but_the_ends_of_the_model(runner: Any) -> None:
    variants = runner.manifest.variants

    assert variants["reuse"].params_bytes < 0.1 * variants["full"].params_bytes
    assert {"t", "y", "text"} <= set(variants["reuse"].dropped_inputs)
    assert "t" in variants["full"].dropped_inputs, "the timestep was folded into constants"
    assert "text" in variants["full"].dropped_inputs, "keys and values of the text come from the prologue"
    assert list(variants["prologue"].inputs) == ["text"]


def test_without_conditions_a_reuse_step_is_one_graph(model: torch.nn.Module, plan: Plan, runner: Any) -> None:
    plain = in_torch(model, EXAMPLE, plan, conditions=False)

    assert [len(step.runs) for step in plain.manifest.steps] == [1, 1, 1, 1]
    assert [len(step.runs) for step in runner.manifest.steps] == [1, 2, 1, 2]
    run = {"seed": 3, "steps": 4, "text": TEXT}
    assert distance(generate(plain, **run), generate(runner, **run)) < 1e-6


def test_streams_and_generations_may_interleave(runner: Any) -> None:
    alone = [generate(runner, seed=seed, steps=4, text=TEXT) for seed in (1, 2)]
    loops = [sampling(runner, seed=seed, steps=4, text=TEXT) for seed in (1, 2)]

    *_, together = zip(*loops, strict=True)

    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[1], alone[1])


def test_equal_generations_must_be_marked(runner: Any) -> None:
    x, t, y, text = noise(1, 4, 8, 8), torch.tensor([timesteps(4)[0]]), torch.tensor([3]), TEXT
    second = torch.tensor([timesteps(4)[1]])
    with runner.generation(), torch.no_grad():
        runner(x, t, y, text)
        runner(x, t, y, text)
        with pytest.raises(BundleError, match=r"2 generations with equal inputs .* runner.generation"):
            runner(x, second, y, text)
    with runner.generation():
        first = runner(x, t, y, text)
        with runner.generation():
            assert torch.equal(runner(x, t, y, text), first)
            runner(x, second, y, text)
        runner(x, second, y, text)
    assert runner.stats.live_streams == 0


def test_other_timesteps_are_refused(runner: Any) -> None:
    x, y = noise(1, 4, 8, 8), torch.tensor([3])
    with pytest.raises(BundleError, match=r"timestep 500 is none of the bundle's 4: \[981, .*\]"):
        runner(x, torch.tensor([500.0]), y, TEXT)
    with pytest.raises(BundleError, match=r"is step 2, but no generation with these inputs is at step 1"):
        runner(x, torch.tensor([timesteps(4)[2]]), y, TEXT)
    with pytest.raises(BundleError, match=r"the sampler has 2 timesteps \[981, 1\]"):
        runner.expect([981.0, 1.0])
    runner.expect(timesteps(4))


def test_conditioning_that_changes_amid_a_generation_is_refused(runner: Any) -> None:
    x, y = noise(1, 4, 8, 8), torch.tensor([3])
    with runner.generation():
        runner(x, torch.tensor([timesteps(4)[0]]), y, TEXT)
        with pytest.raises(BundleError, match="text changed amid a generation"):
            runner(x, torch.tensor([timesteps(4)[1]]), y, TEXT + 1)


def test_other_sizes_and_values_are_refused(runner: Any) -> None:
    t, y = torch.tensor([timesteps(4)[0]]), torch.tensor([3])
    with pytest.raises(BundleError, match=r"x has the shape \[2, 4, 8, 8\], but the bundle was made for \[1, "):
        runner(noise(2, 4, 8, 8), t, y, TEXT)
    with pytest.raises(BundleError, match="the argument text is missing"):
        runner(noise(1, 4, 8, 8), t, y)


def test_of_too_many_streams_the_oldest_is_forgotten(runner: Any) -> None:
    runner.max_streams, before = 1, runner.max_streams
    try:
        for seed in (1, 2):
            runner(noise(1, 4, 8, 8, seed=seed), torch.tensor([timesteps(4)[0]]), torch.tensor([seed]), TEXT)
        assert runner.stats.live_streams == 1
        assert runner.stats.held_bytes == runner.manifest.stream_bytes
        with pytest.raises(BundleError, match="no generation with these inputs is at step 0"):
            runner(noise(1, 4, 8, 8, seed=1), torch.tensor([timesteps(4)[1]]), torch.tensor([1]), TEXT)
    finally:
        runner.max_streams = before


def test_a_plan_of_another_model_is_refused(plan: Plan) -> None:
    with pytest.raises(PlanError, match=r"the plan was made for ToyDiT with other weights"):
        prepare(toy(2, text=8, seed=1), EXAMPLE, plan)
    with pytest.raises(PlanError, match=r"other branches than the model has here: .* are missing"):
        prepare(toy(1, text=8), EXAMPLE, plan, same_weights=False)


class Otherwise(torch.nn.Module):
    """A model that is another one while it is captured."""

    def __init__(self, captured: Callable[[], bool]) -> None:
        super().__init__()
        self.inner = toy(1)
        self.captured = captured

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.inner(x, t, y)
        return out if self.captured() else out * (1.0 + x.mean())


def test_where_torch_export_is_wrong_the_model_is_captured_through_dynamo() -> None:
    model = Otherwise(torch.compiler.is_exporting).eval()
    plan = plan_by_hand(model, names_of(model, *toy_inputs()), "Fr", timesteps(2))

    runner = in_torch(model, toy_inputs(), plan)

    x, t, y = toy_inputs(seed=4)
    t = torch.full_like(t, timesteps(2)[0])
    assert distance(runner(x, t, y), model(x, t, y)) < 1e-6
    assert "inner.blocks.0.mlp.up.weight" in runner.engine.graphs["full"].params
    assert torch.isfinite(runner(x, torch.full_like(t, timesteps(2)[1]), y)).all()


def test_a_capture_that_differs_from_the_model_is_refused() -> None:
    model = Otherwise(torch.compiler.is_compiling).eval()
    plan = plan_by_hand(model, names_of(model, *toy_inputs()), "Fr", timesteps(2))
    with pytest.raises(
        ExportError, match=r"differs from the model by .* second set of inputs .* Nor can it be captured"
    ):
        prepare(model, toy_inputs(), plan)


def test_a_training_model_and_wrong_arguments_are_refused(plan: Plan) -> None:
    with pytest.raises(ExportError, match="training mode"):
        prepare(toy(1, text=8).train(), EXAMPLE, plan)
    with pytest.raises(ExportError, match="the example inputs do not fit ToyDiT"):
        prepare(toy(1, text=8), {"x": EXAMPLE[0]}, plan)
    with pytest.raises(ConfigError, match=r"timestep='z' is none of the small inputs"):
        prepare(toy(2, text=8), EXAMPLE, plan, timestep="z")
    with pytest.raises(ConfigError, match=r"varying_inputs \['z'\] are no arguments"):
        prepare(toy(2, text=8), EXAMPLE, plan, varying_inputs=["z"])


def test_an_input_that_varies_stays_an_input_of_every_graph(model: torch.nn.Module, plan: Plan) -> None:
    runner = in_torch(model, EXAMPLE, plan, varying_inputs=["text"])

    assert "prologue" not in runner.manifest.variants
    assert runner.manifest.call.inputs["text"].role == "varying"
    texts = [TEXT, TEXT + 1, TEXT + 2, TEXT + 3]
    with torch.no_grad():
        for k, time in enumerate(timesteps(4)):
            out = runner(noise(1, 4, 8, 8), torch.tensor([time]), torch.tensor([3]), texts[k])
            if k == 2:
                true = model(noise(1, 4, 8, 8), torch.tensor([time]), torch.tensor([3]), texts[k])
                assert distance(out, true) < 1e-6


def test_a_plan_that_needs_its_profile_says_so() -> None:
    case: Planned = planned(toy(1, text=8), guided, "eoc")
    with pytest.raises(PlanError, match="Give the profile"):
        prepare(case.model, EXAMPLE, case.plan)
