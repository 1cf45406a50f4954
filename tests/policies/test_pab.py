"""PAB: which (step, branch) it reuses, by the release's formula, and what a whole generation then gives."""

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
from omnifx.plan import COMPUTE, REUSE, Plan
from omnifx.policies.pab import Pab, block_number, noise_levels
from omnifx.policy import SLACK, resolve
from omnifx.profile import BranchMeta, Profile
from omnifx.session import find_session
from tests.profiles import make_profile
from tests.toys import EAGER, distance, generate, noise, timesteps, toy

STEPS = 14
TEXT = 24
KINDS = ("self_attention", "cross_attention", "mlp")
NAMES = tuple(f"blocks.{i}.{part}" for i in range(2) for part in ("attn", "cross", "mlp"))


def with_branches(profile: Profile, kinds: dict[str, str], times: list[float] | None = None) -> Profile:
    """The profile of a model with branches of these names and kinds, of 10 FLOPs each."""
    branches = tuple(BranchMeta(name=n, kind=k, flops=10, cache_bytes=8) for n, k in kinds.items())
    changes: dict[str, Any] = {"branches": branches, "flops": 10 * len(branches)}
    if times is not None:
        changes["timesteps"] = tuple(times)
    return Profile(meta=profile.meta.model_copy(update=changes), grams=profile.grams, moves=profile.moves)


def toy_profile(steps: int) -> Profile:
    kinds = {name: KINDS[i % 3] for i, name in enumerate(NAMES)}
    return with_branches(make_profile(steps), kinds, timesteps(steps))


