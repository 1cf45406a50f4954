"""Reuse every branch where the sampling trajectory bends least, and take the noise this causes off the output.

The schedule: the number of reuse steps follows from the speedup; which steps they are minimises the summed curvature
of the trajectory (`omnifx.trajectory`), exactly, by dynamic programming, with the first steps full, never three reuses
in a row, and every phase of the generation taking its share. The correction: a full step replays the cuts of the full
step before on its own input, so that q, the noise of reuse, is known there; a reuse step subtracts F(gamma q), with
gamma from the calibration and F a low-pass early and a high-pass late.

Source: OmniCache, arXiv:2508.16212 (ICCV 2025): curvature, at most two reuses in a row, budget spread over phases,
noise correction with low-pass early and high-pass late. The paper gives no code; what it leaves open we chose by
measurement, an eager simulation of reuse on the trained digits models (DiT with DDIM; PixArt flow model with Euler,
cfg 2). Figures are PSNR in dB against uncached samples, mean of 2 calibrations (8 samples each) with 64 other samples
each, at 2x / 2.5x fewer FLOPs; those beside the defaults are DiT 50 steps, then flow 50 steps. In short:

                                      DiT, 50        flow, 50       DiT, 20
    fewer steps                       44.9 / 41.8    44.0 / 40.7*   37.7 / 35.1
    reuse spread evenly, as FORA      46.1 / 43.4    44.4 / 41.9    41.3 / 38.4
    evenly, with our correction       48.3 / 47.3    51.2 / 50.9    46.1 / 42.3
    evenly, so, and 2 last full       48.5 / 46.9    56.3 / 56.7    45.5 / 42.3
    curvature, no correction          46.3 / 43.3    46.6 / 42.7    39.9 / 38.4
    curvature, correction (default)   49.4 / 46.8    58.0 / 54.0    46.6 / 42.3
    the same, filters forced on       47.9 / 45.2    54.5 / 50.5    45.5 / 41.3
    (* 32 samples)

So it is the correction that pays. Curvature gains 1 to 2 dB over an even spread at 2x, but loses up to 3 at 2.5x, where
the rules leave little to choose, and .5 on flow in 20 steps (47.2 against 47.7). Filters lose on these 8x8 images, and
"auto" leaves them off: the held-back error ranks 22 settings of the correction much as their PSNR does (rank
correlation -.81 on the DiT, -.98 on flow).
Cost: the plan is static. With a correction, a full step also replays the old cuts, at the price of a reuse step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from omnifx.errors import ConfigError
from omnifx.plan import COMPUTE, REUSE, Action, Correction, Plan
from omnifx.policy import Policy, check_speedup, refuse_speedup, register, reuse_steps_needed
from omnifx.profile import NUM_BANDS, NUM_HALVES, Profile
from omnifx.trajectory import CurvatureMethod, coordinates, curvature

Switch = Literal["auto", "off", "on"]
BAND_EDGES = tuple(band / NUM_BANDS for band in range(1, NUM_BANDS))
SWITCHES = (0.25, 0.5, 0.75)  # what is tried where the user does not say when low-pass becomes high-pass


@register
@dataclass(frozen=True, kw_only=True)
class OmniCache(Policy):
    """Curvature decides when to reuse; calibrated noise correction repairs the output.

    Raises: ConfigError if an option is out of its range.
    """

    name: ClassVar[str] = "omnicache"
    most_speedup: ClassVar[float] = 3.0  # one full step in three
    uses_noise: ClassVar[bool] = True

    num_warmup_steps: int = 1
    """>= 1: first steps that are always full. 2 gains .2 / .3 on the DiT and nothing on flow, but
    forbids 2.5x in 20 steps; 3 and 4 lose."""
    max_reuse_run: int = 2
    """1 or 2: reuse steps in a row; the paper's rule is "never three"."""
    num_phases: int = 5
    """>= 1: parts of the generation that each take their share of the reuses. 1 (no spread) loses 2.5 on flow at 2x,
    and is equal elsewhere; 10 is equal."""
    num_final_steps: int = 2
    """>= 0: last steps that reuse only if the budget cannot be met without them. 2: 49.4 / 46.8, 58.0 / 54.0; 0: 49.3 /
    46.4, 51.1 / 50.1; 1: 49.8 / 47.0, 58.1 / 54.6, but 3.2 less than 2 on the DiT in 20 steps at 2x; 3: 49.8 / 46.8,
    55.3 / 54.0."""
    second_reuse_weight: float = 2.0
    """1..100: what the curvature of a second reuse in a row counts, for its cuts are twice as old. 1 loses .5 / 1.0 on
    the DiT, 4.4 / .3 on flow; 3 is equal to 2."""
    curvature: CurvatureMethod = "fit"
    """How the bend of the trajectory is measured. "menger" is noisier: -.1 / -.8, -.5 / +.8, and -2.9 on the DiT in 20
    steps at 2x."""
    curvature_window: int = 5
    """Odd, >= 3: points that "fit" looks at. 7 loses .3 / 1.5 on the DiT."""
    correction: Switch = "auto"
    """"auto": at the steps where it lowers the held-back error. Off: 46.3 / 43.3, 46.6 / 42.7."""
    filter: Switch = "auto"
    """"auto": where it lowers the held-back error further, which it never did here; "on": with every correction."""
    filter_cutoff: float | None = None
    """A band edge, as a share of Nyquist; None: the one of least held-back error."""
    filter_switch: float | None = None
    """0..1: share of the steps that are low-passed, not high-passed; None: the one of least held-back error."""
    max_gamma: float = 2.5
    """0..4: the largest ratio of one step's noise to the last known one. A second reuse has noise about twice the
    first's, so a bound of 1.2 loses .2 / .7 and .9 / 4.2; 4 is equal."""
    min_gain: float = 0.02
    """0..1: least share of the held-back squared error that a correction must take away, at a step and on average. 0 is
    equal within .1, .1 loses .2 / .3 and .3 / .6; above 0 so that chance alone turns nothing on."""

    def __post_init__(self) -> None:
        _check_count("num_warmup_steps", self.num_warmup_steps, 1)
        _check_count("num_final_steps", self.num_final_steps, 0)
        _check_count("num_phases", self.num_phases, 1)
        if self.max_reuse_run not in (1, 2):
            raise ConfigError(f"max_reuse_run must be 1 or 2 (never three in a row), got {self.max_reuse_run!r}.")
        _check_share("min_gain", self.min_gain)
        _check_number("second_reuse_weight", self.second_reuse_weight, 1.0, 100.0)
        _check_number("max_gamma", self.max_gamma, 0.0, 4.0)
        if self.curvature not in get_args(CurvatureMethod):
            raise ConfigError(f"curvature must be one of {list(get_args(CurvatureMethod))}, got {self.curvature!r}.")
        _check_count("curvature_window", self.curvature_window, 3)
        if self.curvature_window % 2 == 0:
            raise ConfigError(f"curvature_window must be odd (points), got {self.curvature_window!r}.")
        for option in ("correction", "filter"):
            if (value := getattr(self, option)) not in get_args(Switch):
                raise ConfigError(f"{option} must be one of {list(get_args(Switch))}, got {value!r}.")
        if self.filter_cutoff is not None and self.filter_cutoff not in BAND_EDGES:
            raise ConfigError(f"filter_cutoff must be one of {list(BAND_EDGES)} or None, got {self.filter_cutoff!r}.")
        if self.filter_switch is not None:
            _check_share("filter_switch", self.filter_switch)

    def plan(self, profile: Profile, *, speedup: float | None = None) -> Plan:
        wanted = check_speedup(speedup, default=2.0)
        num_steps = profile.num_steps
        num_reuses = reuse_steps_needed(profile, wanted)
        most = self.most_reuses(num_steps)
        if speedup is None:
            num_reuses = min(num_reuses, most)  # nobody asked for a number, so the most there is will do
        if num_reuses > most:
            dense = [COMPUTE] * (num_steps - most) + [REUSE] * most  # its cost is all that counts
            first = min(self.num_warmup_steps, num_steps)
            why = f"first {first} steps full, at most {self.max_reuse_run} reuses in a row"
            raise refuse_speedup(self.name, wanted, Plan.uniform(profile, dense, policy=self.name).speedup, why)
        actions = self.schedule(self.bend(profile), num_reuses)
        corrections, notes = self._correct(profile, actions)
        return Plan.uniform(
            profile,
            actions,
            policy=self.name,
            policy_options=self.options,
            corrections=corrections,
            notes=notes,
        )

    def bend(self, profile: Profile) -> Tensor:
        """Curvature of the measured trajectory at each step, [S] float64, no unit; the mean over runs and streams."""
        grams = profile.gram("x", "x").sum(2).flatten(0, 1)
        bends = [curvature(coordinates(gram), method=self.curvature, window=self.curvature_window) for gram in grams]
        return torch.stack(bends).mean(0)

    def most_reuses(self, num_steps: int) -> int:
        """How many of `num_steps` steps can reuse under the rules."""
        return _most_reuses(num_steps - self.num_warmup_steps, self.max_reuse_run)

    def schedule(self, bend: Tensor, num_reuses: int) -> list[Action]:
        """The actions of least summed curvature that reuse exactly `num_reuses` times and keep every rule.

        Args:
            bend: [S], >= 0, the cost of reusing at each step.
            num_reuses: 0 .. `most_reuses(S)`.

        Returns: S actions.
        Cost: O(S * num_reuses * max_reuse_run) on the host.
        """
        num_steps = len(bend)
        even = _ramp(num_steps, num_reuses, self.num_warmup_steps, self.num_final_steps)
        for slack in itertools.count():  # the phases' shares give way where they contradict the rules
            bounds = self._bounds(even, num_reuses, slack)
            if (actions := self._cheapest(bend.tolist(), even, bounds, num_reuses)) is not None:
                return actions
        raise AssertionError("unreachable: with enough slack every schedule is allowed")

    def _bounds(self, even: Sequence[float], num_reuses: int, slack: int) -> list[tuple[int, int]]:
        """Fewest and most reuses among the first k steps, for k = 0 .. S: the phases' shares, at their ends."""
        num_steps, first = len(even) - 1, self.num_warmup_steps
        bounds = [(0, num_reuses)] * (num_steps + 1)
        for phase in range(1, self.num_phases):
            end = first + round((num_steps - self.num_final_steps - first) * phase / self.num_phases)
            if first < end < num_steps:
                can = _most_reuses(end - first, self.max_reuse_run)
                must = num_reuses - _most_reuses(num_steps - end, self.max_reuse_run)
                share = min(max(even[end], must), can)
                bounds[end] = (math.floor(share) - slack, math.ceil(share) + slack)
        return bounds

    def _cheapest(
        self, bend: Sequence[float], even: Sequence[float], bounds: Sequence[tuple[int, int]], num_reuses: int
    ) -> list[Action] | None:
        # A state is (reuses in a row so far, reuses in all so far). Equal curvatures are common (a straight path), so
        # the distance from the even spread decides between schedules that cost the same.
        # Before all, the last steps reuse as little as the budget allows.
        final = len(bend) - self.num_final_steps
        best: dict[tuple[int, int], tuple[int, float, float]] = {(0, 0): (0, 0.0, 0.0)}
        came_from: list[dict[tuple[int, int], tuple[int, int]]] = []
        for step, cost in enumerate(bend):
            following: dict[tuple[int, int], tuple[int, float, float]] = {}
            origin: dict[tuple[int, int], tuple[int, int]] = {}
            low, high = bounds[step + 1]
            for (run, count), (spent, bent, uneven) in best.items():
                options = [((0, count), spent, bent)]
                if step >= self.num_warmup_steps and run < self.max_reuse_run and count < num_reuses:
                    weight = 1.0 if run == 0 else self.second_reuse_weight
                    late = (run + 1) * (step >= final)  # the second in a row counts twice: its cuts are twice as old
                    options.append(((run + 1, count + 1), spent + late, bent + weight * cost))
                for state, late, turns in options:
                    if not low <= state[1] <= high:
                        continue
                    value = (late, turns, uneven + (state[1] - even[step + 1]) ** 2)
                    if state not in following or value < following[state]:
                        following[state], origin[state] = value, (run, count)
            best = following
            came_from.append(origin)
        ends = [state for state in best if state[1] == num_reuses]
        if not ends:
            return None
        state = min(ends, key=lambda end: best[end])
        actions: list[Action] = []
        for origin in reversed(came_from):
            actions.append(REUSE if state[0] else COMPUTE)
            state = origin[state]
        return actions[::-1]

    def _correct(self, profile: Profile, actions: Sequence[Action]) -> tuple[list[Correction | None], list[str]]:
        nothing: list[Correction | None] = [None] * len(actions)
        if self.correction == "off":
            return nothing, ["Noise correction is off, as asked."]
        data = _split(profile)
        sites = [site for site in _sites(actions) if site.energy(data.held_back) > 0.0]
        if not sites:
            return nothing, ["No reuse step with noise follows two full steps; there is nothing to correct."]
        plain = self._candidate(sites, data, None)
        filtered = [self._candidate(sites, data, f) for f in self._filters(profile, len(actions))]
        best_filtered = min(filtered, key=lambda candidate: candidate.error, default=None)
        chosen = plain
        if best_filtered is not None and (self.filter == "on" or best_filtered.error < plain.error):
            chosen = best_filtered
        keep = self.correction == "on" or chosen.error <= 1.0 - self.min_gain
        notes = [
            f"Held back: {data.held_back_is}. Mean squared error of a reuse step there, as a share of its noise:",
            "Without correction: 1.000.",
            f"With correction, no filter: {plain.error:.3f}.",
        ]
        if best_filtered is not None and best_filtered.filter is not None:
            cutoff, switch = best_filtered.filter
            notes.append(
                f"With correction, low-pass before step {switch} and high-pass from there on, "
                f"cutoff {cutoff:g} of Nyquist: {best_filtered.error:.3f}."
            )
        else:
            why = "off, as asked" if self.filter == "off" else "the output has no grid"
            notes.append(f"With correction and filter: not tried ({why}).")
        if not keep:
            gain = 1.0 - chosen.error
            notes.append(f"Correction left off: it takes away {gain:.1%}, less than min_gain ({self.min_gain:.0%}).")
            return nothing, notes
        final = self._candidate(sites, data, chosen.filter, gram=data.everything, like=chosen)
        corrections = nothing
        for site, gamma in zip(sites, final.gammas, strict=True):
            if gamma is not None:
                corrections[site.step] = _correction(gamma, site.step, chosen.filter)
        on = sum(gamma is not None for gamma in final.gammas)
        notes.append(
            f"Correction on at {on} of {len(sites)} reuse steps that could have one, "
            + ("filtered" if chosen.filter else "unfiltered")
            + "."
        )
        return corrections, notes

    def _filters(self, profile: Profile, num_steps: int) -> list[_Filter]:
        if self.filter == "off" or not profile.meta.filter_axes:
            return []
        cutoffs = BAND_EDGES if self.filter_cutoff is None else (self.filter_cutoff,)
        switches = SWITCHES if self.filter_switch is None else (self.filter_switch,)
        return [_Filter(cutoff, round(switch * num_steps)) for cutoff in cutoffs for switch in switches]

    def _candidate(
        self,
        sites: Sequence[_Site],
        data: _Split,
        filter: _Filter | None,
        *,
        gram: Tensor | None = None,
        like: _Candidate | None = None,
    ) -> _Candidate:
        """Fit every gamma and judge it on what is held back; `like` fixes which steps are corrected at all."""
        gammas: list[float | None] = []
        error = carried = 0.0
        for i, site in enumerate(sites):
            if site.is_first:
                carried = 1.0  # the noise as the full step measured it; corrections scale it on
            bands = _bands(site.step, filter)
            cross, energy = site.products(data.fit if gram is None else gram, bands)
            gamma = cross / (carried * energy) if carried * energy > 0.0 else 0.0
            gamma = min(max(gamma, 0.0), self.max_gamma)
            cross, energy = site.products(data.held_back, bands)
            factor, noise = carried * gamma, site.energy(data.held_back)
            left = noise - 2 * factor * cross + factor**2 * energy
            if like is not None:
                helps = like.gammas[i] is not None
            else:
                helps = self.correction == "on" or left < noise * (1.0 - self.min_gain)
            if gamma > 0.0 and helps:
                gammas.append(gamma)
                carried = factor
                error += left / noise
            else:
                gammas.append(None)
                error += 1.0
        return _Candidate(filter, tuple(gammas), error / len(sites))


