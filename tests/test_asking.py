"""Asking for a PSNR or a time: what is promised was measured, and what cannot be promised is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import omnifx
from omnifx.asking import Ask, milliseconds
from omnifx.errors import ConfigError, ProfileError
from omnifx.metrics import psnr
from omnifx.options import Options
from omnifx.plan import REUSE
from omnifx.policies.auto import Auto
from omnifx.policies.omnicache import OmniCache
from omnifx.policies.teacache import TeaCache
from omnifx.profile import Profile
from omnifx.quality import MOST_PSNR, Quality, QualityPoint, Timing, plain_options
from omnifx.rollouts import range_of, samples_of
from tests.profiles import walked
from tests.toys import EAGER, generate, toy

STEPS = 12
CURVE = ((1.5, 60.0), (2.0, 52.0), (4.0, 40.0))


def quality(points: tuple[tuple[float, float], ...] = CURVE, policy: Any = None) -> Quality:
    chosen = policy or Auto(network="skip")
    return Quality(
        policy=chosen.name,
        options=plain_options(chosen.options),
        data_range=2.0,
        num_samples=8,
        points=tuple(
            QualityPoint(asked=speedup, speedup=speedup, psnr=decibels, psnr_p10=decibels - 5, error=0.5)
            for speedup, decibels in points
        ),
    )


def known(profile: Profile, **meta: Any) -> Profile:
    return replace(profile, meta=profile.meta.model_copy(update=meta))


def timing(step_ms: float = 10.0, overhead_ms: float = 1.0) -> Timing:
    return Timing(step_ms=step_ms, overhead_ms=overhead_ms, device="cpu, 1 threads, eager", latent_shape=(1, 4, 8, 8))


# -- the curve ---------------------------------------------------------------------------------------------------------


def test_between_measured_plans_decibels_are_linear_in_the_logarithm_of_the_speedup() -> None:
    found = quality().at(math.sqrt(8.0))  # in the middle of 2 and 4

    assert found is not None
    assert found.psnr == pytest.approx(46.0)
    assert found.psnr_p10 == pytest.approx(41.0)
    assert quality().at(2.0) == quality().points[1]
    assert quality().measured(2.0)
    assert not quality().measured(2.1)


@pytest.mark.parametrize("speedup", [1.0, 1.49, 4.01, 9.0])
def test_beyond_measured_plans_nothing_is_expected(speedup: float) -> None:
    assert quality().at(speedup) is None


def test_points_come_in_the_order_of_their_speedups() -> None:
    more = quality().with_points(QualityPoint(asked=3.0, speedup=3.0, psnr=45.0, psnr_p10=40.0, error=0.1))

    assert [point.speedup for point in more.points] == [1.5, 2.0, 3.0, 4.0]
    with pytest.raises(ValueError, match="rising speedups"):
        quality(((2.0, 50.0), (1.5, 60.0)))


def test_a_profile_keeps_what_was_measured(tmp_path: Path) -> None:
    profile = known(walked(20), quality=(quality(),), timing=timing())

    profile.save(tmp_path / "a.safetensors")

    loaded = Profile.load(tmp_path / "a.safetensors").meta
    assert (loaded.quality, loaded.timing) == (profile.meta.quality, profile.meta.timing)
    assert loaded.quality[0].is_of("auto", Auto(network="skip").options)


# -- min_psnr ----------------------------------------------------------------------------------------------------------


@given(wanted=st.floats(40.0, 59.0))
def test_the_plan_is_the_fastest_one_that_is_expected_to_be_good_enough(wanted: float) -> None:
    found = quality()
    speedups = [20 / computed for computed in range(5, 14)] + [1.5]
    best = max(s for s in speedups if (point := found.at(s)) is not None and point.psnr >= wanted)
    policy = _Evenly()

    plan = omnifx.make_plan(known(walked(20), quality=(quality(policy=policy),)), policy=policy, min_psnr=wanted)

    assert plan.expected_psnr is not None
    assert plan.expected_psnr >= wanted
    assert plan.speedup == pytest.approx(best, rel=0.03)  # 1.5 is 14 of 20 steps


class _Evenly(Auto):
    """Computes the first steps, so that no schedule need be searched."""

    def plan(self, profile: Profile, *, speedup: float | None = None) -> Any:
        from omnifx.plan import COMPUTE, Plan

        computed = math.floor(profile.num_steps / (speedup or 2.0) + 0.05)
        actions = [COMPUTE] * computed + [REUSE] * (profile.num_steps - computed)
        return Plan.uniform(profile, actions, policy="auto")


def test_a_plan_says_what_is_expected_of_it() -> None:
    profile = known(walked(20), quality=(quality(),))

    plan = omnifx.make_plan(profile, policy=Auto(network="skip"), min_psnr=52.0)

    assert plan.speedup == pytest.approx(2.0)
    assert plan.expected_psnr == 52.0
    (note,) = [note for note in plan.notes if "expected PSNR" in note]
    assert "expected PSNR 52.0 dB, speedup 2.00: this plan was measured" in note
    assert "8 samples with a standard error of 0.5 dB" in note
    assert "at least 52 dB was asked for" in note
    between = omnifx.make_plan(profile, policy=Auto(network="skip"), speedup=2.5)
    assert between.expected_psnr == pytest.approx(52.0 - 12.0 * math.log2(1.25), abs=0.01)
    assert any("between two measured plans" in note for note in between.notes)
    assert omnifx.make_plan(profile, policy=Auto(network="skip"), speedup=5.0).expected_psnr is None


@pytest.mark.parametrize(
    ("profile", "policy", "says"),
    [
        (walked(20), Auto(), r"the model never sees the final samples. Measure it: omnifx.calibrate\(.*rollouts=4"),
        (
            known(walked(20), quality=(quality(),)),
            Auto(),
            r"knows that of other settings only: auto \{'network': 'skip'",
        ),
        (known(walked(20), quality=(quality(),)), OmniCache(), "omnicache: min_psnr=50 needs to know"),
        (known(walked(20), resampled_from=50), Auto(), "interpolated from 50 steps, where nobody measured it"),
        (walked(20), TeaCache(), "policy 'teacache' plans nothing from what was measured, so min_psnr cannot"),
    ],
    ids=["unmeasured", "other options", "other policy", "transferred", "at run time"],
)
def test_what_nobody_measured_is_not_promised(profile: Profile, policy: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        omnifx.make_plan(profile, policy=policy, min_psnr=50.0)


def test_too_many_decibels_are_refused_with_the_most_there_is() -> None:
    profile = known(walked(20), quality=(quality(),))
    with pytest.raises(ConfigError, match=r"min_psnr=61 dB is out of reach: .* 1\.50x, gives 60\.0 dB"):
        omnifx.make_plan(profile, policy=Auto(network="skip"), min_psnr=61.0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"speedup": 2.0, "min_psnr": 40.0}, "ask for one of speedup, min_psnr and target_ms"),
        ({"min_psnr": 0.0}, "min_psnr must be a number > 0, got 0.0"),
        ({"min_psnr": math.nan}, "min_psnr must be a number > 0, got nan"),
        ({"target_ms": True}, "target_ms must be a number > 0, got True"),
    ],
)
def test_what_is_asked_is_checked(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Ask(**arguments)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"min_psnr": 40}, r"'min_psnr' found 40, but no 'profile'.*rollouts=4, min_psnr=40"),
        ({"min_psnr": -1}, "option 'min_psnr' found -1: .*greater than 0"),
        ({"target_ms": 0}, "option 'target_ms' found 0: .*greater than 0"),
        ({"target_ms": 5, "speedup": 2}, "ask for one of speedup, min_psnr and target_ms"),
        ({"target_ms": 5, "policy": "teacache"}, "policy 'teacache' plans nothing from what was measured"),
        ({"transfer": "x"}, "option 'transfer' found 'x'"),
    ],
)
def test_options_that_ask_for_the_impossible_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Options.parse(options)


# -- rollouts ----------------------------------------------------------------------------------------------------------


def run(model: Any, seed: int) -> Tensor:
    return generate(model, seed=seed, steps=STEPS)


@pytest.fixture(scope="module")
def measured() -> tuple[Any, Profile]:
    model = toy()
    profile = omnifx.calibrate(
        model, run, rollouts=2, speedups=(1.5, 3.0), min_psnr=60.0, data_range=8.0, options=EAGER, progress=False
    )
    return model, profile


def test_rollouts_measure_the_plans_on_held_back_seeds(measured: tuple[Any, Profile]) -> None:
    model, profile = measured
    (found,) = profile.meta.quality

    assert (found.num_samples, found.data_range) == (2, 8.0)
    assert {round(point.asked, 3) for point in found.points} >= {1.5, 3.0}
    for point in (found.points[0], found.points[-1]):
        plan = omnifx.make_plan(profile, speedup=point.asked)
        assert plan.expected_psnr == point.psnr
        options = {**EAGER, "profile": profile, "plan": plan, "profile_cache": False}
        fast = torch.compile(model, backend="omnicache", options=options)
        pairs = [(generate(fast, seed=s, steps=STEPS), generate(model, seed=s, steps=STEPS)) for s in (1, 2)]
        values = torch.cat([psnr(image, true, data_range=8.0) for image, true in pairs])
        assert float(values.mean()) == pytest.approx(point.psnr, abs=0.1)
        assert point.error == pytest.approx(float(values.std()) / math.sqrt(2), abs=0.1)


def test_the_very_plan_for_a_refined_psnr_was_measured(measured: tuple[Any, Profile]) -> None:
    _, profile = measured
    (found,) = profile.meta.quality

    plan = omnifx.make_plan(profile, min_psnr=60.0)

    assert len(found.points) > 2
    assert found.measured(plan.speedup)
    assert plan.expected_psnr is not None
    assert plan.expected_psnr >= 60.0
    faster = [point for point in found.points if point.speedup > plan.speedup]
    assert all(point.psnr < 60.0 for point in faster)


def test_a_compiled_model_follows_what_min_psnr_asks_for(measured: tuple[Any, Profile], tmp_path: Path) -> None:
    model, profile = measured
    profile.save(tmp_path / "p.safetensors")
    options = {**EAGER, "policy": "auto", "profile": str(tmp_path / "p.safetensors"), "min_psnr": 60.0}
    fast = torch.compile(model, backend="omnicache", options=options)

    generate(fast, seed=5, steps=STEPS)

    ((_, plan),) = omnifx.plans(fast)
    log = omnifx.stats(fast).generations[-1]
    assert not log.reasons
    assert log.speedup == pytest.approx(plan.speedup, rel=1e-6)
    assert plan.steps == omnifx.make_plan(profile, min_psnr=60.0).steps


def test_a_merged_profile_forgets_what_was_measured_of_its_parts(measured: tuple[Any, Profile]) -> None:
    from omnifx.calibration import merge

    _, profile = measured
    assert merge([profile]).meta.quality == profile.meta.quality
    assert merge([profile, profile]).meta.quality == ()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"rollouts": -1}, "rollouts must be a number >= 0, got -1"),
        ({"min_psnr": 40.0}, r"min_psnr=40.0 is measured by rollouts; give their number"),
        ({"rollouts": 1, "min_psnr": (40.0, -1.0)}, "min_psnr must be a number > 0, got -1.0"),
        ({"rollouts": 1, "speedups": ()}, "speedups must hold at least one number"),
        ({"rollouts": 1, "speedups": (0.5,)}, "speedup must be a number >= 1"),
        ({"rollouts": 1, "data_range": 0.0}, "data_range must be > 0"),
        ({"rollouts": 1, "policy": "teacache"}, "policy 'teacache' makes no plans from a profile"),
    ],
)
def test_rollouts_that_make_no_sense_are_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        omnifx.calibrate(toy(), run, options=EAGER, progress=False, **arguments)


def test_a_generate_that_returns_nothing_is_refused() -> None:
    def silent(model: Any, seed: int) -> None:
        run(model, seed)

    with pytest.raises(ConfigError, match=r"generate\(\) returned NoneType. Return the samples"):
        omnifx.calibrate(toy(), silent, rollouts=1, options=EAGER, progress=False)


def test_a_rollout_that_does_not_follow_its_plan_is_refused() -> None:
    def odd(model: Any, seed: int) -> Tensor:
        return generate(model, seed=seed, steps=STEPS if seed == 0 else STEPS - 2)

    with pytest.raises(ProfileError, match="ran steps in full: measured: no plan for these steps yet"):
        omnifx.calibrate(toy(), odd, rollouts=1, options=EAGER, progress=False)


@pytest.mark.parametrize(
    "result",
    [
        torch.zeros(2, 3, 4, 4),
        np.zeros((2, 3, 4, 4)),
        [torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)],
        (torch.zeros(2, 3, 4, 4),),
        type("Output", (), {"images": [np.zeros((3, 4, 4), dtype=np.uint8)] * 2})(),
        type("Output", (), {"frames": [[np.zeros((4, 4))] * 3] * 2})(),
    ],
    ids=["tensor", "array", "list", "tuple", "images", "frames"],
)
def test_samples_come_in_many_forms(result: object) -> None:
    assert samples_of(result).shape[:2] == (2, 3)


def test_a_sample_without_a_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"samples of shape \[5\], expected a batch"):
        samples_of(torch.zeros(5))


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (torch.tensor([[0, 9]], dtype=torch.uint8), 255.0),
        (torch.tensor([[0.2, 0.9]]), 1.0),
        (torch.tensor([[-0.2, 0.9]]), 2.0),
        (torch.tensor([[-3.0, 4.0]]), 7.0),
    ],
)
def test_the_range_of_samples_is_guessed(samples: Tensor, expected: float) -> None:
    assert range_of(samples) == expected
    with pytest.raises(ConfigError, match="there is nothing to compare"):
        range_of(torch.full((1, 2), torch.nan))


def test_equal_samples_are_not_infinitely_good() -> None:
    profile = omnifx.calibrate(
        toy(), run, policy="fora", rollouts=1, speedups=(1.0,), options=EAGER, progress=False, data_range=2.0
    )

    assert profile.meta.quality[0].points[0].psnr == MOST_PSNR


# -- target_ms ---------------------------------------------------------------------------------------------------------


def test_a_time_is_turned_into_a_speedup() -> None:
    profile = known(walked(20), timing=timing())  # 20 * (10 + 1) = 220 ms

    plan = omnifx.make_plan(profile, policy=Auto(network="skip"), target_ms=120.0)

    assert plan.speedup == pytest.approx(2.0)  # 20 * 1 + 10 * 10
    assert milliseconds(plan, profile, timing()) == pytest.approx(120.0)
    (note,) = [note for note in plan.notes if "120 ms was asked for" in note]
    assert "expected 120.0 ms for the model's calls of one generation, uncached 220.0 ms" in note
    assert "VAE are not counted" in note


def test_the_time_of_replays_and_streams_is_counted() -> None:
    profile = known(walked(20), timing=timing(overhead_ms=0.0), num_streams=1)
    plan = OmniCache(correction="on").plan(known(profile), speedup=2.0)
    assert plan.reads_noise
    cost = profile.meta.cost_of((REUSE, REUSE))

    spent = milliseconds(plan, profile, timing(overhead_ms=0.0))

    full = 20 - plan.num_reuse_steps
    assert spent == pytest.approx(10.0 * (full * (1 + cost) + (20 - full) * cost))
    twice = profile.meta.model_copy(update={"num_streams": 2})
    assert milliseconds(plan, Profile(meta=twice, grams=profile.grams.repeat(1, 2, 1, 1, 1, 1), moves=profile.moves),
                        timing(overhead_ms=0.0)) == pytest.approx(2 * spent)  # fmt: skip


def test_more_time_than_it_takes_computes_everything() -> None:
    plan = omnifx.make_plan(known(walked(20), timing=timing()), policy=Auto(network="skip"), target_ms=1e6)

    assert plan.num_reuse_steps == 0


@pytest.mark.parametrize("target", [15.0, 39.0])
def test_too_little_time_is_refused_with_the_least_there_is(target: float) -> None:
    profile = known(walked(20), timing=timing())
    with pytest.raises(ConfigError, match=rf"target_ms={target:g} is out of reach: the least is 40\.0 ms, at 10\.00x"):
        omnifx.make_plan(profile, policy=Auto(network="skip"), target_ms=target)


def test_without_times_a_time_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not hold the time of a step"):
        omnifx.make_plan(walked(20), target_ms=100.0)


def test_a_first_generation_tells_the_time_of_a_step() -> None:
    model = toy()
    fast = torch.compile(model, backend="omnicache", options={**EAGER, "target_ms": 1e6, "profile_cache": False})

    generate(fast, seed=0, steps=STEPS)
    generate(fast, seed=1, steps=STEPS)

    ((profile, plan),) = omnifx.plans(fast)
    found = profile.meta.timing
    assert found is not None
    assert 0.0 < found.step_ms < 1e4
    assert 0.0 < found.overhead_ms < 1e4
    assert found.latent_shape == (1, 4, 8, 8)
    assert found.device.startswith("cpu, ")
    assert found.device.endswith("eager")
    assert plan.num_reuse_steps == 0


def test_times_of_another_place_are_not_taken() -> None:
    model = toy()
    profile = omnifx.calibrate(model, run, options=EAGER, progress=False)
    assert profile.meta.timing is not None
    elsewhere = profile.meta.timing.model_copy(update={"device": "a fast GPU"})
    options = {**EAGER, "profile": known(profile, timing=elsewhere), "target_ms": 50.0}
    fast = torch.compile(model, backend="omnicache", options=options)

    with pytest.raises(Exception, match="target_ms needs the time of a step here"):
        generate(fast, seed=0, steps=STEPS)
