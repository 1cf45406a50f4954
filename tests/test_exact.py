"""Exact first: all-compute is the uncached model, reuse is the model with old outputs, own cuts change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import omnifx
from omnifx.plan import REUSE
from tests.toys import EAGER, TINY, Tiny, distance, noise, toy, trace
from tests.zoo.entry import Entry
from tests.zoo.examine import examine


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
    return Tiny(model, inputs, modules, latents=("x",), times=("t",))


MODELS: dict[str, Callable[[], Tiny]] = {"toy": tiny_toy, **TINY}
QUICK = ("dit", "pixart")  # with Inductor; the others take their time


@torch.no_grad()
def call(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    output = model(**inputs)
    first: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return first


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_all_compute_has_the_bits_of_plain_torch_compile(name: str) -> None:
    tiny = MODELS[name]()
    expected = [call(torch.compile(tiny.model), inputs) for inputs in (tiny.inputs, tiny.next_inputs())]
    torch._dynamo.reset()

    fast = torch.compile(tiny.model, backend="omnicache", options={"policy": "full"})

    for inputs, plain in zip((tiny.inputs, tiny.next_inputs()), expected, strict=True):
        assert torch.equal(call(fast, inputs), plain)
    assert omnifx.stats(fast).graphs == 1


@pytest.mark.parametrize("name", [n if n == "dit" else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_a_measured_step_with_inductor_is_the_uncached_step(name: str) -> None:
    """Full steps that also return cuts are fused differently, so the last bits may differ."""
    tiny = MODELS[name]()
    fast = torch.compile(tiny.model, backend="omnicache", options={"policy": "fora", "profile_cache": False})

    for inputs in (tiny.inputs, tiny.next_inputs()):
        assert distance(call(fast, inputs), call(tiny.model, inputs)) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_all_compute_without_a_compiler_is_the_eager_model(name: str) -> None:
    tiny = MODELS[name]()

    fast = torch.compile(tiny.model, backend="omnicache", options={**EAGER, "policy": "full"})

    for inputs in (tiny.inputs, tiny.next_inputs()):
        assert distance(call(fast, inputs), call(tiny.model, inputs)) < 1e-6


def test_the_toy_reuses_exactly() -> None:
    """The models of diffusers are examined in tests/zoo."""
    entry = Entry(
        name="ToyDiT", config={}, inputs=dict, branches="2 cross_attention, 2 mlp, 2 self_attention",
        dependence="6 latent", left=0.056,
    )  # fmt: skip

    found = examine(tiny_toy())

    assert [*found.unlike(entry), *found.inexact(entry), *found.not_followed(entry)] == []


def test_a_reuse_variant_costs_what_the_analysis_says() -> None:
    tiny = tiny_toy()
    program = (traced := trace(tiny.model, **tiny.inputs)).program()

    reusing = program.variant(program.reusing(program.reuse_row, corrects=False))

    assert REUSE in reusing.spec.row
    assert reusing.flops == program.reuse_flops == traced.program().reuse_flops  # counted before it is made, too
    assert 0 < reusing.flops <= traced.analysis.reuse_flops  # less where narrowed linears compute the gates alone
