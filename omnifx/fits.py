"""What policies that decide at run time learn of a model: signals as profiles, and the policies that were fitted to
them.

TeaCache, for one, has a polynomial for each model. It is fitted to generations that ran in full; what is kept of those
are the signals, so that a later fit may be made otherwise, and several generations can be put together. A fit is
followed by generations at the timesteps that it was measured at. Any other runs in full and is measured in its turn,
as a generation without a plan is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from omnifx.clock import close
from omnifx.following import Followed
from omnifx.profile import NUM_BANDS, NUM_HALVES, Profile, ProfileMeta
from omnifx.program import Program
from omnifx.runtime import AnyRuntimePolicy


@dataclass(frozen=True, eq=False)
class Fit:
    """A policy as it was fitted to a profile."""

    policy: AnyRuntimePolicy
    profile: Profile
    whole: bool = False
    """Whether the measured generation is known to have come to its end."""

    def holds(self, times: Sequence[float]) -> bool:
        """Whether these timesteps follow one another in the measured generation."""
        return self._start(times) is not None

    def total(self, times: Sequence[float]) -> int | None:
        """How many steps a generation that begins with these timesteps has; None if that is not known."""
        start = self._start(times)
        return self.profile.num_steps - start if self.whole and start is not None else None

    def _start(self, times: Sequence[float]) -> int | None:
        """The measured step that the first timestep is of: a later one if a picture is where the generation began."""
        known, count = self.profile.meta.timesteps, len(times)
        starts = range(len(known) - count + 1)
        return next((first for first in starts if all(map(close, times, known[first : first + count]))), None)


class Fits:
    """What one policy learned, newest last.

    Args:
        policy: As it is before it learned anything.
    """

    def __init__(self, policy: AnyRuntimePolicy) -> None:
        self.policy = policy
        self._fits: list[Fit] = []

    def add(self, profile: Profile, *, whole: bool = False) -> str:
        """Let the policy learn from a profile; a sentence on it for the user, empty if there was too little to learn
        from. `whole` says that its generations are known to have come to their ends."""
        learned, said = self.policy.learned(profile.points())
        if said:
            found = Fit(learned, profile, whole)
            shape = profile.meta.latent_shape[1:]
            self._fits = [  # of generations that were cut short the longer one tells more
                fit
                for fit in self._fits
                if fit.profile.meta.latent_shape[1:] != shape or not found.holds(fit.profile.meta.timesteps)
            ]
            self._fits.append(found)
        return said

    def forget(self, fit: Fit) -> None:
        """Follow a fit no longer."""
        self._fits = [known for known in self._fits if known is not fit]

    def at(self, times: Sequence[float], latent_shape: Sequence[int]) -> Fit | None:
        """The fit for a generation that begins with these timesteps: of several that of the latents' own size, then the
        longest, then the newest."""
        fitting = [fit for fit in self._fits if fit.holds(times)]
        shape = tuple(latent_shape[1:])
        return max(
            reversed(fitting),
            key=lambda fit: (fit.profile.meta.latent_shape[1:] == shape, fit.profile.num_steps),
            default=None,
        )

    def holds(self, times: Sequence[float]) -> bool:
        """Whether all of these timesteps lie in one fit."""
        return any(fit.holds(times) for fit in self._fits)


def signals_profile(
    streams: Sequence[Followed],
    program: Program,
    policy: AnyRuntimePolicy,
    *,
    model: str,
    fingerprint: str,
    versions: dict[str, str],
) -> Profile:
    """The profile of one generation that was measured for a run-time policy.

    Args:
        streams: Its streams, all of as many steps, with the signals of each step.
        program: The graph that ran.
        policy: Whose signals they are.
        model: The model's class.
        fingerprint: Of the model and its weights.
        versions: Of what the measurement depends on.

    Memory: 4 bytes for each signal and step.
    """
    first = streams[0]
    names = tuple(sorted({name for stream in streams for step in stream.measured for name in step}))
    meta = ProfileMeta(
        model=model,
        fingerprint=fingerprint,
        versions=versions,
        timesteps=tuple(first.times),
        num_streams=len(streams),
        num_runs=1,
        flops=program.analysis.flops,
        branches=program.branch_metas(),
        latent_shape=first.last.shapes[-1],
        output_shape=(),  # no output is kept
        time_inputs=tuple(sorted(first.changing or ())),
        runtime_policy=policy.name,
        signals=names,
    )
    values = [[[step.get(name, math.nan) for name in names] for step in stream.measured] for stream in streams]
    signals = torch.tensor([values], dtype=torch.float32)
    return Profile(
        meta=meta,
        grams=torch.zeros(1, len(streams), NUM_HALVES, NUM_BANDS, 0, 0),
        moves=torch.tensor([first.moves]),
        signals=torch.where(signals.isfinite(), signals, math.nan),
    )


__all__ = ["Fit", "Fits", "signals_profile"]
