"""Skipped steps of a model in parts: the planned sums of planned values, formed at the boundary, or a full step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

import omnifx
from omnifx.plan import Combination
from omnifx.policies.auto import Auto
from omnifx.session import find_session
from tests.combining import CombinedReference, generate, sampling
from tests.reference import first_tensor
from tests.test_combinations import LATENTS, OUTPUTS, Told, assert_equal_steps, compiled, last, tiny_toy
from tests.toys import EAGER, ToyDiT, ToyInParts, distance, letters_of, lively, noise, toy, toy_in_parts
from tests.toys import generate as sample

LETTERS = "FFssFs"
KNOWN = {2: OUTPUTS, 3: LATENTS, 5: Combination(outputs=(1.5, -0.5), latents=(0.2,))}


class InParts(ToyInParts):
    """A toy in parts, whose output is in a wrapping of the caller's choice."""

    wrap: Callable[[Tensor], Any]

    def forward(self, x: Tensor, t: Tensor, y: Tensor, text: Tensor | None = None) -> Any:
        return self.wrap(super().forward(x, t, y, text))


def calibrated(model: Any, letters: str = LETTERS, known: Mapping[int, Combination] = KNOWN, **options: Any) -> Any:
    """A compiled model in parts that has measured a generation; how to capture it was found out in the one before."""
    torch._dynamo.reset()
    fast = compiled(model, letters, known, **options)
    for seed in (100, 101):
        with omnifx.generation(fast):
            generate(fast, tiny_toy(model), steps=len(letters), seed=seed)
    return fast


def expected(letters: str = LETTERS, model: ToyDiT | None = None, **arguments: Any) -> Tensor:
    reference = CombinedReference(tiny_toy(model), letters, KNOWN)
    return generate(reference, tiny_toy(), **{"steps": len(letters), "seed": 1, **arguments})


def test_a_generation_is_that_of_plain_tensors() -> None:
    fast = calibrated(toy_in_parts())

    got = generate(fast, tiny_toy(), steps=len(LETTERS), seed=1)

    assert last(fast).reasons == {}
    assert letters_of(last(fast)) == LETTERS
    assert_equal_steps(got, expected())
    assert last(fast).speedup == pytest.approx(2.0)
    stats = omnifx.stats(fast)
    assert stats.cache_bytes == 0  # the generation is over
    assert last(fast).peak_cache_bytes == 2 * 2 * 4 * 4 * 8 * 8  # two full steps, an output and latents each


@pytest.mark.parametrize(
    "wrap",
    [lambda x: (x,), lambda x: [x, None, 2.0], lambda x: Transformer2DModelOutput(sample=x)],
    ids=["tuple", "list", "diffusers"],
)
def test_outputs_come_in_the_wrapping_of_the_model(wrap: Callable[[Tensor], Any]) -> None:
    model = InParts()
    model.load_state_dict(toy().state_dict())
    model.wrap = wrap
    fast = calibrated(model)
    seen = []

    def watching(**inputs: Any) -> Tensor:
        seen.append(fast(**inputs))
        return first_tensor(seen[-1])

    got = generate(watching, tiny_toy(), steps=len(LETTERS), seed=1)

    assert letters_of(last(fast)) == LETTERS
    assert {type(output) for output in seen} == {type(wrap(noise(1)))}
    assert_equal_steps(got, expected())


def test_several_outputs_run_in_full_and_say_why() -> None:
    class ToldInParts(Told):
        def forward(self, x: Tensor, t: Tensor, y: Tensor, text: Tensor | None = None) -> Any:
            torch._dynamo.graph_break()
            return super().forward(x, t, y, text)

    fast = calibrated(lively(ToldInParts(2)))

    generate(fast, tiny_toy(), steps=len(LETTERS), seed=1)

    assert letters_of(last(fast)) == "F" * len(LETTERS)
    assert "a call gives 2 tensors" in str(last(fast).reasons)


@pytest.mark.parametrize("in_place", [True, False])
def test_changed_weights_are_noticed_before_a_skip(in_place: bool) -> None:
    model = toy_in_parts()
    fast = calibrated(model)

    def change(step: int, inputs: Any) -> None:
        if step == 3:
            with torch.no_grad():
                weight = model.blocks[1].mlp.down.weight  # type: ignore[union-attr]
                weight.mul_(1.5) if in_place else setattr(weight, "data", weight * 1.5)

    for _ in sampling(fast, tiny_toy(), steps=len(LETTERS), seed=1, before=change):
        pass

    assert letters_of(last(fast)) == "FFsFFF"
    assert set(last(fast).reasons) == {"the weights changed since the caches were made"}


def test_weights_that_come_or_go_are_noticed_before_a_skip() -> None:
    model = toy_in_parts()
    fast = calibrated(model)

    def change(step: int, inputs: Any) -> None:
        if step == 3:
            model.register_parameter("adapter", torch.nn.Parameter(torch.zeros(2)))

    for _ in sampling(fast, tiny_toy(), steps=len(LETTERS), seed=1, before=change):
        pass

    assert last(fast).steps[3].reason == "the weights changed since the caches were made"
    assert letters_of(last(fast)).startswith("FFsF")


def test_evicted_outputs_are_not_combined() -> None:
    fast = calibrated(toy_in_parts())
    session = find_session(fast)

    def evict(step: int, inputs: Any) -> None:
        if step == 3:
            for conductor in session.conductors:
                for stream in conductor.streams:
                    session.store.release(stream.key)  # type: ignore[union-attr]

    got = torch.stack(list(sampling(fast, tiny_toy(), steps=len(LETTERS), seed=1, before=evict)))

    assert letters_of(last(fast)) == "FFsFFF"
    assert set(last(fast).reasons) == {"its caches were evicted to keep cache_budget"}
    assert_equal_steps(got, expected("FFsSFS"))


def test_generations_interleave() -> None:
    fast = calibrated(toy_in_parts())
    jobs = [sampling(fast, tiny_toy(), steps=len(LETTERS), seed=seed) for seed in (1, 2)]

    outputs = [[next(job) for job in jobs] for _ in LETTERS]

    for i, seed in enumerate((1, 2)):
        assert_equal_steps(torch.stack([pair[i] for pair in outputs]), expected(seed=seed))


@pytest.mark.parametrize("network", ["auto", "skip"])
def test_auto_skips_steps_of_a_model_in_parts(network: Any) -> None:
    torch._dynamo.reset()
    model = toy_in_parts()
    policy = Auto(network=network)
    fast = torch.compile(model, backend="omnicache", options={**EAGER, "policy": policy, "speedup": 2.0})
    for seed in (0, 1):
        sample(fast, seed=seed, steps=12)

    image = sample(fast, seed=2, steps=12)

    assert sorted(letters_of(last(fast))) == ["F"] * 6 + ["s"] * 6
    ((_, plan),) = omnifx.plans(fast)
    drift = float(plan.notes[0].partition(": ")[2].partition("%")[0]) / 100
    assert distance(image, sample(toy(), seed=2, steps=12)) < 5 * drift + 1e-5
