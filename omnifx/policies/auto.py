"""Compute the steps that matter most, and forecast the model's output at the others.

A step that is not computed gives a linear combination of what is known: the outputs of the last computed steps and how
far the latents have come since; optionally also the output of the reuse graph and the noise that the last computed step
measured. The weights of every step are fitted in closed form on one recorded generation, so that the sampler's path,
not the single output, comes out right; which steps are computed is searched on the same recording, by what forecasts
say of the final latents (`omnifx.forecast`). Neither costs a call of the model, so the first generation, which runs in
full anyway, yields the plan.

Without the reuse graph a step is a handful of elementwise operations, no cut is kept, and computed steps run the plain
graph (or, in the process that recorded, the one that did). With it, each step costs about 1 to 5% of a computed one.

Source: ours. It contains as special cases: OmniCache's correction gamma q (arXiv:2508.16212), Taylor extrapolation
(TaylorSeer, arXiv:2503.06923) of the whole output, and reuse (FORA, arXiv:2407.01425).
Defaults were chosen by an eager simulation on the trained digits models, calibrated on 8 samples: PSNR in dB to the
uncached samples of 10 tuning seeds that no benchmark reports, at .4 / .3 (20 steps) and .4 / .24 (50 steps) of the
steps computed.

                                 DiT, 20      flow, 20     DiT, 50      flow, 50
    doubt .5, landing 1          48.5 / 44.8  52.7 / 43.4  53.9 / 35.1  63.0 / 56.0
    doubt 1, landing 1           48.6 / 45.2  52.7 / 43.4  56.7 / 45.6  62.4 / 56.7
    doubt 2, landing 1           47.0 / 45.1  47.2 / 43.9  56.4 / 47.3  63.8 / 57.4
    doubt 1, landing .5          48.5 / 45.5  52.4 / 44.6  55.6 / 50.5  61.9 / 55.5
    doubt 1, landing 0           43.3 / 39.4  46.4 / 42.2  51.6 / 43.5  57.8 / 49.4
    with the reuse graph         48.9 / 46.9  52.7 / 47.1  55.5 / 52.6  63.4 / 55.8
    doubt .5, landing 1, evenly  45.9 / 34.5  48.8 / 38.3  50.4 / 34.8  57.9 / 49.5

("Evenly": the same fit on full steps that are spread evenly, the last two among them.)
Cost: the search takes up to 1 s on the host for 50 steps, once for a profile; plans are kept in the
user's cache.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import numpy as np

from omnifx.errors import ConfigError
from omnifx.forecast import Features, Forecast, State
from omnifx.path import Path
from omnifx.plan import COMPUTE, REUSE, SKIP, Combination, Plan
from omnifx.policies.omnicache import OmniCache
from omnifx.policy import SLACK, Policy, check_speedup, refuse_speedup, register
from omnifx.profile import Profile
from omnifx.spreads import even

Kind = Literal["skip", "reuse"]
Network = Literal["auto", "skip", "reuse"]
Spread = Literal["searched", "even"]


@register
@dataclass(frozen=True, kw_only=True)
class Auto(Policy):
    """Searches which steps to compute, and forecasts the others.

    Raises: ConfigError if an option is out of its range.
    """

    name: ClassVar[str] = "auto"
    uses_noise: ClassVar[bool] = True

    network: Network = "auto"
    """What runs at a step that is not computed. "skip": nothing; "reuse": the reuse graph, whose output and noise join
    the combination; "auto": what the forecast finds better, and nothing where it finds them alike."""
    num_outputs: int = 4
    """1..8: computed outputs that a combination reads."""
    num_latents: int | None = None
    """0..8: computed steps from which a combination reads the way of the latents. None: 1, but 3 without the network of
    a sampler that adds fresh noise or clips."""
    ridge: float | None = None
    """0..1: pull of the weights towards plain extrapolation, with the reuse graph towards its output and the noise, as
    a share of each feature's energy. None: 1e-5; where a sampler adds fresh noise 1 with the reuse graph and .01
    without; where it clips .01 without."""
    doubt: float = 1.0
    """0..10: how uncertain the answer of a computed step to drifted latents is, as a share of it."""
    landing: float | None = None
    """0..1: what share of the drift a step that is not computed tries to take back. None: .5, or what a calibration
    with `refine` found best; 0 where a sampler clips."""
    margin: float = 0.8
    """0..1: the reuse graph is run if the drift it forecasts is below this share of that of skipping."""
    amplification: float | None = None
    """1..1000: by how much a drift of the first steps is taken to grow until the end, beside the growth of latents.
    None: 1, or what a calibration with `refine` found best; 10 where a sampler clips."""
    spread: Spread | None = None
    """Which steps are computed: "searched", those that a search finds best, or "even", at the same distance. None:
    searched, even where a sampler clips, or what a calibration with `refine` found best."""
    longest_gap: int | None = None
    """>= 1: most steps in a row that are not computed; None: 1.5 times the mean distance of computed
    steps."""

    def __post_init__(self) -> None:
        if self.network not in get_args(Network):
            raise ConfigError(f"network must be one of {list(get_args(Network))}, got {self.network!r}.")
        for option, low, high in (("num_outputs", 1, 8), ("num_latents", 0, 8)):
            value = getattr(self, option)
            if option == "num_latents" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ConfigError(f"{option} must be a whole number in [{low}, {high}], got {value!r}.")
        if self.spread is not None and self.spread not in get_args(Spread):
            raise ConfigError(f"spread must be None or one of {list(get_args(Spread))}, got {self.spread!r}.")
        if self.num_latents is not None and self.num_latents > self.num_outputs:
            raise ConfigError(
                f"num_latents must be at most num_outputs ({self.num_outputs}), got {self.num_latents}: the same "
                "computed steps are kept for both."
            )
        for option, most in (("ridge", 1.0), ("doubt", 10.0), ("landing", 1.0), ("margin", 1.0)):
            value = getattr(self, option)
            if option in ("ridge", "landing") and value is None:
                continue
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0.0 <= value <= most:
                raise ConfigError(f"{option} must be a number in [0, {most:g}], got {value!r}.")
        grown = self.amplification
        if grown is not None and (
            not isinstance(grown, int | float) or isinstance(grown, bool) or not 1.0 <= grown <= 1000.0
        ):
            raise ConfigError(f"amplification must be None or a number in [1, 1000], got {grown!r}.")
        gap = self.longest_gap
        if gap is not None and (not isinstance(gap, int) or isinstance(gap, bool) or gap < 1):
            raise ConfigError(f"longest_gap must be None or a whole number >= 1 (steps), got {gap!r}.")

    @property
    def most_variants(self) -> int:
        return max(len(self._drifting()), len(self._unforeseen()))

    def variants(self, profile: Profile) -> tuple[Policy, ...]:
        if profile.path is None:
            return ()
        return self._unforeseen() if _is_unforeseen(_path_of(profile)) else self._drifting()

    def _unforeseen(self) -> tuple[Policy, ...]:
        """For samplers with fresh noise, and those that clip."""
        networks: tuple[Network, ...] = ("skip", "reuse") if self.network == "auto" else (self.network,)
        spreads: tuple[Spread, ...] = get_args(Spread) if self.spread is None else (self.spread,)
        found = tuple(replace(self, network=a, spread=b) for a, b in itertools.product(networks, spreads))
        return found if len(found) > 1 else ()

    def _drifting(self) -> tuple[Policy, ...]:
        """For samplers that only carry on what was before."""
        amplifications = AMPLIFICATIONS if self.amplification is None else (self.amplification,)
        landings = LANDINGS if self.landing is None else (self.landing,)
        found = tuple(replace(self, amplification=a, landing=b) for a, b in itertools.product(amplifications, landings))
        return found if len(found) > 1 else ()

    @property
    def history(self) -> int:
        """Computed steps whose outputs and latents a stream keeps."""
        return self.num_outputs

    def plan(self, profile: Profile, *, speedup: float | None = None) -> Plan:
        wanted = check_speedup(speedup, default=2.0)
        if (better := self.refined(profile, wanted)) != self:
            plan = better.plan(profile, speedup=speedup)
            chosen = ", ".join(f"{key}={value}" for key, value in better.options.items() if value != self.options[key])
            why = f"Generations that followed plans chose {chosen}."
            return plan.model_copy(update={"policy_options": self.options, "notes": (*plan.notes, why)})
        if profile.path is None or (profile.meta.in_parts and self.network == "reuse"):
            plan = OmniCache().plan(profile, speedup=speedup)
            why = (
                "Nothing can be forecast here (the model has several outputs, or latents unlike its output, or it is "
                "captured in parts and network='reuse' was asked for): this is OmniCache's plan."
            )
            return plan.model_copy(update={"policy": self.name, "notes": (why, *plan.notes)})
        path = _path_of(profile)
        path = path.amplified(self.amplification or (CLIPPED_AMPLIFICATION if path.is_clipped else 1.0))
        kinds: tuple[Kind, ...] = ("skip", "reuse") if self.network == "auto" else (self.network,)
        kinds = ("skip",) if profile.meta.in_parts else kinds
        counts = {kind: _affordable(profile, wanted, kind) for kind in kinds}
        if _is_unforeseen(path) and len(kinds) > 1:  # forecasts overrate what fits the noise or clips of the recording
            counts = {kind: counts[kind] for kind in ("reuse" if counts["reuse"] == counts["skip"] else "skip",)}
        ends = {
            kind: self._scheduled(Forecast(path, self._features(kind, path)), computed)
            for kind, computed in counts.items()
            if computed >= FEWEST
        }
        if not ends:
            most = max(_speedup_of(profile, FEWEST, kind) for kind in kinds)
            raise refuse_speedup(self.name, wanted, most, f"at least {FEWEST} of {profile.num_steps} steps computed")
        chosen = min(ends, key=lambda kind: ends[kind].cost * (self.margin if kind == "skip" else 1.0))
        return self._as_plan(profile, path, chosen, ends)

    def _scheduled(self, forecast: Forecast, computed: int) -> State:
        path = forecast.path
        if (self.spread or ("even" if path.is_clipped else "searched")) == "even":
            return forecast.follow(even(path.num_steps, computed))
        return forecast.search(computed, longest=self.longest_gap, simple=path.is_noisy)

    def _features(self, kind: Kind, path: Path) -> Features:
        ridge, latents = Features.ridge, Features.latents
        if _is_unforeseen(path):
            ridge, latents = (NOISY if path.is_noisy else CLIPPED)[kind]
        landing = 0.0 if path.is_clipped else LANDINGS[0]
        return Features(
            reuses=kind == "reuse",
            history=self.num_outputs,
            latents=min(latents, self.num_outputs) if self.num_latents is None else self.num_latents,
            ridge=ridge if self.ridge is None else self.ridge,
            doubt=self.doubt,
            landing=landing if self.landing is None else self.landing,
        )

    def _as_plan(self, profile: Profile, path: Path, kind: Kind, ends: dict[Kind, State]) -> Plan:
        end = ends[kind]
        action = SKIP if kind == "skip" else REUSE
        width = len(profile.meta.branches)
        drifts = ", ".join(f"{state.cost:.2%} if they {_DOES[name]}" for name, state in ends.items())
        clean = float(np.median(path.residual))
        notes = [
            f"Forecast drift of the final latents from the uncached ones, as a share of their norm: {drifts}.",
            f"The sampler's steps are affine in latents and outputs but for {clean:.1%} of their length (median).",
        ]
        if off := {k: end.off[k] for k, step in enumerate(end.steps) if step is not None}:
            worst = max(off, key=off.__getitem__)
            usual = float(np.median([*off.values()]))
            notes.append(
                f"Outputs that are not computed are forecast to be off by {usual:.2%} (median) and {off[worst]:.2%} "
                f"(step {worst}, the least certain one)."
            )
        return Plan.from_rows(
            profile,
            [(COMPUTE if step is None else action,) * width for step in end.steps],
            policy=self.name,
            policy_options=self.options,
            combinations=[None if step is None else Combination(**step._asdict()) for step in end.steps],
            history=self.history,
            notes=notes,
        )


NOISY: dict[Kind, tuple[float, int]] = {"reuse": (1.0, 1), "skip": (1e-2, 3)}
"""Ridge and number of latents where the sampler adds fresh noise. The reuse graph sees it, and freer weights would fit
the noise of the recording; without the network only latents know it. Trained digits DiT, 20 steps, 10 of them computed,
30 tuning seeds: DDIM with eta 1: 35.1 dB with the graph, 32.9 without, 31.0 with ridge 1e-5 and one step's latents;
SDE-DPM-Solver++: 37.7, 34.6 and 29.2."""

CLIPPED: dict[Kind, tuple[float, int]] = {"reuse": (1e-5, 1), "skip": (1e-2, 3)}
"""As well, where the sampler clips. There a step's answer to an error differs from element to element, even in its
sign, so that no drift can be taken back, what is forecast of single steps is wrong, and small drifts grow. Trained
digits DiT, DDIM that clips at CFG 1.5 (a third of all elements), 20 steps, 10 / 8 / 6 / 5 of them computed, 80 tuning
seeds: 40.8, 36.3, 33.9 and 31.8 dB with the reuse graph, an even spread, amplification 10 and landing 0; 38.7, 34.8,
31.4 and 29.4 without the graph. Less without any of these: at 10, 38 to 39 dB with a search, 37.9 with landing .5, 40.1
with amplification 1 (40 seeds)."""
CLIPPED_AMPLIFICATION = 10.0

AMPLIFICATIONS = (1.0, 3.0, 10.0)
"""What a calibration with `refine` chooses from. A recording does not show how drift grows: on the digits models 1 is
best, within a factor of two of what was measured; on the moving digits at 20 steps, where samples that drift early end
as other videos, 10 is: 36.7 dB instead of 33.1 (8 steps computed, 60 tuning seeds)."""

LANDINGS = (0.5, 1.0)
"""As well; the first is taken where nothing was tried."""

FEWEST = 2
"""Steps that are computed at least: one output tells nothing of where it goes."""

_DOES = {"skip": "skip the network", "reuse": "run the reuse graph"}


def _path_of(profile: Profile) -> Path:
    assert profile.path is not None
    return Path.of(profile.path.sum((0, 1)), profile.meta.timesteps)


def _is_unforeseen(path: Path) -> bool:
    """Whether what the sampler does depends for the most on what a recording does not tell."""
    return path.is_noisy or path.is_clipped


def _affordable(profile: Profile, speedup: float, kind: Kind) -> int:
    """How many steps can be computed so that FLOPs fall to 1/`speedup`, up to `SLACK` of a step; may be < 1."""
    steps, reuse = profile.num_steps, _reuse_cost(profile, kind)
    return min(steps, math.floor(steps / speedup + SLACK - steps * reuse))


def _speedup_of(profile: Profile, computed: int, kind: Kind) -> float:
    return profile.num_steps / (computed + profile.num_steps * _reuse_cost(profile, kind))


def _reuse_cost(profile: Profile, kind: Kind) -> float:
    """What a step that is not computed costs; one that is computed costs as much more, since it measures the noise."""
    return profile.meta.cost_of((REUSE,) * len(profile.meta.branches)) if kind == "reuse" else 0.0
