"""A profile at other timesteps: another number of steps, or times that a sampler shifts with the resolution.

What a profile holds are inner products of vectors along the sampler's path. The path is nearly the same curve however
finely it is walked, so the vectors at other times are taken as linear combinations of the recorded ones, and their
inner products follow: W G W^T. The model is not called.

- Outputs o(t): cubic splines through the recorded ones, straight lines beyond them.
- Noise: q of a step is what reusing the cuts of the step before causes, nearly a sum over the way between both, so the
  sum of all q up to a time is interpolated, and differences are taken.
- Latents: a solver's step is x' = a x + b o (`omnifx.path`). Steps that share one output compose: with A_k the product
  of all a before step k, and C_k the sum of b_l / A_{l+1}, a step from t to t' is a = A' / A, b = A' (C' - C). That is
  exact for DDIM and Euler; A and C are read at the new times, and the new path is walked with them. Where steps are not
  such (the solver clips, adds noise, or remembers outputs), x(t) is interpolated like the outputs.

Source: ours; composition of DDIM steps, arXiv:2010.02502, of Euler steps, arXiv:2209.03003.
Loss: see docs/asking.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from omnifx.errors import ConfigError
from omnifx.path import Array
from omnifx.profile import Profile

TRAIN_STEPS = 1000
"""Timesteps that noise-predicting models are trained on, as the schedulers of diffusers count them."""

MOST_RESIDUAL = 0.01
"""Share of a solver's step, in the median, that may not be affine if the new path is to be walked by such steps. With
0.1 a DDIM that clips is walked: on the digits DiT from 20 steps to 50 at 2x 51.9 dB, where interpolation gives 53.3."""


def resampled(profile: Profile, *, timesteps: Sequence[float] | None = None, steps: int | None = None) -> Profile:
    """The profile as a generation at other timesteps would have given it, nearly.

    Args:
        profile: Measured at at least 4 timesteps that fall or rise throughout.
        timesteps: The new ones, as the model sees them: of at least 4 values, falling or rising as the measured ones.
        steps: Instead of `timesteps`, their number; they follow the rule of the measured ones, see `timesteps_like`.

    Returns: A profile of `len(timesteps)` steps. What cannot be interpolated is missing: changes of branches, priors,
        and what plans were found to be worth.
    Raises: ConfigError if not exactly one of `timesteps` and `steps` is given, they are no such times, the profile's
        steps follow no known rule, or it holds signals of a run-time policy.
    Cost: milliseconds on the host.
    """
    meta = profile.meta
    if (timesteps is None) == (steps is None):
        raise ConfigError("resampled: give either timesteps, or their number as steps.")
    if meta.unplannable:
        raise ConfigError(f"resampled: no plan can be made from the profile: {meta.unplannable}")
    old = np.asarray(meta.timesteps, dtype=np.float64)
    new = np.asarray(timesteps_like(meta.timesteps, steps) if steps is not None else timesteps, dtype=np.float64)
    for what, times in (("the profile's timesteps", old), ("timesteps", new)):
        _check_times(what, times, falling=bool(old[-1] < old[0]))
    path = None if profile.path is None else _path(profile.path, old, new)
    plain = torch.from_numpy(_blocks(_spline(old, new), old, new))
    return replace(
        profile,
        meta=meta.model_copy(
            update={
                "timesteps": tuple(new.tolist()),
                "measured": (),
                "num_lags": 0,
                "quality": (),
                "resampled_from": meta.resampled_from or len(old),
            }
        ),
        grams=(plain @ profile.grams.double() @ plain.T).float(),
        moves=_moves(profile, old, new),
        changes=None,
        prior=None,
        path=path,
    )


def timesteps_like(timesteps: Sequence[float], steps: int) -> tuple[float, ...]:
    """What `steps` timesteps a scheduler would have that had these ones.

    The rules that are known: "leading" (with an offset), "trailing" and "linspace" spacing of 1000 training steps, and
    flow matching on even sigmas, down to one step or to 1/1000, with any shift.

    Raises: ConfigError if `steps` is not >= 4, or the timesteps follow none of them.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < FEWEST_TIMES:
        raise ConfigError(f"steps must be a whole number >= {FEWEST_TIMES}, got {steps!r}.")
    old = np.asarray(timesteps, dtype=np.float64)
    for known, wanted in zip(_rules(old, len(old)), _rules(old, steps), strict=True):
        if known is not None and wanted is not None and np.allclose(known, old, rtol=1e-4, atol=1e-4 * abs(old[0])):
            return tuple(wanted.tolist())
    shown = ", ".join(f"{time:g}" for time in old[:3])
    raise ConfigError(
        f"the {len(old)} timesteps {shown}, ... follow no rule that is known, so those of {steps} steps are not known. "
        f"Give them as timesteps=: what your scheduler holds after set_timesteps({steps}), as the model sees them."
    )


