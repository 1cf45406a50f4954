"""Measure a model explicitly, and make plans from what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from omnifx.asking import Ask, plan_for
from omnifx.errors import ConfigError, ProfileError
from omnifx.plan import Plan
from omnifx.policy import Policy, check_speedup, resolve
from omnifx.prior import Prior, merge_priors
from omnifx.profile import Profile
from omnifx.rollouts import SPEEDUPS, Rollouts
from omnifx.runtime import RuntimePolicy, is_runtime
from omnifx.session import find_session, generation, options_of
from omnifx.transfer import resampled


def calibrate(
    model: nn.Module,
    generate: Callable[[Any, int], object],
    *,
    policy: str | Policy = "auto",
    runs: int = 1,
    refine: int = 0,
    rollouts: int = 0,
    speedups: Sequence[float] = SPEEDUPS,
    min_psnr: float | Sequence[float] = (),
    data_range: float | None = None,
    save: str | Path | None = None,
    options: dict[str, Any] | None = None,
    progress: bool = True,
) -> Profile:
    """Measure `runs` ordinary generations, each run in full; with `rollouts`, also what plans made from them are worth.

    Args:
        model: The denoiser, as it is or compiled with ``backend="omnicache"`` (whose lowering and Inductor options are
        used).
        generate: ``generate(model, seed)`` runs one generation with the model it is given. With `rollouts` it returns
            the samples, always the same ones for a seed: a tensor [B, ...], an array, images, or a pipeline's output.
        policy: What the profile is for. All read the latents, outputs and noise that every profile holds; those that
            ask for more (changes of branches or blocks, a prior) need a profile that was measured for them. One that
            decides at run time and learns from a model (`teacache`) gets the signals that it learns from, and no more.
        runs: Number of generations, seeds 0 to runs - 1; from 3 on, a third of them is held back to judge corrections.
        refine: On how many of the runs plans are tried out, where the policy has variants that a recording cannot tell
            apart (`auto`: how drift grows, and how much of it is taken back). Each runs in full once more, and by
            every variant's plan for every speedup: for `auto` with the default speedups at the cost of up to 13
            uncached generations. Worth it where few steps of a hard model are computed.
        rollouts: Further generations, seeds `runs` to `runs + rollouts - 1`, whose samples tell what PSNR plans reach,
            as `min_psnr` of plans needs it. Each runs in full once, and once for each speedup: with the default ones
            at the cost of 3.0 uncached generations. The error of the mean is in the plans' notes; for 0.5 dB it takes
            50 to 200 samples on the digits models.
        speedups: What to measure, >= 1; those out of the policy's reach are left out.
        min_psnr: dB that plans will be asked for: the very plans are measured too, so that nothing is interpolated; a
            few further generations for each.
        data_range: Largest possible value of a sample minus the smallest; None: 255 for bytes, 1 or 2 for values within
            [0, 1] or [-1, 1], else the range of the uncached samples.
        save: Where to write the profile.
        options: Further options of the backend, such as ``{"lowering": "eager"}``.
        progress: Whether to show a progress bar.

    Returns: The profile of all runs.
    Raises: ConfigError for `runs` < 1, `refine` beyond them or of a policy without variants, rollouts that are not
    possible, a policy that decides at run time and learns nothing, or a model without reusable branches; ProfileError
    if a run could not be measured, or ran other steps than the first.
    Memory: the caches twice, and at most ``record_budget`` for each run's recording, freed after it; for a policy with
    a prior as much again, and as much on the host. The samples of all rollouts, on the host.
    """
    if not isinstance(runs, int) or runs < 1:
        raise ConfigError(f"calibrate: runs must be a number >= 1, got {runs!r}.")
    chosen = resolve(policy)
    if isinstance(chosen, RuntimePolicy) and not chosen.learns:
        raise ConfigError(
            f"calibrate: policy {chosen.name!r} decides at run time and learns nothing of a model, so there is nothing "
            f"to measure. Use it as the option 'policy'; its own options here are {chosen.options}."
        )
    wanted = _checked(chosen, rollouts, speedups, min_psnr, data_range)
    _check_refine(chosen, refine, runs)
    plain = getattr(model, "_orig_mod", model)
    taken = {**(options_of(model) or {}), **(options or {})}
    taken = {key: value for key, value in taken.items() if key not in _PLANNING}
    taken |= {"policy": chosen, "profile_cache": False, "record_only": True}
    compiled = torch.compile(plain, backend="omnicache", options=taken)
    columns = (TextColumn("calibrating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    profiles: list[Profile] = []
    prior: Prior | None = None
    with Progress(*columns, disable=not progress, transient=True) as bar:
        tried = refine * (1 + len(speedups) * chosen.most_variants)
        task = bar.add_task("runs", total=runs + tried + rollouts * (1 + len(speedups)))
        for seed in range(runs):
            before = _measured(compiled) if seed else 0
            with torch.no_grad(), generation(compiled):
                generate(compiled, seed)
            session = find_session(compiled)
            inactive = [runner.inactive for runner in session.runners if runner.inactive]
            if not session.runners or inactive:
                raise ConfigError(
                    f"calibrate: {inactive[0] if inactive else 'generate() never called the model it was given'}."
                )
            if _measured(compiled) == before:
                raise ProfileError(f"calibrate: run {seed} could not be measured: {'; '.join(session.log.notes)}")
            measured = next(profiles for profiles in session.profiles if profiles)
            priors = [p for p in (prior, measured[-1].prior) if p is not None]
            prior = merge_priors(priors) if priors else None
            measured[-1] = replace(measured[-1], prior=None)  # of many runs, only the mean is held
            profiles.append(measured[-1])
            bar.advance(task)
        profile = replace(merge(profiles), prior=prior)
        given = {key: value for key, value in taken.items() if key not in ("policy", "profile_cache", "record_only")}

        def measuring(seeds: range) -> Rollouts:
            return Rollouts(
                plain,
                generate,
                chosen,
                profile,
                seeds,
                given,
                data_range=data_range,
                tick=lambda: bar.advance(task),
                grow=lambda more: bar.update(task, total=(bar.tasks[0].total or 0) + more),
            )

        if refine:
            found = measuring(range(refine)).refine(speedups)
            profile = replace(profile, meta=profile.meta.model_copy(update={"refined": found}))
        if rollouts:
            quality = measuring(range(runs, runs + rollouts)).measure(speedups, min_psnr=wanted)
            profile = replace(profile, meta=profile.meta.model_copy(update={"quality": (quality,)}))
    if isinstance(chosen, RuntimePolicy) and not chosen.learned(profile.points())[1]:
        raise ProfileError(
            f"calibrate: {chosen.name} can learn nothing from {profile.num_steps} steps: it needs more of them, an "
            "output of the latents' size, and a cache_budget that holds one stream's caches."
        )
    if save is not None:
        profile.save(save)
    return profile


_PLANNING = ("profile", "plan", "speedup", "min_psnr", "target_ms", "steps", "transfer")
"""Options of a compiled model that say nothing of how it is measured."""


def _checked(
    policy: Policy,
    rollouts: int,
    speedups: Sequence[float],
    min_psnr: float | Sequence[float],
    data_range: float | None,
) -> tuple[float, ...]:
    """The PSNRs to refine; raises ConfigError if the rollouts are not possible."""
    wanted = (min_psnr,) if isinstance(min_psnr, int | float) else tuple(min_psnr)
    if not isinstance(rollouts, int) or isinstance(rollouts, bool) or rollouts < 0:
        raise ConfigError(f"calibrate: rollouts must be a number >= 0, got {rollouts!r}.")
    if wanted and not rollouts:
        raise ConfigError(f"calibrate: min_psnr={min_psnr!r} is measured by rollouts; give their number, such as 4.")
    for value in wanted:
        Ask(min_psnr=value)
    if rollouts and not policy.needs_profile:
        raise ConfigError(f"calibrate: policy {policy.name!r} makes no plans from a profile that could be rolled out.")
    if not speedups:
        raise ConfigError("calibrate: speedups must hold at least one number >= 1, got none.")
    for speedup in speedups:
        check_speedup(speedup, default=1.0)
    if data_range is not None and not data_range > 0:
        raise ConfigError(f"calibrate: data_range must be > 0, got {data_range!r}.")
    return wanted


def _check_refine(policy: Policy, refine: int, runs: int) -> None:
    if not isinstance(refine, int) or isinstance(refine, bool) or not 0 <= refine <= runs:
        raise ConfigError(f"calibrate: refine must be a number of the {runs} runs, 0 to {runs}, got {refine!r}.")
    if refine and not policy.most_variants:
        raise ConfigError(
            f"calibrate: policy {policy.name!r} with the options {policy.options} has no variants to refine among. "
            "Leave out refine, or take 'auto' without amplification."
        )


def merge(profiles: list[Profile]) -> Profile:
    """One profile of several runs of the same model with the same steps.

    Raises: ProfileError if they were not measured on the same thing.
    """
    first = profiles[0]
    for i, other in enumerate(profiles):
        same = other.meta.fingerprint == first.meta.fingerprint and other.meta.timesteps == first.meta.timesteps
        same &= (other.meta.measured, other.meta.num_lags) == (first.meta.measured, first.meta.num_lags)
        same &= (other.meta.runtime_policy, other.meta.signals) == (first.meta.runtime_policy, first.meta.signals)
        if not same or other.grams.shape[1:] != first.grams.shape[1:]:
            raise ProfileError(
                f"merge: run {i} has {other.num_steps} steps from {other.meta.timesteps[0]:g}, run 0 has "
                f"{first.num_steps} from "
                f"{first.meta.timesteps[0]:g}; all runs must be of one model with the same steps and streams."
            )
    timings = [p.meta.timing for p in profiles if p.meta.timing is not None]
    update: dict[str, Any] = {
        "num_runs": sum(p.meta.num_runs for p in profiles),
        "timing": min(timings, key=lambda timing: timing.step_ms, default=None),  # the first run compiled
        "quality": first.meta.quality if len(profiles) == 1 else (),  # of plans from fewer runs
        "refined": first.meta.refined if len(profiles) == 1 else (),
    }
    meta = first.meta.model_copy(update=update)
    changes = [p.changes for p in profiles if p.changes is not None]
    signals = [p.signals for p in profiles if p.signals is not None]
    paths = [p.path for p in profiles if p.path is not None]
    return replace(
        first,
        meta=meta,
        grams=torch.cat([p.grams for p in profiles]),
        moves=torch.cat([p.moves for p in profiles]),
        changes=torch.cat(changes) if changes else None,
        signals=torch.cat(signals) if signals else None,
        path=torch.cat(paths) if len(paths) == len(profiles) else None,
    )


def make_plan(
    profile: Profile,
    *,
    policy: str | Policy = "auto",
    speedup: float | None = None,
    min_psnr: float | None = None,
    target_ms: float | None = None,
    steps: int | None = None,
    timesteps: Sequence[float] | None = None,
) -> Plan:
    """Plan which branches each step computes: for a speedup, or for the quality or the time that is asked for.

    Args:
        profile: Measured on this model with this sampler.
        policy: Chooses the rows; its own limits (for OmniCache: never three reuses in a row) come first.
        speedup: Ratio of FLOPs, uncached over planned; no unit, >= 1; None: the policy's default.
        min_psnr: dB against the uncached samples, in the mean over samples, instead of `speedup`: the largest speedup
            that is expected to reach it. Needs a profile of ``calibrate(..., rollouts=n)`` for this policy.
        target_ms: Instead of both, what all calls of the model may take in one generation. Sampler, text encoder and
            VAE are not counted.
        steps: Number of steps, if it is another one than was measured: see `omnifx.transfer.resampled`.
        timesteps: Instead of `steps`, the other timesteps, as the model sees them.

    Returns: A plan of `profile.num_steps` steps, or as many as were asked for; `plan.speedup` is the ratio reached,
        `plan.expected_psnr` the PSNR if that was measured; the notes tell of both.
    Raises: ConfigError if more than one thing is asked for, it is out of reach (naming the most there is), or the
        profile does not tell what it takes.
    Memory: none on the device; the plan is a few kilobytes.
    Source: the policy's own, see its file.
    """
    ask, chosen = Ask(speedup=speedup, min_psnr=min_psnr, target_ms=target_ms), resolve(policy)
    if profile.meta.unplannable and not is_runtime(chosen):
        raise ConfigError(f"make_plan: no plan can be made from the profile: {profile.meta.unplannable}")
    if timesteps is not None or (steps is not None and steps != profile.num_steps):
        profile = resampled(profile, steps=steps, timesteps=timesteps)
    return plan_for(chosen, profile, ask)


def _measured(compiled: object) -> int:
    return sum(map(len, find_session(compiled).profiles))
