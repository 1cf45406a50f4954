"""`auto`: plans from a recording alone, followed as forecast, and better than what it contains as special cases."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import omnifx
from examples.digits.models import load_dit, load_flow
from examples.digits.quality import psnr
from examples.digits.sampling import sample_dit, sample_flow
from omnifx.errors import ConfigError
from omnifx.plan import REUSE, SKIP, reuses
from omnifx.policies.auto import FEWEST, Auto
from omnifx.policies.omnicache import OmniCache
from omnifx.policy import SLACK, resolve
from omnifx.profile import NUM_HALVES, Profile
from tests.profiles import make_profile
from tests.toys import EAGER, distance, generate, toy

STEPS = 12


def profile_of(steps: int, *, branch_flops: tuple[int, ...] = (60, 38), seed: int = 0) -> Profile:
    """A made-up profile whose path is random and smooth."""
    generator = torch.Generator().manual_seed(seed)
    ways = torch.randn(3, 30, generator=generator, dtype=torch.float64)
    at = torch.linspace(0, 1, steps, dtype=torch.float64)[:, None]
    outputs = ways[0] + at * ways[1] + at**2 * ways[2]
    start = torch.randn(1, 30, generator=generator, dtype=torch.float64)
    latents = start - torch.cat([0 * start, outputs[:-1].cumsum(0)]) / steps
    noises = 0.02 * torch.randn(steps, 30, generator=generator, dtype=torch.float64)
    vectors = torch.cat([latents, outputs, noises])
    path = torch.stack([vectors @ vectors.T / NUM_HALVES] * NUM_HALVES)[None]
    return replace(make_profile(steps, branch_flops=branch_flops), path=path)


# -- plans -------------------------------------------------------------------------------------------------------------


@given(
    steps=st.integers(4, 30),
    speedup=st.floats(1.0, 6.0),
    network=st.sampled_from(["skip", "reuse", "auto"]),
)
@settings(max_examples=30, deadline=None)
def test_the_speedup_is_reached_or_refused(steps: int, speedup: float, network: Any) -> None:
    profile, policy = profile_of(steps), Auto(network=network)  # whose reuse graph costs .02 of a step
    affordable = math.floor(steps / speedup + SLACK - (0.02 * steps if network == "reuse" else 0.0))
    if affordable < FEWEST:
        with pytest.raises(ConfigError, match=f"at least {FEWEST} of {steps} steps computed"):
            policy.plan(profile, speedup=speedup)
        return

    plan = policy.plan(profile, speedup=speedup)

    assert not reuses(plan.rows[0])
    computed = steps - plan.num_reuse_steps
    actions = {row[0] for row in plan.rows if reuses(row)}
    assert actions <= ({REUSE, SKIP} if network == "auto" else {SKIP if network == "skip" else REUSE})
    spent = computed + (0.02 * steps if actions == {REUSE} else 0.0)  # a computed step replays the reuse graph
    assert spent <= steps / speedup + SLACK + 1e-6


def test_skipping_keeps_nothing_of_the_network() -> None:
    plan = Auto(network="skip").plan(profile_of(20), speedup=2.0)

    assert plan.speedup == pytest.approx(2.0)
    assert plan.kept == ()
    assert not plan.reads_noise
    assert plan.history == 4
    assert len(plan.variants) == 2
    assert re.search(r"forecast to be off by [\d.]+% \(median\) and [\d.]+% \(step \d+, ", plan.notes[2])


def test_the_reuse_graph_runs_where_it_is_forecast_to_be_better() -> None:
    profile = profile_of(20)
    exact = replace(profile, path=_without_noise(profile))  # reuse is exact there

    assert REUSE in sum(Auto().plan(exact, speedup=2.0).rows, ())
    assert SKIP in sum(Auto(margin=0.0).plan(exact, speedup=2.0).rows, ())


def _without_noise(profile: Profile) -> Tensor:
    assert profile.path is not None
    path, steps = profile.path.clone(), profile.num_steps
    path[..., 2 * steps :, :] = path[..., :, 2 * steps :] = 0.0
    return path


def test_without_a_path_it_is_omnicache() -> None:
    profile = make_profile(20)

    plan = Auto().plan(profile, speedup=2.0)

    other = OmniCache().plan(profile, speedup=2.0)
    assert (plan.rows, plan.steps) == (other.rows, other.steps)
    assert plan.policy == "auto"
    assert "this is OmniCache's plan" in plan.notes[0]


def test_too_much_is_refused_with_the_most_there_is() -> None:
    with pytest.raises(ConfigError, match=r"auto: speedup must be in \[1, 5\.000\] here .*, got 11\.0"):
        Auto(network="skip").plan(profile_of(10), speedup=11.0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"network": "half"}, r"network must be one of \['auto', 'skip', 'reuse'\], got 'half'"),
        ({"num_outputs": 0}, r"num_outputs must be a whole number in \[1, 8\]"),
        ({"num_outputs": 2, "num_latents": 3}, r"num_latents must be at most num_outputs \(2\), got 3"),
        ({"ridge": -1.0}, r"ridge must be a number in \[0, 1\]"),
        ({"doubt": True}, r"doubt must be a number in \[0, 10\]"),
        ({"landing": 1.5}, r"landing must be a number in \[0, 1\]"),
        ({"longest_gap": 0}, r"longest_gap must be None or a whole number >= 1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Auto(**options)


def test_it_is_known_by_its_name() -> None:
    assert resolve("auto") == Auto()


# -- generations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["skip", "reuse"])
@pytest.mark.parametrize("cfg", [None, 7])
def test_a_generation_drifts_no_further_than_was_forecast(network: Any, cfg: int | None) -> None:
    model = toy()
    options = {**EAGER, "policy": Auto(network=network), "speedup": 2.0}
    fast = torch.compile(model, backend="omnicache", options=options)

    generate(fast, seed=0, steps=STEPS, cfg=cfg)
    image = generate(fast, seed=1, steps=STEPS, cfg=cfg)

    ((_, plan),) = omnifx.plans(fast)
    log = omnifx.stats(fast).generations[-1]
    assert not any(step.reason for step in log.steps)
    drift = float(plan.notes[0].partition(": ")[2].partition("%")[0]) / 100
    assert distance(image, generate(model, seed=1, steps=STEPS, cfg=cfg)) < 5 * drift + 1e-5


CASES = {
    "dit": (load_dit, sample_dit, {}, 41.0),
    "flow": (load_flow, sample_flow, {"cfg": 2.0}, 40.5),
}
"""Trained models, and what reuse with OmniCache's schedule and no correction gives at 2x in 20 steps."""


