"""The path of a sampler through its latents: what its solver does with the model's outputs, found out by regression.

A solver's step is affine in its latents and in the model's outputs, x' = a x + b o; solvers of higher order also use
latents and outputs of earlier steps, and stochastic ones add noise that does not depend on either. With classifier-free
guidance o is a mixture of the outputs of several streams (calls with the same latents, or equal parts of one batch),
o = sum_p s_p o_p with sum_p s_p = 1. Only this mixture moves the latents, so only its errors count, and it is what a
profile keeps as `Profile.path`: inner products of the latents x_0 .. x_{S-1}, the mixtures o_0 .. o_{S-1}, and the
mixtures q_0 .. q_{S-1} of what reuse would have caused.

Neither the sampler nor its guidance scale need be known: the s_p, a and b follow from the recorded latents by least
squares. Where a solver clips or adds noise, what is left over is `Path.residual`.

Solvers with a memory: DPM-Solver++, arXiv:2211.01095, UniPC, arXiv:2302.04867.
Source: that the scalars follow from recorded calls is ours; guidance, arXiv:2207.12598.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from omnifx.recording import Recorder

Array = npt.NDArray[np.float64]

MOST_REMEMBERED = 2
"""Steps before the present one whose latents and outputs a solver may use; UniPC of second order uses two."""

CLEAN = 1e-3
"""Share of a step's length that a solver may leave unexplained, as rounding does."""

UNEXPLAINED = 0.3
"""Share of a step's length, in the median over steps, from which on what is left over decides: fresh noise, or
clips."""

LASTING = 0.5
"""Cosine of what is left over in a step and in the one before, in the median over steps, from which on it is no fresh
noise but clips, which mostly hit the same elements again: about 0, and .9, on the digits DiT."""

CLEARER = 0.1
"""What share of the residual a memory must leave, to be believed."""

MOST_PARTS = 3
"""Equal parts of a batch that are told apart: guidance by one more, or by two more outputs."""


def path_of(steps: Sequence[Sequence[Tensor]], recorder: Recorder) -> Tensor | None:
    """Inner products of a generation's path.

    Args:
        steps: For each step and stream, the [3, n] vectors that `recorder` kept.
        recorder: What kept them.

    Returns: [NUM_HALVES, 3 S, 3 S], float64, on the host; None if latents and outputs cannot be compared.
    """
    if not recorder.comparable:
        return None
    first = steps[0][0]
    blocks = next((p for p in _parts(recorder) if p == 1 or _has_equal(recorder.split(first, p))), 1)
    parts = [torch.cat([recorder.split(vectors, blocks) for vectors in streams]) for streams in steps]  # [p, 3, m]
    latents = torch.stack([part[0, 0] for part in parts])
    shares = guidance(latents, [part[:, 1] for part in parts])
    mixed = [torch.einsum("p,pvm->vm", shares.to(part), part[:, 1:]) for part in parts]
    vectors = torch.cat([latents, *torch.stack(mixed, dim=1)])
    return recorder.half_grams(vectors, blocks)


