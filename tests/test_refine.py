"""Refinement: a calibration tries plans out, and later plans are those that came out best."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import omnifx
from omnifx.errors import ConfigError
from omnifx.metrics import psnr
from omnifx.policies.auto import AMPLIFICATIONS, LANDINGS, Auto
from omnifx.policies.omnicache import OmniCache
from omnifx.profile import Profile
from omnifx.quality import Refinement, plain_options
from omnifx.rollouts import range_of
from tests.profiles import walked
from tests.toys import EAGER, generate, toy

STEPS = 12


def run(model: Any, seed: int) -> Tensor:
    return generate(model, seed=seed, steps=STEPS)


def refined(profile: Profile, asked: float, policy: Any = None, **better: Any) -> Profile:
    """The profile as if a calibration had found these options best."""
    chosen = policy or Auto()
    found = Refinement(
        policy=chosen.name,
        options=plain_options(chosen.options),
        asked=asked,
        better=better,
        psnr=40.0,
        plain_psnr=30.0,
    )
    return replace(profile, meta=profile.meta.model_copy(update={"refined": (*profile.meta.refined, found)}))


@pytest.fixture(scope="module")
def measured() -> tuple[Any, Profile]:
    model = toy()
    profile = omnifx.calibrate(model, run, runs=2, refine=1, speedups=(2.0, 4.0), options=EAGER, progress=False)
    return model, profile


def test_the_best_of_the_variants_is_chosen_at_each_speedup(measured: tuple[Any, Profile]) -> None:
    model, profile = measured
    plain = replace(profile, meta=profile.meta.model_copy(update={"refined": ()}))

    assert [found.asked for found in profile.meta.refined] == [2.0, 4.0]
    data_range = range_of(run(model, 0))
    for found in profile.meta.refined:
        chosen = omnifx.make_plan(profile, speedup=found.asked)
        best = Auto(**{**Auto().options, **found.better})
        assert chosen.steps == best.plan(plain, speedup=found.asked).steps
        assert found.psnr >= found.plain_psnr
    found = profile.meta.refined[-1]
    for policy, expected in ((Auto(), found.plain_psnr), (best, found.psnr)):
        torch._dynamo.reset()
        options = {**EAGER, "profile": plain, "plan": policy.plan(plain, speedup=found.asked), "profile_cache": False}
        samples = run(torch.compile(model, backend="omnicache", options=options), 0)
        reached = psnr(samples, run(model, 0), data_range=data_range)
        assert float(reached.mean()) == pytest.approx(expected, abs=1e-3)


def test_a_plan_is_of_the_variant_at_the_nearest_speedup() -> None:
    profile = refined(refined(walked(20), 2.0, amplification=10.0), 5.0, amplification=3.0, landing=1.0)

    mild, strong = (Auto().plan(profile, speedup=speedup) for speedup in (2.5, 4.0))

    assert mild.steps == Auto(amplification=10.0).plan(profile, speedup=2.5).steps
    assert strong.steps == Auto(amplification=3.0, landing=1.0).plan(profile, speedup=4.0).steps
    assert "chose amplification=10.0." in mild.notes[-1]
    assert plain_options(mild.policy_options) == plain_options(Auto().options)


def test_what_was_found_for_other_options_is_left_aside() -> None:
    profile = refined(walked(20), 2.0, policy=Auto(network="reuse"), amplification=10.0)

    assert Auto().refined(profile, 2.0) == Auto()
    assert Auto(network="reuse").refined(profile, 2.0) == Auto(network="reuse", amplification=10.0)
    assert OmniCache().refined(profile, 2.0) == OmniCache()


def test_variants_differ_in_what_was_left_open_only() -> None:
    profile = walked(20)

    every = Auto().variants(profile)
    assert (
        len(every)
        == len(AMPLIFICATIONS) * len(LANDINGS)
        == len({policy.plan(profile).policy_options["landing"] for policy in every}) * len(AMPLIFICATIONS)
    )
    assert {policy.landing for policy in Auto(landing=0.25).variants(profile)} == {0.25}
    assert Auto(amplification=2.0, landing=0.25).variants(profile) == ()
    assert replace(profile, path=None).path is None
    assert Auto().variants(replace(profile, path=None)) == ()


def test_a_profile_keeps_what_was_found(tmp_path: Path) -> None:
    profile = refined(walked(20), 2.0, amplification=10.0)
    profile.save(tmp_path / "a.safetensors")

    assert Profile.load(tmp_path / "a.safetensors").meta.refined == profile.meta.refined


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"refine": 2}, "refine must be a number of the 1 runs, 0 to 1, got 2"),
        ({"refine": True}, "got True"),
        ({"refine": 1, "policy": "omnicache"}, "policy 'omnicache' .* has no variants to refine among"),
        ({"refine": 1, "policy": Auto(amplification=2.0, landing=0.5, network="skip", spread="even")}, "no variants"),
    ],
)
def test_refining_what_cannot_be_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        omnifx.calibrate(toy(), run, options=EAGER, progress=False, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"amplification": 0.5}, "amplification must be None or a number in"),
        ({"amplification": True}, "amplification must be None or a number in"),
        ({"spread": "odd"}, "spread must be None or one of"),
        ({"landing": 2.0}, "landing must be a number in"),
        ({"num_latents": 9}, "num_latents must be a whole number"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Auto(**options)