class _Filter(NamedTuple):
    cutoff: float
    switch_step: int  # low-pass before, high-pass from here on


class _Candidate(NamedTuple):
    filter: _Filter | None
    gammas: tuple[float | None, ...]  # one for each site
    error: float  # held back, squared, as a share of each site's noise; mean over the sites


class _Site(NamedTuple):
    """A reuse step that can be corrected: its noise and the noise last measured, as ranges of recorded q.

    The recording has the noise of cuts that are one step old. Branches add to the trunk, so the output is nearly linear
    in the cuts, and the noise of cuts that are L steps old is the sum of the last L recorded ones. On the digits models
    the median error of that sum is 2% (flow) and 5% (DiT) for L = 2, 4% and 8% for L = 3, at 50 steps.
    """

    step: int
    target: slice  # this step's noise: from the step after the last full one to this one
    source: slice  # what the last full step measured: from the step after the full one before it, to it
    is_first: bool  # of its run of reuses

    def products(self, gram: Tensor, bands: slice) -> tuple[float, float]:
        """<noise, measured> and <measured, measured> in `bands`; gram is [NUM_BANDS, S, S]."""
        kept = gram[bands]
        return float(kept[:, self.target, self.source].sum()), float(kept[:, self.source, self.source].sum())

    def energy(self, gram: Tensor) -> float:
        return float(gram[:, self.target, self.target].sum())


