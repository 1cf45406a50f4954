"""TaylorSeer: a warm-up, one full step in each interval, and Taylor series in between."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omnifx.errors import ConfigError
from omnifx.plan import COMPUTE, PREDICT
from omnifx.policies.taylorseer import TaylorSeer
from omnifx.policy import SLACK, resolve, reuse_steps_needed
from tests.policies.following import assert_faithful
from tests.profiles import make_profile


class Factors:
    """The source's cache: derivatives of each module at its last full step, updated at each full step."""

    def __init__(self, *, interval: int, order: int, first_enhance: int) -> None:
        self.interval, self.order, self.first_enhance = interval, order, first_enhance
        self.activated: list[int] = []
        self.counter = 0
        self.step = -1
        self.full = True
        self.factors: dict[str, dict[int, Tensor]] = {}

    def __call__(self, step: int, name: str, compute: Callable[[], Tensor]) -> Tensor:
        if step != self.step:
            self.step = step
            self.full = step < self.first_enhance or self.counter == self.interval - 1
            self.counter = 0 if self.full else self.counter + 1
            if self.full:
                self.activated.append(step)
        if self.full:
            output = compute()
            factors = {0: output}
            for i in range(self.order):
                if i not in self.factors.get(name, {}) or step <= self.first_enhance - 2:
                    break
                gap = self.activated[-1] - self.activated[-2]
                factors[i + 1] = (factors[i] - self.factors[name][i]) / gap
            self.factors[name] = factors
            return output
        x = step - self.activated[-1]
        terms = [d * x**i / math.factorial(i) for i, d in self.factors[name].items()]
        return torch.stack(terms).sum(0)


@pytest.mark.parametrize(
    ("interval", "order", "warmup", "letters"),
    [
        (2, 1, 1, "FpFpFpFpFp"),
        (3, 2, 3, "FFFppFppFp"),
        (4, 3, 2, "FFpppFpppF"),
        (2, 3, 4, "FFFFpFpFpF"),
    ],
)
def test_a_generation_is_that_of_the_source(interval: int, order: int, warmup: int, letters: str) -> None:
    policy = TaylorSeer(interval=interval, predictor=f"taylor:{order}", num_warmup_steps=warmup)
    reference = Factors(interval=interval, order=order, first_enhance=warmup)

    assert_faithful(policy, reference, steps=10, letters=letters)


@given(
    steps=st.integers(1, 60),
    interval=st.integers(1, 8),
    warmup=st.integers(1, 5),
    predictor=st.sampled_from(["taylor:1", "taylor:3", "newton:2", "average", "chebyshev:4", "fitted:3"]),
)
@settings(max_examples=60, deadline=None)
def test_every_plan_is_valid_and_its_weights_add_up_to_one(
    steps: int, interval: int, warmup: int, predictor: str
) -> None:
    policy = TaylorSeer(interval=interval, num_warmup_steps=warmup, predictor=predictor)

    plan = policy.plan(make_profile(steps))

    full = [row[0] == COMPUTE for row in plan.rows]
    assert all(full[:warmup])
    computed = [k for k, done in enumerate(full) if done]
    assert all(b - a == interval for a, b in itertools.pairwise(computed) if a >= warmup - 1)
    assert plan.terms <= policy.terms
    for step, row in zip(plan.steps, plan.rows, strict=True):
        assert set(row) in ({COMPUTE}, {PREDICT})
        assert bool(step.weights) == (row[0] == PREDICT)
        if step.weights:
            assert sum(step.weights) == pytest.approx(1.0, abs=1e-6)


@given(steps=st.integers(4, 60), speedup=st.floats(1.0, 6.0))
@settings(max_examples=60, deadline=None)
def test_the_speedup_is_reached_by_the_smallest_interval_or_refused(steps: int, speedup: float) -> None:
    profile = make_profile(steps)
    if reuse_steps_needed(profile, speedup) > max(0, steps - 3):
        with pytest.raises(ConfigError, match="Ask for less"):
            TaylorSeer().plan(profile, speedup=speedup)
        return
    plan = TaylorSeer().plan(profile, speedup=speedup)
    assert plan.speedup >= speedup / (1 + SLACK * speedup / steps) - 1e-6
    if (interval := plan.policy_options["interval"]) > 1:
        assert TaylorSeer(interval=interval - 1).plan(profile).speedup < speedup + 1e-6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"interval": 0}, "interval must be >= 1"),
        ({"num_warmup_steps": 0}, "num_warmup_steps must be >= 1"),
        ({"num_warmup_steps": True}, "num_warmup_steps must be >= 1"),
        ({"predictor": "taylor:4"}, r"order must be a whole number in \[1, 3\], got 4"),
        ({"predictor": "hermite"}, "found 'hermite', expected one of"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TaylorSeer(**options)  # type: ignore[arg-type]


def test_it_is_known_by_its_name() -> None:
    assert resolve("taylorseer") == TaylorSeer()
