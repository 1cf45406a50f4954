"""SmoothCache: the measured errors, the longest lags below a bound, and what a whole generation then gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import omnifx
from omnifx.errors import ConfigError
from omnifx.plan import COMPUTE, REUSE
from omnifx.policies.smoothcache import NUM_LAGS, SmoothCache
from omnifx.policy import SLACK, resolve
from omnifx.session import find_session
from tests.policies.stacks import block_profile, plan_of
from tests.toys import EAGER, distance, generate, noise, toy

STEPS = 10
TEXT = 24
PARTS = ("attn", "cross", "mlp")
NAMES = tuple(f"blocks.{i}.{part}" for i in range(2) for part in PARTS)


class Hooked:
    """Eager modules that keep all their outputs, and give the last computed one where `reuses` says so."""

    def __init__(self, model: nn.Module, reuses: Callable[[int, str], bool]) -> None:
        self.model, self.reuses, self.step = model, reuses, -1
        self.outputs: dict[str, list[Tensor]] = {name: [] for name in NAMES}

    def __call__(self, *args: Any) -> Any:
        self.step += 1

        def hook(name: str) -> Callable[..., Any]:
            def run(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
                kept = self.outputs[name]
                kept.append(kept[-1] if self.reuses(self.step, name) else output)
                return kept[-1]

            return run

        handles = [self.model.get_submodule(name).register_forward_hook(hook(name)) for name in NAMES]
        try:
            return self.model(*args)
        finally:
            for handle in handles:
                handle.remove()


def reference_schedules(outputs: dict[str, list[Tensor]], alpha: float) -> dict[str, list[bool]]:
    """By part: whether each step reuses, from recorded outputs."""
    found = {}
    for part in PARTS:
        names = [name for name in NAMES if name.endswith(part)]
        reuses: list[bool] = []
        while len(reuses) < STEPS:
            at = len(reuses)
            best = 0
            for lag in (1, 2, 3):
                if at + lag >= STEPS:
                    break
                pairs = [(outputs[name][at + lag], outputs[name][at]) for name in names]
                error = sum(float((new - old).abs().sum() / new.abs().sum()) for new, old in pairs) / len(names)
                best = lag if error < alpha else best
            reuses += [False, *[True] * best]
        found[part] = reuses
    return found


@pytest.mark.parametrize("alpha", [0.35, 0.6])
def test_a_generation_is_the_eager_reference(alpha: float) -> None:
    model, text = toy(2, text=TEXT), noise(1, 5, TEXT, seed=7)
    recorded = Hooked(model, lambda step, name: False)
    generate(recorded, seed=0, steps=STEPS, text=text)
    schedules = reference_schedules(recorded.outputs, alpha)
    fast = torch.compile(model, backend="omnicache", options={**EAGER, "policy": SmoothCache(alpha=alpha)})
    with omnifx.generation(fast):
        generate(fast, seed=0, steps=STEPS, text=text)
    reference = Hooked(model, lambda step, name: schedules[name.rpartition(".")[2]][step])

    with omnifx.generation(fast):
        image = generate(fast, seed=1, steps=STEPS, text=text)

    plan = plan_of(fast)
    for column, name in enumerate(plan.branches):
        assert [row[column] == REUSE for row in plan.rows] == schedules[name.rpartition(".")[2]]
    assert any(any(reuses) for reuses in schedules.values())
    assert distance(image, generate(reference, seed=1, steps=STEPS, text=text)) < 1e-5
    assert omnifx.stats(fast).generations[-1].reasons == {}


def test_older_caches_are_kept_while_it_is_measured_and_counted() -> None:
    model = toy(2)
    fast = torch.compile(model, backend="omnicache", options={**EAGER, "policy": "smoothcache"})
    with omnifx.generation(fast):
        generate(fast, seed=0, steps=STEPS)

    (runner,) = find_session(fast).runners
    assert omnifx.stats(fast).peak_cache_bytes == (1 + NUM_LAGS) * runner.program.cache_bytes


def test_without_room_for_older_caches_there_is_no_plan_and_it_says_so() -> None:
    model = toy(2)
    small = find_cache_bytes(model)
    fast = torch.compile(
        model, backend="omnicache", options={**EAGER, "policy": "smoothcache", "cache_budget": 2 * small}
    )
    with pytest.warns(omnifx.OmnifxWarning, match="cache_budget had no room for the older caches"):
        marked(fast, 0)
    marked(fast, 1)
    assert {s.variant for log in omnifx.stats(fast).generations for s in log.steps} == {"full+write"}


def marked(fast: Any, seed: int) -> None:
    with omnifx.generation(fast):
        generate(fast, seed=seed, steps=STEPS)


def find_cache_bytes(model: nn.Module) -> int:
    fast = torch.compile(model, backend="omnicache", options={**EAGER, "policy": "fora"})
    generate(fast, seed=0, steps=4)
    (runner,) = find_session(fast).runners
    return runner.program.cache_bytes


def profile_of(errors: Tensor) -> Any:
    """A profile whose 2 blocks' branches have these errors, [S, lags, 2 kinds]."""
    table = torch.cat([errors.repeat(1, 1, 2), torch.ones(len(errors), 1, 4)], dim=1)
    names = tuple(f"blocks.{i}.{part}" for i in range(2) for part in ("attn", "mlp"))
    return block_profile(len(errors), 2, changes=table, measured=names)


@given(steps=st.integers(1, 50), alpha=st.floats(0, 1), seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_runs_are_at_most_three_long_and_below_the_bound(steps: int, alpha: float, seed: int) -> None:
    errors = torch.rand(steps, NUM_LAGS, 2, generator=torch.Generator().manual_seed(seed))

    plan = SmoothCache(alpha=alpha).plan(profile_of(errors))

    for column in range(4):
        actions = [row[column] for row in plan.rows]
        assert actions[0] == COMPUTE
        full = [k for k, action in enumerate(actions) if action == COMPUTE]
        for a, b in zip(full, [*full[1:], steps], strict=True):
            assert b - a <= NUM_LAGS + 1
            assert b - a == 1 or errors[b - 1, b - a - 2, column % 2] < alpha
            longer = [lag for lag in range(b - a, NUM_LAGS + 1) if a + lag < steps]
            assert all(errors[a + lag, lag - 1, column % 2] >= alpha for lag in longer)


@given(steps=st.integers(2, 40), speedup=st.floats(1.0, 5.0), seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_a_speedup_is_reached_or_refused(steps: int, speedup: float, seed: int) -> None:
    errors = 0.01 + torch.rand(steps, NUM_LAGS, 2, generator=torch.Generator().manual_seed(seed))
    profile = profile_of(errors)
    strongest = SmoothCache(alpha=1e9).plan(profile).speedup
    if speedup > strongest * (1 + SLACK * speedup / steps):
        with pytest.raises(ConfigError, match=r"smoothcache: speedup must be in \[1, .*at most 3 reuses in a row"):
            SmoothCache().plan(profile, speedup=speedup)
        return
    assert SmoothCache().plan(profile, speedup=speedup).speedup >= speedup / (1 + SLACK * speedup / steps) - 1e-6


@pytest.mark.parametrize("alpha", [-1.0, float("nan")])
def test_bounds_out_of_range_are_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match="alpha must be a number >= 0"):
        SmoothCache(alpha=alpha)


def test_it_is_known_by_its_name() -> None:
    assert resolve("smoothcache") == SmoothCache()
