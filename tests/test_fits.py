"""What run-time policies learn: calibrated, kept for later processes, followed at its timesteps, refused elsewhere."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import omnifx
from omnifx.calibration import merge
from omnifx.errors import ConfigError, OmnifxWarning, ProfileError
from omnifx.fits import Fits
from omnifx.policies.teacache import TeaCache
from omnifx.policy import policies
from omnifx.profile import Profile
from omnifx.runtime import RuntimePolicy
from omnifx.session import find_session, profile_folder
from tests.profiles import make_profile
from tests.runtime import Eager, EagerTea, letters
from tests.toys import EAGER, TINY, ToyDiT, distance, generate, noise, sampling, toy

STEPS = 12
BLOCKS = 3
POLICY = TeaCache(threshold=0.9)
KEEPING = {"lowering": "eager"}
"""Options with which profiles are kept."""


def generation_of(model: Any, seed: int) -> Tensor:
    return generate(model, seed=seed, steps=STEPS)


def calibrated(runs: int = 1, **kwargs: Any) -> Profile:
    return omnifx.calibrate(
        toy(BLOCKS), generation_of, policy=POLICY, runs=runs, options=EAGER, progress=False, **kwargs
    )


@pytest.fixture(scope="module")
def profile() -> Profile:
    torch._dynamo.reset()
    return calibrated(runs=3)


def compiled(model: ToyDiT | None = None, policy: Any = POLICY, **options: Any) -> Any:
    model = toy(BLOCKS) if model is None else model
    return torch.compile(model, backend="omnicache", options={**EAGER, "policy": policy, **options})


def rows(fast: Any) -> list[str]:
    """What each generation's first stream did."""
    return [letters(log) for log in omnifx.stats(fast).generations]


