"""What a user sees when something is wrong: the words of the innermost error, however Dynamo wraps it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import omnifx
from omnifx import errors
from omnifx.errors import ConfigError, OmnifxError, OmnifxWarning
from omnifx.plan import Plan
from omnifx.policy import policies
from omnifx.profile import Profile
from tests.toys import EAGER, Mlp, Pattern, ToyDiT, generate, lively, noise, toy

STEPS = 7


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def profile() -> Profile:
    torch._dynamo.reset()
    return omnifx.calibrate(
        toy(), lambda model, seed: generate(model, seed=seed, steps=STEPS), options=EAGER, progress=False
    )


def refused(model: nn.Module, kind: str, message: str, **options: Any) -> None:
    """Calling the compiled model raises, and the message holds the inner error's type and words."""
    fast = torch.compile(model, backend="omnicache", options={**EAGER, **options})
    with pytest.raises(Exception, match=message) as caught:
        generate(fast, seed=0, steps=STEPS)
    assert kind in f"{type(caught.value).__name__}: {caught.value}"


def test_an_unknown_option_is_refused() -> None:
    refused(toy(), "ConfigError", r"unknown options \['sped_up'\]; known are", sped_up=2)


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    refused(toy(), "ConfigError", re.escape(f"found 'fastest', expected one of {list(policies())}"), policy="fastest")


def test_a_speedup_below_one_is_refused() -> None:
    refused(toy(), "ConfigError", "option 'speedup' found 0.5", speedup=0.5)


def test_a_speedup_beyond_the_policy_names_the_most_it_allows(profile: Profile) -> None:
    refused(
        toy(), "ConfigError", r"speedup must be in \[1, \d+\.\d+\] here", policy="fora", speedup=1000.0, profile=profile
    )


def test_a_speedup_beyond_the_policy_after_self_calibration_warns_and_runs_in_full() -> None:
    model = toy()
    fast = torch.compile(model, backend="omnicache", options={**EAGER, "policy": "fora", "speedup": 1000.0})
    generate(fast, seed=0, steps=STEPS)

    with pytest.warns(OmnifxWarning, match=r"no plan: fora: speedup must be in \[1, \d+\.\d+\] here"):
        image = generate(fast, seed=1, steps=STEPS)

    assert torch.allclose(image, generate(model, seed=1, steps=STEPS), atol=1e-5)


def test_a_profile_that_is_not_there_is_refused(tmp_path: Path) -> None:
    refused(toy(), "ProfileError", "cannot read .*nowhere.safetensors", profile=str(tmp_path / "nowhere.safetensors"))


def test_a_corrupt_profile_is_refused(tmp_path: Path, profile: Profile) -> None:
    path = tmp_path / "p.safetensors"
    profile.save(path)
    path.write_bytes(path.read_bytes()[:200])

    refused(toy(), "ProfileError", "p.safetensors is corrupt: .*Measure it anew", profile=str(path))


def test_a_profile_from_a_file_is_followed(tmp_path: Path, profile: Profile) -> None:
    profile.save(tmp_path / "p.safetensors")
    options = {**EAGER, "policy": Pattern(pattern="Fr"), "profile": str(tmp_path / "p.safetensors")}
    fast = torch.compile(toy(), backend="omnicache", options=options)

    generate(fast, seed=0, steps=STEPS)

    assert [s.variant for s in omnifx.stats(fast).generations[0].steps][1] == "reuse"


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (lambda: toy(seed=1), "its weights are other ones"),
        (lambda: toy(3), "its branches are other ones"),
        (lambda: _Renamed(), "it was measured on ToyDiT, this is _Renamed"),
    ],
    ids=["weights", "branches", "class"],
)
def test_a_profile_of_something_else_is_refused(model: Any, what: str, profile: Profile) -> None:
    refused(model(), "ProfileError", f"does not belong to this model: {what}", profile=profile)


class _Renamed(ToyDiT):
    pass


