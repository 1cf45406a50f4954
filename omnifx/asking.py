"""Plan for what is asked: a speedup, the least PSNR, or the most milliseconds.

A policy plans for a speedup. What PSNR a speedup buys is what a calibration measured with generations that followed
plans (`omnifx.rollouts`), and what time it takes follows from the time of a step (`omnifx.quality.Timing`). So both are
turned into the speedup to ask for: the largest one whose expected PSNR is enough, the smallest one that is fast enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from omnifx.errors import ConfigError
from omnifx.plan import REUSE, Plan, reuses
from omnifx.policy import Policy
from omnifx.profile import Profile
from omnifx.quality import Quality, QualityPoint, Timing


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a plan is to reach; at most one of all, or the policy's default speedup.

    Raises: ConfigError if more than one is given, or one is out of its range.
    """

    speedup: float | None = None
    """>= 1: FLOPs uncached over planned."""
    min_psnr: float | None = None
    """> 0: dB against the uncached samples, in the mean over samples."""
    target_ms: float | None = None
    """> 0: what all calls of the model may take in one generation."""

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) > 1:
            raise ConfigError(f"ask for one of speedup, min_psnr and target_ms, got {given}.")
        for name in ("min_psnr", "target_ms"):
            if name in given and not _is_positive(given[name]):
                raise ConfigError(f"{name} must be a number > 0, got {given[name]!r}.")

    def check_policy(self, policy: Policy) -> None:
        """Raises: ConfigError if the policy plans nothing from a profile, so that there is nothing to ask of it."""
        asked = {name: value for name, value in vars(self).items() if value is not None and name != "speedup"}
        if asked and not policy.needs_profile:
            raise ConfigError(
                f"policy {policy.name!r} plans nothing from what was measured, so {', '.join(asked)} cannot be "
                "promised. Use one that plans ahead, such as 'auto'."
            )


def plan_for(policy: Policy, profile: Profile, ask: Ask) -> Plan:
    """The plan that a policy makes for what is asked; its notes say what is expected of it.

    Args:
        policy: Makes the plans.
        profile: Measured on this model with this sampler, or resampled (`omnifx.transfer`).
        ask: With `min_psnr`, the profile must know what the policy's plans are worth, and with `target_ms` how long a
            step takes.

    Raises: ConfigError if that is not known, or what is asked is out of reach; it names the most that can be had.
    """
    ask.check_policy(policy)
    if ask.min_psnr is not None:
        found = quality_of(policy, profile)
        if found is None:
            raise ConfigError(_unmeasured(policy, profile, ask.min_psnr))
        plan, _ = least_enough(policy, profile, found, ask.min_psnr)
    elif ask.target_ms is not None:
        plan = _in_time(policy, profile, ask.target_ms)
    else:
        plan = policy.plan(profile, speedup=ask.speedup)
    return _with_notes(policy, profile, plan, ask)


def quality_of(policy: Policy, profile: Profile) -> Quality | None:
    """What is known of the policy's plans; None if they were not measured."""
    return next((found for found in profile.meta.quality if found.is_of(policy.name, policy.options)), None)


def milliseconds(plan: Plan, profile: Profile, timing: Timing) -> float:
    """What all calls of the model take in a generation that follows the plan, by the time of a computed step."""
    costs = [plan.reuse_flops[step.variant] for step in plan.steps]
    if plan.reads_noise:  # computed steps replay the old cuts
        replay = profile.meta.cost_of((REUSE,) * len(profile.meta.branches))
        costs = [cost if reuses(row) else cost + replay for cost, row in zip(costs, plan.rows, strict=True)]
    return profile.meta.num_streams * (len(costs) * timing.overhead_ms + sum(costs) * timing.step_ms)


def least_enough(policy: Policy, profile: Profile, found: Quality, wanted: float) -> tuple[Plan, float]:
    """The plan of the largest speedup that is expected to reach a PSNR, and the speedup that it was asked for.

    Raises: ConfigError if no measured plan reaches it.
    """
    for asked in _speedups(profile, found):
        if not (nominal := _expected(found, asked)) or nominal.psnr < wanted:
            continue
        plan = policy.plan(profile, speedup=asked)
        expected = found.at(plan.speedup)
        if expected is not None and expected.psnr >= wanted:
            return plan, asked
    best = max(found.points, key=lambda point: point.psnr)
    raise ConfigError(
        f"{policy.name}: min_psnr={wanted:g} dB is out of reach: the best plan that was measured, {best.speedup:.2f}x, "
        f"gives {best.psnr:.1f} dB. Ask for less, or calibrate with smaller speedups."
    )


def _speedups(profile: Profile, found: Quality) -> Iterator[float]:
    """What may be asked of a policy: what was measured, and one speedup for each number of computed steps; the largest
    first."""
    steps = profile.num_steps
    yield from sorted({*(point.asked for point in found.points), *(steps / k for k in range(1, steps))}, reverse=True)


