"""Predictors: what a branch gives at a step, as a linear combination of its stored values of earlier steps.

A plan knows which steps are stored, so a predictor is evaluated when the plan is made: the plan holds its weights,
`PredictCuts` applies them in the graph, and a policy only names it. The weights of every predictor but `Linear` and
`Difference` with odd numbers add up to 1, so that a branch that does not change is predicted exactly.

A predictor is written as ``name``, ``name:number`` or ``name:number@timesteps``:

==================  ====================================================================================================
``taylor:2``        Taylor series of order 1 to 3 with finite differences, as TaylorSeer takes them
``newton:2``        the polynomial of order 1 to 3 through the last values
``average``         the average velocity from the last computed step to this one
``chebyshev:4``     Chebyshev polynomials up to a degree, fitted by regularised least squares
``difference:1.2``  the newest value plus a multiple of the last difference, as GOC does
``linear:2,-1``     fixed weights
``fitted:3``        weights fitted on the measured generation's outputs
==================  ====================================================================================================

They count in steps, as TaylorSeer does, or with ``@timesteps`` in the model's own timesteps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from omnifx.errors import ConfigError
from omnifx.plan import PREDICT, REUSE, Action, Plan, PlanStep, Row, stored_actions
from omnifx.profile import Profile

Axis = Literal["steps", "timesteps"]
"""What a predictor counts in."""

MOST_TERMS = 8
"""Stored values that a predictor may read: each costs a set of caches."""

Weights = tuple[float, ...]
"""What stored values are multiplied by, newest first."""


class Predictor(ABC):
    """Base of all predictors: a frozen, keyword-only dataclass whose fields are its options."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def terms(self) -> int:
        """Stored values that it reads at most."""

    @property
    def needs_profile(self) -> bool:
        """Whether its weights depend on more than the numbers of the steps."""
        return True

    @abstractmethod
    def weights(self, stored: Sequence[int], target: int, profile: Profile | None) -> Weights:
        """The weights at a step.

        Args:
            stored: Steps whose values are stored, newest first; at least one, all before `target`.
            target: The step.
            profile: Of the generation; None only if it needs none.

        Returns: At most ``min(terms, len(stored))`` weights, newest first.
        """

    @classmethod
    @abstractmethod
    def parse(cls, argument: str, axis: Axis) -> Predictor:
        """The predictor that ``name:argument@axis`` stands for. Raises ValueError if there is none."""


@dataclass(frozen=True, kw_only=True)
class _OnAxis(Predictor):
    """A predictor that sees stored values as a function of the step or of the timestep."""

    axis: Axis = "steps"

    def __post_init__(self) -> None:
        if self.axis not in get_args(Axis):
            raise ConfigError(f"{self.name}: axis must be one of {list(get_args(Axis))}, got {self.axis!r}.")

    @property
    def needs_profile(self) -> bool:
        """Only for timesteps."""
        return self.axis != "steps"

    def weights(self, stored: Sequence[int], target: int, profile: Profile | None) -> Weights:
        used = list(stored[: self.terms])
        if self.axis == "steps":
            last = target if profile is None else profile.num_steps - 1.0
            return self.along(tuple(map(float, used)), float(target), (0.0, max(1.0, last)))
        assert profile is not None  # it needs one
        times = profile.meta.timesteps
        at = tuple(times[step] for step in used)
        if len(set(at)) < len(at):
            raise ConfigError(
                f"{self}: the sampler calls the model several times at the timesteps {sorted(set(at))}, so values "
                f"cannot be told apart by them. Leave '@timesteps' away."
            )
        return self.along(at, times[target], (min(times), max(times)))

    @abstractmethod
    def along(self, times: Sequence[float], target: float, span: tuple[float, float]) -> Weights:
        """The weights at `target` of values at `times`, newest first; all times of the generation lie in `span`."""

    def _tail(self) -> str:
        return "" if self.axis == "steps" else f"@{self.axis}"