def guidance(latents: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """What share each part's output has in a sampler's steps.

    Args:
        latents: [S, m].
        outputs: S of [p, m], the outputs of p parts at the same latents.

    Returns: [p], float64, on the host; their sum is 1. The median over the steps; equal shares if nothing can be told.
    """
    number = outputs[0].shape[0]
    if number == 1:
        return torch.ones(1, dtype=torch.float64)
    found = []
    columns = [torch.cat([now[None], part]).double() for now, part in zip(latents, outputs, strict=True)]
    for k in range(len(columns) - 1):
        known = torch.cat(columns[max(0, k - MOST_REMEMBERED) : k + 1][::-1])
        weights = _least_squares(known.T.cpu().numpy(), latents[k + 1].double().cpu().numpy())[1 : 1 + number]
        if abs(total := weights.sum()) > 1e-8 * np.abs(weights).sum():
            found.append(torch.as_tensor(weights / total))
    if not found:
        return torch.full((number,), 1.0 / number, dtype=torch.float64)
    shares = torch.stack(found).median(0).values
    return shares / shares.sum()


@dataclass(frozen=True)
class Path:
    """A recorded path, in coordinates of its own span: inner products are those of the recorded vectors.

    Attributes:
        x, o, q: [S, r], latents, outputs and noise; r <= 3 S.
        a, b: [S], the solver's step ``x_{k+1} = a x_k + b o_k + sum_j (past_x_j x_{k-1-j} + past_o_j o_{k-1-j})``;
        those of the last step, whose result nobody saw, are those of the step before.
        residual: [S], what the solver's step does beside that (clips, fresh noise), over the length of the step; no
        unit.
        lasting: Cosine of what a step does beside that to what the step before did, in the median over steps; no unit.
        times: [S], the timesteps, in the model's units.
        past_x, past_o: [S, depth], what the solver remembers; depth 0 if nothing.
        growth: [S], norm of the step's result, what is left over aside, over that of its latents: what a step makes
        of a perturbation that looks like data. With fresh noise the mean of that and of what it makes of noise, which
        is measured: outputs answer to the noise of the step before, and errors of outputs are something of both.
        answer: [S], how outputs follow latents that drift: see `omnifx.forecast`.
    """

    x: Array
    o: Array
    q: Array
    a: Array
    b: Array
    residual: Array
    lasting: float
    times: Array
    past_x: Array
    past_o: Array
    growth: Array
    answer: Array

    @classmethod
    def of(cls, gram: Tensor, times: Sequence[float]) -> Path:
        """From [3 S, 3 S] inner products (sums over halves and runs, or one of them) and S >= 3 timesteps."""
        steps = len(times)
        values, vectors = np.linalg.eigh(gram.double().numpy())
        kept = values > max(values[-1], 0.0) * 1e-15
        coordinates = vectors[:, kept] * np.sqrt(values[kept])
        x, o, q = coordinates[:steps], coordinates[steps : 2 * steps], coordinates[2 * steps :]
        return cls.through(x, o, q, times)

    @classmethod
    def through(cls, x: Array, o: Array, q: Array, times: Sequence[float]) -> Path:
        """From [S, r] vectors; S >= 3.

        A solver is taken to remember as few steps as explain what it did, and none where no memory does: noise then
        hides it, and its effect is about that of the present output.
        """
        fits = [_Solver.fit(x, o, depth) for depth in range(MOST_REMEMBERED + 1)]
        plain = fits[0]
        clean = (fit for fit in fits if np.median(fit.residual) <= max(CLEAN, CLEARER * np.median(plain.residual)))
        solver = next(clean, plain)
        norms = np.linalg.norm(x, axis=1)
        growth = solver.lengths / np.maximum(norms, np.finfo(np.float64).tiny)
        if _is_noise(solver):
            growth = (growth + np.clip(_kept_noise(x, o, plain), 0.0, growth)) / 2
        answer = np.where(plain.b == 0.0, 0.0, (growth - plain.a) / np.where(plain.b == 0.0, 1.0, plain.b))
        return cls(
            x,
            o,
            q,
            solver.a,
            solver.b,
            solver.residual,
            solver.lasting,
            np.asarray(times, dtype=np.float64),
            solver.past_x,
            solver.past_o,
            growth,
            answer,
        )

    def projected(self, share: float) -> Path:
        """The path in its leading directions: all but `share` of the energy of latents, outputs and noise."""
        vectors = np.concatenate([self.x, self.o, self.q])
        values, directions = np.linalg.eigh(vectors.T @ vectors)
        kept = directions[:, np.cumsum(values) > share * values.sum()]
        return replace(self, x=self.x @ kept, o=self.o @ kept, q=self.q @ kept)

    def amplified(self, times: float) -> Path:
        """The path if a drift of the first step grows by `times` more until the end, evenly over the steps."""
        plain = np.where(self.b == 0.0, 1.0, self.b)
        growth = self.growth * times ** (1.0 / self.num_steps)
        return replace(
            self, growth=growth, answer=self.answer + np.where(self.b == 0.0, 0.0, growth - self.growth) / plain
        )

    @property
    def depth(self) -> int:
        """How many steps the solver remembers."""
        return int(self.past_x.shape[1])

    @property
    def is_noisy(self) -> bool:
        """Whether most of what the sampler does is to add fresh noise."""
        return _is_noise(self)

    @property
    def is_clipped(self) -> bool:
        """Whether most of what the sampler does, beside what is affine, lasts from step to step, as clips do."""
        return bool(np.median(self.residual) > UNEXPLAINED) and not self.is_noisy

    @property
    def num_steps(self) -> int:
        """Number of steps."""
        return len(self.times)


class _Solver(NamedTuple):
    """What a solver does that remembers so many steps: see `Path`."""

    a: Array
    b: Array
    past_x: Array
    past_o: Array
    residual: Array
    lasting: float
    lengths: Array
    """[S], norms of the steps' results, what is left over aside."""

    @classmethod
    def fit(cls, x: Array, o: Array, depth: int) -> _Solver:
        steps = len(x)
        weights = np.zeros((steps, 2, depth + 1))
        residual, lengths, left = np.zeros(steps), np.zeros(steps), np.zeros_like(x)
        for k in range(steps - 1):
            known = min(k, depth) + 1
            columns = np.concatenate([x[k - known + 1 : k + 1][::-1], o[k - known + 1 : k + 1][::-1]]).T
            found = _least_squares(columns, x[k + 1])
            weights[k, :, :known] = found.reshape(2, known)
            made = columns @ found
            length = float(np.linalg.norm(x[k + 1] - x[k]))
            left[k] = x[k + 1] - made
            residual[k] = np.linalg.norm(left[k]) / length if length else 0.0
            lengths[k] = np.linalg.norm(made)
        weights[-1], residual[-1] = weights[-2], residual[-2]
        lengths[-1] = lengths[-2] * np.linalg.norm(x[-1]) / max(float(np.linalg.norm(x[-2])), 1e-300)
        past_x, past_o = weights[:, 0, 1:], weights[:, 1, 1:]
        return cls(weights[:, 0, 0], weights[:, 1, 0], past_x, past_o, residual, _lasting(left[:-1]), lengths)


def _lasting(left: Array) -> float:
    """The median cosine of successive rows; 0 if there are none."""
    norms = np.linalg.norm(left, axis=1)
    products = norms[1:] * norms[:-1]
    cosines = np.einsum("kr,kr->k", left[1:], left[:-1]) / np.where(products == 0.0, 1.0, products)
    return float(np.median(cosines)) if len(cosines) else 0.0


def _is_noise(found: Path | _Solver) -> bool:
    """Whether most of a solver's steps is fresh noise."""
    return bool(np.median(found.residual) > UNEXPLAINED) and found.lasting < LASTING


def _kept_noise(x: Array, o: Array, solver: _Solver) -> Array:
    """[S], what share of the noise that the step before added is left after a step; 1 for the first."""
    kept = np.ones(len(x))
    for k in range(1, len(x)):
        made = solver.a[k - 1] * x[k - 1] + solver.b[k - 1] * o[k - 1]
        answer = _least_squares(np.stack([made, o[k - 1], x[k] - made], axis=1), o[k])[2]
        kept[k] = solver.a[k] + solver.b[k] * answer
    return kept


def _least_squares(columns: Array, target: Array) -> Array:
    """Weights of the [m, n] columns; the smallest ones if several do."""
    scale = np.maximum(np.linalg.norm(columns, axis=0), 1e-300)
    found, *_ = np.linalg.lstsq(columns / scale, target, rcond=1e-7)
    return np.asarray(found / scale)


def _parts(recorder: Recorder) -> tuple[int, ...]:
    """Numbers of equal parts that the batch may have, the largest first."""
    if recorder.sketched:
        return (recorder.blocks, 1) if recorder.blocks > 1 else (1,)
    return tuple(p for p in range(MOST_PARTS, 0, -1) if recorder.grid.shape[0] % p == 0)


def _has_equal(parts: Tensor) -> bool:
    """Whether all [p, 3, m] parts have the same latents."""
    return bool((parts[1:, 0] == parts[0, 0]).all())
