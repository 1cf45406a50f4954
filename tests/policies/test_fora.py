"""FORA: one full step in every interval, and the smallest interval that reaches a speedup."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnifx.errors import ConfigError
from omnifx.plan import COMPUTE, REUSE
from omnifx.policies.fora import Fora
from omnifx.policy import SLACK, resolve, reuse_steps_needed
from tests.profiles import make_profile


@given(steps=st.integers(1, 60), interval=st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_every_interval_has_one_full_step_at_its_start(steps: int, interval: int) -> None:
    plan = Fora(interval=interval).plan(make_profile(steps))

    assert [row[0] for row in plan.rows] == [COMPUTE if k % interval == 0 else REUSE for k in range(steps)]
    assert not plan.reads_noise


@given(steps=st.integers(2, 60), speedup=st.floats(1.0, 8.0), branch_flops=st.sampled_from([(60, 40), (60, 30)]))
@settings(max_examples=80, deadline=None)
def test_the_speedup_is_reached_by_the_smallest_interval_or_refused(
    steps: int, speedup: float, branch_flops: tuple[int, int]
) -> None:
    profile = make_profile(steps, branch_flops=branch_flops)
    if reuse_steps_needed(profile, speedup) > steps - 1:
        assert Fora(interval=steps).plan(profile).speedup < speedup
        with pytest.raises(ConfigError, match="Ask for less"):
            Fora().plan(profile, speedup=speedup)
        return
    plan = Fora().plan(profile, speedup=speedup)
    assert plan.speedup >= speedup / (1 + SLACK * speedup / len(plan.steps)) - 1e-6
    if (interval := plan.policy_options["interval"]) > 1:
        assert Fora(interval=interval - 1).plan(profile).speedup < speedup + 1e-6


def test_the_error_names_the_largest_speedup() -> None:
    says = r"fora: speedup must be in \[1, 10\.000\] here \(one full step in 10\), got 11\.0"
    with pytest.raises(ConfigError, match=says):
        Fora().plan(make_profile(10), speedup=11.0)


@pytest.mark.parametrize("interval", [0, -1, 1.5, "2"])
def test_intervals_that_are_no_count_are_refused(interval: object) -> None:
    with pytest.raises(ConfigError, match="interval must be >= 1"):
        Fora(interval=interval)  # type: ignore[arg-type]


@pytest.mark.parametrize("speedup", [0.5, float("nan"), True, "2"])
def test_speedups_that_are_none_are_refused(speedup: object) -> None:
    with pytest.raises(ConfigError, match="speedup must be a number >= 1"):
        Fora().plan(make_profile(10), speedup=speedup)  # type: ignore[arg-type]


def test_it_is_known_by_its_name() -> None:
    assert resolve("fora") == Fora()
