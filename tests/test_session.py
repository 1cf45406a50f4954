"""Sessions: each model instance has its own, and finds it again."""

import torch

import omnifx
from tests.toys import generate, toy


def compiled(seed: int) -> object:
    options = {"profile_cache": False, "lowering": "eager", "speedup": 1.5}
    return torch.compile(toy(seed=seed), backend="omnicache", options=options)


def test_two_instances_of_a_class_have_sessions_of_their_own() -> None:
    first, second = compiled(0), compiled(1)

    for _ in range(2):
        generate(first, seed=0, steps=6)
    for _ in range(3):
        generate(second, seed=0, steps=6)

    assert len(omnifx.stats(first).generations) == 2
    assert len(omnifx.stats(second).generations) == 3
    assert set(omnifx.stats(second).generations[0].variants) == {"full+write"}


def test_a_generation_marked_before_the_first_call_is_learned_from() -> None:
    model = compiled(0)

    with omnifx.generation(model, steps=6):
        generate(model, seed=0, steps=6)

    assert len(omnifx.plans(model)) == 1


def test_a_fresh_instance_can_be_calibrated_after_another() -> None:
    for seed in (0, 1):
        profile = omnifx.calibrate(
            toy(seed=seed),
            lambda model, seed: generate(model, seed=seed, steps=6),
            options={"lowering": "eager"},
            progress=False,
        )
        assert profile.num_steps == 6
