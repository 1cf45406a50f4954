"""OmniCache: schedules keep every rule at least cost; the correction is on only where it helps what was held back."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from omnifx.errors import ConfigError
from omnifx.plan import COMPUTE, REUSE, Action, Plan
from omnifx.policies.omnicache import OmniCache
from omnifx.policy import SLACK, resolve, reuse_steps_needed
from omnifx.profile import NUM_BANDS, NUM_HALVES, Profile
from tests.profiles import make_profile, path

SIZE = 32  # coefficients in each band and half of the made-up noise


def longest_run(actions: list[Action]) -> int:
    return max((len(list(group)) for action, group in itertools.groupby(actions) if action == REUSE), default=0)


def actions_of(plan: Plan) -> list[Action]:
    return [row[0] for row in plan.rows]


def gammas_of(plan: Plan) -> list[float | None]:
    return [step.correction.gamma if step.correction else None for step in plan.steps]


def noise(steps: int, *, ratio: float, seed: int = 0, runs: int = 1) -> Tensor:
    """Noises of one direction, each `ratio` times the one before; q_0 is zero."""
    direction = torch.randn(runs, 1, 1, NUM_HALVES, NUM_BANDS, SIZE, generator=Generator().manual_seed(seed))
    sizes = torch.tensor([0.0] + [ratio**k for k in range(1, steps)])
    return direction * sizes[:, None, None, None]


def white_noise(steps: int, *, seed: int, runs: int = 1) -> Tensor:
    q = torch.randn(runs, 1, steps, NUM_HALVES, NUM_BANDS, 64, generator=Generator().manual_seed(seed))
    q[:, :, 0] = 0
    return q


def alternating(q: Tensor, *, filter_axes: tuple[int, ...] = (-2, -1), **options: Any) -> tuple[Profile, Plan]:
    """The plan F F r F r F r ...: reuses have noise of lag 1, predicted from noise of lag 2 (at first 1)."""
    steps = q.shape[2]
    profile = make_profile(steps, q=q, runs=q.shape[0], filter_axes=filter_axes)
    policy = OmniCache(max_reuse_run=1, num_warmup_steps=2, num_final_steps=0, **options)
    return profile, policy.plan(profile, speedup=steps / (steps - (steps - 2 + 1) // 2))


@given(
    steps=st.integers(2, 40),
    share=st.floats(0.0, 1.0),
    warmup=st.integers(1, 4),
    final=st.integers(0, 4),
    max_run=st.integers(1, 2),
    phases=st.integers(1, 8),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_a_schedule_keeps_every_rule(
    steps: int, share: float, warmup: int, final: int, max_run: int, phases: int, seed: int
) -> None:
    policy = OmniCache(num_warmup_steps=warmup, num_final_steps=final, max_reuse_run=max_run, num_phases=phases)
    budget = round(share * policy.most_reuses(steps))
    bend = torch.rand(steps, generator=Generator().manual_seed(seed), dtype=torch.float64)

    actions = policy.schedule(bend, budget)

    assert len(actions) == steps
    assert actions.count(REUSE) == budget
    assert actions[:warmup] == [COMPUTE] * min(warmup, steps)
    assert longest_run(actions) <= max_run


@given(steps=st.integers(1, 60), max_run=st.integers(1, 2), warmup=st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_the_most_reuses_are_possible_and_one_more_is_not(steps: int, max_run: int, warmup: int) -> None:
    policy = OmniCache(max_reuse_run=max_run, num_warmup_steps=warmup)
    most = policy.most_reuses(steps)
    densest = [REUSE if k >= warmup and (k - warmup) % (max_run + 1) < max_run else COMPUTE for k in range(steps)]
    assert most == densest.count(REUSE)


@given(steps=st.integers(3, 10), budget=st.integers(0, 6), weight=st.sampled_from([1.0, 2.0]), seed=st.integers(0, 999))
@settings(max_examples=80, deadline=None)
def test_a_schedule_costs_as_little_as_the_best_of_all(steps: int, budget: int, weight: float, seed: int) -> None:
    policy = OmniCache(num_phases=1, num_warmup_steps=1, num_final_steps=0, second_reuse_weight=weight)
    budget = min(budget, policy.most_reuses(steps))
    bend = torch.rand(steps, generator=Generator().manual_seed(seed), dtype=torch.float64).tolist()

    def cost(actions: list[Action]) -> float:
        if actions[0] == REUSE or longest_run(actions) > 2 or actions.count(REUSE) != budget:
            return math.inf
        weights = [1.0 if actions[k - 1] == COMPUTE else weight for k in range(steps)]
        return sum(w * b for w, b, action in zip(weights, bend, actions, strict=True) if action == REUSE)

    found = policy.schedule(torch.tensor(bend, dtype=torch.float64), budget)

    every = itertools.product([COMPUTE, REUSE], repeat=steps)
    assert cost(found) == pytest.approx(min(cost(list(actions)) for actions in every))


def test_each_phase_takes_its_share_and_the_last_steps_are_spared() -> None:
    bend = torch.linspace(1.0, 0.0, 42, dtype=torch.float64)  # asks for reuse at the end
    free = OmniCache(num_phases=1, num_warmup_steps=1, num_final_steps=0).schedule(bend, 12)
    spread = OmniCache(num_phases=4, num_warmup_steps=1, num_final_steps=1).schedule(bend, 12)

    assert free[:18] == [COMPUTE] * 18
    assert [spread[1 + 10 * phase : 11 + 10 * phase].count(REUSE) for phase in range(4)] == [3, 3, 3, 3]
    assert spread[-1] == COMPUTE


def test_equal_bends_are_spread_evenly() -> None:
    actions = OmniCache(num_phases=1, num_warmup_steps=1, num_final_steps=0).schedule(torch.zeros(21), 10)
    assert actions == [COMPUTE, *[COMPUTE, REUSE] * 10] or actions == [*[COMPUTE, REUSE] * 10, COMPUTE]


def test_the_final_steps_reuse_only_what_the_budget_demands() -> None:
    policy = OmniCache(num_warmup_steps=1, num_final_steps=3)
    assert policy.schedule(torch.zeros(20), 8)[-3:] == [COMPUTE] * 3
    most = policy.most_reuses(20)
    assert policy.schedule(torch.zeros(20), most).count(REUSE) == most


@given(steps=st.integers(3, 50), speedup=st.floats(1.0, 3.5), branch_flops=st.sampled_from([(60, 40), (60, 30)]))
@settings(max_examples=60, deadline=None)
def test_the_speedup_is_reached_with_the_fewest_reuses_or_refused(
    steps: int, speedup: float, branch_flops: tuple[int, int]
) -> None:
    profile, policy = make_profile(steps, branch_flops=branch_flops), OmniCache()
    if policy.most_reuses(steps) < reuse_steps_needed(profile, speedup):
        with pytest.raises(ConfigError, match="Ask for less"):
            policy.plan(profile, speedup=speedup)
        return
    plan = policy.plan(profile, speedup=speedup)
    assert plan.speedup >= speedup / (1 + SLACK * speedup / len(plan.steps)) - 1e-6
    assert plan.num_reuse_steps == reuse_steps_needed(profile, speedup)


def test_the_error_names_a_speedup_that_then_works() -> None:
    profile = make_profile(30)
    with pytest.raises(
        ConfigError, match=r"omnicache: speedup must be in \[1, \d\.\d+\] here \(first \d+ step"
    ) as error:
        OmniCache().plan(profile, speedup=3.5)
    most = float(str(error.value).split("[1, ")[1].split("]")[0])
    plan = OmniCache().plan(profile, speedup=math.floor(most * 1000) / 1000)
    assert plan.num_reuse_steps == OmniCache().most_reuses(30)


def test_reuse_falls_where_the_path_is_straight() -> None:
    straight = torch.stack([torch.arange(20.0), torch.zeros(20), torch.zeros(20)], dim=1)
    angles = torch.linspace(0.2, 4.0, 20)
    turning = torch.tensor([19.0, 4.0, 0.0]) + 4 * torch.stack([angles.sin(), -angles.cos(), 0.1 * angles], dim=1)
    profile = make_profile(40, x=path(torch.cat([straight, turning])))

    plan = OmniCache(num_phases=1, num_warmup_steps=1, num_final_steps=0).plan(profile, speedup=1.25)

    assert actions_of(plan)[:18].count(REUSE) == plan.num_reuse_steps == 8


@pytest.mark.parametrize("ratio", [1.0, 0.9, 1.1])
def test_gamma_recovers_a_planted_ratio(ratio: float) -> None:
    _, plan = alternating(noise(13, ratio=ratio))

    # FFrFrF...: the first reuse follows a source one step old, the others one of two steps: q_k / (q_{k-1} + q_{k-2}).
    assert actions_of(plan)[:5] == [COMPUTE, COMPUTE, REUSE, COMPUTE, REUSE]
    expected = [ratio, *[ratio / (1 + 1 / ratio)] * 5]
    found = [gamma for gamma in gammas_of(plan) if gamma is not None]
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_second_reuse_scales_what_the_first_left() -> None:
    profile = make_profile(10, q=noise(10, ratio=1.0))
    policy = OmniCache(num_phases=1, num_warmup_steps=2, num_final_steps=0)

    plan = policy.plan(profile, speedup=10 / 4)

    assert plan.timeline().splitlines()[1] == "FFccFccFcc"
    assert [g for g in gammas_of(plan) if g is not None] == pytest.approx([1.0, 2.0, *[1 / 3, 2.0] * 2], rel=1e-4)


def test_gamma_is_clamped() -> None:
    _, plan = alternating(noise(12, ratio=1.1), max_gamma=0.5)
    assert max(g for g in gammas_of(plan) if g is not None) == 0.5
    _, opposed = alternating(noise(12, ratio=-1.0), correction="on")
    assert all(gamma is None or gamma > 0 for gamma in gammas_of(opposed))


def test_there_is_no_gamma_before_two_full_steps() -> None:
    policy = OmniCache(num_warmup_steps=1, num_final_steps=0, num_phases=1, max_reuse_run=1, correction="on")
    plan = policy.plan(make_profile(8, q=noise(8, ratio=1.0)), speedup=2.0)

    assert plan.timeline().splitlines()[1] == "FrFcFcFc"


@pytest.mark.parametrize("runs", [1, 2, 3, 6])
@pytest.mark.parametrize("seed", range(5))
def test_the_judge_turns_the_correction_off_on_noise_without_memory(runs: int, seed: int) -> None:
    _, plan = alternating(white_noise(20, seed=seed, runs=runs))
    assert not plan.reads_noise
    assert any("Correction left off" in note for note in plan.notes)


@pytest.mark.parametrize("runs", [1, 3])
def test_the_judge_turns_the_correction_on_for_noise_with_memory(runs: int) -> None:
    q = noise(20, ratio=1.0, runs=runs) + 0.2 * white_noise(20, seed=1, runs=runs)[..., :SIZE]

    _, plan = alternating(q)

    assert all(step.correction is not None for step, row in zip(plan.steps, plan.rows, strict=True) if REUSE in row)
    held_back = "1 of 3 runs" if runs == 3 else "one half of the frequencies"
    assert any(held_back in note for note in plan.notes)


def test_the_filter_is_taken_where_only_its_bands_have_memory() -> None:
    q = noise(24, ratio=1.0)
    memory = torch.zeros(24, NUM_BANDS)
    memory[:12, :2] = 1.0  # low frequencies early, high ones late
    memory[12:, 2:] = 1.0
    white = white_noise(24, seed=3)[..., :SIZE]
    q = torch.where(memory[None, None, :, None, :, None] > 0, q, white)

    _, plan = alternating(q)

    filters = {k: step.correction for k, step in enumerate(plan.steps) if step.correction}
    assert {c.cutoff for c in filters.values()} == {0.5}
    assert all(c.filter == ("low" if k < 12 else "high") for k, c in filters.items())
    assert any("low-pass before step 12 and high-pass from there on, cutoff 0.5" in note for note in plan.notes)


def test_without_a_grid_nothing_is_filtered() -> None:
    _, plan = alternating(noise(12, ratio=1.0), filter_axes=(), filter="on")
    assert {step.correction.filter for step in plan.steps if step.correction} == {"all"}
    assert any("no grid" in note for note in plan.notes)


def test_off_means_off() -> None:
    _, plan = alternating(noise(12, ratio=1.0), correction="off")
    assert not plan.reads_noise
    assert plan.notes == ("Noise correction is off, as asked.",)
    _, unfiltered = alternating(noise(12, ratio=1.0), filter="off")
    assert any("off, as asked" in note for note in unfiltered.notes)


def test_noise_free_branches_need_no_correction() -> None:
    _, plan = alternating(torch.zeros(1, 1, 12, NUM_HALVES, NUM_BANDS, 4), correction="on")
    assert not plan.reads_noise


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_tiny_generations_get_a_plan(steps: int) -> None:
    assert OmniCache().plan(make_profile(steps), speedup=1.0).num_reuse_steps == 0


def test_a_plan_survives_its_file_and_names_its_options(tmp_path: Any) -> None:
    plan = OmniCache().plan(make_profile(12, q=noise(12, ratio=1.0)))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert OmniCache(**plan.policy_options) == OmniCache() == resolve("omnicache")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_warmup_steps": 0}, "num_warmup_steps must be a whole number >= 1, got 0"),
        ({"num_warmup_steps": True}, "num_warmup_steps"),
        ({"num_final_steps": -1}, "num_final_steps must be a whole number >= 0"),
        ({"max_reuse_run": 3}, "max_reuse_run must be 1 or 2 .*never three in a row.* got 3"),
        ({"num_phases": 0}, "num_phases"),
        ({"second_reuse_weight": 0.5}, r"second_reuse_weight must be a number in \[1, 100\]"),
        ({"second_reuse_weight": math.inf}, "second_reuse_weight"),
        ({"curvature": "spline"}, r"curvature must be one of \['menger', 'fit'\]"),
        ({"curvature_window": 4}, "curvature_window must be odd"),
        ({"correction": True}, r"correction must be one of \['auto', 'off', 'on'\], got True"),
        ({"filter": "low"}, "filter must be one of"),
        ({"filter_cutoff": 0.3}, r"filter_cutoff must be one of \[0.25, 0.5, 0.75\] or None, got 0.3"),
        ({"filter_switch": 1.5}, r"filter_switch must be a number in \[0, 1\]"),
        ({"max_gamma": 5.0}, r"max_gamma must be a number in \[0, 4\]"),
        ({"min_gain": float("nan")}, "min_gain"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        OmniCache(**options)
