"""The runner of run-time policies: which calls belong together, what makes a step compute, what users are told."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import omnifx
from omnifx.errors import OmnifxWarning
from omnifx.policies.adacache import AdaCache
from omnifx.policies.dbcache import DBCache
from omnifx.policies.dicache import DiCache
from omnifx.policies.easycache import EasyCache
from omnifx.policies.first_block_cache import FirstBlockCache
from omnifx.policies.teacache import TeaCache
from omnifx.runlog import GenerationLog
from omnifx.session import find_session
from tests.runtime import EagerBlocks, letters
from tests.toys import EAGER, distance, free_toy, generate, noise, sampling, toy, toy_in_parts

STEPS = 12
ALWAYS = FirstBlockCache(threshold=1e9)
"""Skips whatever it may."""


def compiled(model: nn.Module, policy: Any = ALWAYS, **options: Any) -> Any:
    return torch.compile(model, backend="omnicache", options={**EAGER, "policy": policy, **options})


def logs(fast: Any) -> list[GenerationLog]:
    return omnifx.stats(fast).generations


def test_every_generation_begins_in_full_whether_marked_or_not() -> None:
    fast = compiled(toy(3))
    generate(fast, seed=0, steps=STEPS)
    generate(fast, seed=1, steps=STEPS)
    with omnifx.generation(fast, steps=STEPS):
        generate(fast, seed=1, steps=STEPS)
    generate(fast, seed=2, steps=STEPS, label=5)

    assert [letters(log) for log in logs(fast)] == ["F" + "r" * (STEPS - 1)] * 4
    assert all(log.reasons == {} for log in logs(fast))


def test_interleaved_generations_keep_their_own_state() -> None:
    model = toy(3)
    fast, policy = compiled(model, FirstBlockCache(threshold=0.7)), 0.7
    first, second = (sampling(fast, seed=seed, steps=STEPS, label=label) for seed, label in ((0, 3), (1, 4)))

    images = list(zip(first, second, strict=True))[-1]

    for image, seed, label in zip(images, (0, 1), (3, 4), strict=True):
        reference = EagerBlocks(model, policy, equal=True)
        assert distance(image, generate(reference, seed=seed, steps=STEPS, label=label)) < 1e-5
    assert len(logs(fast)) == 2


def test_two_generations_that_cannot_be_told_apart_run_in_full_until_they_are_marked() -> None:
    model = toy(3)
    fast = compiled(model)
    twins = [sampling(fast, seed=0, steps=STEPS) for _ in range(2)]

    images = list(zip(*twins, strict=True))[-1]

    for image in images:
        assert distance(image, generate(model, seed=0, steps=STEPS)) < 1e-5
    assert any("two generations with equal inputs" in reason for log in logs(fast) for reason in log.reasons)


def test_latents_that_jump_begin_anew() -> None:
    model = toy(3)
    fast = compiled(model)
    jump = lambda k, x: noise(1, 4, 8, 8, seed=99) if k == 5 else x  # noqa: E731

    image = generate(fast, seed=0, steps=STEPS, before=jump)

    steps = [letters(log) for log in logs(fast)]
    assert steps == ["F" + "r" * 4, "F" + "r" * (STEPS - 6)]
    assert torch.isfinite(image).all()


def test_changed_weights_make_the_next_step_compute() -> None:
    model = toy(3)
    fast = compiled(model)

    def change(k: int, x: torch.Tensor) -> torch.Tensor:
        if k == 4:
            with torch.no_grad():
                model.blocks[1].mlp.up.weight.mul_(1.5)  # type: ignore[union-attr]
        return x

    generate(fast, seed=0, steps=STEPS, before=change)

    (log,) = logs(fast)
    assert letters(log)[4] == "F"
    assert log.reasons == {"the weights changed since the caches were made": 1}


def test_latents_that_are_no_numbers_are_never_skipped() -> None:
    fast = compiled(toy(3))
    broken = lambda k, x: x * float("nan") if k == 4 else (noise(1, 4, 8, 8) if k == 5 else x)  # noqa: E731

    generate(fast, seed=0, steps=STEPS, before=broken)

    assert letters(logs(fast)[0])[4] == "F"
    assert "the latents hold NaN or infinity" in logs(fast)[0].reasons


def test_the_caller_may_write_to_what_it_got() -> None:
    model = toy(3)
    fast = compiled(model, FirstBlockCache(threshold=0.7))

    def spoiling(*args: Any) -> Any:
        out = fast(*args)
        copy = out.clone()
        out.fill_(float("nan"))
        return copy

    image = generate(spoiling, seed=0, steps=STEPS)

    assert distance(image, generate(EagerBlocks(model, 0.7, equal=True), seed=0, steps=STEPS)) < 1e-5


@pytest.mark.parametrize("name", ["easycache", "teacache", "dicache", "adacache", "dbcache"])
def test_the_sampler_may_overwrite_its_latents(name: str) -> None:
    model = toy(3)
    policy: Any = TeaCache(coefficients="identity", threshold=0.7) if name == "teacache" else name
    plain, other = (compiled(model, policy, steps=STEPS) for _ in range(2))
    expected = generate(plain, seed=0, steps=STEPS)
    buffer = noise(1, 4, 8, 8, seed=0)

    *_, image = sampling(other, seed=0, steps=STEPS, latents=buffer, before=lambda k, now: buffer.copy_(now))

    assert distance(image, expected) < 1e-6


def test_caches_are_counted_bounded_and_freed() -> None:
    fast = compiled(toy(3), steps=STEPS)
    steps = sampling(fast, seed=0, steps=STEPS)
    next(steps)
    held = omnifx.stats(fast).cache_bytes
    list(steps)

    assert held == 2 * 16 * 32 * 4  # the first block's residual, and the others'
    assert omnifx.stats(fast).cache_bytes == 0
    assert omnifx.stats(fast).peak_cache_bytes == held


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_predictor_keeps_as_many_residuals_as_it_has_terms(order: int) -> None:
    fast = compiled(toy(3), FirstBlockCache(threshold=1e-9, predictor=f"taylor:{order}"), steps=STEPS)
    generate(fast, seed=0, steps=STEPS)

    one = 16 * 32 * 4
    assert omnifx.stats(fast).peak_cache_bytes == (1 + order + 1) * one


def test_changed_weights_end_the_history_that_is_predicted_from() -> None:
    model = toy(3)
    policy = DBCache(threshold=1e9, warmup=2, most_skips=3, predictor="taylor:2")
    seen: list[tuple[int, ...]] = []
    fast = compiled(model, policy)

    def change(k: int, x: torch.Tensor) -> torch.Tensor:
        if k == 6:
            with torch.no_grad():
                model.blocks[1].mlp.up.weight.mul_(1.5)  # type: ignore[union-attr]
        if k:
            (runner,) = find_session(fast).runners
            (stream,) = runner.streams  # type: ignore[attr-defined]
            seen.append(stream.computed)
        return x

    generate(fast, seed=0, steps=STEPS, before=change)

    assert letters(logs(fast)[0])[:7] == "FFrrrFF"
    assert seen[4:8] == [(1, 0), (5, 1, 0), (6,), (6,)]


def test_a_budget_too_small_for_one_stream_computes_everything_and_says_so() -> None:
    model = toy(3)
    fast = compiled(model, cache_budget=3000)

    image = generate(fast, seed=0, steps=STEPS)

    assert distance(image, generate(model, seed=0, steps=STEPS)) < 1e-5
    assert any("more than cache_budget" in reason for reason in logs(fast)[0].reasons)


def test_models_without_what_a_policy_needs_run_in_full_and_the_user_is_told() -> None:
    model = toy(1)
    fast = compiled(model)
    with pytest.warns(OmnifxWarning, match="first-block-cache needs two blocks"):
        image = generate(fast, seed=0, steps=4)

    assert distance(image, generate(model, seed=0, steps=4)) < 1e-6
    with pytest.warns(OmnifxWarning, match="moreg=True needs video latents"):
        generate(compiled(toy(2), AdaCache(moreg=True)), seed=0, steps=4)


def test_a_broken_graph_is_told_as_such() -> None:
    model = toy_in_parts()
    with pytest.warns(OmnifxWarning, match="needs the step as one graph"):
        image = generate(compiled(model), seed=0, steps=4)

    assert distance(image, generate(model, seed=0, steps=4)) < 1e-6


def test_an_unknown_number_of_steps_is_told_where_it_matters() -> None:
    fast = compiled(toy(2), TeaCache(coefficients="identity", threshold=1e9))
    generate(fast, seed=0, steps=6)
    with omnifx.generation(fast, steps=6):
        generate(fast, seed=0, steps=6)

    assert [letters(log) for log in logs(fast)] == ["Frrrrr", "FrrrrF"]
    assert any("the number of steps is not known" in note for note in omnifx.stats(fast).notes)


def test_threads_that_are_marked_do_not_mix() -> None:
    model = toy(3)
    fast = compiled(model, FirstBlockCache(threshold=0.7))
    generate(fast, seed=9, steps=2)  # compiled before the threads start
    images: dict[int, torch.Tensor] = {}

    def work(seed: int) -> None:
        with omnifx.generation(fast, steps=STEPS):
            images[seed] = generate(fast, seed=seed, steps=STEPS)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for seed, image in images.items():
        assert distance(image, generate(EagerBlocks(model, 0.7, equal=True), seed=seed, steps=STEPS)) < 1e-5


@pytest.mark.parametrize("policy", [FirstBlockCache(threshold=0.7), DiCache(threshold=1.0, retention=0.0), EasyCache()])
def test_a_capture_with_symbolic_sizes_serves_many(policy: Any) -> None:
    model = free_toy(3)
    fast = torch.compile(model, backend="omnicache", dynamic=True, options={**EAGER, "policy": policy, "steps": 16})
    for batch, height, width in ((2, 8, 12), (3, 16, 8), (2, 12, 8)):
        latents = noise(batch, 4, height, width, seed=1)
        image = generate(fast, seed=0, steps=16, latents=latents)

        static = compiled(free_toy(3), policy, steps=16)
        assert distance(image, generate(static, seed=0, steps=16, latents=latents)) < 1e-5
        assert letters(logs(fast)[-1]) == letters(logs(static)[-1])
    assert omnifx.stats(fast).graphs == 1


@pytest.mark.slow
def test_with_inductor_steps_and_samples_are_the_same() -> None:
    model = toy(3)
    fast = compiled(model, FirstBlockCache(threshold=0.7), lowering="inductor")
    with torch._dynamo.config.patch(error_on_recompile=True), warnings.catch_warnings():
        warnings.simplefilter("error", OmnifxWarning)
        image = generate(fast, seed=0, steps=STEPS)

    reference = EagerBlocks(model, 0.7, equal=True)
    assert distance(image, generate(reference, seed=0, steps=STEPS)) < 1e-4
    assert letters(logs(fast)[0]) == reference.letters[3]


RANKS = """
import os, sys, torch, torch.distributed as dist, omnifx
from omnifx.policies.dicache import DiCache
from omnifx.policies.easycache import EasyCache
from omnifx.policies.first_block_cache import FirstBlockCache
from tests.runtime import letters
from tests.toys import EAGER, generate, toy
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
torch.set_num_threads(1)
for ranks_agree in (True, False):
    torch._dynamo.reset()
    policy = FirstBlockCache(threshold=0.7, ranks_agree=ranks_agree)
    fast = torch.compile(toy(3), backend="omnicache", options={**EAGER, "policy": policy})
    generate(fast, seed=rank, steps=12)
    print(letters(omnifx.stats(fast).generations[0]))
dist.destroy_process_group()
"""


def test_ranks_that_agree_run_the_same_steps(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANKS]
    running = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    found = [process.communicate(timeout=240)[0].split()[-2:] for process in running]

    alone = []
    for seed in (0, 1):
        reference = EagerBlocks(toy(3), 0.7, equal=True)
        generate(reference, seed=seed, steps=12)
        alone.append(reference.letters[3])
    assert alone[0] != alone[1]  # else agreeing could not be seen
    agreeing, each_alone = zip(*found, strict=True)
    assert list(each_alone) == alone
    assert agreeing[0] == agreeing[1]
    assert "r" in agreeing[0]