class Broadcasting:
    """The release's rules on eager modules: counts, windows, kept outputs; `reused` lists what was taken from them."""

    def __init__(self, model: nn.Module, policy: Pab, times: list[float]) -> None:
        self.model, self.policy, self.times = model, policy, times
        self.kept: dict[str, Tensor] = {}
        self.reused: list[tuple[int, str]] = []
        self.step = -1

    def broadcasts(self, name: str, t: float) -> bool:
        low, high = self.policy.window
        if name.endswith("mlp"):
            for start in self.policy.mlp_times:
                first = self.times.index(start)
                if first < self.step <= first + self.policy.mlp_skip and int(name[7]) in self.policy.mlp_blocks:
                    return True
            return False
        width = self.policy.cross_range if name.endswith("cross") else self.policy.spatial_range
        return self.step % width != 0 and low < t < high

    def __call__(self, x: Tensor, t: Tensor, *rest: Any) -> Any:
        self.step += 1

        def hook(name: str) -> Callable[..., Any]:
            def run(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                if self.broadcasts(name, float(t[0])):
                    self.reused.append((self.step, name))
                    return self.kept[name]
                self.kept[name] = output
                return output

            return run

        handles = [self.model.get_submodule(name).register_forward_hook(hook(name)) for name in NAMES]
        try:
            return self.model(x, t, *rest)
        finally:
            for handle in handles:
                handle.remove()


@pytest.mark.parametrize(
    "policy",
    [
        Pab(),
        Pab(spatial_range=3, cross_range=4, window=(300.0, 950.0), mlp_times=(timesteps(STEPS)[4],), mlp_blocks=(1,)),
    ],
    ids=["defaults", "with MLPs"],
)
def test_a_generation_is_the_eager_reference_of_the_release(policy: Pab) -> None:
    model, text = toy(2, text=TEXT), noise(1, 5, TEXT, seed=7)
    fast = torch.compile(model, backend="omnicache", options={**EAGER, "policy": policy})
    generate(fast, seed=0, steps=STEPS, text=text)
    reference = Broadcasting(model, policy, timesteps(STEPS))

    image = generate(fast, seed=1, steps=STEPS, text=text)

    assert distance(image, generate(reference, seed=1, steps=STEPS, text=text)) < 1e-5
    plan = plan_of(fast)
    planned = [
        (step, name)
        for step, row in enumerate(plan.rows)
        for name, action in zip(plan.branches, row, strict=True)
        if action == REUSE
    ]
    assert sorted(planned) == sorted(reference.reused) != []
    log = omnifx.stats(fast).generations[-1]
    assert log.reasons == {}
    assert [s.variant.startswith("full") for s in log.steps] == [REUSE not in row for row in plan.rows]


def plan_of(fast: Any) -> Plan:
    (conductor,) = find_session(fast).conductors
    return conductor.entries[0].plan


def test_only_the_cuts_of_reused_branches_are_made_and_kept() -> None:
    model, text = toy(2, text=TEXT), noise(1, 5, TEXT, seed=7)
    fast = torch.compile(model, backend="omnicache", options={**EAGER, "policy": "pab"})
    with omnifx.generation(fast):
        generate(fast, seed=0, steps=STEPS, text=text)
    with omnifx.generation(fast):
        generate(fast, seed=1, steps=STEPS, text=text)

    (runner,) = find_session(fast).runners
    program = runner.program
    kept = tuple(name for name in sorted(NAMES) if not name.endswith("mlp"))
    writing = [spec for spec in program.variants if set(spec.writes) == set(kept)]
    assert [spec.row.count(REUSE) for spec in writing] == [0]
    assert not any(w.endswith("mlp") for s in program.variants if s != program.full(measures=False) for w in s.writes)
    first, second = omnifx.stats(fast).generations
    assert first.peak_cache_bytes >= program.cache_bytes
    assert second.peak_cache_bytes == program.cache_bytes_at(program.hinted_sizes, kept) == program.cache_bytes * 2 // 3


@given(
    steps=st.integers(1, 60),
    ranges=st.tuples(*[st.integers(1, 9)] * 3),
    window=st.tuples(st.floats(0, 1000), st.floats(0, 1000)).filter(lambda w: w[0] < w[1]),
)
@settings(max_examples=60, deadline=None)
def test_gaps_are_kept(steps: int, ranges: tuple[int, int, int], window: tuple[float, float]) -> None:
    spatial, temporal, cross = ranges
    kinds = {
        "blocks.0.attn": "self_attention",
        "temporal.0.attn": "self_attention",
        "blocks.0.cross": "cross_attention",
    }
    kinds |= {"blocks.0.mlp": "mlp", "single.0": "parallel"}
    profile = with_branches(make_profile(steps), kinds, timesteps(steps))

    plan = Pab(spatial_range=spatial, temporal_range=temporal, cross_range=cross, window=window).plan(profile)

    for column, longest in enumerate((spatial, temporal, cross, 1, 1)):
        computed = [k for k, row in enumerate(plan.rows) if row[column] == COMPUTE]
        assert computed[0] == 0
        assert all(b - a <= longest for a, b in zip(computed, [*computed[1:], steps], strict=True))
        reused = set(range(steps)) - set(computed)
        assert all(window[0] < profile.meta.timesteps[k] < window[1] for k in reused)


@given(steps=st.integers(2, 60), speedup=st.floats(1.0, 4.0))
@settings(max_examples=60, deadline=None)
def test_the_smallest_ranges_that_reach_a_speedup_are_taken_or_it_is_refused(steps: int, speedup: float) -> None:
    profile = toy_profile(steps)
    strongest = Pab(spatial_range=steps, temporal_range=steps, cross_range=steps).plan(profile).speedup
    if speedup > strongest * (1 + SLACK * speedup / steps):
        with pytest.raises(ConfigError, match=r"pab: speedup must be in \[1, .*attentions alone, timesteps 100 to 850"):
            Pab().plan(profile, speedup=speedup)
        return
    plan = Pab().plan(profile, speedup=speedup)
    assert plan.speedup >= speedup / (1 + SLACK * speedup / steps) - 1e-6
    assert plan.policy_options["cross_range"] == 3 * plan.policy_options["spatial_range"]
    factor = plan.policy_options["spatial_range"] // 2
    if factor > 1:
        milder = Pab(spatial_range=2 * factor - 2, temporal_range=4 * factor - 4, cross_range=6 * factor - 6)
        assert milder.plan(profile).speedup < speedup


def test_timesteps_of_any_unit_and_direction_are_noise_levels() -> None:
    assert noise_levels([1.0, 0.5, 0.25]) == [1000.0, 500.0, 250.0]
    assert noise_levels([999.0, 500.0]) == [999.0, 500.0]
    assert noise_levels([0.0, 0.25, 1.0]) == [1000.0, 750.0, 0.0]
    assert noise_levels([2000.0, 1000.0]) == [1000.0, 500.0]


def test_blocks_are_numbered_by_the_first_number_alone() -> None:
    assert [*map(block_number, ("graph12.blocks.3.mlp.net.2", "attn1", "7"))] == [3, None, 7]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"spatial_range": 0}, "spatial_range must be a whole number >= 1"),
        ({"mlp_skip": True}, "mlp_skip"),
        ({"window": (800.0, 100.0)}, "window must be two rising timesteps"),
        ({"mlp_times": (1200.0,)}, "mlp_times must be timesteps"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Pab(**options)


def test_it_is_known_by_its_name_and_its_options_come_back() -> None:
    assert resolve("pab") == Pab()
    plan = toy_profile(10)
    options = Plan.model_validate_json(Pab().plan(plan).model_dump_json()).policy_options
    assert Pab(**{**options, "window": tuple(options["window"])}).plan(plan).variants == Pab().plan(plan).variants