def changes(model: ToyDiT, seed: int, steps: int = STEPS) -> list[tuple[float, float]]:
    """Relative changes of the modulated input and of the output, from step to step of one generation in full."""
    eager = Eager(model)
    seen: list[tuple[Tensor, Tensor]] = []

    def watching(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = model(x, t, y)
        seen.append((eager.modulated(*eager.begin(x, t, y)), out))
        return out

    generate(watching, seed=seed, steps=steps)
    return [
        (float((n - m).abs().mean() / m.abs().mean()), float((b - a).abs().mean() / a.abs().mean()))
        for (m, a), (n, b) in itertools.pairwise(seen)
    ]


def polynomial(points: Sequence[tuple[float, float]], degree: int = 4) -> Tensor:
    """Least squares, highest power first, float64."""
    x, y = torch.tensor(points, dtype=torch.float64).T
    powers = torch.stack([x**n for n in range(degree, -1, -1)], 1)
    return torch.linalg.lstsq(powers, y[:, None], driver="gelsd").solution[:, 0]


class FittedTea(EagerTea):
    """TeaCache with a polynomial that holds in an interval."""

    def __init__(self, model: ToyDiT, points: Sequence[tuple[float, float]]) -> None:
        super().__init__(model, 0.9, (), STEPS)
        self.fitted = polynomial(points)
        self.low, self.high = min(x for x, _ in points), max(x for x, _ in points)

    def step(self, state: dict[str, Any], x: Tensor, t: Tensor, y: Tensor) -> tuple[bool, Tensor]:
        start, c = self.begin(x, t, y)
        modulated = self.modulated(start, c)
        computes = state["k"] == 0 or state["last"]
        if not computes:
            d = float((modulated - state["modulated"]).abs().mean() / state["modulated"].abs().mean())
            d = min(max(d, self.low), self.high)
            state["sum"] += max(0.0, sum(float(a) * d ** (4 - i) for i, a in enumerate(self.fitted)))
            computes = state["sum"] >= self.threshold
        state["modulated"] = modulated
        if computes:
            trunk = self.blocks(start, c, 0)
            state |= {"sum": 0.0, "residual": trunk - start}
        else:
            trunk = start + state["residual"]
        return computes, self.end(trunk, x)


# -- calibration -------------------------------------------------------------------------------------------------------


def test_a_calibration_measures_every_run_and_fits_all_of_them(profile: Profile) -> None:
    model = toy(BLOCKS)

    points = [changes(model, seed)[:-1] for seed in range(3)]  # the last step's output is read by no later one
    policy, said = POLICY.learned(profile.points())

    assert (profile.meta.runtime_policy, profile.meta.signals) == ("teacache", ("change", "output_change"))
    assert (profile.meta.num_runs, profile.meta.num_streams, profile.num_steps) == (3, 1, STEPS)
    found = [(p["change"], p["output_change"]) for p in profile.points() if len(p) == 2]
    assert torch.tensor(found).allclose(torch.tensor([point for run in points for point in run]), rtol=1e-3)
    expected = polynomial([point for run in points for point in run])
    at = torch.tensor([x for run in points for x, _ in run], dtype=torch.float64)
    values = sum(at ** (4 - i) * a for i, a in enumerate(expected))
    assert [policy.estimate(float(x)) for x in at] == pytest.approx(values.tolist(), rel=1e-3, abs=1e-4)  # type: ignore[union-attr]
    assert "was fitted to 30 steps" in said


@pytest.mark.parametrize("how", ["path", "object"])
def test_with_a_profile_the_first_generation_is_that_of_the_reference(
    profile: Profile, tmp_path: Path, how: str
) -> None:
    model, path = toy(BLOCKS), tmp_path / "tea.safetensors"
    profile.save(path)
    fast = compiled(model, profile=path if how == "path" else profile)
    points = [point for seed in range(3) for point in changes(model, seed)[:-1]]

    for seed in (5, 6):
        reference = FittedTea(model, points)
        expected = generate(reference, seed=seed, steps=STEPS)
        image = generate(fast, seed=seed, steps=STEPS)

        assert rows(fast)[-1] == reference.letters[3]
        assert "r" in rows(fast)[-1]
        assert rows(fast)[-1][-1] == "F"  # the profile tells which step is the last
        assert distance(image, expected) < 1e-5
    assert any("of the given profile" in note for note in omnifx.stats(fast).notes)
    assert all(log.reasons == {} for log in omnifx.stats(fast).generations)


def test_streams_are_measured_each_for_itself() -> None:
    guided = lambda model, seed: generate(model, seed=seed, steps=STEPS, cfg=7)  # noqa: E731
    profile = omnifx.calibrate(toy(BLOCKS), guided, policy=POLICY, options=EAGER, progress=False)

    fast = compiled(profile=profile)
    guided(fast, 3)

    assert profile.meta.num_streams == 2
    (log,) = omnifx.stats(fast).generations
    assert all("r" in letters(log, stream) for stream in (0, 1))


def test_what_was_measured_on_a_model_comes_before_what_is_published() -> None:
    tiny = TINY["flux"]()

    def run(model: Any, seed: int) -> None:
        inputs = dict(tiny.inputs)
        with torch.no_grad():
            for k in range(6):
                for at in tiny.latents:
                    inputs[at] = tiny.inputs[at] + 0.03 * k * noise(*tiny.inputs[at].shape, seed=seed)
                for at in tiny.times:
                    inputs[at] = (tiny.inputs[at] * (1.0 - k / 10)).to(tiny.inputs[at].dtype)
                model(**inputs)

    profile = omnifx.calibrate(tiny.model, run, policy="teacache", options=EAGER, progress=False)
    fast = torch.compile(tiny.model, backend="omnicache", options={**EAGER, "policy": "teacache", "profile": profile})
    run(fast, 1)

    notes = omnifx.stats(fast).notes
    assert any("of the given profile" in note for note in notes)
    assert not any("TeaCache4FLUX" in note for note in notes)


RUNTIME = {name: policy for name, cls in policies().items() if isinstance(policy := cls(), RuntimePolicy)}


@pytest.mark.parametrize("name", [name for name, policy in RUNTIME.items() if not policy.learns])
def test_policies_that_learn_nothing_are_not_calibrated(name: str) -> None:
    with pytest.raises(ConfigError, match=f"policy '{name}' decides at run time and learns nothing of a model"):
        omnifx.calibrate(toy(1), generation_of, policy=name)


def test_a_polynomial_that_is_given_leaves_nothing_to_calibrate() -> None:
    with pytest.raises(ConfigError, match="learns nothing of a model"):
        omnifx.calibrate(toy(1), generation_of, policy=TeaCache(coefficients=(1.0, 0.0)))


def test_too_few_steps_are_no_calibration() -> None:
    short = lambda model, seed: generate(model, seed=seed, steps=3)  # noqa: E731
    with pytest.raises(ProfileError, match="run 0 could not be measured"):
        omnifx.calibrate(toy(1), short, policy=POLICY, options=EAGER, progress=False)
    starved = {**EAGER, "cache_budget": 3000}
    with pytest.raises(ProfileError, match="teacache can learn nothing from 12 steps"):
        omnifx.calibrate(toy(1), generation_of, policy=POLICY, options=starved, progress=False)


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_a_first_generation_is_learned_from_once_for_all_processes() -> None:
    first = compiled(**KEEPING, profile_cache=True)
    generate(first, seed=0, steps=STEPS)
    generate(first, seed=1, steps=STEPS)
    torch._dynamo.reset()

    again = compiled(**KEEPING, profile_cache=True)  # another instance of equal weights
    image = generate(again, seed=1, steps=STEPS)

    assert rows(first)[0] == "F" * STEPS
    assert rows(again) == [rows(first)[1]]
    assert "r" in rows(again)[0]
    assert any("in the cache directory" in note for note in omnifx.stats(again).notes)
    torch._dynamo.reset()
    assert distance(image, generate(first, seed=1, steps=STEPS)) < 1e-6


def test_other_weights_and_profile_cache_false_learn_anew() -> None:
    generate(keeping := compiled(**KEEPING, profile_cache=True), seed=0, steps=STEPS)
    find_session(keeping).finish()

    for fast in (compiled(profile_cache=False), compiled(toy(BLOCKS, seed=1), profile_cache=True)):
        generate(fast, seed=0, steps=STEPS)
        assert rows(fast) == ["F" * STEPS]


def test_a_process_that_ends_after_one_generation_leaves_what_it_measured() -> None:
    script = (
        "import torch, omnifx\nfrom omnifx.policies.teacache import TeaCache\nfrom tests.toys import generate, toy\n"
        "torch.set_num_threads(1)\n"
        "options = {'lowering': 'eager', 'policy': TeaCache(threshold=0.9)}\n"
        f"fast = torch.compile(toy({BLOCKS}), backend='omnicache', options=options)\n"
        f"generate(fast, seed=0, steps={STEPS})\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=240, env=dict(os.environ))

    fast = compiled(profile_cache=True)
    generate(fast, seed=0, steps=STEPS)

    assert "r" in rows(fast)[0]


def test_a_corrupt_file_in_the_cache_is_told_and_not_used() -> None:
    first = compiled(profile_cache=True)
    generate(first, seed=0, steps=STEPS)
    find_session(first).finish()
    (profile,) = find_session(first).profiles[0]
    (path,) = (profile_folder(profile.meta.fingerprint) / "teacache").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:50])
    torch._dynamo.reset()

    again = compiled(profile_cache=True)
    with pytest.warns(OmnifxWarning, match="a cached profile is not used: .* is corrupt"):
        generate(again, seed=0, steps=STEPS)

    assert rows(again) == ["F" * STEPS]


