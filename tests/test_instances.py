"""Several instances of one class whose graph is broken: Dynamo runs one's parts for all, each has its own plan."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import omnifx
from omnifx.program import Program
from omnifx.session import find_session
from tests.test_breaks import FULL, PLAN, STEPS, BrokenDiT, BrokenInside, Masked
from tests.test_whole import Routed
from tests.toys import EAGER, Pattern, Reference, generate, letters_of, lively, noise, sampling

MODELS: dict[str, Callable[[int], nn.Module]] = {
    "breaks between the blocks": lambda seed: lively(BrokenDiT((0, 1)), seed),
    "breaks inside the blocks": lambda seed: lively(BrokenInside(), seed),
}
WHOLE: dict[str, Callable[[int], nn.Module]] = {
    "sizes are captured": lambda seed: lively(Masked(2, text=16), seed),
    "modules are kept whole": lambda seed: lively(Routed(), seed),
}


def compiled(model: nn.Module, pattern: str = "Frr", **options: Any) -> Any:
    return torch.compile(model, backend="omnicache", options={**EAGER, "policy": Pattern(pattern=pattern), **options})


def text_of(model: Any) -> dict[str, Any]:
    return {"text": noise(1, 5, 16, seed=7)} if model.blocks[0].cross is not None else {}


def assert_right(model: nn.Module, image: Tensor, letters: str, seed: int) -> None:
    expected = generate(Reference(model, letters), seed=seed, steps=STEPS, **text_of(model))
    assert torch.allclose(image, expected, atol=2e-5), (letters, seed)


def letters(fast: Any) -> list[str]:
    return [letters_of(log) for log in omnifx.stats(fast).generations]


def programs(fast: Any) -> list[Program]:
    return [runner.program for runner in find_session(fast).runners]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Program, str]]:
    """Every variant that is compiled from here on."""
    found: list[tuple[Program, str]] = []
    compiles = Program._compile

    def compile_and_note(self: Program, spec: Any) -> Any:
        found.append((self, repr(spec)))
        return compiles(self, spec)

    monkeypatch.setattr(Program, "_compile", compile_and_note)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_second_instance_is_served_with_the_parts_of_the_first_and_plans_for_itself(
    name: str, made: list[tuple[Program, str]]
) -> None:
    models = MODELS[name](0), MODELS[name](1)
    first, second = map(compiled, models)
    images = [generate(first, seed=seed, steps=STEPS) for seed in (0, 1)]
    compilations, graphs = len(made), omnifx.stats(first).graphs

    others = [generate(second, seed=seed, steps=STEPS) for seed in (0, 1, 2)]
    images.append(generate(first, seed=2, steps=STEPS))

    assert len(made) == compilations
    assert omnifx.stats(first).graphs == omnifx.stats(second).graphs == graphs > 1
    assert letters(first) == letters(second) == [FULL, PLAN, PLAN]
    for seed in range(3):
        assert_right(models[0], images[seed], letters(first)[seed], seed)
        assert_right(models[1], others[seed], letters(second)[seed], seed)
    assert not omnifx.stats(second).generations[1].reasons
    assert omnifx.stats(second).cache_bytes == 0
    assert omnifx.plans(first)[0][0].meta.fingerprint != omnifx.plans(second)[0][0].meta.fingerprint


@pytest.mark.parametrize("name", MODELS)
def test_instances_that_take_turns_from_the_first_step_on_do_not_mix(
    name: str, made: list[tuple[Program, str]]
) -> None:
    models = MODELS[name](0), MODELS[name](1)
    fast = [compiled(model) for model in models]

    for seed in (0, 1, 2):
        jobs: list[Iterator[Tensor]] = [sampling(f, seed=seed, steps=STEPS) for f in fast]
        *_, images = zip(*jobs, strict=True)
        for model, f, image in zip(models, fast, images, strict=True):
            assert_right(model, image, letters(f)[seed], seed)

    assert letters(fast[0]) == letters(fast[1]) == [FULL, PLAN, PLAN]
    assert programs(fast[0]) == programs(fast[1])
    assert len(set(made)) == len(made)


def test_instances_in_threads_do_not_mix() -> None:
    models = [MODELS["breaks between the blocks"](seed) for seed in (0, 1)]
    fast = [compiled(model) for model in models]
    for f in fast:
        for seed in (0, 1):
            generate(f, seed=seed, steps=STEPS)
    images: dict[int, Tensor] = {}

    def work(i: int) -> None:
        for seed in (2, 3):
            images[i] = generate(fast[i], seed=seed, steps=STEPS)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for i in (0, 1):
        assert letters(fast[i]) == [FULL, PLAN, PLAN, PLAN]
        assert_right(models[i], images[i], PLAN, 3)


@pytest.mark.parametrize("gone", [0, 1])
def test_an_instance_goes_with_its_session_and_leaves_the_other_one_as_it_was(gone: int) -> None:
    models = [MODELS["breaks between the blocks"](seed) for seed in (0, 1)]
    fast = [compiled(model) for model in models]
    for f in fast:
        for seed in (0, 1):
            generate(f, seed=seed, steps=STEPS)
    model, session = weakref.ref(models[gone]), weakref.ref(find_session(fast[gone]))

    del f, models[gone], fast[gone]
    gc.collect()
    image = generate(fast[0], seed=2, steps=STEPS)

    assert model() is None
    gc.collect()  # the session goes with the model, but has cycles of its own
    assert session() is None
    assert letters(fast[0]) == [FULL, PLAN, PLAN]
    assert_right(models[0], image, PLAN, 2)


def test_instances_with_other_options_share_no_graph() -> None:
    models = [MODELS["breaks between the blocks"](seed) for seed in (0, 1)]
    fast = [compiled(model, pattern) for model, pattern in zip(models, ("Frr", "Fr"), strict=True)]

    images = [[generate(f, seed=seed, steps=STEPS) for seed in (0, 1)][1] for f in fast]

    assert not set(programs(fast[0])) & set(programs(fast[1]))
    assert [letters(f)[-1] for f in fast] == [PLAN, "FrFrFrF"]
    for model, f, image in zip(models, fast, images, strict=True):
        assert_right(model, image, letters(f)[1], 1)


class OtherDiT(BrokenDiT):
    """Another class that runs the same blocks."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, text: Tensor | None = None) -> Tensor:
        return 1.5 * super().forward(x, t, y, text)