def test_a_profile_of_latents_with_other_axes_is_refused(profile: Profile) -> None:
    other = profile.meta.model_copy(update={"latent_shape": (1, 4, 5, 8, 8)})
    refused(
        toy(), "ProfileError", r"measured on latents \[1, 4, 5, 8, 8\], these are \[1, 4, 8, 8\]",
        profile=Profile(meta=other, grams=profile.grams, moves=profile.moves),
    )  # fmt: skip


def test_a_plan_without_its_profile_is_refused(profile: Profile) -> None:
    plan = Pattern(pattern="Fr").plan(profile)

    refused(toy(), "ConfigError", "the option 'plan' needs 'profile'", plan=plan)


def test_a_plan_of_another_model_is_refused(profile: Profile) -> None:
    plan = Pattern(pattern="Fr").plan(profile).model_copy(update={"fingerprint": "other"})

    refused(toy(), "PlanError", "the plan was not made from this profile", profile=profile, plan=plan)


def test_a_corrupt_plan_file_is_refused(tmp_path: Path, profile: Profile) -> None:
    path = tmp_path / "plan.json"
    path.write_text("{")

    refused(toy(), "PlanError", "plan.json is not a plan", profile=profile, plan=str(path))


def test_a_plan_that_is_given_is_followed(profile: Profile) -> None:
    plan: Plan = Pattern(pattern="FFr").plan(profile)
    fast = torch.compile(toy(), backend="omnicache", options={**EAGER, "profile": profile, "plan": plan})

    generate(fast, seed=0, steps=STEPS)

    assert ["reuse" in s.variant for s in omnifx.stats(fast).generations[0].steps] == [k % 3 == 2 for k in range(STEPS)]


class _NoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.layer(x) * t.reshape(-1, 1, 1, 1)


def test_a_model_without_branches_runs_uncached_and_says_why() -> None:
    model = _NoBranches()
    fast = torch.compile(model, backend="omnicache", options=EAGER)
    x, t, y = noise(1, 4, 8, 8), torch.tensor([0.5]), torch.tensor([1])

    with torch.no_grad():
        output = fast(x, t, y)

    assert torch.allclose(output, model(x, t, y))
    told = str(omnifx.stats(fast))
    assert "no branch of _NoBranches can be reused" in told
    assert re.search(r"Seen: \d+ operators in 1 graph\(s\); those that cost FLOPs: 1 matrix products", told)
    assert "Residual branches: none among" in told
    assert "pass the transformer itself" in told


class _Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Mlp(8, 32), Mlp(8, 32)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = x + self.first(x) * (t / 1000).reshape(-1, 1, 1, 1)
        torch._dynamo.graph_break()
        return x + self.second(x)


def test_a_broken_function_cannot_be_told_step_from_step_and_says_so() -> None:
    model = lively(_Breaks())
    fast = torch.compile(
        lambda *inputs: model(*inputs), backend="omnicache", options={**EAGER, "policy": Pattern(pattern="Fr")}
    )

    with pytest.warns(OmnifxWarning, match="was not compiled as a module"):
        images = [generate(fast, seed=seed, steps=STEPS) for seed in (0, 1, 2)]

    for seed, image in enumerate(images):
        assert torch.allclose(image, generate(model, seed=seed, steps=STEPS), atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "message"), [(0, "steps must be a number >= 1"), (2.5, "steps must be a number >= 1")]
)
def test_a_mark_checks_its_steps(steps: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message), omnifx.generation(toy(), steps=steps):
        pass


def test_a_mark_on_something_else_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected a compiled model, got function"), omnifx.generation(lambda: None):
        pass


def test_statistics_of_a_model_that_never_ran_are_refused() -> None:
    with pytest.raises(ConfigError, match="has not run through omnifx yet"):
        omnifx.stats(toy())


def test_every_error_is_an_omnifx_error() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and kind.__module__ == errors.__name__]

    assert all(issubclass(kind, OmnifxError) or kind is OmnifxWarning for kind in kinds)
    assert len(kinds) >= 7