class _Split(NamedTuple):
    """<q, q>, [NUM_BANDS, S, S], summed over runs and streams: to fit gammas on, to judge them by, and both."""

    fit: Tensor
    held_back: Tensor
    everything: Tensor
    held_back_is: str


def _split(profile: Profile) -> _Split:
    halves = torch.stack([profile.gram("q", "q", half=half).sum(1) for half in range(NUM_HALVES)])  # [2, R, band, S, S]
    everything = halves.sum((0, 1))
    if (runs := profile.meta.num_runs) >= 3:
        held = max(1, runs // 3)
        by_run = halves.sum(0)
        return _Split(by_run[:-held].sum(0), by_run[-held:].sum(0), everything, f"{held} of {runs} runs")
    by_half = halves.sum(1)
    return _Split(by_half[0], by_half[1], everything, "one half of the frequencies")


def _sites(actions: Sequence[Action]) -> Iterator[_Site]:
    last_full, source = -1, None
    for step, action in enumerate(actions):
        if action == COMPUTE:
            source = slice(last_full + 1, step + 1) if last_full >= 0 else None
            last_full = step
        elif source is not None:
            yield _Site(step, slice(last_full + 1, step + 1), source, step == last_full + 1)


def _bands(step: int, filter: _Filter | None) -> slice:
    if filter is None:
        return slice(None)
    edge = round(filter.cutoff * NUM_BANDS)
    return slice(None, edge) if step < filter.switch_step else slice(edge, None)


def _correction(gamma: float, step: int, filter: _Filter | None) -> Correction:
    if filter is None:
        return Correction(gamma=gamma)
    return Correction(gamma=gamma, filter="low" if step < filter.switch_step else "high", cutoff=filter.cutoff)


def _most_reuses(num_steps: int, max_run: int) -> int:
    return max(0, num_steps - num_steps // (max_run + 1)) if num_steps > 0 else 0


def _ramp(num_steps: int, num_reuses: int, warmup: int, final: int) -> list[float]:
    """Reuses among the first k steps, k = 0 .. S, if the steps between the first and the last shared them evenly."""
    between = max(1, num_steps - warmup - final)
    return [num_reuses * min(max(0, k - warmup), between) / between for k in range(num_steps + 1)]


def _check_count(option: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{option} must be a whole number >= {least}, got {value!r}.")


def _check_share(option: str, value: object) -> None:
    _check_number(option, value, 0.0, 1.0)


def _check_number(option: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{option} must be a number in [{low:g}, {high:g}], got {value!r}.")