@dataclass(frozen=True, kw_only=True)
class _OfOrder(_OnAxis):
    """A predictor of order 1 to 3."""

    order: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count(self.name, "order", self.order, 1, 3)

    @property
    def terms(self) -> int:
        """One value more than the order."""
        return self.order + 1

    @classmethod
    def parse(cls, argument: str, axis: Axis) -> Predictor:
        return cls(order=int(argument), axis=axis) if argument else cls(axis=axis)

    def __str__(self) -> str:
        return f"{self.name}:{self.order}{self._tail()}"


@dataclass(frozen=True, kw_only=True)
class Taylor(_OfOrder):
    """A Taylor series whose derivatives are differences of differences, each over the last gap of its own values.

    With D_0 the values and a_0 > a_1 > ... the steps: ``D_{i+1}(a_j) = (D_i(a_j) - D_i(a_{j+1})) / (a_j - a_{j+1})``;
    the prediction is ``sum_i D_i(a_0) (k - a_0)^i / i!``. Exact for what is constant or linear in the step; from order
    2 on backward differences lag behind the derivatives they stand for, so that a parabola is not met (`Newton` does).
    Source: TaylorSeer, arXiv:2503.06923, and its code.
    """

    name: ClassVar[str] = "taylor"

    def along(self, times: Sequence[float], target: float, span: tuple[float, float]) -> Weights:
        count = len(times)
        level = [[float(i == j) for i in range(count)] for j in range(count)]
        found = list(level[0])
        for i in range(1, count):
            level = [
                [(a - b) / (times[j] - times[j + 1]) for a, b in zip(level[j], level[j + 1], strict=True)]
                for j in range(len(level) - 1)
            ]
            factor = (target - times[0]) ** i / math.factorial(i)
            found = [value + factor * a for value, a in zip(found, level[0], strict=True)]
        return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Newton(_OfOrder):
    """The polynomial through the last ``order + 1`` values: exact for polynomials up to the order, whatever the gaps.

    Source: Newton's and Lagrange's; as a predictor beside TaylorSeer's it is ours.
    """

    name: ClassVar[str] = "newton"

    def along(self, times: Sequence[float], target: float, span: tuple[float, float]) -> Weights:
        return tuple(
            math.prod((target - other) / (own - other) for i, other in enumerate(times) if i != j)
            for j, own in enumerate(times)
        )


@dataclass(frozen=True, kw_only=True)
class Average(_OnAxis):
    """The mean over the interval from the newest value's step to this one of the line through the last two values.

    MeanCache replaces a velocity by its average over an interval, ``v + (s - t) J``, with J the change from the last
    velocity to the last average velocity over their distance. Of a line that is half its slope; on cuts, whose
    integral no sampler keeps, it is therefore the line at half the distance. Source: MeanCache (UnicomAI), for outputs;
    the form for cuts is ours.
    """

    name: ClassVar[str] = "average"

    @property
    def terms(self) -> int:
        """Two."""
        return 2

    def along(self, times: Sequence[float], target: float, span: tuple[float, float]) -> Weights:
        if len(times) < 2:
            return (1.0,)
        half = (target - times[0]) / (times[0] - times[1]) / 2.0
        return (1.0 + half, -half)

    @classmethod
    def parse(cls, argument: str, axis: Axis) -> Predictor:
        if argument:
            raise ValueError("it takes no number")
        return cls(axis=axis)

    def __str__(self) -> str:
        return f"{self.name}{self._tail()}"