FEWEST_TIMES = 4


def _rules(old: Array, steps: int) -> Iterator[Array | None]:
    """The timesteps of every rule, at this number of steps; None where the rule does not allow them."""
    k, total = np.arange(steps, dtype=np.float64), TRAIN_STEPS
    yield (steps - 1 - k) * (total // steps) + old[-1] if old[-1] in (0, 1) and steps <= total else None
    yield np.round(total - k * total / steps) - 1
    yield np.round(np.linspace(0, total - 1, steps))[::-1]
    for least in (lambda number: 1 / number, lambda number: 1 / total):
        was, now = (np.linspace(1.0, least(number), number) for number in (len(old), steps))
        middle = len(old) // 2
        sigma, seen = was[middle], old[middle] / old[0] if old[0] else 1.0
        shift = seen * (1 - sigma) / (sigma * (1 - seen)) if 0 < seen < 1 else 0.0
        yield old[0] * shift * now / (1 + (shift - 1) * now) if shift > 0 else None


def _check_times(what: str, times: Array, *, falling: bool) -> None:
    ways = np.diff(times) if times.ndim == 1 else np.zeros(1)
    if times.ndim != 1 or len(times) < FEWEST_TIMES or not np.isfinite(times).all():
        raise ConfigError(f"resampled: {what} must be at least {FEWEST_TIMES} finite numbers, got {times.tolist()}.")
    if not ((ways < 0) if falling else (ways > 0)).all():
        raise ConfigError(
            f"resampled: {what} must {'fall' if falling else 'rise'} throughout, like the measured ones, got "
            f"{times[:4].tolist()}, ...; samplers that call the model twice at a time cannot be interpolated. "
            "Calibrate at these steps."
        )


def _path(grams: Tensor, old: Array, new: Array) -> Tensor:
    """[runs, halves, 3 S', 3 S'] of the sampler's path.

    Between two recorded times lies what no interpolation can know, and a forecast must not take it for predictable. So
    each new output, and each new sum of noise, also gets a direction of its own, as long as what leaving out the
    recorded ones beside it does to the spline, in proportion to how far it lies from them.
    """
    size, count, outputs = len(old), len(new), _spline(old, new)
    a, b, residual = _solver(grams.sum((0, 1)).numpy(), size)
    weights = np.zeros((3 * count, 3 * size + 2 * count))
    weights[:, : 3 * size] = _blocks(outputs, old, new)
    weights[count : 2 * count, 3 * size : 3 * size + count] = np.eye(count)
    weights[2 * count :, 3 * size + count :] = np.diff(np.eye(count), axis=0, prepend=np.eye(count)[:1])
    if float(np.median(residual)) <= MOST_RESIDUAL and bool((a > 0.0).all()):
        _walk(weights, a, b, outputs)
    sums, found = np.tri(size), []
    for part in grams.flatten(0, 1).numpy():  # runs and halves
        known = part[size : 2 * size, size : 2 * size], sums @ part[2 * size :, 2 * size :] @ sums.T
        gram = np.zeros((weights.shape[1],) * 2)
        gram[: 3 * size, : 3 * size] = part
        gram[3 * size :, 3 * size :] = np.diag(np.concatenate([_unknown(each, old, new) for each in known]))
        found.append(weights @ gram @ weights.T)
    return torch.from_numpy(np.stack(found)).reshape(*grams.shape[:2], 3 * count, 3 * count)


def _solver(gram: Array, size: int) -> tuple[Array, Array, Array]:
    """For each step but the last, a and b of ``x' = a x + b o`` by least squares, and what that leaves of the step's
    length; no unit."""
    a, b, residual = np.ones(size - 1), np.zeros(size - 1), np.zeros(size - 1)
    for k in range(size - 1):
        known, aim = [k, size + k], gram[k + 1, k + 1]
        products, target = gram[np.ix_(known, known)], gram[known, k + 1]
        found = np.linalg.lstsq(products, target, rcond=None)[0]
        length = gram[k, k] - 2 * gram[k, k + 1] + aim
        left = aim - 2 * found @ target + found @ products @ found
        a[k], b[k] = found
        residual[k] = np.sqrt(max(left, 0.0) / length) if length > 0.0 else 0.0
    return a, b, residual


def _walk(weights: Array, a: Array, b: Array, outputs: Array) -> None:
    """Replace the new latents' weights by those of a solver that takes the new steps."""
    count = len(outputs)
    grown = np.concatenate([[0.0], np.cumsum(np.log(a))])  # log A at each step
    added = np.concatenate([[0.0], np.cumsum(b / np.exp(grown[1:]))])  # C
    grown, added = outputs @ grown, outputs @ added
    for k in range(count - 1):
        step = np.exp(grown[k + 1]) * (added[k + 1] - added[k])
        weights[k + 1] = np.exp(grown[k + 1] - grown[k]) * weights[k] + step * weights[count + k]


def _unknown(gram: Array, old: Array, new: Array) -> Array:
    """[S']: squared length of what is not known of each new vector, from [S, S] inner products of the recorded ones."""
    size = len(old)
    missed = np.zeros(size)
    for k in range(1, size - 1):
        others = np.delete(np.arange(size), k)
        off = np.zeros(size)
        off[others] = _spline(old[others], old[k : k + 1])[0]
        off[k] = -1.0
        missed[k] = off @ gram @ off
    missed[0], missed[-1] = missed[1], missed[-2]
    falling = old[-1] < old[0]
    at, of = (old[::-1], missed[::-1]) if falling else (old, missed)
    right = np.clip(np.searchsorted(at, new), 1, size - 1)
    share = (new - at[right - 1]) / (at[right] - at[right - 1])
    near = np.maximum(of[right - 1], of[right])
    return np.asarray(near * (UNKNOWN * 4 * np.abs(share * (1 - share))) ** 2)


UNKNOWN = 0.25
"""What is missed of an output in the middle between two recorded ones, as a share of what is missed of one between two
that are twice as far apart. Errors of smooth functions fall by 4 for straight lines."""


def _blocks(spline: Array, old: Array, new: Array) -> Array:
    """[3 S', 3 S]: latents and outputs are interpolated, and the noise's sum."""
    size, count = len(old), len(new)
    sums = spline @ np.tri(size)
    noise = np.diff(sums, axis=0, prepend=sums[:1])
    weights = np.zeros((3 * count, 3 * size))
    weights[:count, :size] = spline
    weights[count : 2 * count, size : 2 * size] = spline
    weights[2 * count :, 2 * size :] = noise
    return weights


def _spline(at: Array, new: Array) -> Array:
    """[S', S]: the weights that values at times `at` have in the natural cubic spline at `new`, beyond whose ends it
    goes on as a straight line."""
    order = np.argsort(at)
    at, size = at[order], len(at)
    gap = np.diff(at)
    system, right = np.eye(size), np.zeros((size, size))
    for i in range(1, size - 1):  # its second derivatives are continuous, and 0 at the ends
        system[i, i - 1 : i + 2] = gap[i - 1], 2 * (gap[i - 1] + gap[i]), gap[i]
        right[i, i - 1 : i + 2] = 6 / gap[i - 1], -6 / gap[i - 1] - 6 / gap[i], 6 / gap[i]
    bends = np.linalg.solve(system, right)
    values, rows = np.eye(size), []
    for time in new:
        inside = min(max(time, at[0]), at[-1])
        i = min(max(int(np.searchsorted(at, inside)) - 1, 0), size - 2)
        h, up, down = gap[i], (inside - at[i]) / gap[i], (at[i + 1] - inside) / gap[i]
        row = down * values[i] + up * values[i + 1]
        row = row + h**2 / 6 * ((down**3 - down) * bends[i] + (up**3 - up) * bends[i + 1])
        slope = (values[i + 1] - values[i]) / h
        slope = slope + h / 6 * ((1 - 3 * down**2) * bends[i] + (3 * up**2 - 1) * bends[i + 1])
        rows.append(row + (time - inside) * slope)
    weights = np.empty((len(new), size))
    weights[:, order] = np.stack(rows)
    return weights


def _moves(profile: Profile, old: Array, new: Array) -> Tensor:
    """[runs, S']: how far the latents move in each step, from the way they had come at each time."""
    order = np.argsort(old)
    ways = []
    for run in profile.moves.double().numpy():
        way = np.cumsum(run)
        at, found = old[order], way[order]
        inside = np.interp(new, at, found)
        for end, inner, beyond in ((0, 1, new < at[0]), (-1, -2, new > at[-1])):
            slope = (found[end] - found[inner]) / (at[end] - at[inner])
            inside = np.where(beyond, found[end] + slope * (new - at[end]), inside)
        ways.append(np.abs(np.diff(inside, prepend=inside[:1])))
    return torch.from_numpy(np.stack(ways)).float()


__all__ = ["resampled", "timesteps_like"]
