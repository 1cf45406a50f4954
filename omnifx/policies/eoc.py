"""Move reused branches on by what a prior expects of them, where the prior is worth it.

Source: EOC, arXiv:2501.19243, and its code: ``f_cached (1 + theta E_t)`` for the outputs of attention and MLP before
their gates, with ``E_t = P_t - P_{t-1}``, P the mean output of the branch at each step over sampling runs of every
class, theta 0.01; the moved value is cached in its turn. Base: FORA on DiT-XL/2, DDIM-20, every other step cached.
Theta multiplies by the feature itself, so that its unit is one over the feature's: the right one depends on the model.
Form "shift", ``f_cached + a E_t``, has no unit; it is ours. So is the judgement of steps: the paper's has two criteria,
of which the magnitude of E is known; here a step follows the prior if E is not small beside its mean over all steps,
and goes on in the direction of the step before, taken over all branches. The source averages the conditional half of
the batch, and applies that to both halves; a graph does not tell which half that is, so `samples` does.
Measured on the digits models, 20 steps, every other one full (`python -m benchmarks.predictors --intervals 2`, 50
seeds, prior of 150 samples, PSNR to the uncached run in dB, DiT / flow): reuse 42.43 / 39.94; scale 0.01 42.43 /
39.92, 1.0 42.47 / 38.21; shift 0.5 42.95 / 40.24, unjudged 42.97 / 40.24; shift 1.0 42.80 / 40.20. The mean over
samples says little of what one sample's branch will change by; there, theta 0.01 is too small to be seen.
Cost: one set of cuts; the prior (see `omnifx.prior`); a pass over both in each cached step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch

from omnifx.errors import ConfigError
from omnifx.plan import COMPUTE, PREDICT, Plan
from omnifx.policies.fora import interval_for
from omnifx.policy import Policy, register
from omnifx.prior import Precision, Prior, PriorSpec, Samples
from omnifx.profile import Profile

Form = Literal["scale", "shift"]
STRENGTHS: dict[Form, float] = {"scale": 0.01, "shift": 1.0}
"""The source's theta; and for "shift" the whole of the expected change."""


@register
@dataclass(frozen=True, kw_only=True)
class Eoc(Policy):
    """Full step every `interval` steps; in between, reuse plus what the prior expects to change."""

    name: ClassVar[str] = "eoc"

    interval: int | None = None  # steps from one full step to the next; None: the smallest that reaches the speedup
    form: Form = "scale"  # how a value follows the prior: f (1 + s E), as the source, or f + s E
    strength: float | None = None  # s, >= 0; None: 0.01 to scale, 1 to shift
    floor: float = 0.05  # least mean |E| of a step that follows it, as a share of the mean over steps, >= 0
    judges: bool = True  # whether steps must pass the judgement; False: every cached step follows the prior
    samples: Samples = "all"  # see PriorSpec
    precision: Precision = "float16"
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.interval is not None and (not isinstance(self.interval, int) or self.interval < 1):
            raise ConfigError(f"interval must be >= 1 (steps), got {self.interval!r}.")
        if self.form not in get_args(Form):
            raise ConfigError(f"form must be one of {list(get_args(Form))}, got {self.form!r}.")
        for option, value in (("strength", self.strength), ("floor", self.floor)):
            if value is not None and (isinstance(value, bool) or not 0.0 <= value < math.inf):
                raise ConfigError(f"{option} must be a number >= 0, got {value!r}.")
        PriorSpec(samples=self.samples, precision=self.precision, rank=self.rank)

    @property
    def terms(self) -> int:
        """One: the newest value."""
        return 1

    @property
    def stores(self) -> bool:
        """Moved values are cached in their turn."""
        return True

    @property
    def trend(self) -> Form:
        """How values follow the prior."""
        return self.form

    @property
    def prior(self) -> PriorSpec:
        """What is averaged, and how it is kept."""
        return PriorSpec(samples=self.samples, precision=self.precision, rank=self.rank)

    def plan(self, profile: Profile, *, speedup: float | None = None) -> Plan:
        if profile.prior is None:
            raise ConfigError(
                "eoc: the profile has no prior beside it. Measure one: omnifx.calibrate(model, generate, policy='eoc')."
            )
        interval = interval_for(self.name, profile, speedup) if self.interval is None else self.interval
        cached = [step % interval != 0 for step in range(profile.num_steps)]
        worth = self.judge(profile.prior) if self.judges else [True] * profile.num_steps
        strength = STRENGTHS[self.form] if self.strength is None else self.strength
        follows = [step for step, reused in enumerate(cached) if reused and worth[step]]
        return Plan.uniform(
            profile,
            [PREDICT if reused else COMPUTE for reused in cached],
            policy=self.name,
            policy_options={**self.options, "interval": interval, "strength": strength},
            weights=[(1.0,) if reused else () for reused in cached],
            stores=cached,
            terms=self.terms if any(cached) else 0,
            trends=[strength if step in follows else 0.0 for step in range(profile.num_steps)],
            trend=self.form if any(cached) else "",
            notes=[
                f"{len(follows)} of {sum(cached)} cached steps follow the prior of {profile.prior.num_runs} run(s), "
                f"{profile.prior.num_bytes:,} bytes: {follows}."
            ],
        )

    def judge(self, prior: Prior) -> list[bool]:
        """Whether each step's trend is large enough, and goes on in the direction of the one before."""
        sizes, numbers = torch.zeros(prior.num_steps, dtype=torch.float64), 0
        products = torch.zeros(prior.num_steps, dtype=torch.float64)
        for key in prior.means:
            trends = prior.along(key).diff(dim=0).flatten(1).double()  # [S - 1, n]: of steps 1 to S - 1
            sizes[1:] += trends.abs().sum(1)
            products[2:] += (trends[1:] * trends[:-1]).sum(1)
            numbers += trends.shape[1]
        sizes /= max(1, numbers)
        least = self.floor * float(sizes[1:].mean()) if prior.num_steps > 1 else 0.0
        onward = products > 0.0
        onward[:2] = True  # nothing comes before the trend of step 1
        return [bool(large and on) for large, on in zip(sizes >= least, onward, strict=True)]
