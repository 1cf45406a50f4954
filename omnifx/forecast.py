"""Forecast a generation that computes some steps only: weights of its combinations, its drift, and its best schedule.

All of it is algebra on one recorded path (`omnifx.path`); the model is not called. At a step that is not computed, the
output is a linear combination of what is known then, with weights in closed form: the last computed outputs, how far
the latents have come since, and, if the network's reuse graph runs, its output and the noise measured last. What the
sampler does with an output that is a little wrong is known too, so the forecast follows how far the latents drift from
the recorded ones. The target of a fit is the output that would take the drift back, not the recorded one.

How an output that *is* computed answers to drifted latents is not recorded. It is taken to answer so that drift keeps
its share of the latents' norm: x' = a x + b o moves a perturbation d to (a + b J) d, and for a perturbation that looks
like data, (a + b J) is the ratio of the latents' norms. That is exact for Gaussian data, and on trained models it holds
within a factor of two; so a fit counts the answer as uncertain by its own size (`doubt`), and trusts features less that
hang on it. Without that, the weights exploit it, and drift is forecast to vanish: the digits DiT, 50 steps, 12 of them
computed, 35 dB instead of 46.

Source: gamma q of OmniCache, arXiv:2508.16212, Taylor and Adams-Bashforth forms are special cases of the combination;
the fit on a drifting path, the errors-in-variables form and the search are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from omnifx.path import Array, Path

SLACK_OF_SEARCH = 6
"""By how many computed steps a schedule under way may be ahead of an even one, or behind it."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a combination may use, and how its fit is regularised."""

    reuses: bool
    """The reuse graph's output, and the noise that the last computed step measured."""
    history: int = 4
    """>= 1: computed outputs."""
    latents: int = 1
    """>= 0: computed steps since which the way of the latents counts."""
    ridge: float = 1e-5
    """>= 0: pull towards extrapolation, as a share of each feature's energy."""
    doubt: float = 1.0
    """>= 0: by what share of itself the answer of computed outputs to drift is uncertain."""
    reuse_doubt: float = 0.1
    """>= 0: how uncertain the noise of older cuts is, per step of age, as a share of it."""
    landing: float = 1.0
    """0..1: what share of the drift a predicted step tries to take back."""


class Known(NamedTuple):
    """A computed step, as later ones see it."""

    step: int
    latents: Array
    output: Array
    doubt: float
    """Standard deviation of what is unknown of the output."""


class Weights(NamedTuple):
    """The combination of one predicted step: see `omnifx.plan.Combination`."""

    reuse: float
    noise: float
    outputs: tuple[float, ...]
    latents: tuple[float, ...]


@dataclass(frozen=True)
class State:
    """A generation before one of its steps."""

    drift: Array
    """Latents minus the recorded ones, as far as it is known."""
    variance: float = 0.0
    """Squared norm of what is unknown of the drift, in expectation."""
    known: tuple[Known, ...] = ()
    """Computed steps, newest first."""
    noise: Array | None = None
    """What the newest one measured."""
    noise_doubt: float = 0.0
    steps: tuple[Weights | None, ...] = ()
    """What was done so far; None where it was computed."""
    cost: float = 0.0
    """Drift over the norm of the latents."""
    past: tuple[tuple[Array, Array], ...] = ()
    """Drifts, and how wrong outputs were, at the last steps, newest first: what the solver remembers."""

    @property
    def size(self) -> float:
        """Norm of the drift, its unknown part included."""
        return math.sqrt(float(self.drift @ self.drift) + self.variance)

    @property
    def num_computed(self) -> int:
        """Computed steps so far."""
        return sum(step is None for step in self.steps)