@pytest.mark.parametrize("name", CASES)
def test_one_image_is_enough_to_beat_reuse_on_trained_models(name: str) -> None:
    load, sample, options, reuse = CASES[name]
    steps, labels = 20, torch.arange(8) % 10
    fast = torch.compile(load(), backend="omnicache", options={**EAGER, "policy": Auto(network="skip"), "speedup": 2.0})

    sample(fast, seeds=range(1_000_000, 1_000_001), labels=labels[:1], steps=steps, **options)
    images = sample(fast, seeds=range(8), labels=labels, steps=steps, **options)

    true = sample(load(), seeds=range(8), labels=labels, steps=steps, **options)
    assert omnifx.stats(fast).generations[-1].steps[-1].reason == ""
    assert float(psnr(images, true).mean()) > reuse + 3.0


SOLVERS = {
    "dit": (load_dit, partial(sample_dit, solver="unipc"), 36.8),
    "flow": (load_flow, partial(sample_flow, solver="dpmsolver++"), 34.0),
    "noise": (load_flow, partial(sample_flow, solver="stochastic-euler"), 13.9),
}
"""Solvers that remember or add noise, and what FORA gives with 6 of 20 steps computed (DiT: 34.6, flow: 32.7, noise:
13.9), or what a forecast that takes them for others does (flow: 20.7)."""


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_that_remember_or_add_noise_are_forecast(name: str) -> None:
    load, sample, least = SOLVERS[name]
    steps, labels = 20, torch.arange(8) % 10
    options = {**EAGER, "policy": Auto(network="skip"), "speedup": 20 / 6}
    fast = torch.compile(load(), backend="omnicache", options=options)

    sample(fast, seeds=range(1_000_000, 1_000_008), labels=labels, steps=steps)
    images = sample(fast, seeds=range(8), labels=labels, steps=steps)

    true = sample(load(), seeds=range(8), labels=labels, steps=steps)
    log = omnifx.stats(fast).generations[-1]
    assert [step.variant for step in log.steps].count("skip") == 14
    assert float(psnr(images, true).mean()) > least


def test_where_a_sampler_clips_steps_are_spread_evenly_and_the_network_reused() -> None:
    """DDIM clips a third of all elements at this guidance; FORA gives 34.0 dB for these samples."""
    sample = partial(sample_dit, cfg=1.5, labels=torch.arange(8) % 10, steps=20)
    fast = torch.compile(load_dit(), backend="omnicache", options={**EAGER, "policy": "auto", "speedup": 2.0})

    sample(fast, seeds=range(1_000_000, 1_000_008))
    images = sample(fast, seeds=range(8))

    true = sample(load_dit(), seeds=range(8))
    log = omnifx.stats(fast).generations[-1]
    assert [step.variant.partition("+")[0] for step in log.steps] == ["full", "reuse"] * 10
    assert float(psnr(images, true).mean()) > 39.0