def _expected(found: Quality, asked: float) -> QualityPoint | None:
    """What is expected of the plan for a speedup, before it is made."""
    return next((point for point in found.points if point.asked == asked), None) or found.at(asked)


def _unmeasured(policy: Policy, profile: Profile, wanted: float) -> str:
    asked = f"{policy.name}: min_psnr={wanted:g} needs to know what PSNR its plans reach, but "
    anew = f"omnifx.calibrate(model, generate, policy={policy.name!r}, rollouts=4, min_psnr={wanted:g})"
    if profile.meta.resampled_from:
        return (
            f"{asked}the profile was interpolated from {profile.meta.resampled_from} steps, where nobody measured it. "
            f"Calibrate at {profile.num_steps} steps: {anew}, with a generate() that returns the samples."
        )
    if profile.meta.quality:
        known = ", ".join(f"{q.policy} {q.options}" for q in profile.meta.quality)
        return f"{asked}the profile knows that of other settings only: {known}. Calibrate for these: {anew}."
    return (
        f"{asked}a recorded generation does not tell, for the model never sees the final samples. Measure it: {anew}, "
        "with a generate() that returns the samples; then use that profile."
    )


def _in_time(policy: Policy, profile: Profile, target: float) -> Plan:
    timing = profile.meta.timing
    if timing is None:
        raise ConfigError(
            f"target_ms={target:g}: the profile of {profile.meta.model} does not hold the time of a step: the model is "
            "not one graph, or it was measured by an older version. Ask for a speedup, or calibrate anew."
        )
    steps, streams = profile.num_steps, profile.meta.num_streams
    fastest: Plan | None = None
    for computed in range(steps, 0, -1):
        least = streams * (steps * timing.overhead_ms + computed * timing.step_ms)
        if least > target and computed > 1:
            continue  # no plan with so many computed steps is fast enough
        try:
            fastest = policy.plan(profile, speedup=steps / computed)
        except ConfigError:
            break  # and none is faster
        if milliseconds(fastest, profile, timing) <= target:
            return fastest
    fastest = fastest or _fastest(policy, profile)
    least = milliseconds(fastest, profile, timing)
    raise ConfigError(
        f"{policy.name}: target_ms={target:g} is out of reach: the least is {least:.1f} ms, at {fastest.speedup:.2f}x "
        f"({timing.step_ms:.2f} ms for a computed step, {timing.overhead_ms:.2f} ms for each call beside it, on "
        f"{timing.device}). Ask for more, or sample in fewer steps."
    )


def _fastest(policy: Policy, profile: Profile) -> Plan:
    """The plan of the largest speedup that a policy makes."""
    for computed in range(1, profile.num_steps):
        try:
            return policy.plan(profile, speedup=profile.num_steps / computed)
        except ConfigError:
            continue
    return policy.plan(profile, speedup=1.0)


def _with_notes(policy: Policy, profile: Profile, plan: Plan, ask: Ask) -> Plan:
    notes, meta = [], profile.meta
    found = quality_of(policy, profile)
    expected = found.at(plan.speedup) if found is not None else None
    if found is not None and expected is not None:
        how = "this plan was measured" if found.measured(plan.speedup) else "between two measured plans"
        wanted = f" at least {ask.min_psnr:g} dB was asked for." if ask.min_psnr is not None else ""
        notes.append(
            f"expected PSNR {expected.psnr:.1f} dB, speedup {plan.speedup:.2f}: {how}; the mean over "
            f"{found.num_samples} samples with a standard error of {expected.error:.1f} dB, one sample in ten below "
            f"{expected.psnr_p10:.1f} dB, of a range of {found.data_range:g}.{wanted}"
        )
    if ask.target_ms is not None and meta.timing is not None:
        timing = meta.timing
        whole = meta.num_streams * profile.num_steps * (timing.step_ms + timing.overhead_ms)
        notes.append(
            f"expected {milliseconds(plan, profile, timing):.1f} ms for the model's calls of one generation, uncached "
            f"{whole:.1f} ms; {ask.target_ms:g} ms was asked for. Assumed: {timing.step_ms:.2f} ms for a computed step "
            f"and {timing.overhead_ms:.2f} ms before each, as measured on {timing.device} at latents "
            f"{list(timing.latent_shape)}; other steps in proportion to their FLOPs. Sampler, text encoder and VAE are "
            "not counted."
        )
    if meta.resampled_from:
        notes.append(f"Transferred from {meta.resampled_from} steps to {profile.num_steps}: {TRANSFER_LOSS}")
    return plan.model_copy(
        update={
            "notes": (*plan.notes, *notes),
            "expected_psnr": expected.psnr if expected is not None else None,
            "transferred_from": meta.resampled_from,
        }
    )


TRANSFER_LOSS = (
    "on the digits models that loses up to 1.8 dB from 50 steps to 20 or 30, and 2 to 6 dB from 20 to 50, at 2x and "
    "3x, beside plans that were measured there (docs/asking.md)."
)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


__all__ = ["Ask", "least_enough", "milliseconds", "plan_for", "quality_of"]