@dataclass(frozen=True, kw_only=True)
class Chebyshev(_OnAxis):
    """Chebyshev polynomials over the whole generation, fitted to the stored values with a penalty on their
    coefficients.

    The fit is to the differences from the newest value, which stays as it is: so a penalty draws towards plain reuse,
    and not towards zero. Source: Spectrum (CVPR 2026), which fits the values themselves, all of the past, with
    degree 4 and penalty 0.1; the window of ``degree + 1`` values and the differences are ours.
    """

    name: ClassVar[str] = "chebyshev"

    degree: int = 4
    penalty: float = 0.1  # >= 0; added to the squares of the basis

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count(self.name, "degree", self.degree, 1, MOST_TERMS - 1)
        if not (math.isfinite(self.penalty) and self.penalty >= 0.0):
            raise ConfigError(f"{self.name}: penalty must be a number >= 0, got {self.penalty!r}.")

    @property
    def terms(self) -> int:
        """One value more than the degree."""
        return self.degree + 1

    @property
    def needs_profile(self) -> bool:
        """Its polynomials lie over the whole generation."""
        return True

    def along(self, times: Sequence[float], target: float, span: tuple[float, float]) -> Weights:
        low, high = span
        if len(times) < 2:
            return (1.0,)
        at = torch.tensor([*times, target], dtype=torch.float64)
        basis = torch.cos(
            torch.arange(1, self.degree + 1, dtype=torch.float64)
            * torch.acos((2.0 * (at - low) / (high - low) - 1.0).clamp(-1.0, 1.0))[:, None]
        )
        moved = basis - basis[0]
        return _from_newest(_ridge(moved[1:-1], moved[-1], self.penalty))

    @classmethod
    def parse(cls, argument: str, axis: Axis) -> Predictor:
        return cls(degree=int(argument), axis=axis) if argument else cls(axis=axis)

    def __str__(self) -> str:
        return f"{self.name}:{self.degree}{self._tail()}"


@dataclass(frozen=True, kw_only=True)
class Difference(Predictor):
    """The newest value, plus `eta` times what it differs from the one before.

    Source: GOC, arXiv:2503.05156; eta is 1.2 there with FORA, 0.8 with L2C.
    """

    name: ClassVar[str] = "difference"

    eta: float = 1.2

    def __post_init__(self) -> None:
        if not math.isfinite(self.eta):
            raise ConfigError(f"{self.name}: eta must be a finite number, got {self.eta!r}.")

    @property
    def terms(self) -> int:
        """Two."""
        return 2

    @property
    def needs_profile(self) -> bool:
        """Its weights never change."""
        return False

    def weights(self, stored: Sequence[int], target: int, profile: Profile | None) -> Weights:
        return (1.0 + self.eta, -self.eta) if len(stored) > 1 else (1.0,)

    @classmethod
    def parse(cls, argument: str, axis: Axis) -> Predictor:
        _refuse_axis(axis)
        return cls(eta=float(argument)) if argument else cls()

    def __str__(self) -> str:
        return f"{self.name}:{self.eta!r}"


@dataclass(frozen=True, kw_only=True)
class Linear(Predictor):
    """Fixed weights, newest first; until as many values are stored, the newest one is repeated.

    Use: for what was calibrated elsewhere; FoCa's comes down to about (7/3, -5/3, 1/3).
    """

    name: ClassVar[str] = "linear"

    fixed: Weights

    def __post_init__(self) -> None:
        if not 1 <= len(self.fixed) <= MOST_TERMS or not all(map(math.isfinite, self.fixed)):
            raise ConfigError(f"{self.name}: needs 1 to {MOST_TERMS} finite weights, got {self.fixed!r}.")

    @property
    def terms(self) -> int:
        """As many as there are weights."""
        return len(self.fixed)

    @property
    def needs_profile(self) -> bool:
        """Its weights never change."""
        return False

    def weights(self, stored: Sequence[int], target: int, profile: Profile | None) -> Weights:
        return self.fixed if len(stored) >= len(self.fixed) else (1.0,)

    @classmethod
    def parse(cls, argument: str, axis: Axis) -> Predictor:
        _refuse_axis(axis)
        return cls(fixed=tuple(map(float, argument.split(","))))

    def __str__(self) -> str:
        return f"{self.name}:{','.join(map(repr, self.fixed))}"