def test_both_streams_of_a_first_generation_are_kept_where_its_steps_are_known() -> None:
    fast = compiled(profile_cache=True, steps=STEPS)
    generate(fast, seed=0, steps=STEPS, cfg=7)

    ((profile,),) = find_session(fast).profiles
    assert profile.meta.num_streams == 2
    assert len(profile.meta.timesteps) == STEPS


# -- timesteps ---------------------------------------------------------------------------------------------------------


def test_other_timesteps_are_measured_before_anything_is_skipped(profile: Profile) -> None:
    fast = compiled(profile=profile)
    for steps in (8, 8, STEPS):
        generate(fast, seed=0, steps=steps)

    full, fitted, known = rows(fast)
    assert full == "F" * 8
    assert "r" in fitted
    assert "r" in known


def test_a_generation_cut_short_gives_way_to_a_whole_one() -> None:
    model = toy(BLOCKS)
    fast = compiled(model)
    for k, _ in enumerate(sampling(fast, seed=0, steps=STEPS)):
        if k == 5:
            break
    images = [generate(fast, seed=seed, steps=STEPS) for seed in (1, 2, 3)]

    short, beyond, whole, fitted = rows(fast)
    assert short == "F" * 6
    assert "r" in beyond[:6]
    assert beyond[6:] == "F" * 6
    assert omnifx.stats(fast).generations[1].reasons == {
        "its timesteps leave those that teacache was fitted at": STEPS - 6
    }
    assert whole == "F" * STEPS
    assert "r" in fitted
    assert distance(images[1], generate(model, seed=2, steps=STEPS)) < 1e-5


def test_image_to_image_follows_the_later_timesteps_of_a_profile(profile: Profile) -> None:
    fast = compiled(profile=profile)
    generate(fast, seed=0, steps=STEPS, start=4)

    assert len(rows(fast)[0]) == STEPS - 4
    assert "r" in rows(fast)[0]
    assert rows(fast)[0][-1] == "F"


def signals(times: Sequence[float], shape: tuple[int, ...] = (1, 4, 8, 8), seed: int = 0) -> Profile:
    """A made-up profile for TeaCache."""
    plain = make_profile(len(times))
    generator = torch.Generator().manual_seed(seed)
    meta = plain.meta.model_copy(
        update={
            "timesteps": tuple(times),
            "latent_shape": shape,
            "runtime_policy": "teacache",
            "signals": ("change", "output_change"),
        }
    )
    values = torch.rand(1, 1, len(times), 2, generator=generator)
    values[:, :, 0, 0] = torch.nan
    return Profile(meta=meta, grams=plain.grams[..., :0, :0], moves=plain.moves, signals=values)