@dataclass
class Forecast:
    """Follows generations of one recorded path.

    Args:
        path: What was recorded.
        features: What combinations may use.
    Cost: about 0.1 ms for a predicted step, on the host.
    """

    path: Path
    features: Features
    _norms: Array = field(init=False)
    _noise_sum: Array = field(init=False)

    def __post_init__(self) -> None:
        path, norms = self.path, np.linalg.norm(self.path.x, axis=1)
        self._norms = np.append(norms[1:], norms[-1] * path.growth[-1])
        self._noise_sum = np.cumsum(path.q, axis=0)

    def start(self) -> State:
        """Before the first step."""
        return State(np.zeros(self.path.x.shape[1]))

    def compute(self, state: State) -> State:
        """The step is computed."""
        k = len(state.steps)
        error = self.path.answer[k] * state.drift
        doubt = self.features.doubt * abs(self.path.answer[k]) * state.size
        noise, noise_doubt = None, 0.0
        if state.known and self.features.reuses:
            last = state.known[0].step
            noise = self._noise_of(last, k)
            noise_doubt = self.features.reuse_doubt * (k - last) * float(np.linalg.norm(noise))
        here = Known(k, self.path.x[k] + state.drift, self.path.o[k] + error, doubt)
        known = (here, *state.known)[: self.features.history]
        return self._moved(state, error, 0.0, None, known, noise, noise_doubt)

    def predict(self, state: State) -> State:
        """The step is a combination, with the weights of least squares."""
        k, features = len(state.steps), self.features
        columns, prior, doubts = self._columns(state)
        matrix, centre, unsure = np.stack(columns, axis=1), np.asarray(prior), np.asarray(doubts)
        step = self.path.b[k]
        target = self.path.o[k]
        if step:
            target = target - features.landing / step * self._carried(state)
        gram = matrix.T @ matrix
        pull = features.ridge * gram.diagonal() + 1e-300
        weights = np.linalg.solve(gram + np.diag(pull + unsure**2), matrix.T @ target + pull * centre)
        error = matrix @ weights - self.path.o[k]
        unknown = step**2 * float((weights * unsure) @ (weights * unsure))
        return self._moved(
            state, error, unknown, self._named(weights, state), state.known, state.noise, state.noise_doubt
        )

    def follow(self, computed: Sequence[int]) -> State:
        """The end of a generation that computes these steps; the first is among them."""
        state, chosen = self.start(), frozenset(computed)
        for k in range(self.path.num_steps):
            state = self.compute(state) if k in chosen else self.predict(state)
        return state

    def search(self, computed: int, *, longest: int | None = None) -> State:
        """The end of the generation of least final drift that computes this many steps, as far as a beam finds it.

        Of the generations that have computed equally many steps, the last and the one before equally long ago, only the
        best one is followed: the future sees little else of the past.

        Args:
            computed: 1 .. S.
            longest: Most predicted steps in a row; None: twice what an even spread has.

        Cost: about S * SLACK_OF_SEARCH * longest^2 predicted steps.
        """
        total = self.path.num_steps
        longest = longest or 2 * math.ceil(total / computed)
        layer: dict[tuple[int, int, int], State] = {(0, 0, 0): self.start()}
        for k in range(total):
            following: dict[tuple[int, int, int], State] = {}
            even = computed * (k + 1) / total
            for (used, gap, before), state in layer.items():
                moves = [((used + 1, 0, gap), self.compute)]
                if k and gap < longest:
                    moves.append(((used, gap + 1, before), self.predict))
                for key, move in moves:
                    left = total - k - 1
                    fits = key[0] + left >= computed and key[0] <= computed
                    if not fits or abs(key[0] - even) > SLACK_OF_SEARCH:
                        continue
                    moved = move(state)
                    if key not in following or moved.cost < following[key].cost:
                        following[key] = moved
            layer = following
        return min((s for s in layer.values() if s.num_computed == computed), key=lambda state: state.cost)

    def _columns(self, state: State) -> tuple[list[Array], list[float], list[float]]:
        """What the present step may combine, the weights of plain extrapolation, and what is unknown of each."""
        k, features = len(state.steps), self.features
        last, times = state.known[0].step, self.path.times
        before = state.known[1].step if len(state.known) > 1 else None
        columns: list[Array] = []
        prior: list[float] = []
        doubts: list[float] = []
        ahead = 0.0
        if before is not None and times[last] != times[before]:
            ahead = float((times[k] - times[last]) / (times[last] - times[before]))
        if features.reuses:
            noise = self._noise_of(last, k)
            columns.append(self.path.o[k] + self.path.answer[k] * state.drift + noise)
            prior.append(1.0)
            old = features.reuse_doubt * (k - last - 1) * float(np.linalg.norm(noise))
            doubts.append(old + features.doubt * abs(self.path.answer[k]) * state.size)
            if state.noise is not None:
                columns.append(state.noise)
                prior.append(-ahead)
                doubts.append(state.noise_doubt)
        for i, known in enumerate(state.known):
            columns.append(known.output)
            doubts.append(known.doubt)
            prior.append(0.0 if features.reuses else (1.0 + ahead if i == 0 else -ahead if i == 1 else 0.0))
        for known in state.known[: features.latents]:
            columns.append(self.path.x[k] + state.drift - known.latents)
            prior.append(0.0)
            doubts.append(0.0)
        return columns, prior, doubts

    def _named(self, weights: Array, state: State) -> Weights:
        rest = iter(map(float, weights))
        reuse = next(rest) if self.features.reuses else 0.0
        noise = next(rest) if self.features.reuses and state.noise is not None else 0.0
        outputs = tuple(_take(rest, len(state.known)))
        return Weights(reuse, noise, outputs, tuple(rest))

    def _noise_of(self, source: int, step: int) -> Array:
        """What reusing the cuts of `source` causes at `step`: nearly the sum of the noise of single steps."""
        return np.asarray(self._noise_sum[step] - self._noise_sum[source])

    def _carried(self, state: State) -> Array:
        """The drift behind the present step if its output is right."""
        k, path = len(state.steps), self.path
        drift = path.a[k] * state.drift
        for j, (before, error) in enumerate(state.past):
            drift = drift + path.past_x[k, j] * before + path.past_o[k, j] * error
        return np.asarray(drift)

    def _moved(
        self,
        state: State,
        error: Array,
        unknown: float,
        done: Weights | None,
        known: tuple[Known, ...],
        noise: Array | None,
        noise_doubt: float,
    ) -> State:
        k = len(state.steps)
        drift = self._carried(state) + self.path.b[k] * error
        past = ((state.drift, error), *state.past)[: self.path.depth]
        variance = self.path.growth[k] ** 2 * state.variance + unknown
        norm = self._norms[k]
        cost = math.sqrt(float(drift @ drift) + variance) / norm if norm else 0.0
        return State(drift, variance, known, noise, noise_doubt, (*state.steps, done), cost, past)


def _take(values: Iterator[float], number: int) -> Iterator[float]:
    for _ in range(number):
        yield next(values)
