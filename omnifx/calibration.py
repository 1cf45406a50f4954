"""Measure a model explicitly, and make plans from what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from omnifx.errors import ConfigError, ProfileError
from omnifx.plan import Plan
from omnifx.policy import Policy, resolve
from omnifx.prior import Prior, merge_priors
from omnifx.profile import Profile
from omnifx.runtime import RuntimePolicy, is_runtime
from omnifx.session import find_session, generation, options_of


def calibrate(
    model: nn.Module,
    generate: Callable[[Any, int], object],
    *,
    policy: str | Policy = "auto",
    runs: int = 1,
    save: str | Path | None = None,
    options: dict[str, Any] | None = None,
    progress: bool = True,
) -> Profile:
    """Measure `runs` ordinary generations, each run in full.

    Args:
        model: The denoiser, as it is or compiled with ``backend="omnicache"`` (whose lowering and Inductor options are
        used).
        generate: ``generate(model, seed)`` runs one generation with the model it is given; its result is not used.
        policy: What the profile is for. All read the latents, outputs and noise that every profile holds; those that
            ask for more (changes of branches or blocks, a prior) need a profile that was measured for them. One that
            decides at run time and learns from a model (`teacache`) gets the signals that it learns from, and no more.
        runs: Number of generations, seeds 0 to runs - 1; from 3 on, a third of them is held back to judge corrections.
        save: Where to write the profile.
        options: Further options of the backend, such as ``{"lowering": "eager"}``.
        progress: Whether to show a progress bar.

    Returns: The profile of all runs.
    Raises: ConfigError for `runs` < 1, a policy that decides at run time and learns nothing, or a model without
        reusable branches; ProfileError if a run could not be measured, or ran other steps than the first.
    Memory: the caches twice, and at most ``record_budget`` for each run's recording, freed after it; for a policy with
    a prior as much again, and as much on the host.
    """
    if not isinstance(runs, int) or runs < 1:
        raise ConfigError(f"calibrate: runs must be a number >= 1, got {runs!r}.")
    chosen = resolve(policy)
    if isinstance(chosen, RuntimePolicy) and not chosen.learns:
        raise ConfigError(
            f"calibrate: policy {chosen.name!r} decides at run time and learns nothing of a model, so there is nothing "
            f"to measure. Use it as the option 'policy'; its own options here are {chosen.options}."
        )
    plain = getattr(model, "_orig_mod", model)
    taken = {**(options_of(model) or {}), **(options or {})}
    taken = {key: value for key, value in taken.items() if key not in ("profile", "plan", "speedup", "steps")}
    taken |= {"policy": chosen, "profile_cache": False, "record_only": True}
    compiled = torch.compile(plain, backend="omnicache", options=taken)
    columns = (TextColumn("calibrating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    profiles: list[Profile] = []
    prior: Prior | None = None
    with Progress(*columns, disable=not progress, transient=True) as bar:
        task = bar.add_task("runs", total=runs)
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
    if isinstance(chosen, RuntimePolicy) and not chosen.learned(profile.points())[1]:
        raise ProfileError(
            f"calibrate: {chosen.name} can learn nothing from {profile.num_steps} steps: it needs more of them, an "
            "output of the latents' size, and a cache_budget that holds one stream's caches."
        )
    if save is not None:
        profile.save(save)
    return profile


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
    meta = first.meta.model_copy(update={"num_runs": sum(p.meta.num_runs for p in profiles)})
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
) -> Plan:
    """Plan which branches each step computes, so that a generation costs at most 1/`speedup` of the uncached FLOPs.

    Args:
        profile: Measured on this model with this sampler.
        policy: Chooses the rows; its own limits (for OmniCache: never three reuses in a row) come first.
        speedup: Ratio of FLOPs, uncached over planned; no unit, >= 1; None: the policy's default.
        min_psnr: dB against the uncached output, instead of `speedup`; no policy of this version can promise one.

    Returns: A plan of `profile.num_steps` steps; `plan.speedup` is the ratio reached.
    Raises: ConfigError if `speedup` is beyond what the policy allows, naming the most it allows.
    Memory: none on the device; the plan is a few kilobytes.
    Source: the policy's own, see its file.
    """
    if min_psnr is not None:
        raise ConfigError(
            f"make_plan: min_psnr={min_psnr!r} cannot be promised by policy {resolve(policy).name!r}; "
            "ask for a speedup, and measure the quality it buys."
        )
    chosen = resolve(policy)
    if profile.meta.unplannable and not is_runtime(chosen):
        raise ConfigError(f"make_plan: no plan can be made from the profile: {profile.meta.unplannable}")
    return chosen.plan(profile, speedup=speedup)


def _measured(compiled: object) -> int:
    return sum(map(len, find_session(compiled).profiles))
