"""GOC: reuse plus a multiple of the last difference, from a queue that holds corrected values too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omnifx.errors import ConfigError
from omnifx.plan import COMPUTE, PREDICT
from omnifx.policies.fora import Fora
from omnifx.policies.goc import Goc
from omnifx.policy import resolve
from omnifx.profile import NUM_BANDS, NUM_HALVES, Profile
from tests.policies.following import assert_faithful
from tests.profiles import make_profile


@dataclass
class Queue:
    """The source's cache: the last two outputs of each module, whatever they are."""

    interval: int
    eta: float
    listed: tuple[int, ...]
    kept: dict[str, list[Tensor]] = field(default_factory=dict)

    def __call__(self, step: int, name: str, compute: Callable[[], Tensor]) -> Tensor:
        queue = self.kept.get(name, [])
        if step % self.interval == 0:
            value = compute()
        elif step in self.listed:
            newest, before = queue
            value = newest + self.eta * (newest - before)
        else:
            value = queue[0]
        self.kept[name] = [value, *queue[:1]]
        return value


@pytest.mark.parametrize(
    ("interval", "eta", "listed"),
    [(2, 1.2, (3, 5, 7)), (2, 0.8, (3, 7, 9)), (3, 0.5, (2, 4, 5, 8)), (4, 0.3, (3, 5, 7))],
)
def test_a_generation_is_that_of_the_source(interval: int, eta: float, listed: tuple[int, ...]) -> None:
    letters = "".join("F" if step % interval == 0 else "p" for step in range(10))

    assert_faithful(
        Goc(interval=interval, eta=eta, steps=listed), Queue(interval, eta, listed), steps=10, letters=letters
    )


def with_outputs(outputs: Tensor) -> Profile:
    """A profile of these outputs [S, D]; its latents and noises are arbitrary."""
    steps = len(outputs)
    profile = make_profile(steps)
    grams = profile.grams.clone()
    grams[..., steps : 2 * steps, steps : 2 * steps] = 0.0
    grams[0, 0, 0, 0, steps : 2 * steps, steps : 2 * steps] = outputs.float() @ outputs.float().T
    assert grams.shape[2:4] == (NUM_HALVES, NUM_BANDS)
    return Profile(meta=profile.meta, grams=grams, moves=profile.moves)


def corrected(plan_steps: object) -> list[int]:
    return [k for k, step in enumerate(plan_steps) if len(step.weights) > 1]  # type: ignore[arg-type, attr-defined]


def test_it_corrects_where_the_output_goes_on_as_before_and_not_where_it_turns() -> None:
    position = torch.tensor([0.0, 1, 2, 3, 4, 3, 2, 1, 0, -1, -2, -3])  # turns between steps 4 and 5
    outputs = torch.stack([position, torch.ones(12)], dim=1)

    plan = Goc(interval=2, eta=0.8).plan(with_outputs(outputs))

    assert corrected(plan.steps) == [3, 7, 9, 11]
    assert plan.steps[1].weights == plan.steps[5].weights == (1.0,)


def test_a_listed_step_is_corrected_whatever_the_profile_says() -> None:
    plan = Goc(interval=2, steps=(3, 9)).plan(make_profile(12))

    assert corrected(plan.steps) == [3, 9]
    assert plan.steps[3].weights == pytest.approx((2.2, -1.2))
    assert plan.notes == ("Corrected at 2 of 6 cached steps: [3, 9].",)


@given(steps=st.integers(1, 50), interval=st.integers(1, 8), eta=st.floats(0.0, 2.0))
@settings(max_examples=60, deadline=None)
def test_every_plan_is_valid_and_computes_what_fora_computes(steps: int, interval: int, eta: float) -> None:
    profile = make_profile(steps)

    plan = Goc(interval=interval, eta=eta).plan(profile)

    fora = Fora(interval=interval).plan(profile)
    assert [row[0] == COMPUTE for row in plan.rows] == [row[0] == COMPUTE for row in fora.rows]
    assert plan.speedup == pytest.approx(fora.speedup)
    assert all(step.stores == (row[0] == PREDICT) for step, row in zip(plan.steps, plan.rows, strict=True))
    assert len(plan.variants) <= 2


@given(steps=st.integers(2, 50), speedup=st.floats(1.0, 6.0))
@settings(max_examples=40, deadline=None)
def test_the_interval_of_a_speedup_is_that_of_fora(steps: int, speedup: float) -> None:
    profile = make_profile(steps)
    try:
        expected = Fora().plan(profile, speedup=speedup).policy_options["interval"]
    except ConfigError:
        with pytest.raises(ConfigError, match="goc: speedup must be in"):
            Goc().plan(profile, speedup=speedup)
        return
    assert Goc().plan(profile, speedup=speedup).policy_options["interval"] == expected


def test_steps_that_cannot_be_corrected_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"goc: steps \[1, 4\] are not cached with two values .*; \[3, 5\] are"):
        Goc(interval=2, steps=(1, 3, 4)).plan(make_profile(6))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"interval": 0}, "interval must be >= 1"),
        ({"eta": -0.1}, "eta must be a number >= 0"),
        ({"eta": float("nan")}, "eta must be a number >= 0"),
        ({"steps": (2.5,)}, "steps must be numbers of steps"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Goc(**options)  # type: ignore[arg-type]


def test_it_is_known_by_its_name() -> None:
    assert resolve("goc") == Goc()