@given(steps=st.integers(5, 20), first=st.integers(0, 18), count=st.integers(2, 20), other=st.floats(0.1, 0.9))
@settings(max_examples=60, deadline=None)
def test_a_fit_holds_any_run_of_its_own_timesteps_and_no_others(
    steps: int, first: int, count: int, other: float
) -> None:
    times = [float(steps - k) for k in range(steps)]
    fits = Fits(POLICY)
    fits.add(signals(times), whole=True)
    part = times[first : first + count]

    fit = fits.at(part, (1, 4, 8, 8)) if part else None

    if part:
        assert fit is not None
        assert fit.total(part) == steps - min(first, steps - 1)
        assert fits.at([*part[:-1], part[-1] - other], (1, 4, 8, 8)) is None
        assert not fits.holds([*times, 0.0])


def test_the_fit_of_the_latents_own_size_comes_first_then_the_longest() -> None:
    times = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0]
    small, large, long = signals(times), signals(times, (1, 4, 16, 16), 1), signals([*times, 3.0], seed=2)
    fits = Fits(POLICY)
    for profile in (small, large, long):
        assert fits.add(profile)

    found = [fits.at(times[:2], (2, 4, *size)) for size in ((8, 8), (16, 16), (24, 24))]

    assert [fit.profile if fit else None for fit in found] == [long, large, long]
    assert not fits.add(signals([2.0, 1.0]))  # too few to learn from


# -- files -------------------------------------------------------------------------------------------------------------


def test_signals_come_back_from_their_file(profile: Profile, tmp_path: Path) -> None:
    profile.save(tmp_path / "tea.safetensors")
    loaded = Profile.load(tmp_path / "tea.safetensors")

    assert loaded.meta == profile.meta
    assert loaded.points() == profile.points()
    assert POLICY.learned(loaded.points()) == POLICY.learned(profile.points())


def test_signals_of_another_shape_or_infinite_are_refused() -> None:
    made = signals([4.0, 3.0, 2.0, 1.0])
    assert made.signals is not None
    with pytest.raises(ProfileError, match=r"signals have shape None, expected \(1, 1, 4, 2\)"):
        Profile(meta=made.meta, grams=made.grams, moves=made.moves)
    with pytest.raises(ProfileError, match="NaN or infinity"):
        Profile(meta=made.meta, grams=made.grams, moves=made.moves, signals=made.signals * torch.inf)
    with pytest.raises(ProfileError, match="grams have shape"):
        Profile(meta=made.meta, grams=make_profile(4).grams, moves=made.moves, signals=made.signals)


def test_runs_of_different_policies_are_not_merged() -> None:
    made = signals([4.0, 3.0, 2.0, 1.0])
    with pytest.raises(ProfileError, match="all runs must be of one model"):
        merge([make_profile(4), made])


def test_no_plan_is_made_of_signals(profile: Profile) -> None:
    with pytest.raises(ConfigError, match="signals that policy 'teacache' learns from"):
        omnifx.make_plan(profile, policy="fora")
    with pytest.raises(ConfigError, match="holds no inner products"):
        profile.gram("x", "x")
    with pytest.raises(Exception, match="no plan can be made from the profile of ToyDiT"):
        generate(compiled(policy="fora", profile=profile), seed=0, steps=4)


def test_a_profile_that_does_not_fit_the_policy_is_refused(profile: Profile, tmp_path: Path) -> None:
    refusals: list[tuple[Any, ToyDiT, str]] = [
        ("dbcache", toy(BLOCKS), "was measured for policy 'teacache', and the option 'policy' is 'dbcache'"),
        (TeaCache(coefficients="identity"), toy(BLOCKS), "its options say all that it would learn"),
        (POLICY, toy(BLOCKS, seed=1), "the profile does not belong to this model"),
    ]
    for policy, model, says in refusals:
        torch._dynamo.reset()
        with pytest.raises(Exception, match=says):
            generate(compiled(model, policy, profile=profile), seed=0, steps=4)
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(Exception, match="is corrupt"):
        generate(compiled(profile=tmp_path / "junk"), seed=0, steps=4)


def test_a_profile_to_plan_from_only_tells_the_steps() -> None:
    plain = omnifx.calibrate(toy(BLOCKS), generation_of, options=EAGER, progress=False)
    fast = compiled(profile=plain)
    generate(fast, seed=0, steps=STEPS)
    generate(fast, seed=1, steps=STEPS)

    full, fitted = rows(fast)
    assert full == "F" * STEPS
    assert "r" in fitted
    assert fitted[-1] == "F"
