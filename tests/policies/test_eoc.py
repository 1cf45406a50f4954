"""EOC: reuse that follows the trend of a prior, at the steps where the prior is worth it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import omnifx
from omnifx.errors import ConfigError, OmnifxWarning, ProfileError
from omnifx.plan import COMPUTE, PREDICT
from omnifx.policies.eoc import Eoc
from omnifx.policies.fora import Fora
from omnifx.policy import resolve
from omnifx.prior import Prior, PriorSpec, prior_path
from omnifx.profile import Profile
from omnifx.session import find_session
from tests.policies.following import TEXT, Hooked, assert_faithful
from tests.profiles import make_profile
from tests.toys import EAGER, distance, generate, letters_of, noise, toy

STEPS = 8


def means_of(*, steps: int, seeds: tuple[int, ...], batch: int = 1) -> dict[str, Tensor]:
    """The source's prior by hand: each module's mean output over samples at each step, [S, tokens, width]."""
    sums: dict[str, list[list[Tensor]]] = {}
    for seed in seeds:

        def value(step: int, name: str, compute: Callable[[], Tensor]) -> Tensor:
            output = compute()
            steps_of = sums.setdefault(name, [[] for _ in range(steps)])
            steps_of[step].append(output.mean(0))
            return output

        latents = noise(batch, 4, 8, 8, seed=seed)
        generate(Hooked(toy(text=TEXT), value), seed=seed, steps=steps, latents=latents, text=text(batch))
    return {name: torch.stack([torch.stack(values).mean(0) for values in kept]) for name, kept in sums.items()}


def text(batch: int = 1) -> Tensor:
    return noise(1, 5, TEXT, seed=9).expand(batch, -1, -1).contiguous()


@dataclass
class Trending:
    """The source's block: the last output, cached or not, times (1 + theta E), or plus a E, at the listed steps."""

    means: dict[str, Tensor]
    interval: int
    listed: list[int]
    form: str
    strength: float
    kept: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, step: int, name: str, compute: Callable[[], Tensor]) -> Tensor:
        if step % self.interval == 0:
            self.kept[name] = compute()
        elif step in self.listed:
            trend = self.means[name][step] - self.means[name][step - 1]
            cached = self.kept[name]
            scaled = cached * (1 + self.strength * trend)
            self.kept[name] = scaled if self.form == "scale" else cached + self.strength * trend
        return self.kept[name]


@pytest.mark.parametrize(
    ("interval", "form", "strength", "judges"),
    [(2, "scale", 0.3, False), (3, "scale", None, True), (3, "shift", None, True), (4, "shift", 0.5, False)],
)
def test_a_generation_is_that_of_the_source(interval: int, form: Any, strength: float | None, judges: bool) -> None:
    policy = Eoc(interval=interval, form=form, strength=strength, judges=judges, precision="float32")
    means = means_of(steps=STEPS, seeds=(100,))  # what `assert_faithful` measures on
    cached = [step for step in range(STEPS) if step % interval]
    listed = cached
    if judges:
        worth = Eoc(floor=policy.floor).judge(Prior(policy.prior, 1, means, {}))
        listed = [step for step in cached if worth[step]]
    used = {"scale": 0.01, "shift": 1.0}[form] if strength is None else strength

    assert_faithful(
        policy,
        Trending(means, interval, listed, form, used),
        steps=STEPS,
        letters="".join("F" if step % interval == 0 else "p" for step in range(STEPS)),
    )


# -- the prior ---------------------------------------------------------------------------------------------------------


def calibrated(policy: Eoc, *, runs: int = 3, batch: int = 2, **arguments: Any) -> Profile:
    def run(model: Any, seed: int) -> None:
        generate(model, seed=seed, steps=STEPS, latents=noise(batch, 4, 8, 8, seed=seed), text=text(batch))

    return omnifx.calibrate(
        toy(text=TEXT), run, policy=policy, runs=runs, options=EAGER_ONLY, progress=False, **arguments
    )


EAGER_ONLY = {"lowering": EAGER["lowering"]}


def test_a_prior_is_the_mean_over_samples_and_runs() -> None:
    prior = calibrated(Eoc(precision="float32")).prior

    assert prior is not None
    means = means_of(steps=STEPS, seeds=(0, 1, 2), batch=2)
    assert prior.num_runs == 3
    assert len(prior.means) == len(means) == 6
    for key, mean in prior.means.items():
        assert distance(mean.squeeze(1), means[key.rpartition(":")[0]]) < 1e-5