def test_classes_that_share_blocks_do_not_mix() -> None:
    models = lively(BrokenDiT((0, 1)), 0), lively(OtherDiT((0, 1)), 1)
    fast = [compiled(model) for model in models]

    for seed in (0, 1, 2):
        jobs = [sampling(f, seed=seed, steps=STEPS) for f in fast]
        *_, images = zip(*jobs, strict=True)
        for model, f, image in zip(models, fast, images, strict=True):
            assert_right(model, image, letters(f)[seed], seed)

    assert letters(fast[0]) == letters(fast[1]) == [FULL, PLAN, PLAN]


def test_changed_weights_are_noticed_by_the_instance_that_has_them() -> None:
    models = [MODELS["breaks between the blocks"](seed) for seed in (0, 1)]
    fast = [compiled(model) for model in models]
    for f in fast:
        for seed in (0, 1):
            generate(f, seed=seed, steps=STEPS)

    for k, _ in enumerate(zip(*(sampling(f, seed=2, steps=STEPS) for f in fast), strict=True)):
        if k == 3:  # before a reuse step
            with torch.no_grad():
                models[1].blocks[2].mlp.down.weight.mul_(1.5)  # type: ignore[union-attr,index]

    assert not omnifx.stats(fast[0]).generations[-1].reasons
    assert any("weights changed" in reason for reason in omnifx.stats(fast[1]).generations[-1].reasons)


def test_each_instance_checks_its_own_reuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights decide how well a variant reproduces a step, so that one instance's check says nothing of another."""
    models = [MODELS["breaks between the blocks"](seed) for seed in (0, 1)]
    fast = [compiled(model) for model in models]
    for seed in (0, 1):
        generate(fast[0], seed=seed, steps=STEPS)
    monkeypatch.setattr("omnifx.runner.TOLERANCE", {torch.float32: -1.0})

    with pytest.warns(omnifx.errors.OmnifxWarning, match="differs from that step"):
        images = [generate(fast[1], seed=seed, steps=STEPS) for seed in (0, 1)]

    assert "nothing is reused" in str(omnifx.stats(fast[1]))
    assert_right(models[1], images[1], FULL, 1)
    generate(fast[0], seed=2, steps=STEPS)
    assert letters(fast[0]) == [FULL, PLAN, PLAN]


@pytest.mark.parametrize("name", WHOLE)
def test_instances_that_are_one_graph_after_all_do_not_disturb_each_other(
    name: str, made: list[tuple[Program, str]]
) -> None:
    """The second one is tried in the middle of a generation of the first one, whose graph Dynamo must not lose."""
    models = [WHOLE[name](seed) for seed in (0, 1)]
    fast = [compiled(model) for model in models]
    text = text_of(models[0])
    for seed in (0, 1):
        generate(fast[0], seed=seed, steps=STEPS, **text)
    runs = [sampling(f, seed=2, steps=STEPS, **text) for f in fast]

    *_, images = zip(*runs, strict=True)
    others = [generate(fast[1], seed=seed, steps=STEPS, **text) for seed in (3, 4)]

    assert letters(fast[0])[-1] == letters(fast[1])[-1] == PLAN
    assert omnifx.stats(fast[0]).graphs == omnifx.stats(fast[1]).graphs == 1
    assert_right(models[0], images[0], PLAN, 2)
    assert_right(models[1], images[1], FULL, 2)
    assert_right(models[1], others[-1], PLAN, 4)
    assert len(set(made)) == len(made)


def test_an_instance_does_not_wait_for_ever_for_one_that_nobody_calls() -> None:
    models = [MODELS["breaks between the blocks"](seed) for seed in (0, 1)]
    fast = [compiled(model) for model in models]
    next(sampling(fast[0], seed=0, steps=STEPS))

    images = [generate(fast[1], seed=seed, steps=STEPS) for seed in (0, 1, 2, 3)]

    assert letters(fast[1])[-1] == PLAN
    for seed, (image, ran) in enumerate(zip(images, letters(fast[1]), strict=True)):
        assert_right(models[1], image, ran, seed)
    for seed in (1, 2, 3):
        image = generate(fast[0], seed=seed, steps=STEPS)
    ran = "".join(letters(fast[0])[-2:])  # its one lone step made the first generation seem to begin with two of them
    assert ran.count("r") == 4
    assert_right(models[0], image, ran, 3)
