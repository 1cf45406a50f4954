"""LeMiCa: edges from inner products, the lexicographically minimax path, and what a whole generation then gives."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import omnifx
from omnifx.errors import ConfigError
from omnifx.plan import COMPUTE, REUSE
from omnifx.policies.lemica import LeMiCa, cheapest_path, edge_costs
from omnifx.policy import SLACK, resolve
from omnifx.profile import NUM_BANDS, NUM_HALVES
from tests.policies.stacks import plan_of
from tests.profiles import make_profile
from tests.toys import EAGER, Reference, distance, generate, letters_of, toy

STEPS = 8


def brute_force(costs: dict[tuple[int, int], float], steps: int, count: int, first: int) -> list[float]:
    """The sorted edge costs of the best path, from all of them."""
    best: list[float] = [float("inf")]
    for rest in itertools.combinations(range(first, steps), count - first):
        full = [*range(first), *rest]
        edges = list(zip(full, [*full[1:], steps], strict=True))
        if all(edge in costs for edge in edges):
            best = min(best, sorted((costs[edge] for edge in edges), reverse=True))
    return best


@given(data=st.data(), steps=st.integers(2, 9), max_run=st.integers(1, 4), first=st.integers(1, 3))
@settings(max_examples=80, deadline=None)
def test_the_path_is_the_best_of_all(data: Any, steps: int, max_run: int, first: int) -> None:
    first = min(first, steps)
    fewest = first + (steps - first) // (max_run + 1)
    count = data.draw(st.integers(max(fewest, first), steps))
    costs = {
        (a, b): 0.0 if b == a + 1 else float(data.draw(st.integers(1, 6)))
        for a in range(steps)
        for b in range(a + 1, min(a + max_run + 1, steps) + 1)
    }

    full = cheapest_path(costs, steps, count, first)

    assert full[:first] == list(range(first))
    assert len(full) == count == len(set(full))
    found = sorted((costs[edge] for edge in zip(full, [*full[1:], steps], strict=True)), reverse=True)
    assert found == brute_force(costs, steps, count, first)


def test_edges_cost_what_their_noise_adds_to_the_sample() -> None:
    """An Euler sampler x_{k+1} = x_k - 0.1 o_k: reuse adds 0.1 times the noise, which adds up over older caches."""
    steps, size = 6, 16
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(3, steps, size, generator=generator, dtype=torch.float64)
    outputs, noise = vectors[0], vectors[1]
    latents = [vectors[2, 0]]
    for k in range(steps - 1):
        latents.append(latents[-1] - 0.1 * outputs[k])
    profile = make_profile(steps)
    stacked = torch.cat([torch.stack(latents), outputs, noise])
    grams = torch.zeros(1, 1, NUM_HALVES, NUM_BANDS, 3 * steps, 3 * steps)
    grams[0, 0, 0, 0] = (stacked @ stacked.T).float()
    profile = omnifx.Profile(meta=profile.meta, grams=grams, moves=profile.moves)

    costs = edge_costs(profile, 3)

    assert costs[2, 3] == 0.0
    one = 0.1 * noise[3]
    two = 0.1 * (noise[3] + noise[4])
    scale = latents[-1].norm()
    assert costs[2, 4] == pytest.approx(float(one.norm() / scale), rel=1e-3)
    assert costs[2, 5] == pytest.approx(float((one + two).norm() / scale), rel=1e-3)
    assert (2, 6) in costs
    assert (1, 6) not in costs


@given(steps=st.integers(1, 24), max_run=st.integers(1, 5), warmup=st.integers(1, 4), speedup=st.floats(1.0, 4.0))
@settings(max_examples=40, deadline=None)
def test_the_budget_is_kept_exactly_and_runs_stay_short_or_it_is_refused(
    steps: int, max_run: int, warmup: int, speedup: float
) -> None:
    policy = LeMiCa(max_reuse_run=max_run, num_warmup_steps=warmup)
    profile = make_profile(steps)
    try:
        plan = policy.plan(profile, speedup=speedup)
    except ConfigError:
        first = min(warmup, steps)
        densest = first + (steps - first) // (max_run + 1)
        assert steps / densest < speedup
        return
    actions = [row[0] for row in plan.rows]
    assert set(actions[:warmup]) == {COMPUTE}
    assert max(map(len, "".join("r" if a == REUSE else "F" for a in actions).split("F"))) <= max_run
    assert actions.count(COMPUTE) == plan.policy_options["budget"]
    assert plan.speedup >= speedup / (1 + SLACK * speedup / steps) - 1e-6


def test_a_long_generation_is_planned_in_seconds() -> None:
    plan = LeMiCa(budget=60).plan(make_profile(150))
    assert plan.num_reuse_steps == 90


def test_a_generation_is_the_eager_reference() -> None:
    model = toy(2)
    fast = torch.compile(model, backend="omnicache", options={**EAGER, "policy": LeMiCa(budget=4)})
    with omnifx.generation(fast):
        generate(fast, seed=0, steps=STEPS)

    with omnifx.generation(fast):
        image = generate(fast, seed=1, steps=STEPS)

    letters = letters_of(omnifx.stats(fast).generations[-1])
    assert letters == "".join("r" if REUSE in row else "F" for row in plan_of(fast).rows)
    assert letters.count("F") == 4
    assert distance(image, generate(Reference(model, letters), seed=1, steps=STEPS)) < 1e-5


@pytest.mark.parametrize("options", [{"budget": 0}, {"max_reuse_run": 0}, {"num_warmup_steps": True}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))} must be a whole number >= 1"):
        LeMiCa(**options)


def test_a_budget_below_what_the_runs_allow_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lemica: budget must be >= 4 here \(10 steps, at most 2 reuses in a row\)"):
        LeMiCa(budget=3, max_reuse_run=2).plan(make_profile(10))


def test_it_is_known_by_its_name() -> None:
    assert resolve("lemica") == LeMiCa()
