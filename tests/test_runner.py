"""The runner: whatever a caller does, a call is computed in full or reuses the right values, and says which."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import omnifx
from omnifx.errors import CacheError, OmnifxWarning
from omnifx.runlog import GenerationLog
from omnifx.session import find_session
from tests.toys import EAGER, Pattern, Reference, ToyDiT, distance, generate, letters_of, noise, sampling, toy

STEPS = 7
PLAN = "FrrFrrF"
FULL = "F" * STEPS
TEXT = 1000  # wide enough for text to count as a large input: 5 x 1000 elements


def compiled(model: ToyDiT, pattern: str = "Frr", **options: Any) -> Any:
    return torch.compile(model, backend="omnicache", options={**EAGER, "policy": Pattern(pattern=pattern), **options})


def calibrated(model: ToyDiT, pattern: str = "Frr", *, options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """A compiled model that has measured one generation."""
    fast = compiled(model, pattern, **(options or {}))
    with omnifx.generation(fast):
        generate(fast, seed=100, **{"steps": STEPS, **kwargs})
    return fast


def logs(fast: Any) -> list[GenerationLog]:
    return omnifx.stats(fast).generations


def assert_is_reference(image: Tensor, model: ToyDiT, letters: Any, **kwargs: Any) -> None:
    """The image is what the eager reference makes of the same plan; all-F letters stand for the uncached model."""
    expected = generate(Reference(model, letters), **{"steps": STEPS, **kwargs})
    assert distance(image, expected) < 1e-5


def reasons(fast: Any, number: int = -1) -> str:
    return "; ".join(logs(fast)[number].reasons)


# -- generations one after another -------------------------------------------------------------------------------------


def test_the_first_generation_is_measured_in_full_and_later_ones_follow_the_plan() -> None:
    model = toy()
    fast = compiled(model)

    images = [generate(fast, seed=seed, steps=STEPS, label=label) for seed, label in ((0, 3), (1, 3), (2, 5))]

    assert [letters_of(log) for log in logs(fast)] == [FULL, PLAN, PLAN]
    assert logs(fast)[0].reasons == {"measured: no plan for these steps yet": STEPS}
    assert logs(fast)[1].reasons == logs(fast)[2].reasons == {}
    for image, letters, seed, label in zip(images, (FULL, PLAN, PLAN), (0, 1, 2), (3, 3, 5), strict=True):
        assert_is_reference(image, model, letters, seed=seed, label=label)


def test_reuse_is_visible_at_all() -> None:
    model = toy()

    reused = generate(Reference(model, PLAN), seed=0, steps=STEPS)

    assert (
        distance(reused, generate(model, seed=0, steps=STEPS)) > 1e-3
    )  # else the tests here could not see a wrong cache


def test_the_latents_themselves_may_be_overwritten_by_the_sampler() -> None:
    model = toy()
    fast = calibrated(model)
    x = noise(1, 4, 8, 8, seed=1)
    buffer = x.clone()

    for latents in sampling(fast, seed=0, steps=STEPS, latents=buffer, before=lambda k, now: buffer.copy_(now)):
        image = latents

    assert letters_of(logs(fast)[-1]) == PLAN
    assert_is_reference(image, model, PLAN, seed=0, latents=x)


@pytest.mark.parametrize("pattern", ["Fa", "Fram"])
def test_rows_that_reuse_some_branches_and_refresh_the_others(pattern: str) -> None:
    model = toy(text=TEXT)
    text = noise(1, 5, TEXT, seed=9)
    fast = calibrated(model, pattern, text=text)

    image = generate(fast, seed=1, steps=STEPS, text=text)

    letters = (pattern * STEPS)[:STEPS]
    assert len(logs(fast)[-1].steps) == STEPS
    assert logs(fast)[-1].reasons == {}
    assert_is_reference(image, model, letters, seed=1, text=text)


def test_statistics_count_what_ran() -> None:
    fast = calibrated(toy())
    generate(fast, seed=1, steps=STEPS)

    stats = omnifx.stats(fast)

    assert stats.graphs == 1
    assert stats.recompilations == 0
    assert stats.cache_bytes == 0  # both generations are over
    assert 0 < stats.peak_cache_bytes <= stats.cache_budget
    assert 0.5 < stats.generations[0].speedup <= 1.0  # measuring costs a reuse step beside each full one
    assert 2.0 < stats.generations[1].speedup < STEPS / 3
    assert "2 x reuse" in str(stats) or "4 x reuse" in str(stats)


def test_after_two_full_steps_a_corrected_step_subtracts_the_predicted_noise() -> None:
    model = toy()
    fast = calibrated(model, "FFccFFF")
    images = list(sampling(fast, seed=1, steps=STEPS))

    full = list(sampling(model, seed=1, steps=STEPS))
    replay = Reference(model, "Frrr")
    noises = []

    def reference(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        step = len(noises)
        with torch.no_grad():
            true = model(x, t, y)
            if step == 0:
                noises.append(replay(x, t, y) * 0)
                return true
            if step == 1:
                noises.append(replay(x, t, y) - true)
                at_one(x, t, y)  # its first step: keeps what this full step computed
                return true
            noises.append(0.5 * noises[-1])
            return at_one(x, t, y) - noises[-1]

    at_one = Reference(model, "Frrr")
    expected = []
    for latents in sampling(reference, seed=1, steps=STEPS):
        expected.append(latents)
        if len(expected) == 4:
            break

    assert [s.variant for s in logs(fast)[-1].steps][2:4] == ["reuse+correct"] * 2
    assert distance(images[1], full[1]) < 1e-6
    for step in (2, 3):
        assert distance(images[step] - images[step - 1], expected[step] - expected[step - 1]) < 1e-4


@pytest.mark.slow  # Inductor compiles the backward graph too
def test_gradients_are_left_alone() -> None:
    model = toy()
    fast = compiled(model)
    x = noise(1, 4, 8, 8).requires_grad_()

    with pytest.warns(OmnifxWarning, match="compiled without caching"):
        fast(x, torch.tensor([500.0]), torch.tensor([3])).sum().backward()

    assert x.grad is not None
    expected = torch.autograd.grad(model(x, torch.tensor([500.0]), torch.tensor([3])).sum(), x)[0]
    assert distance(x.grad, expected) < 1e-4


# -- interleaved generations -------------------------------------------------------------------------------------------


def run_interleaved(fast: Any, jobs: list[dict[str, Any]], order: str | None = None) -> list[Tensor]:
    """Run several generations at once, step by step: round robin, or by a string of job numbers."""
    running = [sampling(fast, **{"steps": STEPS, **job}) for job in jobs]
    images: list[Any] = [None] * len(jobs)
    for number in map(int, order) if order else [n for _ in range(STEPS) for n in range(len(jobs))]:
        images[number] = next(running[number])
    return images


@pytest.mark.parametrize(
    "jobs",
    [
        [{"seed": 1, "label": 2}, {"seed": 2, "label": 7}],
        [{"seed": 1, "label": 2}, {"seed": 1, "label": 7}],
        [{"seed": 1}, {"seed": 2}],
        [{"seed": 1}, {"seed": 2}, {"seed": 3}],
    ],
    ids=["labels_and_seeds", "labels", "seeds", "three_seeds"],
)
def test_interleaved_generations_keep_to_their_own_caches(jobs: list[dict[str, Any]]) -> None:
    model = toy()
    fast = calibrated(model)

    images = run_interleaved(fast, jobs)

    for image, job in zip(images, jobs, strict=True):
        assert_is_reference(image, model, PLAN, **job)
    assert all(log.reasons == {} for log in logs(fast)[1:])


@pytest.mark.parametrize("seed", [0, 1])
def test_any_interleaving_of_generations_gives_the_planned_images(seed: int) -> None:
    model = toy()
    fast = calibrated(model)
    jobs = [{"seed": 1, "label": 2}, {"seed": 2, "label": 2}, {"seed": 3, "label": 5}]
    order = [n for n in range(3) for _ in range(STEPS)]
    random.Random(seed).shuffle(order)

    images = run_interleaved(fast, jobs, "".join(map(str, order)))

    for image, job in zip(images, jobs, strict=True):
        assert_is_reference(image, model, PLAN, **job)


def test_equal_generations_at_once_are_computed_in_full_and_said_so() -> None:
    model = toy()
    fast = calibrated(model)

    images = run_interleaved(fast, [{"seed": 1}, {"seed": 1}])

    ran = [letters_of(log) for log in logs(fast)[1:]]
    assert FULL in ran
    for image, letters in zip(images, ran, strict=True):
        assert_is_reference(image, model, letters, seed=1)
    assert "two generations with equal inputs fit this call" in reasons(fast, ran.index(FULL) + 1)


def test_generations_interleaved_before_any_plan_are_not_learned_from() -> None:
    model = toy()
    fast = compiled(model)
    jobs = [{"seed": 1, "label": 2}, {"seed": 2, "label": 7}]

    with pytest.warns(OmnifxWarning, match="could not be used to plan"):
        images = run_interleaved(fast, jobs)
    alone = generate(fast, seed=3, steps=STEPS)

    for image, job in zip(images, jobs, strict=True):
        assert_is_reference(image, model, FULL, **job)
    assert_is_reference(alone, model, FULL, seed=3)
    assert_is_reference(generate(fast, seed=4, steps=STEPS), model, PLAN, seed=4)  # learned from the one that ran alone


# -- classifier-free guidance ------------------------------------------------------------------------------------------


def test_guidance_as_two_calls_is_two_streams_of_one_generation() -> None:
    model = toy()
    fast = calibrated(model, cfg=0)

    image = generate(fast, seed=1, steps=STEPS, cfg=0)

    assert len(logs(fast)) == 2
    assert [letters_of(logs(fast)[1], stream) for stream in (0, 1)] == [PLAN, PLAN]
    assert_is_reference(image, model, PLAN, seed=1, cfg=0)


def test_interleaved_generations_with_guidance() -> None:
    model = toy()
    fast = calibrated(model, cfg=0)
    jobs = [{"seed": 1, "label": 2, "cfg": 0}, {"seed": 2, "label": 7, "cfg": 0}]

    images = run_interleaved(fast, jobs)

    for image, job in zip(images, jobs, strict=True):
        assert_is_reference(image, model, PLAN, **job)


def test_guidance_with_equal_prompts_is_never_wrong() -> None:
    model = toy()
    fast = calibrated(model, cfg=0)

    image = generate(fast, seed=1, steps=STEPS, label=0, cfg=0)

    ran = {number: letters_of(log) for number, log in enumerate(logs(fast)[1:])}
    assert ran[0] == FULL
    calls = itertools.count()
    reference = Reference(model, ran, stream_of=lambda *args: next(calls) % 2)
    assert distance(image, generate(reference, seed=1, steps=STEPS, label=0, cfg=0)) < 1e-5


def test_a_plan_measured_with_guidance_serves_a_generation_without() -> None:
    model = toy()
    fast = calibrated(model, cfg=0)

    image = generate(fast, seed=1, steps=STEPS)

    assert_is_reference(image, model, letters_of(logs(fast)[-1]), seed=1)


# -- generations that do not go as planned -----------------------------------------------------------------------------


@pytest.mark.parametrize("after", [1, 3, 6])
@pytest.mark.parametrize("seed", [1, 2])
def test_an_abandoned_generation_leaves_nothing_behind(after: int, seed: int) -> None:
    model = toy()
    fast = calibrated(model)
    abandoned = sampling(fast, seed=1, steps=STEPS)
    for _ in range(after):
        next(abandoned)

    image = generate(fast, seed=seed, steps=STEPS)

    letters = letters_of(logs(fast)[2])
    if len(letters) < STEPS:  # the very same latents again: at the abandoned step, either may be the one that goes on
        letters += letters_of(logs(fast)[1])[after:]
        assert set(letters[after:]) == {"F"}
    assert letters == PLAN or seed == 1
    assert_is_reference(image, model, letters, seed=seed)


def test_a_first_generation_that_is_abandoned_is_not_learned_from() -> None:
    model = toy()
    fast = compiled(model)
    abandoned = sampling(fast, seed=1, steps=STEPS)
    for _ in range(3):
        next(abandoned)

    with pytest.warns(OmnifxWarning, match="it saw 3 steps, and at least 4 are needed"):
        image = generate(fast, seed=2, steps=STEPS)

    assert_is_reference(image, model, FULL, seed=2)
    assert_is_reference(generate(fast, seed=3, steps=STEPS), model, PLAN, seed=3)


@pytest.mark.parametrize("start", [1, 3])
def test_image_to_image_starts_in_the_middle_and_runs_in_full(start: int) -> None:
    model = toy()
    fast = calibrated(model)

    image = generate(fast, seed=1, steps=STEPS, start=start)

    assert_is_reference(image, model, FULL, seed=1, start=start)
    assert reasons(fast) == "measured: no plan for these steps yet"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OmnifxWarning)  # too short to learn from
        assert_is_reference(generate(fast, seed=2, steps=STEPS), model, PLAN, seed=2)


def test_image_to_image_is_learned_from_like_any_other_generation() -> None:
    model = toy()
    fast = calibrated(model)
    generate(fast, seed=1, steps=STEPS, start=2)

    image = generate(fast, seed=2, steps=STEPS, start=2)

    assert_is_reference(image, model, "FrrFr", seed=2, start=2)


def test_image_to_image_beside_a_generation_at_the_same_step() -> None:
    model = toy()
    fast = calibrated(model)
    other = sampling(fast, seed=1, steps=STEPS)
    for _ in range(3):
        next(other)

    image = generate(fast, seed=2, steps=STEPS, start=3)

    assert_is_reference(image, model, FULL, seed=2, start=3)


@pytest.mark.parametrize("steps", [5, 9, 13])
def test_a_step_count_nobody_calibrated_runs_in_full_once_measured_follows_its_own_plan(steps: int) -> None:
    model = toy()
    fast = calibrated(model)

    first = generate(fast, seed=1, steps=steps)
    second = generate(fast, seed=2, steps=steps)

    assert_is_reference(first, model, "F" * steps, seed=1, steps=steps)
    ran = "".join(letters_of(log) for log in logs(fast))[STEPS + steps :]
    assert len(ran) == steps
    assert "r" in ran
    assert_is_reference(second, model, ran, seed=2, steps=steps)
    assert_is_reference(generate(fast, seed=3, steps=STEPS), model, PLAN, seed=3)


def test_plans_that_fit_alike_at_first_are_told_apart_before_anything_is_reused() -> None:
    """Both start at the same timestep; the second ones differ."""
    model = toy()
    fast = compiled(model)
    for steps in (5, 9):
        generate(fast, seed=0, steps=steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OmnifxWarning)
        generate(fast, seed=0, steps=5)

    before = len(logs(fast))
    image = generate(fast, seed=1, steps=5)

    assert_is_reference(image, model, "".join(letters_of(log) for log in logs(fast)[before:]), seed=1, steps=5)
    assert "FrrFr" in letters_of(logs(fast)[-1])


def test_the_option_steps_ignores_other_counts() -> None:
    model = toy()
    fast = compiled(model, steps=STEPS)
    generate(fast, seed=0, steps=5)

    with pytest.warns(OmnifxWarning, match="a generation of 5 steps was not used: steps=7 was asked for"):
        generate(fast, seed=0, steps=STEPS)

    assert_is_reference(generate(fast, seed=1, steps=5), model, "F" * 5, seed=1, steps=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OmnifxWarning)
        assert_is_reference(generate(fast, seed=1, steps=STEPS), model, PLAN, seed=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [0, 4])
def test_latents_that_are_not_finite_run_in_full_and_the_next_generation_is_fine(value: float, step: int) -> None:
    model = toy()
    fast = calibrated(model)

    def spoil(k: int, x: Tensor) -> Tensor:
        if k == step:
            x = x.clone()
            x[0, 0, 0, 0] = value
        return x

    image = generate(fast, seed=1, steps=STEPS, before=spoil)

    assert not image.isfinite().all()
    assert set(letters_of(logs(fast)[-1])[max(step, 1) :]) == {"F"}
    assert "NaN or infinity" in reasons(fast)
    assert_is_reference(generate(fast, seed=2, steps=STEPS), model, PLAN, seed=2)


def test_a_first_generation_with_nan_is_not_learned_from() -> None:
    model = toy()
    fast = compiled(model)
    generate(fast, seed=1, steps=STEPS, before=lambda k, x: x * float("nan") if k == 3 else x)

    with pytest.warns(OmnifxWarning, match="latents held NaN or infinity"):
        image = generate(fast, seed=2, steps=STEPS)

    assert_is_reference(image, model, FULL, seed=2)


def test_latents_that_jump_are_not_taken_for_the_next_step() -> None:
    model = toy()
    fast = calibrated(model)
    other = noise(1, 4, 8, 8, seed=50)

    def jump(k: int, x: Tensor) -> Tensor:
        return other if k == 4 else x

    image = generate(fast, seed=1, steps=STEPS, before=jump)

    ran = "".join(letters_of(log) for log in logs(fast)[1:])
    assert ran[4:] == "FFF"
    assert "the latents moved" in reasons(fast)
    assert_is_reference(image, model, ran, seed=1, before=jump)


# -- what changes under a running generation ---------------------------------------------------------------------------


@torch.no_grad()
def _add(model: ToyDiT) -> None:
    model.blocks[0].mlp.down.weight.add_(0.3)


def _data_add(model: ToyDiT) -> None:
    model.blocks[0].mlp.down.weight.data += 0.3  # as peft fuses a LoRA


def _data_replaced(model: ToyDiT) -> None:
    weight = model.blocks[0].mlp.down.weight
    weight.data = weight.data + 0.3


def _loaded(model: ToyDiT) -> None:
    state = {
        name: value + 0.3 if name == "blocks.0.mlp.down.weight" else value.clone()
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(state)


def _replaced(model: ToyDiT) -> None:
    down = model.blocks[0].mlp.down
    down.weight = torch.nn.Parameter(down.weight.detach() + 0.3)


@pytest.mark.parametrize(
    "change", [_add, _data_add, _data_replaced, _loaded, _replaced], ids=lambda change: change.__name__
)
def test_weights_that_change_in_the_middle_end_all_reuse_of_older_caches(change: Any) -> None:
    model = toy()
    fast = calibrated(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def swap(k: int, x: Tensor) -> Tensor:
        if k == 4:  # a planned reuse of step 3's caches
            change(model)
        return x

    image = generate(fast, seed=1, steps=STEPS, before=swap)
    ran = letters_of(logs(fast)[-1])
    assert ran[4] == "F"
    after = {name: value.clone() for name, value in model.state_dict().items()}

    model.load_state_dict(before)
    reference = Reference(model, ran)

    def swap_back(k: int, x: Tensor) -> Tensor:
        if k == 4:
            model.load_state_dict(after)
        return x

    assert distance(image, generate(reference, seed=1, steps=STEPS, before=swap_back)) < 1e-5


def test_the_reason_names_the_weights() -> None:
    model = toy()
    fast = calibrated(model)

    generate(fast, seed=1, steps=STEPS, before=lambda k, x: (_add(model) if k == 4 else None, x)[1])

    assert reasons(fast) == "the weights changed since the caches were made"
    assert letters_of(logs(fast)[-1]) == "FrrFFrF"  # step 5 reuses what step 4 computed with the new weights


def test_a_weight_update_between_generations_costs_nothing() -> None:
    model = toy()
    fast = calibrated(model)
    _add(model)

    image = generate(fast, seed=1, steps=STEPS)

    assert_is_reference(image, model, PLAN, seed=1)


@pytest.mark.parametrize("inference_mode", [False, True])
@pytest.mark.parametrize("width", [24, TEXT])
def test_a_prompt_overwritten_in_place_ends_all_reuse_of_older_caches(width: int, inference_mode: bool) -> None:
    model = toy(text=width)
    first, second = noise(1, 5, width, seed=8), noise(1, 5, width, seed=9)
    fast = compiled(model)

    with torch.inference_mode(inference_mode):
        with omnifx.generation(fast):
            generate(fast, seed=0, steps=STEPS, text=first.clone())
        text = first.clone()

        def overwrite(k: int, x: Tensor) -> Tensor:
            text.copy_(second if k >= 4 else first) if k in (0, 4) else None
            return x

        image = generate(fast, seed=1, steps=STEPS, text=text, before=overwrite)
        ran = "".join(letters_of(log) for log in logs(fast)[1:])
        expected = generate(Reference(model, "FrrFFFF"), seed=1, steps=STEPS, text=text, before=overwrite)

    assert ran == "FrrFFFF"
    assert distance(image, expected) < 1e-5


def test_a_prompt_overwritten_in_the_measured_generation_does_not_count_as_changing_with_the_steps() -> None:
    model = toy(text=TEXT)
    first, second = noise(1, 5, TEXT, seed=8), noise(1, 5, TEXT, seed=9)
    text = first.clone()

    def overwrite(k: int, x: Tensor) -> Tensor:
        if k in (0, 4):
            text.copy_(second if k else first)
        return x

    fast = compiled(model)
    for seed in (0, 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OmnifxWarning)
            image = generate(fast, seed=seed, steps=STEPS, text=text, before=overwrite)

    letters = "".join(letters_of(log) for log in logs(fast))[STEPS:]
    assert letters[4] == "F"  # step 3's caches were made from the other prompt
    expected = generate(Reference(model, letters), seed=1, steps=STEPS, text=text, before=overwrite)
    assert distance(image, expected) < 1e-5


def test_an_equal_prompt_in_a_new_tensor_is_the_same_prompt() -> None:
    model = toy(text=TEXT)
    text = noise(1, 5, TEXT, seed=8)
    fast = calibrated(model, text=text)

    def copied(x: Tensor, t: Tensor, y: Tensor, given: Tensor) -> Tensor:
        return fast(x, t, y, given.clone())

    image = generate(copied, seed=1, steps=STEPS, text=text)

    assert letters_of(logs(fast)[-1]) == PLAN
    assert_is_reference(image, model, PLAN, seed=1, text=text)


def test_a_label_that_changes_in_the_middle_runs_in_full() -> None:
    model = toy()
    fast = calibrated(model)
    calls: list[int] = []

    def changing(inner: Any) -> Any:
        calls.clear()

        def call(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            calls.append(1)
            return inner(x, t, y if len(calls) <= 4 else y + 1)

        return call

    image = generate(changing(fast), seed=1, steps=STEPS)

    ran = "".join(letters_of(log) for log in logs(fast)[1:])
    assert ran == "FrrFFFF"
    reference = Reference(model, ran, stream_of=lambda *args: 0)
    assert distance(image, generate(changing(reference), seed=1, steps=STEPS)) < 1e-5


def test_another_batch_size_is_measured_on_its_own() -> None:
    batch = 2
    model = toy()
    fast = calibrated(model)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OmnifxWarning)
        images = [generate(fast, seed=0, steps=STEPS, latents=noise(batch, 4, 8, 8, seed=s)) for s in (1, 2, 3)]

    ran = "".join(letters_of(log) for log in logs(fast)[1:])
    assert len(ran) == 3 * STEPS
    for i, image in enumerate(images):
        letters = ran[i * STEPS : (i + 1) * STEPS]
        assert_is_reference(image, model, letters, seed=0, latents=noise(batch, 4, 8, 8, seed=i + 1))
    assert_is_reference(generate(fast, seed=5, steps=STEPS), model, PLAN, seed=5)


# -- marked generations and threads ------------------------------------------------------------------------------------


def test_marked_generations_with_equal_inputs_may_interleave() -> None:
    model = toy()
    fast = calibrated(model)
    running = [sampling(fast, seed=1, steps=STEPS) for _ in range(2)]
    outer, inner = omnifx.generation(fast), omnifx.generation(fast)
    images: list[Any] = [None, None]

    with outer:
        for _ in range(3):
            images[0] = next(running[0])
        with inner:
            for latents in running[1]:
                images[1] = latents
        for latents in running[0]:
            images[0] = latents

    assert [letters_of(log) for log in logs(fast)[1:]] == [PLAN, PLAN]
    for image in images:
        assert_is_reference(image, model, PLAN, seed=1)


def test_a_mark_is_proof_that_latents_which_jump_belong_together() -> None:
    model = toy()
    fast = calibrated(model)
    other = noise(1, 4, 8, 8, seed=50)

    def jump(k: int, x: Tensor) -> Tensor:
        return other if k == 4 else x

    with omnifx.generation(fast):
        image = generate(fast, seed=1, steps=STEPS, before=jump)

    assert_is_reference(image, model, PLAN, seed=1, before=jump)


def test_the_end_of_a_marked_generation_frees_its_caches() -> None:
    fast = calibrated(toy())
    running = sampling(fast, seed=1, steps=STEPS)

    with omnifx.generation(fast):
        for _ in range(3):
            next(running)
        held = omnifx.stats(fast).cache_bytes

    assert held > 0
    assert omnifx.stats(fast).cache_bytes == 0


def test_an_abandoned_marked_generation_is_no_danger_to_the_next() -> None:
    model = toy()
    fast = calibrated(model)
    running = sampling(fast, seed=1, steps=STEPS)
    with omnifx.generation(fast):
        for _ in range(3):
            next(running)

    with omnifx.generation(fast):
        image = generate(fast, seed=1, steps=STEPS)

    assert letters_of(logs(fast)[-1]) == PLAN
    assert_is_reference(image, model, PLAN, seed=1)


def test_a_mark_with_another_number_of_steps_follows_no_plan_of_this_one() -> None:
    model = toy()
    fast = calibrated(model)

    with omnifx.generation(fast, steps=STEPS + 1):
        image = generate(fast, seed=1, steps=STEPS)

    assert_is_reference(image, model, FULL, seed=1)


def test_a_marked_first_generation_is_learned_from_at_once() -> None:
    model = toy()
    fast = compiled(model)
    with omnifx.generation(fast):
        generate(fast, seed=0, steps=STEPS)

    image = generate(fast, seed=1, steps=STEPS)

    assert [letters_of(log) for log in logs(fast)] == [FULL, PLAN]
    assert_is_reference(image, model, PLAN, seed=1)


@pytest.mark.parametrize("marked", [True, False])
def test_threads_that_run_at_once_keep_to_their_own_caches(marked: bool) -> None:
    model = toy()
    fast = calibrated(model)
    jobs = [{"seed": s, "label": 3} for s in range(1, 5)]
    images: dict[int, Tensor] = {}
    start = threading.Barrier(len(jobs))

    def work(number: int) -> None:
        start.wait()
        if marked:
            with omnifx.generation(fast):
                images[number] = generate(fast, steps=STEPS, **jobs[number])
        else:
            images[number] = generate(fast, steps=STEPS, **jobs[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for number, job in enumerate(jobs):
        assert_is_reference(images[number], model, PLAN, **job)
    assert [letters_of(log) for log in logs(fast)[1:]] == [PLAN] * len(jobs)


def test_threads_with_equal_inputs_need_a_mark_and_with_one_are_right() -> None:
    model = toy()
    fast = calibrated(model)
    images: list[Tensor] = []
    start = threading.Barrier(3)

    def work() -> None:
        start.wait()
        with omnifx.generation(fast, steps=STEPS):
            images.append(generate(fast, seed=1, steps=STEPS))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(images) == 3
    for image in images:
        assert_is_reference(image, model, PLAN, seed=1)


# -- the budget of the caches ------------------------------------------------------------------------------------------

CUT = 4 * 16 * 32  # bytes of one cut of the toy: float32, 16 tokens, width 32; a toy of 2 blocks has 4 of them


def test_a_budget_for_some_branches_caches_those_and_says_so() -> None:
    model = toy()
    fast = compiled(model, cache_budget=2 * CUT)

    with pytest.warns(OmnifxWarning, match="cache_budget leaves 2 of 4 branches uncached"):
        generate(fast, seed=0, steps=STEPS)
    image = generate(fast, seed=1, steps=STEPS)

    assert_is_reference(image, model, "FmmFmmF", seed=1)  # MLPs save the most FLOPs a byte
    assert omnifx.stats(fast).peak_cache_bytes <= 2 * CUT


def test_a_budget_for_no_branch_is_an_error() -> None:
    fast = compiled(toy(), cache_budget=CUT - 1)

    with pytest.raises(Exception, match=r"the smallest branch needs 2,048\. Raise cache_budget") as caught:
        generate(fast, seed=0, steps=STEPS)

    assert "CacheError" in type(caught.value).__name__ + str(caught.value) + repr(caught.value.__cause__)
    assert issubclass(CacheError, omnifx.OmnifxError)


def test_evicted_generations_run_in_full_and_hold_nothing() -> None:
    model = toy()
    fast = calibrated(model, options={"cache_budget": 4 * CUT})
    jobs = [{"seed": 1}, {"seed": 2}]

    images = run_interleaved(fast, jobs)

    ran = [letters_of(log) for log in logs(fast)[1:]]
    assert ran == ["FFFFFFF", PLAN]
    for image, letters, job in zip(images, ran, jobs, strict=True):
        assert_is_reference(image, model, letters, **job)
    assert logs(fast)[1].reasons == {"its caches were evicted to keep cache_budget": 4}


def test_an_evicted_stream_keeps_no_cuts() -> None:
    fast = calibrated(toy(), options={"cache_budget": 4 * CUT})
    first, second = (sampling(fast, seed=seed, steps=STEPS) for seed in (1, 2))
    next(first)
    next(second)
    for _ in range(3):
        next(first)  # in full: it was evicted

    (runner,) = find_session(fast).runners
    holding = [stream for stream in runner.conductor.streams if stream.cache.cuts]

    assert len(holding) == 1


def test_a_cache_evicted_after_the_decision_to_reuse_it_is_never_read_as_zeros() -> None:
    """What another thread may do between two lines of this one."""
    model = toy()
    fast = calibrated(model)
    (runner,) = find_session(fast).runners
    extra_inputs = runner._extra_inputs
    evicted = []

    def evict_then_read(variant: Any, job: Any, args: Any) -> Any:
        if variant.spec.label == "reuse" and not evicted:
            evicted.append(job)
            runner.conductor.store.release(job.call.stream.key)
        return extra_inputs(variant, job, args)

    runner._extra_inputs = evict_then_read
    image = generate(fast, seed=1, steps=STEPS)

    assert evicted
    letters = letters_of(logs(fast)[-1])
    assert_is_reference(image, model, letters, seed=1)


# -- profiles that outlive a session -----------------------------------------------------------------------------------

CHILD = """
import sys, torch, omnifx
from tests.toys import generate, letters_of, toy, Pattern
torch.set_num_threads(1)
fast = torch.compile(toy(), backend="omnicache", options={"lowering": "eager", "policy": Pattern(pattern="Frr")})
image = generate(fast, seed=1, steps=7)
print(letters_of(omnifx.stats(fast).generations[-1]), float(image.double().sum()))
"""


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_a_profile_is_kept_and_found_by_a_new_session(cache_home: Path) -> None:
    model = toy()
    fast = compiled(model, profile_cache=True)
    for seed in (0, 1):
        generate(fast, seed=seed, steps=STEPS)
    assert len(list(cache_home.rglob("*.safetensors"))) == 1

    torch._dynamo.reset()
    again = toy()
    fast = compiled(again, profile_cache=True)
    image = generate(fast, seed=2, steps=STEPS)

    assert [letters_of(log) for log in logs(fast)] == [PLAN]
    assert_is_reference(image, again, PLAN, seed=2)


def test_a_profile_of_other_weights_is_not_found(cache_home: Path) -> None:
    fast = compiled(toy(), profile_cache=True)
    for seed in (0, 1):
        generate(fast, seed=seed, steps=STEPS)

    torch._dynamo.reset()
    other = compiled(toy(seed=1), profile_cache=True)
    generate(other, seed=2, steps=STEPS)

    assert [letters_of(log) for log in logs(other)] == [FULL]


def test_a_spoilt_profile_in_the_cache_is_told_of_and_measured_again(cache_home: Path) -> None:
    fast = compiled(toy(), profile_cache=True)
    for seed in (0, 1):
        generate(fast, seed=seed, steps=STEPS)
    (path,) = cache_home.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:100])

    torch._dynamo.reset()
    model = toy()
    again = compiled(model, profile_cache=True)
    with pytest.warns(OmnifxWarning, match="a cached profile is not used: Profile.load: .* is corrupt"):
        image = generate(again, seed=2, steps=STEPS)

    assert_is_reference(image, model, FULL, seed=2)


def test_a_new_process_follows_the_plan_of_an_older_one(cache_home: Path) -> None:
    """The older process ran one generation only: its profile is written when it ends."""
    root = Path(__file__).parents[1]
    ran = [
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", CHILD], cwd=root, capture_output=True, text=True, timeout=300
        )
        for _ in range(2)
    ]

    assert [child.stdout.split()[0] if child.stdout else child.stderr for child in ran] == [FULL, PLAN]
    model = toy()
    for child, letters in zip(ran, (FULL, PLAN), strict=True):
        expected = generate(Reference(model, letters), seed=1, steps=STEPS)
        assert float(child.stdout.split()[1]) == pytest.approx(float(expected.double().sum()), abs=1e-3)
