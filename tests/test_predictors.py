"""Predictors: weights that add up to one, exact on what their order promises, and texts that come back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnifx.errors import ConfigError
from omnifx.plan import COMPUTE, PREDICT, REUSE, Correction, Plan
from omnifx.predictors import PREDICTORS, Average, Chebyshev, Fitted, Linear, Newton, resolve_predictor, with_predictor
from tests.profiles import make_profile

NAMES = ["taylor:1", "taylor:2", "taylor:3", "newton:3", "average", "chebyshev:2", "difference:0.8", "fitted:4"]


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[int], int]:
    """Stored steps, newest first, and a later target, all below 40."""
    steps = draw(st.lists(st.integers(0, 39), min_size=2, max_size=8, unique=True))
    *stored, target = sorted(steps)
    return stored[::-1], target


@given(history=histories(), name=st.sampled_from(NAMES), axis=st.sampled_from(["", "@timesteps"]))
@settings(max_examples=200, deadline=None)
def test_weights_add_up_to_one_and_are_no_more_than_the_stored_values(
    history: tuple[list[int], int], name: str, axis: str
) -> None:
    stored, target = history
    predictor = resolve_predictor(name + axis if not name.startswith(("difference", "fitted")) else name)

    weights = predictor.weights(stored, target, make_profile(40))

    assert 1 <= len(weights) <= min(len(stored), predictor.terms)
    assert sum(weights) == pytest.approx(1.0, abs=1e-6 * max(1.0, *map(abs, weights)))


@given(history=histories(), order=st.integers(1, 3), roots=st.lists(st.floats(-1.0, 2.0), min_size=3, max_size=3))
@settings(max_examples=200, deadline=None)
def test_newton_meets_polynomials_of_its_order_over_any_gaps(
    history: tuple[list[int], int], order: int, roots: list[float]
) -> None:
    stored, target = history
    degree = min(order, len(stored) - 1)

    def value(step: int) -> float:
        return math.prod(step / 40 - root for root in roots[:degree])

    weights = Newton(order=order).weights(stored, target, make_profile(40))

    size = sum(abs(w * value(s)) for w, s in zip(weights, stored, strict=False))
    assert sum(w * value(s) for w, s in zip(weights, stored, strict=False)) == pytest.approx(
        value(target), abs=1e-9 * max(1.0, size)
    )


@given(history=histories(), order=st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_taylor_meets_lines_over_any_gaps(history: tuple[list[int], int], order: int) -> None:
    stored, target = history
    weights = resolve_predictor(f"taylor:{order}").weights(stored, target, make_profile(40))

    found = sum(w * (3.0 * s - 7.0) for w, s in zip(weights, stored, strict=False))

    expected = 3.0 * target - 7.0 if len(stored) > 1 else 3.0 * stored[0] - 7.0
    assert found == pytest.approx(expected, abs=1e-9 * max(abs(w) for w in weights) * 120)


def test_taylor_of_order_two_takes_differences_of_differences() -> None:
    # D1 at steps 9 and 6: (f9 - f6) / 3, (f6 - f2) / 4; D2: their difference over 3; 2 steps on: D1 * 2 + D2 * 4 / 2
    weights = resolve_predictor("taylor:2").weights([9, 6, 2], 11, make_profile(12))

    d1, older = torch.tensor([1 / 3, -1 / 3, 0]), torch.tensor([0, 1 / 4, -1 / 4])
    expected = torch.tensor([1.0, 0, 0]) + 2 * d1 + 2 * (d1 - older) / 3
    assert weights == pytest.approx(expected.tolist())


def test_the_average_goes_half_as_far_as_the_line() -> None:
    assert Average().weights([8, 4], 10, make_profile(12)) == pytest.approx((1.25, -0.25))
    assert Average().weights([8], 10, make_profile(12)) == (1.0,)


def test_without_a_penalty_chebyshev_is_the_polynomial_through_all_values() -> None:
    profile = make_profile(20)

    fitted = Chebyshev(degree=2, penalty=0.0).weights([12, 9, 4], 14, profile)

    assert fitted == pytest.approx(Newton(order=2).weights([12, 9, 4], 14, profile), abs=1e-4)


def test_a_large_penalty_makes_chebyshev_repeat_the_newest_value() -> None:
    weights = Chebyshev(degree=2, penalty=1e9).weights([12, 9, 4], 14, make_profile(20))

    assert weights == pytest.approx((1.0, 0.0, 0.0), abs=1e-6)


def test_fitted_weights_are_those_of_least_squares_on_the_outputs() -> None:
    profile = make_profile(6)
    gram = profile.gram("o", "o").sum((0, 1, 2))

    weights = Fitted(num_terms=2, penalty=0.0).weights([3, 1], 5, profile)

    square = gram[1, 1] - 2 * gram[1, 3] + gram[3, 3]
    share = float((gram[1, 5] - gram[1, 3] - gram[3, 5] + gram[3, 3]) / square)
    assert weights == pytest.approx((1.0 - share, share))


def test_fixed_weights_wait_for_as_many_values() -> None:
    predictor = resolve_predictor("linear:2.5,-2,0.5")

    assert predictor.weights([4, 3], 5, make_profile(6)) == (1.0,)
    assert predictor.weights([4, 3, 2, 1], 5, make_profile(6)) == (2.5, -2.0, 0.5)


def test_timesteps_tell_where_steps_are_not_even() -> None:
    profile = make_profile(4)
    uneven = profile.meta.model_copy(update={"timesteps": (9.0, 8.0, 4.0, 2.0)})
    profile = type(profile)(meta=uneven, grams=profile.grams, moves=profile.moves)

    assert resolve_predictor("taylor:1").weights([2, 1], 3, profile) == pytest.approx((2.0, -1.0))
    assert resolve_predictor("taylor:1@timesteps").weights([2, 1], 3, profile) == pytest.approx((1.5, -0.5))


def test_equal_timesteps_are_refused() -> None:
    profile = make_profile(4)
    twice = profile.meta.model_copy(update={"timesteps": (9.0, 8.0, 8.0, 2.0)})
    profile = type(profile)(meta=twice, grams=profile.grams, moves=profile.moves)

    with pytest.raises(ConfigError, match="several times at the timesteps"):
        resolve_predictor("taylor:1@timesteps").weights([2, 1], 3, profile)


@pytest.mark.parametrize("text", [*NAMES, "taylor:2@timesteps", "linear:2.0,-1.0", "average@timesteps"])
def test_a_predictor_comes_back_from_its_text(text: str) -> None:
    assert resolve_predictor(str(resolve_predictor(text))) == resolve_predictor(text)


@pytest.mark.parametrize("name", [name for name in PREDICTORS if name != "linear"])
def test_every_predictor_has_defaults(name: str) -> None:
    assert resolve_predictor(name).name == name


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hermite", "found 'hermite', expected one of"),
        ("taylor@sigmas", "expected one of"),
        ("taylor:two", "'taylor:two' is not understood"),
        ("taylor:0", r"order must be a whole number in \[1, 3\], got 0"),
        ("average:3", "takes no number"),
        ("linear:", "is not understood"),
        ("linear:1,nan", "finite weights"),
        ("difference:inf", "eta must be a finite number"),
        ("difference:1@timesteps", "does not depend on timesteps"),
        ("chebyshev:9", r"degree must be a whole number in \[1, 7\]"),
        ("fitted:1", r"num_terms must be a whole number in \[2, 8\]"),
    ],
)
def test_texts_that_name_nothing_are_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        resolve_predictor(text)


def test_more_weights_than_caches_are_worth_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 to 8 finite weights"):
        Linear(fixed=(0.1,) * 9)


def test_any_plan_can_be_predicted_and_keeps_its_corrections() -> None:
    profile = make_profile(8)
    actions = [COMPUTE, COMPUTE, REUSE, COMPUTE, REUSE, REUSE, COMPUTE, REUSE]
    corrections = [Correction(gamma=0.5) if action == REUSE else None for action in actions]
    plan = Plan.uniform(profile, actions, policy="toy", corrections=corrections, notes=["a sentence."])

    predicted = with_predictor(plan, profile, "taylor:1")

    assert [row[0] for row in predicted.rows] == [PREDICT if a == REUSE else a for a in actions]
    assert [step.correction for step in predicted.steps] == corrections
    assert (predicted.terms, predicted.notes, predicted.speedup) == (2, plan.notes, plan.speedup)
    assert predicted.steps[5].weights == pytest.approx((2.0, -1.0))
    assert predicted.steps[3].weights == pytest.approx((3.0, -2.0))  # a full step: what its replay predicts with
    assert predicted.timeline().splitlines()[1] == "FFCFCCFC"


def test_a_plan_that_reuses_nothing_stays_as_it_is() -> None:
    profile = make_profile(3)
    plan = Plan.uniform(profile, [COMPUTE] * 3, policy="toy")

    assert with_predictor(plan, profile, "taylor:3") == plan


def test_branches_computed_at_different_steps_are_refused() -> None:
    profile = make_profile(4)
    rows = [(COMPUTE, COMPUTE), (COMPUTE, REUSE), (REUSE, REUSE), (REUSE, REUSE)]

    with pytest.raises(ConfigError, match=r"taylor:1: at step 2 the branches were last computed at different steps"):
        with_predictor(Plan.from_rows(profile, rows, policy="toy"), profile, "taylor:1")
