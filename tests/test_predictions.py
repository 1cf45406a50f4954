"""Predictions at run time: which stored values they read, what they hold, and when they are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import omnifx
from omnifx.errors import PlanError
from omnifx.plan import COMPUTE, PREDICT, REUSE, Plan
from omnifx.policies.fora import Fora
from omnifx.policy import Policy
from omnifx.predictors import resolve_predictor, with_predictor
from omnifx.profile import Profile
from omnifx.session import find_session
from tests.policies.following import Hooked
from tests.profiles import make_profile
from tests.toys import EAGER, Pattern, ToyDiT, distance, generate, letters_of, sampling, toy, toy_in_parts

STEPS = 9


@dataclass(frozen=True, kw_only=True)
class Predicted(Policy):
    """A `Pattern` whose reuses are predictions."""

    name = "predicted"

    pattern: str = "Fpp"
    predictor: str = "newton:1"

    @property
    def terms(self) -> int:
        return resolve_predictor(self.predictor).terms

    def plan(self, profile: Profile, *, speedup: float | None = None) -> Plan:
        plan = Pattern(pattern=self.pattern.replace("p", "r")).plan(profile)
        return with_predictor(plan, profile, self.predictor)


@dataclass
class Line:
    """Eager: modules whose letter says so give the line through their last two stored values; F and S compute, and only
    F stores."""

    letters: str
    stored: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)

    def __call__(self, step: int, name: str, compute: Callable[[], Tensor]) -> Tensor:
        kept, letter = self.stored.setdefault(name, []), self.letters[step]
        predicts = {"p": True, "a": not name.endswith(".mlp"), "m": name.endswith(".mlp")}.get(letter, False)
        if not predicts:
            value = compute()
            if letter != "S":
                kept.insert(0, (step, value))
            return value
        return self.at(step, name)

    def at(self, step: int, name: str) -> Tensor:
        (last, newest), (before, older) = (self.stored[name] * 2)[:2]
        return newest + (step - last) / max(1, last - before) * (newest - older)


def compiled(model: ToyDiT, policy: Policy, **options: Any) -> Any:
    return torch.compile(model, backend="omnicache", options={**EAGER, "policy": policy, **options})


def calibrated(model: ToyDiT, policy: Policy, *, steps: int = STEPS, cfg: int | None = None, **options: Any) -> Any:
    fast = compiled(model, policy, **options)
    with omnifx.generation(fast):
        generate(fast, seed=100, steps=steps, cfg=cfg)
    return fast


def reference(letters: str, **kwargs: Any) -> Tensor:
    return generate(Hooked(toy(), Line(letters)), **{"steps": len(letters), **kwargs})


def last(fast: Any) -> Any:
    return omnifx.stats(fast).generations[-1]


# -- what is predicted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["Fpp", "FFpppp", "Fa", "Fam", "FFmma"])
def test_branches_are_predicted_from_their_own_last_values(pattern: str) -> None:
    fast = calibrated(toy(), Predicted(pattern=pattern))
    letters = (pattern * STEPS)[:STEPS]

    image = generate(fast, seed=1, steps=STEPS)

    assert last(fast).reasons == {}
    assert letters_of(last(fast)) == letters.replace("a", "m")
    assert distance(image, reference(letters, seed=1)) < 1e-5
    assert omnifx.stats(fast).recompilations == 0


def test_interleaved_generations_and_streams_keep_to_their_own_history() -> None:
    fast = calibrated(toy(), Predicted(), cfg=9)
    running = [sampling(fast, seed=seed, steps=STEPS, label=label, cfg=9) for seed, label in ((1, 2), (2, 7))]

    images = [[next(run) for run in running] for _ in range(STEPS)][-1]

    letters = ("Fpp" * STEPS)[:STEPS]
    for image, (seed, label) in zip(images, ((1, 2), (2, 7)), strict=True):
        conditional, unconditional = (Hooked(toy(), Line(letters)) for _ in range(2))

        def both(x: Tensor, t: Tensor, y: Tensor, one: Hooked = conditional, two: Hooked = unconditional) -> Tensor:
            return (two if int(y[0]) == 9 else one)(x, t, y)

        assert distance(image, generate(both, seed=seed, steps=STEPS, label=label, cfg=9)) < 1e-5


def test_a_corrected_prediction_subtracts_the_noise_that_prediction_caused() -> None:
    """At step 2, a full one, the line through steps 0 and 1 is replayed; what it got wrong, halved, corrects step 3."""
    model, line, noises = toy(), Line("FFFpp"), []
    hooked = Hooked(model, line)

    def expected(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        step = hooked.step
        if step < 2:
            return hooked(x, t, y)
        if step == 2:
            predicted = Hooked(model, lambda step, name, compute: line.at(2, name))(x, t, y)
            true = hooked(x, t, y)
            noises.append(predicted - true)
            return true
        noises.append(0.5 * noises[-1])
        return hooked(x, t, y) - noises[-1]

    fast = calibrated(toy(), Predicted(pattern="FFFcc"), steps=5)

    image = generate(fast, seed=1, steps=5)

    assert [step.variant for step in last(fast).steps][3:] == ["predict+correct"] * 2
    assert distance(image, generate(expected, seed=1, steps=5)) < 1e-5
    assert distance(image, reference("FFFpp", seed=1)) > 1e-4


def test_a_plan_with_predictions_comes_from_its_file(tmp_path: Path) -> None:
    measured = calibrated(toy(), Predicted())
    (entry,) = find_session(measured).conductors[0].entries
    entry.plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == entry.plan

    fast = compiled(toy(), Fora(interval=2), profile=entry.profile, plan=tmp_path / "plan.json")

    assert distance(generate(fast, seed=1, steps=STEPS), reference(("Fpp" * STEPS)[:STEPS], seed=1)) < 1e-5


@pytest.mark.slow  # Inductor
def test_with_inductor_a_generation_is_the_same() -> None:
    fast = calibrated(toy(1), Predicted(predictor="newton:1"), lowering="inductor")

    image = generate(fast, seed=1, steps=STEPS)

    expected = generate(Hooked(toy(1), Line(("Fpp" * STEPS)[:STEPS])), seed=1, steps=STEPS)
    assert (letters_of(last(fast)), last(fast).reasons) == ("FppFppFpp", {})
    assert distance(image, expected) < 1e-5


def test_a_model_with_a_graph_break_predicts_in_all_of_its_parts() -> None:
    model = toy_in_parts()
    fast = compiled(model, Predicted())
    for seed in (100, 101):
        with omnifx.generation(fast):
            generate(fast, seed=seed, steps=STEPS)

    image = generate(fast, seed=1, steps=STEPS)

    assert last(fast).reasons == {}
    assert distance(image, reference(("Fpp" * STEPS)[:STEPS], seed=1)) < 1e-5


# -- what is held ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("predictor", "terms"), [("newton:1", 2), ("taylor:3", 4)])
def test_a_stream_is_admitted_with_as_many_sets_of_cuts_as_it_will_hold(predictor: str, terms: int) -> None:
    fast = calibrated(toy(), Predicted(predictor=predictor, pattern="Fp"))
    session = find_session(fast)
    (runner,) = session.runners
    store, one = session.store, runner.program.cache_bytes
    assert store is not None
    store.peak_bytes = 0
    held = []

    for _ in sampling(fast, seed=1, steps=STEPS):
        held.append(store.held_bytes)

    assert max(held) == terms * one == store.peak_bytes == omnifx.stats(fast).peak_cache_bytes
    assert last(fast).peak_cache_bytes == terms * one
    assert held[:3] == [one, one, 2 * one]


def test_a_budget_for_fewer_sets_caches_fewer_branches() -> None:
    whole = find_session(calibrated(toy(), Predicted())).runners[0].program
    torch._dynamo.reset()

    with pytest.warns(omnifx.OmnifxWarning, match=r"cache_budget leaves 2 of 4 branches uncached"):
        fast = calibrated(toy(), Predicted(), cache_budget=whole.cache_bytes)
    generate(fast, seed=1, steps=STEPS)

    assert last(fast).reasons == {}
    assert letters_of(last(fast)) == "FppFppFpp"
    assert last(fast).peak_cache_bytes <= whole.cache_bytes


# -- when it is refused ------------------------------------------------------------------------------------------------


def test_after_a_change_of_weights_no_value_of_the_old_ones_is_read() -> None:
    model = toy()
    fast = calibrated(model, Predicted(pattern="Fppp"), steps=15)

    def changing(weights: Tensor) -> Callable[[int, Tensor], Tensor]:
        def before(step: int, x: Tensor) -> Tensor:
            if step == 5:
                with torch.no_grad():
                    weights.mul_(1.5)
            return x

        return before

    image = generate(fast, seed=1, steps=15, before=changing(model.blocks[0].mlp.down.weight))

    # 5 to 7 find other weights, 9 to 11 only one value of the new ones
    assert letters_of(last(fast)) == "FpppFFFFFFFFFpp"
    assert last(fast).reasons["the weights changed since the caches were made"] == 3
    assert sum("the plan predicts from steps [8, 4]" in reason for reason in last(fast).reasons) == len(
        [reason for reason in last(fast).reasons if "weights changed" not in reason]
    )
    other = toy()
    hooked = Hooked(other, Line("FpppFSSSFSSSFpp"))
    expected = generate(hooked, seed=1, steps=15, before=changing(other.blocks[0].mlp.down.weight))
    assert distance(image, expected) < 1e-5


def test_values_of_other_steps_than_planned_are_not_read() -> None:
    fast = calibrated(toy(), Predicted())
    running = sampling(fast, seed=1, steps=STEPS)
    for _ in range(4):
        next(running)
    (stream,) = find_session(fast).conductors[0].streams
    stream.cache.steps = dict.fromkeys(stream.cache.steps, (3, 1))  # as if step 0 had not been stored

    *_, image = running

    assert letters_of(last(fast)) == "FppFFFFpp"
    assert any("is stored of steps [3, 1], but the plan predicts from steps [3, 0]" in r for r in last(fast).reasons)
    assert distance(image, reference("FppFSSFpp", seed=1)) < 1e-5


def test_evicted_values_are_not_read() -> None:
    fast = calibrated(toy(), Predicted())
    session = find_session(fast)
    running = sampling(fast, seed=1, steps=STEPS)
    for _ in range(4):
        next(running)
    assert session.store is not None
    for stream in session.conductors[0].streams:
        session.store.release(stream.key)

    *_, image = running

    assert letters_of(last(fast)) == "FppFFFFFF"
    assert "its caches were evicted to keep cache_budget" in last(fast).reasons
    assert distance(image, reference("FppFFFFFF", seed=1)) < 1e-5


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "fields", "says"),
    [
        ("CP", {"weights": [(), ()], "terms": 1}, "step 1 predicts a branch, but has no weights"),
        ("CP", {"weights": [(), (2.0, -1.0)], "terms": 2}, "step 1 predicts from 2 stored values, but .* has 1 before"),
        ("CCP", {"weights": [(), (), (2.0, -1.0)], "terms": 1}, "step 2 has 2 weights, but the plan's terms are 1"),
        ("CR", {"weights": [(), (1.0,)], "terms": 1}, "step 1 has weights, but predicts no branch"),
        ("CR", {"stores": [False, True], "terms": 1}, "step 1 stores predicted values, but predicts no branch"),
        ("PC", {"weights": [(1.0,), ()], "terms": 1}, "step 0 reuses a branch"),
        ("CC", {"weights": [(1.0,), ()], "terms": 1}, "step 0 predicts from 1 stored values, but .* has 0 before"),
    ],
)
def test_plans_that_predict_from_what_is_not_there_are_refused(rows: str, fields: dict[str, Any], says: str) -> None:
    actions = [{"C": COMPUTE, "P": PREDICT, "R": REUSE}[letter] for letter in rows]
    with pytest.raises(PlanError, match=says):
        Plan.uniform(make_profile(len(rows)), actions, policy="toy", **fields)


def test_what_a_plan_stores_is_known_ahead() -> None:
    actions = [COMPUTE, PREDICT, PREDICT, COMPUTE, PREDICT]
    weights = [(), (1.0,), (2.0, -1.0), (), (2.0, -1.0)]

    plan = Plan.uniform(
        make_profile(5), actions, policy="toy", weights=weights, stores=[False, True, False, False, False], terms=2
    )

    assert [stored[0] for stored in plan.stored_before()] == [(), (0,), (1, 0), (1, 0), (3, 1)]
    assert plan.readings == (((PREDICT,) * 2, True), ((PREDICT,) * 2, False))
    assert plan.timeline().splitlines()[1] == "FppFp"
    assert plan.num_reuse_steps == 3


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    plan = Plan.uniform(make_profile(2), [COMPUTE, PREDICT], policy="toy", weights=[(), (1.0,)], terms=1)
    plan.save(path := tmp_path / "plan.json")
    path.write_text(path.read_text().replace("1.0\n", "NaN\n"))

    with pytest.raises(PlanError, match=r"steps.1.weights.0"):
        Plan.load(path)
