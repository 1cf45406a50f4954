"""Exact first: all-compute is the uncached model, reuse is the model with old outputs, own cuts change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import omnifx
from omnifx.plan import REUSE
from tests.reference import OldOutputs, replay_cuts
from tests.toys import EAGER, TINY, Tiny, distance, noise, toy, trace


def tiny_toy() -> Tiny:
    """The toy in the shape of the other models."""
    model = toy(2, text=24)
    modules = tuple(f"blocks.{i}.{part}" for i in range(2) for part in ("attn", "cross", "mlp"))
    inputs = {
        "x": noise(1, 4, 8, 8),
        "t": torch.tensor([500.0]),
        "y": torch.tensor([3]),
        "text": noise(1, 5, 24, seed=7),
    }
    return Tiny(model, inputs, modules)


MODELS: dict[str, Callable[[], Tiny]] = {"toy": tiny_toy, **TINY}
QUICK = ("dit", "pixart")  # with Inductor; the others take their time


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch.set_num_threads(threads)


def next_inputs(tiny: Tiny) -> dict[str, Any]:
    """Another step's call."""
    if "hidden_states" in tiny.inputs:
        return tiny.next_inputs()
    return {**tiny.inputs, "x": 0.9 * tiny.inputs["x"] + 0.3 * noise(1, 4, 8, 8, seed=99), "t": tiny.inputs["t"] * 0.8}


@torch.no_grad()
def call(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    output = model(**inputs)
    first: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return first


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_all_compute_has_the_bits_of_plain_torch_compile(name: str) -> None:
    tiny = MODELS[name]()
    expected = [call(torch.compile(tiny.model), inputs) for inputs in (tiny.inputs, next_inputs(tiny))]
    torch._dynamo.reset()

    fast = torch.compile(tiny.model, backend="omnicache", options={"policy": "full"})

    for inputs, plain in zip((tiny.inputs, next_inputs(tiny)), expected, strict=True):
        assert torch.equal(call(fast, inputs), plain)
    assert omnifx.stats(fast).graphs == 1


@pytest.mark.parametrize("name", [n if n == "dit" else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_a_measured_step_with_inductor_is_the_uncached_step(name: str) -> None:
    """Full steps that also return cuts are fused differently, so the last bits may differ."""
    tiny = MODELS[name]()
    fast = torch.compile(tiny.model, backend="omnicache", options={"policy": "fora", "profile_cache": False})

    for inputs in (tiny.inputs, next_inputs(tiny)):
        assert distance(call(fast, inputs), call(tiny.model, inputs)) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_all_compute_without_a_compiler_is_the_eager_model(name: str) -> None:
    tiny = MODELS[name]()

    fast = torch.compile(tiny.model, backend="omnicache", options={**EAGER, "policy": "full"})

    for inputs in (tiny.inputs, next_inputs(tiny)):
        assert distance(call(fast, inputs), call(tiny.model, inputs)) < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_a_step_that_reuses_everything_is_the_model_with_its_modules_old_outputs(name: str) -> None:
    tiny = MODELS[name]()
    reference = OldOutputs(tiny.model, tiny.modules)
    reference(tiny.inputs, reuse=False)
    expected = reference(next_inputs(tiny), reuse=True)
    traced = trace(tiny.model, **tiny.inputs)

    values = as_called(traced.inputs, tiny.inputs, next_inputs(tiny))
    _, again = replay_cuts(traced.program(), traced.inputs, values)

    assert distance(again[0], expected) < 1e-5
    assert distance(again[0], call(tiny.model, next_inputs(tiny))) > 1e-3  # else reuse could not be told from computing


def as_called(values: list[Any], before: dict[str, Any], after: dict[str, Any]) -> list[Any]:
    """The graph's inputs at another call: those that were the old arguments, replaced by the new ones."""
    new = {before[key].data_ptr(): after[key] for key in before if isinstance(before[key], torch.Tensor)}
    replaced = [new.get(v.data_ptr(), v) if isinstance(v, torch.Tensor) else v for v in values]
    changed = sum(a is not b for a, b in zip(values, replaced, strict=True))
    assert changed >= 2  # latents and timestep at least
    return replaced


@pytest.mark.parametrize("name", MODELS)
def test_a_reuse_variant_fed_the_steps_own_cuts_computes_the_same_bits(name: str) -> None:
    tiny = MODELS[name]()
    traced = trace(tiny.model, **tiny.inputs)
    program = traced.program()

    made, again = replay_cuts(program, traced.inputs, traced.inputs)

    reusing = program.variant(program.reusing(program.reuse_row, corrects=False))
    assert REUSE in reusing.spec.row
    assert (
        torch.equal(made[0], call(tiny.model, tiny.inputs)) or distance(made[0], call(tiny.model, tiny.inputs)) < 1e-6
    )
    assert torch.equal(again[0], made[0])
    assert reusing.flops <= traced.analysis.reuse_flops  # less where narrowed linears compute the gates alone