@dataclass(frozen=True, kw_only=True)
class Fitted(Predictor):
    """Weights that would have predicted the model's output best in the measured generations, by least squares.

    A profile holds inner products of outputs, not of cuts; branches add to the trunk, so outputs stand for them.
    Source: the idea is L2P's (a matrix of weights over earlier steps); the fit on a profile is ours.
    """

    name: ClassVar[str] = "fitted"

    num_terms: int = 3
    penalty: float = 0.01  # >= 0; as a share of the mean square of the differences

    def __post_init__(self) -> None:
        _check_count(self.name, "num_terms", self.num_terms, 2, MOST_TERMS)
        if not (math.isfinite(self.penalty) and self.penalty >= 0.0):
            raise ConfigError(f"{self.name}: penalty must be a number >= 0, got {self.penalty!r}.")

    @property
    def terms(self) -> int:
        """As asked for."""
        return self.num_terms

    def weights(self, stored: Sequence[int], target: int, profile: Profile | None) -> Weights:
        assert profile is not None  # it needs one
        used = list(stored[: self.terms])
        if len(used) < 2:
            return (1.0,)
        gram = profile.gram("o", "o").sum((0, 1, 2))[[*used, target]][:, [*used, target]]
        moved = gram - gram[:1] - gram[:, :1] + gram[0, 0]  # inner products of differences from the newest value
        square, cross = moved[1:-1, 1:-1], moved[1:-1, -1]
        damping = self.penalty * float(square.diagonal().mean()) + torch.finfo(torch.float64).tiny
        found = torch.linalg.solve(square + damping * torch.eye(len(square), dtype=torch.float64), cross)
        return _from_newest(found)

    @classmethod
    def parse(cls, argument: str, axis: Axis) -> Predictor:
        _refuse_axis(axis)
        return cls(num_terms=int(argument)) if argument else cls()

    def __str__(self) -> str:
        return f"{self.name}:{self.num_terms}"


PREDICTORS: dict[str, type[Predictor]] = {
    cls.name: cls for cls in (Taylor, Newton, Average, Chebyshev, Difference, Linear, Fitted)
}
"""All predictors by name."""


def resolve_predictor(predictor: str | Predictor) -> Predictor:
    """The predictor that a text or an object stands for. Raises ConfigError that lists what is known."""
    if isinstance(predictor, Predictor):
        return predictor
    text, _, axis = predictor.partition("@") if isinstance(predictor, str) else ("", "", "")
    name, _, argument = text.partition(":")
    axis = axis or "steps"
    if name not in PREDICTORS or axis not in get_args(Axis):
        raise ConfigError(
            f"predictor: found {predictor!r}, expected one of {list(PREDICTORS)}, with ':number' and '@timesteps' "
            "after it where wanted (such as 'taylor:2'), or a Predictor object."
        )
    try:
        return PREDICTORS[name].parse(argument, "timesteps" if axis == "timesteps" else "steps")
    except ValueError as error:
        raise ConfigError(f"predictor: {predictor!r} is not understood: {error}.") from error


def runtime_predictor(policy: str, predictor: str | Predictor | None) -> Predictor | None:
    """The predictor that a policy names which decides at run time; None for None.

    Raises: ConfigError in the name of `policy` if it needs a profile.
    """
    if predictor is None:
        return None
    found = resolve_predictor(predictor)
    if found.needs_profile:
        raise ConfigError(
            f"{policy}: predictor {str(found)!r} needs a profile of the generation, which a policy that decides at run "
            "time has not. Choose one that counts in steps: taylor, newton, average, difference or linear."
        )
    return found


