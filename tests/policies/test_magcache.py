"""MagCache: the measured curve, the rule that skips, and what a whole generation then gives."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import omnifx
from omnifx.calibration import merge
from omnifx.errors import ConfigError
from omnifx.plan import REUSE
from omnifx.policies.magcache import MagCache
from omnifx.policy import SLACK, resolve
from omnifx.session import find_session
from tests.policies.stacks import Stacks, block_profile, plan_of, reused_by
from tests.toys import EAGER, distance, generate, toy

STEPS = 12


def skips(curve: list[float], threshold: float, most: int, retention: float) -> list[bool]:
    """The release's rule."""
    found, ratio, error, count = [], 1.0, 0.0, 0
    for step, gamma in enumerate(curve):
        skip = False
        if step >= max(1, int(retention * len(curve))):
            ratio *= gamma
            error += abs(1 - ratio)
            count += 1
            skip = error <= threshold and count <= most
        if not skip:
            ratio, error, count = 1.0, 0.0, 0
        found.append(skip)
    return found


def test_a_generation_is_the_eager_reference() -> None:
    model = toy(3)
    whole = (0, 2)
    measuring = Stacks(model, lambda step: None, (whole,))
    generate(measuring, seed=0, steps=STEPS)
    old = [residual[whole] for residual in measuring.residuals]
    curve = [1.0, *(float((b.norm(dim=-1) / a.norm(dim=-1)).mean()) for a, b in itertools.pairwise(old))]
    expected = skips(curve, 0.24, 5, 0.1)
    fast = torch.compile(model, backend="omnicache", options={**EAGER, "policy": "magcache"})
    with omnifx.generation(fast):
        generate(fast, seed=0, steps=STEPS)
    reference = Stacks(model, lambda step: whole if expected[step] else None, (whole,))

    with omnifx.generation(fast):
        image = generate(fast, seed=1, steps=STEPS)

    (conductor,) = find_session(fast).conductors
    measured = conductor.entries[0].profile.growth_of("span0-2")
    assert measured.tolist() == pytest.approx(curve, rel=1e-4)
    assert reused_by(plan_of(fast)) == [["span0-2"] if skip else [] for skip in expected]
    assert 3 <= sum(expected) < STEPS - 2  # so that there is something to see
    assert distance(image, generate(reference, seed=1, steps=STEPS)) < 1e-5
    log = omnifx.stats(fast).generations[-1]
    assert log.reasons == {}
    assert [s.variant for s in log.steps] == ["reuse+span0-2" if skip else "full+write" for skip in expected]
    assert log.peak_cache_bytes == 16 * 32 * 4  # one residual of [1, 16, 32]


def curve_profile(curve: list[float]) -> Any:
    changes = torch.zeros(len(curve), 2, 1)
    changes[:, 1, 0] = torch.tensor(curve)
    return block_profile(len(curve), changes=changes, measured=("span0-3",))


CURVES = st.lists(st.floats(0.7, 1.4), min_size=1, max_size=50)


@given(curve=CURVES, threshold=st.floats(0, 2), most=st.integers(1, 8), retention=st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_the_rule_is_kept(curve: list[float], threshold: float, most: int, retention: float) -> None:
    curve = torch.tensor(curve).tolist()  # as float32 holds it
    policy = MagCache(threshold=threshold, max_skips=most, retention=retention)

    plan = policy.plan(curve_profile(curve))

    skipped = [REUSE in row for row in plan.rows]
    assert skipped == skips(curve, threshold, most, retention)
    assert not any(skipped[: max(1, int(retention * len(curve)))])
    runs = "".join("r" if skip else "F" for skip in skipped).split("F")
    assert max(map(len, runs)) <= most
    assert len(plan.variants) <= 2


@given(curve=CURVES, speedup=st.floats(1.0, 5.0))
@settings(max_examples=60, deadline=None)
def test_the_smallest_threshold_that_reaches_a_speedup_is_taken_or_it_is_refused(
    curve: list[float], speedup: float
) -> None:
    profile = curve_profile(curve)
    strongest = MagCache(threshold=1e9).plan(profile).speedup
    if speedup > strongest * (1 + SLACK * speedup / len(curve)):
        with pytest.raises(ConfigError, match=r"magcache: speedup must be in \[1, .*at most 5 skipped in a row"):
            MagCache().plan(profile, speedup=speedup)
        return
    plan = MagCache().plan(profile, speedup=speedup)
    assert plan.speedup >= speedup / (1 + SLACK * speedup / len(curve)) - 1e-6
    if (threshold := plan.policy_options["threshold"]) > 0:
        assert MagCache(threshold=threshold * (1 - 1e-6)).plan(profile).timeline() != plan.timeline()


def test_a_profile_of_another_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"does not tell how \['span0-3'\] change over 1 steps: it was measured for"):
        MagCache().plan(block_profile(8))


def test_runs_are_averaged() -> None:
    both = merge([curve_profile([1.0, 1.25, 0.75]), curve_profile([1.0, 1.75, 0.25])])
    assert both.growth_of("span0-3").tolist() == [1.0, 1.5, 0.5]


def test_profiles_with_changes_come_back_from_their_files(tmp_path: Any) -> None:
    profile = curve_profile([1.0, 1.25, 0.75])
    profile.save(tmp_path / "p.safetensors")

    loaded = omnifx.Profile.load(tmp_path / "p.safetensors")

    assert loaded.growth_of("span0-3").tolist() == [1.0, 1.25, 0.75]
    assert loaded.meta == profile.meta


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"threshold": -0.1}, "threshold must be a number >= 0"),
        ({"threshold": float("nan")}, "threshold"),
        ({"max_skips": 0}, "max_skips must be a whole number >= 1"),
        ({"retention": 2.0}, r"retention must be a number in \[0, 1\]"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        MagCache(**options)


def test_it_is_known_by_its_name() -> None:
    assert resolve("magcache") == MagCache()
