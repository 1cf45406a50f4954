"""Profiles at other timesteps: paths whose samplers are known come out as if they had been measured there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import omnifx
from omnifx.errors import ConfigError, PlanError
from omnifx.path import Path
from omnifx.plan import Plan
from omnifx.profile import NUM_HALVES, Profile
from omnifx.transfer import resampled, timesteps_like
from tests.profiles import FLOW, walked
from tests.toys import EAGER, distance, generate, timesteps, toy


def path_of(profile: Profile) -> Path:
    assert profile.path is not None
    return Path.of(profile.path.sum((0, 1)), profile.meta.timesteps)


@pytest.mark.parametrize("ddim", [False, True])
@pytest.mark.parametrize(("before", "after"), [(50, 20), (20, 50), (50, 12)])
def test_a_walk_at_other_times_has_their_solver_and_their_inner_products(before: int, after: int, ddim: bool) -> None:
    measured = walked(after, ddim=ddim)

    moved = resampled(walked(before, ddim=ddim), steps=after)

    assert moved.meta.timesteps == pytest.approx(measured.meta.timesteps)
    found, true = path_of(moved), path_of(measured)
    np.testing.assert_allclose(found.a, true.a, rtol=1e-3)
    np.testing.assert_allclose(found.b[:-1], true.b[:-1], rtol=2e-2)
    assert found.residual.max() < 1e-3
    size = 3 * after
    assert moved.path is not None
    assert measured.path is not None
    assert moved.path.shape == (1, NUM_HALVES, size, size)
    assert distance(moved.path[0, :, : 2 * after, : 2 * after], measured.path[0, :, : 2 * after, : 2 * after]) < 0.01
    assert float(torch.linalg.eigvalsh(moved.path[0, 0])[0]) > -1e-8 * float(moved.path.abs().max())


def test_the_noise_of_longer_steps_is_the_sum_of_shorter_ones() -> None:
    profile = walked(50)

    moved = resampled(profile, timesteps=profile.meta.timesteps[::2])

    assert profile.path is not None
    assert moved.path is not None
    fine, coarse = profile.path[0, 0, 100:, 100:], moved.path[0, 0, 50:, 50:]
    assert float(coarse[5, 5]) == pytest.approx(float(fine[9:11, 9:11].sum()), rel=1e-6)
    assert float(coarse[0, 0]) == pytest.approx(0.0, abs=1e-12)


def test_outputs_between_recorded_times_are_known_the_less_the_rougher_they_are() -> None:
    def energy(roughness: float) -> Tensor:
        profile = walked(12)
        assert profile.path is not None
        path = profile.path.clone()
        outputs = slice(12, 24)
        path[..., outputs, outputs] += roughness * torch.eye(12)
        found = resampled(replace(profile, path=path), steps=20).path
        assert found is not None
        return found[0].sum(0)[20:40, 20:40]

    def missed(gram: Tensor) -> float:
        """How far the tenth output is from the middle of its neighbours, squared."""
        off = torch.zeros(20, dtype=torch.float64)
        off[9:12] = torch.tensor([0.5, -1.0, 0.5])
        return float(off @ gram @ off)

    assert missed(energy(1.0)) > 0.05
    assert missed(energy(0.0)) < 0.01


def test_a_solver_that_is_not_affine_is_interpolated() -> None:
    profile = walked(50)
    assert profile.path is not None
    path = profile.path.clone()
    path[..., :50, :50] += 5.0 * torch.eye(50)  # fresh noise in every step

    moved = resampled(replace(profile, path=path), steps=20)

    assert moved.path is not None
    np.testing.assert_allclose(moved.path[..., :20, :20].diagonal(dim1=-2, dim2=-1)[..., 0], path[..., 0, 0], rtol=1e-6)
    assert np.median(path_of(moved).residual) > 0.1


def test_what_cannot_be_interpolated_is_left_out_and_told() -> None:
    profile = walked(50)

    moved = resampled(resampled(profile, steps=20), steps=12)

    assert (moved.changes, moved.prior, moved.meta.quality, moved.meta.measured) == (None, None, (), ())
    assert (moved.meta.resampled_from, moved.num_steps) == (50, 12)
    assert moved.moves.shape == (1, 12)
    plan = omnifx.make_plan(profile, speedup=2.0, steps=20)
    assert plan.transferred_from == 50
    assert len(plan.steps) == 20
    assert any("Transferred from 50 steps to 20" in note for note in plan.notes)
    assert omnifx.make_plan(profile, speedup=2.0, steps=50).transferred_from == 0


def test_latents_move_further_in_longer_steps() -> None:
    profile = walked(50)
    profile = replace(profile, moves=torch.full((1, 50), 0.02).index_fill(1, torch.tensor(0), 0.0))

    moved = resampled(profile, steps=20)

    torch.testing.assert_close(moved.moves[0, 1:], torch.full((19,), 0.05))
    assert float(moved.moves[0, 0]) == 0.0


LEADING = tuple(981.0 - 20 * k for k in range(50))
TRAILING = tuple(999.0 - 20 * k for k in range(50))
SHIFTED = tuple(1000 * 3 * s / (1 + 2 * s) for s in np.linspace(1, 1 / 50, 50))


@pytest.mark.parametrize(
    ("measured", "steps", "expected"),
    [
        (LEADING, 20, (951.0, 901.0, 1.0)),
        (TRAILING, 20, (999.0, 949.0, 49.0)),
        (FLOW[50], 20, (1000.0, 950.0, 50.0)),
        (tuple(t / 1000 for t in FLOW[50]), 20, (1.0, 0.95, 0.05)),
        (SHIFTED, 20, (1000.0, 1000 * 3 * 0.95 / 2.9, 1000 * 3 * 0.05 / 1.1)),
        (tuple(np.linspace(1000, 1, 50)), 25, (1000.0, 958.375, 1.0)),
        (tuple(np.round(np.linspace(0, 999, 50))[::-1]), 28, (999.0, 962.0, 0.0)),
    ],
    ids=["leading", "trailing", "flow", "flow to 1", "shifted", "flow to 1/1000", "linspace"],
)
def test_the_rule_of_timesteps_is_found(
    measured: tuple[float, ...], steps: int, expected: tuple[float, float, float]
) -> None:
    found = timesteps_like(measured, steps)

    assert len(found) == steps
    assert (found[0], found[1], found[-1]) == pytest.approx(expected, rel=1e-5)
    assert timesteps_like(measured, len(measured)) == pytest.approx(measured, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "give either timesteps, or their number"),
        ({"steps": 20, "timesteps": (3.0, 2.0, 1.0, 0.0)}, "give either timesteps, or their number"),
        ({"steps": 3}, "steps must be a whole number >= 4, got 3"),
        ({"timesteps": (3.0, 2.0)}, "must be at least 4 finite numbers"),
        ({"timesteps": (1.0, 2.0, 3.0, 4.0)}, "timesteps must fall throughout"),
        ({"timesteps": (4.0, 3.0, 3.0, 2.0)}, "timesteps must fall throughout"),
    ],
)
def test_times_that_make_no_sense_are_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        resampled(walked(20), **arguments)


def test_timesteps_without_a_rule_must_be_given() -> None:
    with pytest.raises(ConfigError, match=r"follow no rule that is known.*set_timesteps\(20\)"):
        timesteps_like([900.0, 500.0, 200.0, 100.0, 7.0], 20)
    twice = walked(20)
    twice = replace(twice, meta=twice.meta.model_copy(update={"timesteps": (*FLOW[20][:-1], FLOW[20][-2])}))
    with pytest.raises(ConfigError, match="the profile's timesteps must fall throughout"):
        resampled(twice, timesteps=FLOW[12])


# -- generations -------------------------------------------------------------------------------------------------------


def measured_toy(steps: int) -> tuple[Any, Profile]:
    model = toy()

    def run(compiled: Any, seed: int) -> Tensor:
        return generate(compiled, seed=seed, steps=steps)

    return model, omnifx.calibrate(model, run, options=EAGER, progress=False)


def test_a_first_generation_follows_a_transferred_plan(tmp_path: FilePath) -> None:
    model, profile = measured_toy(16)
    plan = omnifx.make_plan(profile, speedup=2.0, timesteps=timesteps(10))
    plan.save(tmp_path / "plan.json")
    options = {**EAGER, "profile": profile, "plan": tmp_path / "plan.json", "profile_cache": False}
    fast = torch.compile(model, backend="omnicache", options=options)

    image = generate(fast, seed=3, steps=10)

    (log,) = omnifx.stats(fast).generations
    assert not log.reasons
    assert log.speedup == pytest.approx(2.0)
    assert distance(image, generate(model, seed=3, steps=10)) < 0.05


def test_a_plan_that_was_not_transferred_needs_its_own_profile() -> None:
    model, profile = measured_toy(16)
    plan: Plan = omnifx.make_plan(resampled(profile, timesteps=timesteps(10)), speedup=2.0)
    options = {**EAGER, "profile": profile, "profile_cache": False}
    own = plan.model_copy(update={"transferred_from": 0})
    fast = torch.compile(model, backend="omnicache", options={**options, "plan": own})
    with pytest.raises(Exception, match="the plan was not made from this profile") as caught:
        generate(fast, seed=3, steps=10)
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), PlanError)


def test_with_transfer_a_marked_generation_of_other_steps_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omnifx.transfer.timesteps_like", lambda known, steps: tuple(timesteps(steps)))
    model, profile = measured_toy(16)
    options = {**EAGER, "policy": "auto", "profile": profile, "profile_cache": False, "speedup": 2.0}
    fast = torch.compile(model, backend="omnicache", options={**options, "transfer": True})

    with omnifx.generation(fast, steps=10):
        generate(fast, seed=3, steps=10)
    generate(fast, seed=3, steps=16)

    logs = omnifx.stats(fast).generations
    assert [log.reasons for log in logs] == [{}, {}]
    assert [len(log.steps) for log in logs] == [10, 16]
    assert [round(log.speedup, 2) for log in logs] == [2.0, 2.0]


def test_steps_that_cannot_be_transferred_are_measured_and_told() -> None:
    model, profile = measured_toy(16)
    odd = profile.meta.model_copy(update={"timesteps": tuple(t + 3.3 * (k % 2) for k, t in enumerate(FLOW[20][:16]))})
    options = {**EAGER, "profile": replace(profile, meta=odd), "profile_cache": False, "transfer": True}
    fast = torch.compile(model, backend="omnicache", options=options)

    with (
        pytest.warns(omnifx.OmnifxWarning, match="no plan could be interpolated for 10 steps"),
        omnifx.generation(fast, steps=10),
    ):
        generate(fast, seed=3, steps=10)

    assert set(omnifx.stats(fast).generations[0].reasons) == {"measured: no plan for these steps yet"}


def test_without_transfer_a_profile_of_other_steps_is_not_used() -> None:
    model, profile = measured_toy(16)
    options = {**EAGER, "profile": profile, "profile_cache": False, "steps": 10}
    fast = torch.compile(model, backend="omnicache", options=options)

    generate(fast, seed=3, steps=10)

    assert "a profile of 16 steps is not used: steps=10 was asked for" in omnifx.stats(fast).notes