def with_predictor(
    plan: Plan, profile: Profile, predictor: str | Predictor, *, stores: bool = False, oldest: int = 0
) -> Plan:
    """The same plan, with every reuse replaced by a prediction; corrected plans also measure noise by it.

    What is inside of a reused span stays reused with it.

    Args:
        plan: Any plan without predictions.
        profile: What it was made from.
        predictor: A name or an object.
        stores: Whether predicted values are stored as if they had been computed.
        oldest: The first step whose values may be used where there are later ones.

    Raises: ConfigError if branches are computed at different steps, so that no weights suit all of them.
    """
    found = resolve_predictor(predictor)
    rows = [_predicting(plan, row) for row in plan.rows]
    columns = len(plan.branches)
    weights: list[Weights] = []
    for k, (row, stored) in enumerate(zip(rows, _stored(rows, stores), strict=True)):
        predicts = PREDICT in row
        measures = plan.reads_noise and k > 0 and not predicts
        histories = {
            stored[i][: found.terms] for i, action in enumerate(row[:columns]) if measures or action == PREDICT
        }
        if len(histories) > 1:
            raise ConfigError(
                f"{found}: at step {k} the branches were last computed at different steps ({_shown(histories)}), so "
                "that one set of weights cannot predict them all. Use a policy that computes all branches together."
            )
        if not predicts and not measures:
            weights.append(())
            continue
        (history,) = histories
        weights.append(found.weights([s for s in history if s >= oldest] or history[:1], k, profile))
    return Plan.from_rows(
        profile,
        rows,
        policy=plan.policy,
        policy_options=plan.policy_options,
        corrections=[step.correction for step in plan.steps],
        weights=weights,
        stores=[stores and PREDICT in row for row in rows],
        terms=found.terms if any(PREDICT in row for row in rows) else 0,
        notes=plan.notes,
        spans=plan.span_names,
        merges={k: step.merges for k, step in enumerate(plan.steps)},
    )


def _predicting(plan: Plan, row: Row) -> Row:
    columns = len(plan.branches)
    reused = [span for span, action in zip(plan.spans, row[columns:], strict=True) if action == REUSE]
    inside = {name for span in reused for name in span.branches}
    branches = zip(plan.branches, row[:columns], strict=True)
    predicted = tuple(PREDICT if does == REUSE and name not in inside else does for name, does in branches)
    return predicted + row[columns:]


def _stored(rows: Sequence[Row], stores: bool) -> Iterator[tuple[tuple[int, ...], ...]]:
    """For each step, what steps each branch has stored before it; newest first."""
    kept: tuple[Action, ...] = stored_actions(PlanStep(variant=0, stores=stores))
    stored: tuple[tuple[int, ...], ...] = ((),) * len(rows[0])
    for k, row in enumerate(rows):
        yield stored
        stored = tuple(
            (k, *old)[:MOST_TERMS] if action in kept else old for action, old in zip(row, stored, strict=True)
        )


def _shown(histories: set[tuple[int, ...]]) -> str:
    return ", ".join(sorted(str(list(history)) for history in histories)[:3])


def _from_newest(others: Tensor) -> Weights:
    """Weights of all values, from those of the older ones' differences from the newest."""
    return (1.0 - float(others.sum()), *map(float, others))


def _ridge(rows: Tensor, target: Tensor, penalty: float) -> Tensor:
    """The combination of `rows` that a regularised least-squares fit in their columns gives at `target`."""
    square = rows.T @ rows + (penalty + 1e-12) * torch.eye(rows.shape[1], dtype=rows.dtype)
    found: Tensor = rows @ torch.linalg.solve(square, target)
    return found


def _refuse_axis(axis: Axis) -> None:
    if axis != "steps":
        raise ValueError("it does not depend on timesteps")


def _check_count(name: str, option: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ConfigError(f"{name}: {option} must be a whole number in [{least}, {most}], got {value!r}.")


__all__ = ["PREDICTORS", "Axis", "Predictor", "Weights", "resolve_predictor", "runtime_predictor", "with_predictor"]
