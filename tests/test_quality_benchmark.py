import json

import pytest
import torch

from benchmarks.quality import CASES, Evenly, Extrapolated, calibrate, evenly_spread, main, same_reuses_as
from omnifx.errors import ConfigError
from omnifx.plan import COMPUTE, REUSE, Plan
from omnifx.policies.fora import Fora
from tests.profiles import make_profile


def plan_with(profile, num_full):
    return Plan.uniform(profile, [COMPUTE] * num_full + [REUSE] * (profile.num_steps - num_full), policy="any")


@pytest.mark.parametrize(("num_steps", "num_full"), [(50, 25), (50, 24), (20, 7), (20, 20), (10, 1)])
def test_full_steps_are_spread_evenly_from_step_0_on(num_steps, num_full):
    chosen = sorted(evenly_spread(num_steps, num_full))

    gaps = {b - a for a, b in zip(chosen, [*chosen[1:], num_steps], strict=True)}
    assert chosen[0] == 0
    assert len(chosen) == num_full
    assert max(gaps) - min(gaps) <= 1


def test_the_even_policy_runs_as_many_full_steps_as_it_is_told():
    plan = Evenly(num_full_steps=4).plan(make_profile(10))

    assert plan.timeline().splitlines()[1] == "FrrFrFrrFr"
    assert plan.policy_options == {"num_full_steps": 4}


def test_the_even_policy_takes_its_count_from_the_speedup():
    plan = Evenly().plan(make_profile(10), speedup=2.5)

    assert plan.speedup == pytest.approx(2.5)
    assert not plan.reads_noise


@pytest.mark.parametrize("num_full", [0, -1])
def test_the_even_policy_refuses_to_compute_nothing(num_full):
    with pytest.raises(ConfigError, match=rf"num_full_steps must be >= 1 .*, got {num_full}"):
        Evenly(num_full_steps=num_full)


def test_the_even_policy_refuses_more_than_the_steps_allow():
    with pytest.raises(ConfigError, match=r"num_full_steps must be at most 10 .*, got 11"):
        Evenly(num_full_steps=11).plan(make_profile(10))
    with pytest.raises(ConfigError, match=r"evenly: speedup must be in \[1, 10.000\] here \(one full step in 10\)"):
        Evenly().plan(make_profile(10), speedup=11.0)


@pytest.mark.parametrize(
    ("num_full", "label", "policy"),
    [
        (10, "FORA, interval 2", Fora(interval=2)),
        (7, "FORA, interval 3", Fora(interval=3)),
        (8, "FORA, spread evenly", Evenly(num_full_steps=8)),
    ],
)
def test_fora_gets_the_same_number_of_reuse_steps(num_full, label, policy):
    profile = make_profile(20)
    wanted = plan_with(profile, num_full)

    found = same_reuses_as(wanted, profile)

    assert found == (label, policy)
    assert found[1].plan(profile).num_reuse_steps == wanted.num_reuse_steps


def test_an_output_linear_in_time_is_extrapolated_exactly():
    asked = []

    def model(*, timestep, hidden_states):
        asked.append(float(timestep[0]))
        return (hidden_states * 0 + 3 * timestep.float()[:, None, None, None] + 1,)

    skipping = Extrapolated(model, num_steps=6, num_full=3)
    times = [900.0, 800.0, 700.0, 600.0, 500.0, 400.0]
    for _ in range(2):  # a second generation starts from nothing
        outputs = [skipping(timestep=torch.full((2,), t), hidden_states=torch.ones(2, 1, 8, 8))[0] for t in times]

    assert asked == [900.0, 700.0, 500.0] * 2
    assert outputs[1].unique().tolist() == [2701.0]  # one output yet: repeated
    assert [float(o[0, 0, 0, 0]) for o in outputs[2:]] == [2101.0, 1801.0, 1501.0, 1201.0]


def test_seeds_that_are_reported_cannot_be_calibrated_on():
    with pytest.raises(ValueError, match=r"seeds \[1000003\] would be both calibrated on and reported"):
        calibrate(CASES["dit"], steps=10, lowering="eager", taken=[0, 1_000_003])


@pytest.mark.slow
def test_the_smoke_run_measures_every_row(tmp_path):
    num_threads = torch.get_num_threads()
    try:
        figures = main(["--smoke", "--out", str(tmp_path / "quality.json")])
    finally:
        torch.set_num_threads(num_threads)

    written = json.loads((tmp_path / "quality.json").read_text())
    rows = {row["method"]: row for row in figures[0]["rows"]}
    assert written["figures"] == figures
    assert {"command", "date", "torch", "omnifx"} <= set(written["environment"])
    assert len(rows) == 9
    assert all(row["time ratio"] is None for row in rows.values())  # the one batch compiled
    assert rows["uncached"]["SSIM"] == pytest.approx(1.0)
    assert rows["OmniCache as shipped"]["FLOPs ratio"] > 1.9
    assert rows["OmniCache as shipped"]["PSNR dB"] > rows["fewer steps, same solver"]["PSNR dB"]
    assert "Held back: 1 of 3 runs" in figures[0]["calibration"]["decisions"][0]["notes"][0]
