"""Forecasts: weights of least squares, drift as a sampler moves it, and schedules as good as there are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnifx.forecast import SLACK_OF_SEARCH, Features, Forecast, State, Weights
from omnifx.path import Array, Path
from tests.paths import remembering


def smooth_path(steps: int, *, size: int = 40, seed: int = 0, noise: float = 0.05, b: float = -0.2) -> Path:
    """A sampler's path under outputs that bend, and noise of reuse that is none at first."""
    rng = np.random.default_rng(seed)
    ways = rng.normal(size=(4, size))
    at = np.linspace(0.0, 1.0, steps)[:, None]
    o = ways[0] + at * ways[1] + np.sin(3 * at) * ways[2] + at**3 * ways[3]
    q = noise * rng.normal(size=(steps, size))
    q[0] = 0.0
    x = [3 * rng.normal(size=size)]
    for k in range(steps - 1):
        x.append(x[-1] + b * o[k])
    return path_through(np.stack(x), o, q, b=b)


def path_through(x: Array, o: Array, q: Array, *, b: float = -0.2) -> Path:
    """The path of a sampler with x' = x + b o."""
    ones, norms = np.ones(len(x)), np.linalg.norm(x, axis=1)
    growth = np.append(norms[1:] / norms[:-1], norms[-1] / norms[-2]) if norms.all() else ones
    answer = (growth - 1.0) / b if b else 0 * ones
    none = np.zeros((len(x), 0))
    return Path(x, o, q, ones, b * ones, 0 * ones, 0.0, np.arange(len(x), 0.0, -1.0), none, none, growth, answer)


def plain(reuses: bool = False, **changes: float) -> Features:
    """No doubts, no landing, hardly a ridge: ordinary least squares."""
    return Features(reuses=reuses, doubt=0.0, reuse_doubt=0.0, landing=0.0, ridge=1e-12, **changes)  # type: ignore[arg-type]


def letters(state: State) -> str:
    return "".join("F" if step is None else "r" for step in state.steps)


def test_outputs_that_lie_on_a_line_are_forecast_without_drift() -> None:
    path = smooth_path(10)
    line = path.o[0] + np.linspace(0, 1, 10)[:, None] * (path.o[5] - path.o[0])
    x = np.stack([path.x[0] - 0.2 * line[:k].sum(0) for k in range(10)])
    path = path_through(x, line, path.q)

    end = Forecast(path, plain(latents=0)).follow([0, 1])

    assert end.cost < 1e-5
    weights = end.steps[5]
    assert weights is not None
    assert weights.outputs == pytest.approx((5.0, -4.0), abs=1e-3)  # from steps 1 and 0 to step 5


@pytest.mark.parametrize("reuses", [False, True])
def test_a_prediction_is_the_nearest_combination(reuses: bool) -> None:
    path = smooth_path(8)
    forecast = Forecast(path, plain(reuses, history=2, latents=1))
    state = forecast.start()
    for _ in range(5):  # computed, so that nothing drifts
        state = forecast.compute(state)

    after = forecast.predict(state)

    columns: list[Array] = [path.o[4], path.o[3], path.x[5] - path.x[4]]
    if reuses:
        columns = [path.o[5] + path.q[5], path.q[4], *columns]
    matrix = np.stack(columns, axis=1)
    nearest = matrix @ np.linalg.lstsq(matrix, path.o[5], rcond=None)[0]
    np.testing.assert_allclose(after.drift, path.b[5] * (nearest - path.o[5]), atol=1e-6)
    off = np.linalg.norm(nearest - path.o[5]) / np.linalg.norm(path.o[5])
    assert after.off == pytest.approx((0.0, 0.0, 0.0, 0.0, 0.0, off), abs=1e-6)
    found = after.steps[5]
    assert found is not None
    weights = [found.reuse, found.noise, *found.outputs, *found.latents][0 if reuses else 2 :]
    np.testing.assert_allclose(matrix @ weights, nearest, atol=1e-5)


def test_a_predicted_step_takes_back_the_drift_of_the_one_before() -> None:
    path = smooth_path(8)
    drifts = {}
    for landing in (0.0, 1.0):
        features = Features(reuses=False, doubt=0.0, landing=landing, ridge=1e-9)
        drifts[landing] = Forecast(path, features).follow([0, 2, 4]).cost
    assert drifts[1.0] < 0.8 * drifts[0.0]


def test_doubt_shrinks_the_weights_that_hang_on_drifted_outputs() -> None:
    path = smooth_path(16)
    sizes = []
    for doubt in (0.0, 5.0):
        features = Features(reuses=False, doubt=doubt, ridge=1e-9)
        steps = Forecast(path, features).follow([0, 3, 6, 9]).steps
        sizes.append(max(sum(map(abs, step.outputs)) for step in steps if step is not None))
    assert sizes[1] < sizes[0]