@pytest.mark.parametrize(("half", "samples"), [("first", slice(0, 1)), ("second", slice(1, 2))])
def test_half_of_the_batch_can_be_averaged_alone(half: Any, samples: slice) -> None:
    prior = calibrated(Eoc(precision="float32", samples=half), runs=1).prior

    assert prior is not None
    kept: dict[str, Tensor] = {}

    def value(step: int, name: str, compute: Callable[[], Tensor]) -> Tensor:
        if step == 0:
            kept[name] = compute()[samples].mean(0)
        return compute()

    generate(Hooked(toy(text=TEXT), value), seed=0, steps=STEPS, latents=noise(2, 4, 8, 8, seed=0), text=text(2))
    for key, mean in prior.means.items():
        assert distance(mean[0].squeeze(0), kept[key.rpartition(":")[0]]) < 1e-5


def test_low_precision_and_low_rank_take_fewer_bytes_and_keep_the_trends() -> None:
    whole, half, low = (
        calibrated(Eoc(precision=precision, rank=rank), runs=2).prior  # type: ignore[arg-type]
        for precision, rank in (("float32", None), ("float16", None), ("float32", 3))
    )
    assert whole is not None
    assert half is not None
    assert low is not None

    assert half.num_bytes * 2 == whole.num_bytes
    assert low.num_bytes < whole.num_bytes / 2
    errors = {"half": 0.0, "low": 0.0}
    for key in whole.means:
        for name, prior in (("half", half), ("low", low)):
            trends = [torch.stack([p.trend(key, step) for step in range(STEPS)]) for p in (prior, whole)]
            errors[name] = max(errors[name], distance(*trends))
    assert errors["half"] < 2e-2
    assert errors["low"] < 0.7
    full_rank = Prior.of(whole.means, PriorSpec(precision="float32", rank=STEPS))
    key = next(iter(whole.means))
    assert distance(full_rank.trend(key, 3), whole.trend(key, 3)) < 1e-4


def test_a_prior_lies_beside_its_profile_and_comes_back(tmp_path: Path) -> None:
    profile = calibrated(Eoc(rank=2), runs=2, save=tmp_path / "toy.safetensors")

    loaded = Profile.load(tmp_path / "toy.safetensors")

    assert prior_path(tmp_path / "toy.safetensors").exists()
    assert loaded.prior is not None
    assert profile.prior is not None
    assert (loaded.prior.spec, loaded.prior.num_runs) == (profile.prior.spec, 2)
    for key in profile.prior.means:
        assert torch.equal(loaded.prior.trend(key, 4), profile.prior.trend(key, 4))
    assert Eoc().plan(loaded).timeline() == Eoc().plan(profile).timeline()

    replace(profile, prior=None).save(tmp_path / "toy.safetensors")
    assert Profile.load(tmp_path / "toy.safetensors").prior is None


def test_a_prior_of_another_profile_is_refused(tmp_path: Path) -> None:
    profile = calibrated(Eoc(), runs=1, save=tmp_path / "toy.safetensors")
    assert profile.prior is not None
    profile.prior.save(prior_path(tmp_path / "toy.safetensors"), fingerprint="other")

    with pytest.raises(ProfileError, match=r"is not of this profile: it has 8 steps of model other"):
        Profile.load(tmp_path / "toy.safetensors")


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00" * 64])
def test_a_file_that_is_no_prior_is_refused(tmp_path: Path, content: bytes) -> None:
    make_profile(4).save(tmp_path / "toy.safetensors")
    prior_path(tmp_path / "toy.safetensors").write_bytes(content)

    with pytest.raises(ProfileError, match=r"Prior.load: .* is corrupt"):
        Profile.load(tmp_path / "toy.safetensors")


def test_the_bytes_of_a_prior_are_told_and_bounded() -> None:
    model = toy(text=TEXT)
    options = {**EAGER, "policy": Eoc(), "record_budget": 40_000, "steps": STEPS}
    fast = torch.compile(model, backend="omnicache", options=options)

    says = r"the prior takes 49,152 bytes for 8 steps, but record_budget is 40,000"
    with (
        pytest.warns(OmnifxWarning, match="no plan: eoc"),
        pytest.warns(OmnifxWarning, match=says),
        omnifx.generation(fast),
    ):
        generate(fast, seed=0, steps=STEPS, text=text())

    assert any(
        "the prior of policy eoc takes 6,144 bytes a step, 49,152 for 8 steps" in note
        for note in omnifx.stats(fast).notes
    )
    generate(fast, seed=1, steps=STEPS, text=text())
    assert letters_of(omnifx.stats(fast).generations[-1]) == "F" * STEPS  # no prior, no plan


