"""Forecast a generation that computes some steps only: weights of its combinations, its drift, and its best schedule.

All of it is algebra on one recorded path (`omnifx.path`); the model is not called. At a step that is not computed, the
output is a linear combination of what is known then, with weights in closed form: the last computed outputs, how far
the latents have come since, and, if the network's reuse graph runs, its output and the noise measured last. What the
sampler does with an output that is a little wrong is known too, so the forecast follows how far the latents drift from
the recorded ones. The target of a fit is the output that would take the drift back, not the recorded one.

A solver may remember steps, and add fresh noise. What it remembers carries drift and errors of outputs on; noise is
the same with and without a cache, and carries nothing.

How an output that *is* computed answers to drifted latents is not recorded. It is taken to answer so that drift keeps
its share of the latents' norm: x' = a x + b o moves a perturbation d to (a + b J) d, and for a perturbation that looks
like data, (a + b J) is the ratio of the norms of a x + b o and x. That is exact for Gaussian data, and on trained
models it holds within a factor of two; so a fit counts the answer as uncertain by its own size (`doubt`), and trusts
features less that hang on it. Without that, the weights exploit it, and drift is forecast to vanish: the digits DiT,
50 steps, 12 of them computed, 35 dB instead of 46.

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
from omnifx.spreads import Schedule, longest_gap, nearby, spreads

LONGEST_GAP = 1.5
"""Most steps in a row that are predicted, as a multiple of the mean distance of computed steps. The forecast knows the
mean over samples, and a long gap may lose single ones: trained video model, 20 steps, 6 computed: 34.6 dB, with 2 here
32.4; the digits DiT does not mind."""

SLACK_OF_SEARCH = 6
"""By how many computed steps a schedule under way may be ahead of an even one, or behind it."""

FINE_GAPS = 6
"""Up to how many skipped steps in a row a search tells every length of the gap before the last computed step apart."""

BLUR = 1e-8
"""Share of a path's energy that a search leaves aside, to follow short vectors."""

MOST_FOLLOWED = 20_000
"""Steps that are followed to improve a schedule; a generation of 20 steps needs a tenth of it, one of 250 all."""