def test_drift_keeps_its_share_of_the_latents_through_computed_steps() -> None:
    path = smooth_path(12)
    forecast = Forecast(path, Features(reuses=False))

    state = forecast.follow([0, 2, *range(4, 12)])
    early = forecast.start()
    for k in range(5):
        early = forecast.compute(early) if k in (0, 2, 4) else forecast.predict(early)

    assert state.cost == pytest.approx(early.cost, rel=1e-9)


@pytest.mark.parametrize(("reuses", "computed"), [(False, 3), (False, 4), (True, 4)])
def test_the_search_finds_nearly_the_best_schedule(reuses: bool, computed: int) -> None:
    forecast = Forecast(smooth_path(9, seed=computed), Features(reuses=reuses))

    found = forecast.search(computed, longest=8)

    every = [(0, *rest) for rest in itertools.combinations(range(1, 9), computed - 1)]
    costs = sorted(forecast.follow(schedule).cost for schedule in every)
    assert found.cost <= 1.2 * costs[0]
    assert found.cost <= costs[len(costs) // 10]


@given(
    steps=st.integers(3, 24),
    share=st.floats(0.1, 1.0),
    reuses=st.booleans(),
    seed=st.integers(0, 9),
)
@settings(max_examples=25, deadline=None)
def test_every_schedule_keeps_the_rules(steps: int, share: float, reuses: bool, seed: int) -> None:
    computed = max(1, round(share * steps))
    path = smooth_path(steps, seed=seed)
    forecast = Forecast(path, Features(reuses=reuses))

    end = forecast.search(computed)

    assert len(end.steps) == steps
    assert end.steps[0] is None
    assert end.num_computed == computed
    longest = max((len(run) for run in letters(end).split("F")), default=0)
    assert longest <= 2 * -(-steps // computed)
    again = forecast.follow([k for k, step in enumerate(end.steps) if step is None])
    assert again.steps == end.steps
    assert again.cost == pytest.approx(end.cost)
    for k, step in enumerate(end.steps):
        if step is not None:
            before = end.steps[:k].count(None)
            assert len(step.outputs) == min(before, forecast.features.history)
            assert len(step.latents) == min(before, forecast.features.latents)
            assert np.isfinite([step.reuse, step.noise, *step.outputs, *step.latents]).all()


def test_long_generations_are_searched_in_a_band() -> None:
    end = Forecast(smooth_path(100, size=8), Features(reuses=False)).search(50)

    ahead = np.cumsum([step is None for step in end.steps]) - 0.5 * np.arange(1, 101)
    assert np.abs(ahead).max() <= SLACK_OF_SEARCH


def test_a_path_without_movement_is_followed_without_dividing_by_it() -> None:
    path = smooth_path(6)
    still = replace(path_through(0 * path.x, 0 * path.o, 0 * path.q, b=0.0), times=0 * path.times)

    end = Forecast(still, Features(reuses=True)).search(3)

    assert end.cost == 0.0
    assert all(np.isfinite(step.outputs).all() for step in end.steps if step is not None)


def simulated(path: Path, steps: Sequence[Weights | None]) -> Array:
    """The last latents of a sampler that moves as the path says, and follows `steps` with a network that answers."""
    x, o, known = [path.x[0]], [], []
    for k, step in enumerate(steps[:-1]):
        if step is None:
            o.append(path.o[k] + path.answer[k] * (x[k] - path.x[k]))
            known.insert(0, (x[k], o[k]))
        else:
            parts = [w * old for w, (_, old) in zip(step.outputs, known, strict=False)]
            parts += [w * (x[k] - old) for w, (old, _) in zip(step.latents, known, strict=False)]
            o.append(np.sum(parts, axis=0))
        made, recorded = _made(path, x, o, k), _made(path, path.x, path.o, k)
        x.append(path.x[k + 1] + made - recorded)  # what is left over, fresh noise for one, is the same
    return x[-1]


def _made(path: Path, x: Sequence[Array] | Array, o: Sequence[Array] | Array, k: int) -> Array:
    total = path.a[k] * x[k] + path.b[k] * o[k]
    for j in range(min(k, path.depth)):
        total = total + path.past_x[k, j] * x[k - 1 - j] + path.past_o[k, j] * o[k - 1 - j]
    return np.asarray(total)


@pytest.mark.parametrize(
    ("past", "noise"),
    [((), 0.0), (((-0.2, 0.1),), 0.0), (((-0.3, 0.1), (0.1, -0.05)), 0.0), ((), 0.5)],
)
def test_a_forecast_is_what_the_sampler_does(past: Sequence[tuple[float, float]], noise: float) -> None:
    x, o = remembering(14, past=past, noise=noise)
    path = Path.through(x, o, 0 * o, range(14, 0, -1))
    forecast = Forecast(path, Features(reuses=False, latents=2))

    state = forecast.start()
    for k in range(14):
        last, state = state, forecast.compute(state) if k % 3 == 0 else forecast.predict(state)

    assert path.depth == len(past)
    drift = simulated(path, state.steps) - path.x[-1]
    np.testing.assert_allclose(last.drift, drift, atol=1e-6 * np.linalg.norm(path.x[-1]))
    assert np.linalg.norm(drift) > 1e-3