def test_a_process_that_finds_the_profile_finds_the_prior() -> None:
    options = {"lowering": "eager", "policy": Eoc(interval=2)}
    with omnifx.generation(fast := torch.compile(toy(text=TEXT), backend="omnicache", options=options)):
        generate(fast, seed=0, steps=STEPS, text=text())
    torch._dynamo.reset()

    again = torch.compile(toy(text=TEXT), backend="omnicache", options=options)
    generate(again, seed=1, steps=STEPS, text=text())

    assert letters_of(omnifx.stats(again).generations[0]) == "FpFpFpFp"
    (entry,) = find_session(again).conductors[0].entries
    assert entry.profile.prior is not None


def test_a_prior_of_another_size_is_not_followed() -> None:
    profile = calibrated(Eoc(), runs=1, batch=1)
    assert profile.prior is not None
    cut = {key: mean[:, :, :-1] for key, mean in profile.prior.means.items()}
    wrong = replace(profile, prior=Prior(profile.prior.spec, 1, cut, {}))
    options = {**EAGER, "policy": Eoc(interval=2, judges=False), "profile": wrong}
    fast = torch.compile(toy(text=TEXT), backend="omnicache", options=options)

    generate(fast, seed=1, steps=STEPS, text=text())

    log = omnifx.stats(fast).generations[-1]
    assert letters_of(log) == "F" * STEPS
    assert all("but a sample's cut here is (1, 16, 32)" in reason for reason in log.reasons)


# -- plans -------------------------------------------------------------------------------------------------------------


def with_prior(profile: Profile, means: Tensor) -> Profile:
    return replace(profile, prior=Prior.of({"blocks.0.attn:0": means}, PriorSpec(precision="float32")))


def test_steps_whose_trend_is_small_or_turns_do_not_follow_it() -> None:
    position = torch.tensor([0.0, 1, 2, 3, 4, 3, 2, 2.001, 2.5, 3])  # turns at 5, stands at 7, turns and goes on at 8
    profile = with_prior(make_profile(10), position[:, None, None])

    plan = Eoc(interval=10).plan(profile)

    followed = [k for k, step in enumerate(plan.steps) if step.trend]
    assert followed == [1, 2, 3, 4, 6, 8, 9]
    assert plan.notes[0].startswith("7 of 9 cached steps follow the prior of 1 run(s), 40 bytes")
    assert {step.trend for step in Eoc(interval=10, judges=False).plan(profile).steps} == {0.0, 0.01}


@given(steps=st.integers(1, 40), interval=st.integers(1, 8), form=st.sampled_from(["scale", "shift"]))
@settings(max_examples=60, deadline=None)
def test_every_plan_is_valid_and_computes_what_fora_computes(steps: int, interval: int, form: Any) -> None:
    profile = with_prior(make_profile(steps), torch.randn(steps, 1, 3))

    plan = Eoc(interval=interval, form=form).plan(profile)

    fora = Fora(interval=interval).plan(profile)
    assert [row[0] == COMPUTE for row in plan.rows] == [row[0] == COMPUTE for row in fora.rows]
    assert all(step.stores == (row[0] == PREDICT) for step, row in zip(plan.steps, plan.rows, strict=True))
    assert len(plan.variants) <= 2


def test_without_a_prior_it_says_how_to_get_one() -> None:
    with pytest.raises(ConfigError, match=r"no prior beside it. Measure one: omnifx.calibrate"):
        Eoc().plan(make_profile(8))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"interval": 0}, "interval must be >= 1"),
        ({"form": "twist"}, r"form must be one of \['scale', 'shift'\]"),
        ({"strength": -1.0}, "strength must be a number >= 0"),
        ({"floor": float("inf")}, "floor must be a number >= 0"),
        ({"samples": "third"}, "samples must be one of"),
        ({"precision": "int8"}, "precision must be one of"),
        ({"rank": 0}, "rank must be >= 1 or None"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Eoc(**options)


def test_it_is_known_by_its_name() -> None:
    assert resolve("eoc") == Eoc()
