"""Delta-DiT: which blocks each step reuses as one residual, and what a whole generation then gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import omnifx
from omnifx.errors import ConfigError
from omnifx.plan import Plan
from omnifx.policies.delta_dit import DeltaDit
from omnifx.policy import SLACK, resolve
from omnifx.session import find_session
from tests.policies.stacks import Stacks, block_profile, plan_of, reused_by
from tests.profiles import make_profile
from tests.toys import EAGER, distance, generate, toy

STEPS = 9


def test_a_generation_is_the_eager_reference() -> None:
    """Blocks 1 to 3 of 4 in the first half of the steps, 0 to 2 in the second; a full step every third."""

    def reused(step: int) -> tuple[int, int] | None:
        switch = STEPS // 2
        if step < switch:
            return (1, 3) if step % 3 else None
        return (0, 2) if (step - switch) % 3 else None

    model = toy(4)
    fast = torch.compile(model, backend="omnicache", options={**EAGER, "policy": "delta-dit"})
    with omnifx.generation(fast):
        generate(fast, seed=0, steps=STEPS)
    reference = Stacks(model, reused, ((1, 3), (0, 2)))

    with omnifx.generation(fast):
        image = generate(fast, seed=1, steps=STEPS)

    assert distance(image, generate(reference, seed=1, steps=STEPS)) < 1e-5
    expected = [[] if (found := reused(k)) is None else [f"span{found[0]}-{found[1]}"] for k in range(STEPS)]
    assert reused_by(plan_of(fast)) == expected
    log = omnifx.stats(fast).generations[-1]
    assert log.reasons == {}
    assert [s.variant.split("+")[0] for s in log.steps] == ["reuse6" if names else "full" for names in expected]
    (runner,) = find_session(fast).runners
    assert log.peak_cache_bytes == 2 * 16 * 32 * 4  # two residuals of [1, 16, 32], and no cut of a branch
    assert log.speedup >= 0.99 * plan_of(fast).speedup > 1.5
    assert runner.inactive == ""


@given(
    steps=st.integers(1, 50),
    blocks=st.integers(1, 9),
    interval=st.integers(1, 8),
    share=st.floats(0.01, 1.0),
    switch=st.floats(0.0, 1.0),
)
@settings(max_examples=60, deadline=None)
def test_rear_blocks_come_first_and_no_residual_is_older_than_the_interval(
    steps: int, blocks: int, interval: int, share: float, switch: float
) -> None:
    plan = DeltaDit(interval=interval, share=share, switch=switch).plan(block_profile(steps, blocks))

    found = reused_by(plan)
    assert found[0] == []
    age = 0
    for k, names in enumerate(found):
        age = age + 1 if names else 0
        assert age < interval
        assert len(names) <= 1
        if names:
            first, last = map(int, names[0].removeprefix("span").split("-"))
            assert last == blocks - 1 if k < round(switch * steps) else first == 0
    assert len(plan.variants) <= 3
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


@given(steps=st.integers(2, 50), speedup=st.floats(1.0, 5.0))
@settings(max_examples=60, deadline=None)
def test_the_smallest_interval_that_reaches_a_speedup_is_taken_or_it_is_refused(steps: int, speedup: float) -> None:
    profile = block_profile(steps)
    strongest = DeltaDit(interval=steps).plan(profile).speedup
    if speedup > strongest * (1 + SLACK * speedup / steps):
        with pytest.raises(ConfigError, match=r"delta-dit: speedup must be in \[1, .*75% of the blocks"):
            DeltaDit().plan(profile, speedup=speedup)
        return
    plan = DeltaDit().plan(profile, speedup=speedup)
    assert plan.speedup >= speedup / (1 + SLACK * speedup / steps) - 1e-6
    if (interval := plan.policy_options["interval"]) > 1:
        assert DeltaDit(interval=interval - 1).plan(profile).speedup < speedup


def test_where_skips_leave_the_front_the_rear_is_reused_throughout() -> None:
    plan = DeltaDit().plan(block_profile(8, leaks=True))

    assert reused_by(plan) == [[], ["span1-3"], ["span1-3"], [], [], ["span1-3"], ["span1-3"], []]
    assert plan.notes == ("The front blocks cannot be reused as one; the others are, throughout.",)


def test_a_model_without_known_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not hold the range of blocks span0-0: it knows none"):
        DeltaDit().plan(make_profile(8))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"interval": 0}, "interval must be a whole number >= 1"),
        ({"interval": True}, "interval"),
        ({"share": 0.0}, r"share must be a number in \(0, 1\]"),
        ({"switch": 1.5}, r"switch must be a number in \[0, 1\]"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DeltaDit(**options)


def test_it_is_known_by_its_name() -> None:
    assert resolve("delta-dit") == DeltaDit()