_Place = tuple[int, int, int]
"""Of a generation under way: steps computed, steps since the last of them, and before that, roughly."""


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
    size: float = 0.0
    """Norm of the drift, its unknown part included."""
    cost: float = 0.0
    """That over the norm of the latents."""
    known: tuple[Known, ...] = ()
    """Computed steps, newest first."""
    noise: Array | None = None
    """What the newest one measured."""
    noise_doubt: float = 0.0
    steps: tuple[Weights | None, ...] = ()
    """What was done so far; None where it was computed."""
    off: tuple[float, ...] = ()
    """How far the output of each step is from the recorded one, over its norm, as far as it is known."""
    past: tuple[tuple[Array, Array], ...] = ()
    """Drifts, and how wrong outputs were, at the last steps, newest first: what the solver remembers."""

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
    Cost: about 0.1 ms for a predicted step, on the host; in a search, a tenth of that.
    """

    path: Path
    features: Features
    _norms: Array = field(init=False)
    _noise_sum: Array = field(init=False)
    _output_norms: list[float] = field(init=False)

    def __post_init__(self) -> None:
        path, norms = self.path, np.linalg.norm(self.path.x, axis=1)
        self._norms = np.append(norms[1:], norms[-1] * path.growth[-1])
        self._noise_sum = np.cumsum(path.q, axis=0)
        self._output_norms = np.linalg.norm(path.o, axis=1).tolist()

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
        drifts = state.drift[None]
        moved = self._carried([state], drifts) + self.path.b[k] * error
        (end,) = self._ends([state], moved, np.zeros(1))
        past = ((state.drift, error), *state.past)[: self.path.depth]
        return State(
            *end,
            known=known,
            noise=noise,
            noise_doubt=noise_doubt,
            steps=(*state.steps, None),
            off=(*state.off, self._share_of(error, k)),
            past=past,
        )

    def predict(self, state: State) -> State:
        """The step is a combination, with the weights of least squares."""
        return self._predict_alike([state])[0]

    def follow(self, computed: Sequence[int]) -> State:
        """The end of a generation that computes these steps; the first is among them."""
        state, chosen = self.start(), frozenset(computed)
        for k in range(self.path.num_steps):
            state = self.compute(state) if k in chosen else self.predict(state)
        return state

    def search(self, computed: int, *, longest: int | None = None, simple: bool = False) -> State:
        """The end of the generation of least final drift that computes this many steps, as far as a beam finds it.

        Of the generations that have computed equally many steps, the last and the one before equally long ago, only the
        best one is followed: the future sees little else of the past.

        Args:
            computed: 1 .. S.
            longest: Most predicted steps in a row; None: `LONGEST_GAP` of an even spread's step.
            simple: Whether only simple spreads are compared, where forecasts say little of single steps.

        The beam's end and the best of simple spreads (`omnifx.spreads`) are then improved by moving one computed step
        at a time, as long as that helps, and the better one is taken.

        Cost: about S * SLACK_OF_SEARCH * longest^2 predicted steps for the beam, and up to four times `MOST_FOLLOWED`.
        """
        total = self.path.num_steps
        longest = longest or math.ceil(LONGEST_GAP * total / computed)
        small = Forecast(self.path.projected(BLUR), self.features)
        spread = [s for s in spreads(total, computed) if longest_gap(s, total) <= longest]
        if simple and spread:
            return min(self._follow_all(spread), key=lambda state: state.cost)
        starts = [_computed(small._beam(computed, longest))]
        if spread:
            starts.append(_computed(min(small._follow_all(spread), key=lambda state: state.cost)))
        ends = [self.follow(_computed(small._improved(start, longest))) for start in starts]
        return min(ends, key=lambda state: state.cost)

    def _improved(self, schedule: Schedule, longest: int) -> State:
        """The end of the best schedule that can be reached by moves that each lessen the final drift."""
        best, seen = self.follow(schedule), {schedule}
        while len(seen) * self.path.num_steps < MOST_FOLLOWED:
            near = [s for s in nearby(_computed(best), self.path.num_steps, longest) if s not in seen]
            seen.update(near)
            better = min(self._follow_all(near), key=lambda state: state.cost, default=best)
            if better.cost >= best.cost:
                break
            best = better
        return best

    def _follow_all(self, schedules: Sequence[Schedule]) -> list[State]:
        """`follow` of many schedules."""
        chosen = [frozenset(schedule) for schedule in schedules]
        states = [self.start()] * len(chosen)
        for k in range(self.path.num_steps):
            skipping = [i for i, steps in enumerate(chosen) if k not in steps]
            after = dict(zip(skipping, self._predict_all([states[i] for i in skipping]), strict=True))
            states = [after[i] if i in after else self.compute(state) for i, state in enumerate(states)]
        return states

    def _beam(self, computed: int, longest: int) -> State:
        total = self.path.num_steps
        coarse = max(1, longest // FINE_GAPS)
        layer: dict[_Place, State] = {(0, 0, 0): self.start()}
        for k in range(total):
            even, left = computed * (k + 1) / total, total - k - 1

            def allowed(used: int, even: float = even, left: int = left) -> bool:
                return computed - left <= used <= computed and abs(used - even) <= SLACK_OF_SEARCH

            best: dict[_Place, State] = {}
            skipped: dict[_Place, State] = {}
            for (used, gap, before), state in layer.items():
                place = (used + 1, 0, gap // coarse)
                if allowed(used + 1) and (place not in best or state.cost < best[place].cost):
                    best[place] = state
                if k and gap < longest and allowed(used):
                    skipped[used, gap + 1, before] = state
            layer = {place: self.compute(state) for place, state in best.items()}
            layer |= zip(skipped, self._predict_all(list(skipped.values())), strict=True)
        return min((s for s in layer.values() if s.num_computed == computed), key=lambda state: state.cost)

    def _predict_all(self, states: Sequence[State]) -> list[State]:
        """`predict` of many states before the same step."""
        alike: dict[tuple[int, bool], list[int]] = {}
        for i, state in enumerate(states):
            alike.setdefault((len(state.known), state.noise is None), []).append(i)
        found: dict[int, State] = {}
        for group in alike.values():
            found |= zip(group, self._predict_alike([states[i] for i in group]), strict=True)
        return [found[i] for i in range(len(states))]

    def _predict_alike(self, states: Sequence[State]) -> list[State]:
        """`predict` of states that know equally much, n of them at once."""
        path, features, k = self.path, self.features, len(states[0].steps)
        drifts = np.array([state.drift for state in states])  # [n, r]
        matrix, prior, unsure = self._columns(states, drifts)  # [n, c, r], [n, c], [n, c]
        carried = self._carried(states, drifts)
        step = path.b[k]
        target = path.o[k] - features.landing / step * carried if step else np.broadcast_to(path.o[k], drifts.shape)
        gram = matrix @ matrix.transpose(0, 2, 1)
        pull = features.ridge * np.einsum("ncc->nc", gram) + 1e-300
        np.einsum("ncc->nc", gram)[:] += pull + unsure**2
        right = (matrix @ target[..., None])[..., 0] + pull * prior
        weights = np.linalg.solve(gram, right[..., None])[..., 0]
        errors = np.einsum("nc,ncr->nr", weights, matrix) - path.o[k]
        unknown = step**2 * ((weights * unsure) ** 2).sum(1)
        ends = self._ends(states, carried + step * errors, unknown)
        return [
            State(
                *end,
                known=state.known,
                noise=state.noise,
                noise_doubt=state.noise_doubt,
                steps=(*state.steps, self._named(row, state)),
                off=(*state.off, self._share_of(error, k)),
                past=((state.drift, error), *state.past)[: path.depth],
            )
            for state, end, error, row in zip(states, ends, errors, weights.tolist(), strict=True)
        ]

    def _columns(self, states: Sequence[State], drifts: Array) -> tuple[Array, Array, Array]:
        """What the present step may combine, the weights of plain extrapolation, and what is unknown of each."""
        path, features, k = self.path, self.features, len(states[0].steps)
        count, known = len(states), len(states[0].known)
        last = np.array([state.known[0].step for state in states])
        before = np.array([state.known[min(1, known - 1)].step for state in states])
        gap = path.times[last] - path.times[before]
        ahead = np.where(gap == 0.0, 0.0, (path.times[k] - path.times[last]) / np.where(gap == 0.0, 1.0, gap))
        outputs = np.array([each.output for state in states for each in state.known]).reshape(count, known, -1)
        columns = [outputs]
        prior = np.zeros((count, known))
        unsure = [np.array([[each.doubt for each in state.known] for state in states])]
        priors = [prior]
        if not features.reuses:
            prior[:, 0] = 1.0 + ahead * (known > 1)
            prior[:, 1:2] = -ahead[:, None]
        else:
            noise = self._noise_sum[k] - self._noise_sum[last]
            old = features.reuse_doubt * (k - last - 1) * np.linalg.norm(noise, axis=1)
            sizes = np.array([state.size for state in states])
            reused = [(path.o[k] + path.answer[k] * drifts + noise)[:, None]]
            doubts = [(old + features.doubt * abs(path.answer[k]) * sizes)[:, None]]
            pulls = [np.ones((count, 1))]
            if states[0].noise is not None:
                reused.append(np.array([state.noise for state in states])[:, None])
                doubts.append(np.array([[state.noise_doubt] for state in states]))
                pulls.append(-ahead[:, None])
            columns, unsure, priors = [*reused, *columns], [*doubts, *unsure], [*pulls, *priors]
        if moved := min(known, features.latents):
            then = np.array([each.latents for state in states for each in state.known[:moved]])
            columns.append((path.x[k] + drifts)[:, None] - then.reshape(count, moved, -1))
            priors.append(np.zeros((count, moved)))
            unsure.append(np.zeros((count, moved)))
        return (
            np.concatenate(columns, axis=1),
            np.concatenate(priors, axis=1),
            np.concatenate(unsure, axis=1),
        )

    def _named(self, weights: list[float], state: State) -> Weights:
        first = int(self.features.reuses)
        own = first + int(first and state.noise is not None)
        rest = own + len(state.known)
        reuse, noise = weights[0] if first else 0.0, weights[1] if own > 1 else 0.0
        return Weights(reuse, noise, tuple(weights[own:rest]), tuple(weights[rest:]))

    def _share_of(self, error: Array, step: int) -> float:
        """The norm of an error over that of the output."""
        return math.sqrt(error @ error) / max(self._output_norms[step], 1e-300)

    def _noise_of(self, source: int, step: int) -> Array:
        """What reusing the cuts of `source` causes at `step`: nearly the sum of the noise of single steps."""
        return np.asarray(self._noise_sum[step] - self._noise_sum[source])

    def _carried(self, states: Sequence[State], drifts: Array) -> Array:
        """[n, r], the drifts behind the present step if its output is right."""
        k, path = len(states[0].steps), self.path
        carried = path.a[k] * drifts
        for j in range(len(states[0].past)):
            carried += path.past_x[k, j] * np.array([state.past[j][0] for state in states])
            carried += path.past_o[k, j] * np.array([state.past[j][1] for state in states])
        return np.asarray(carried)

    def _ends(
        self, states: Sequence[State], drifts: Array, unknown: Array
    ) -> Iterator[tuple[Array, float, float, float]]:
        """For each state that moves to one of the [n, r] drifts: drift, variance, size and cost."""
        k, path = len(states[0].steps), self.path
        variances = path.growth[k] ** 2 * np.array([state.variance for state in states]) + unknown
        sizes = np.sqrt(np.einsum("nr,nr->n", drifts, drifts) + variances)
        norm = self._norms[k]
        costs = sizes / norm if norm else 0.0 * sizes
        return zip(drifts, variances.tolist(), sizes.tolist(), costs.tolist(), strict=True)


def _computed(state: State) -> Schedule:
    return tuple(k for k, step in enumerate(state.steps) if step is None)
