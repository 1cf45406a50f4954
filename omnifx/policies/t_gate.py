"""Freeze cross-attention from a gate step on; before it, compute self-attention at an interval.

Source: T-GATE, arXiv:2404.02747, and its release: cross-attention outputs converge in the first steps. At gate step m
they are kept, as the mean of the unconditional and the conditional half, and reused to the end. Before m, behind
`warm_up` steps, self-attention is computed every `sp_interval` steps and cross-attention every `fi_interval` steps.
The release's settings: gate 10 with sp_interval 5, or gate 15 with 3; fi_interval 1, warm_up 2.
What is left to the pipeline: behind the gate the paper runs the network on one half only, without guidance. The batch
is the caller's, so here both halves still run (with the same cross-attention, if they share a batch), and guidance is
the sampler's; a pipeline that drops it after step m gets the paper's further saving. Halves that come in two calls
are two streams, whose caches are apart: each keeps its own cross-attention.
Ours: a generation of fewer steps than two gates has its gate at 40% of them. Joint attention (as in SD3) counts as
self-attention; branches that fuse attention and MLP, and MLPs, are always computed. A speedup takes the latest gate
that reaches it.
Cost: none at run time but one mean at the gate; the plan is static.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from omnifx.errors import ConfigError
from omnifx.plan import COMPUTE, REUSE, Action, Plan
from omnifx.policy import Policy, register
from omnifx.profile import Profile
from omnifx.search import mildest


@register
@dataclass(frozen=True, kw_only=True)
class TGate(Policy):
    """Cross-attention frozen behind `gate_step`, self-attention every `sp_interval` steps before it."""

    name: ClassVar[str] = "t-gate"

    gate_step: int | None = None  # the last step that computes cross-attention; None: 10, or 40% of less than 20 steps
    sp_interval: int = 5  # steps from one computed self-attention to the next, before the gate; 1 reuses none
    fi_interval: int = 1  # the same, of cross-attention
    warm_up: int = 2  # first steps that compute everything

    def __post_init__(self) -> None:
        least = {"gate_step": 1, "sp_interval": 1, "fi_interval": 1, "warm_up": 1}
        for option, fewest in least.items():
            value = getattr(self, option)
            if option == "gate_step" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < fewest:
                raise ConfigError(f"{option} must be a whole number >= {fewest} (steps), got {value!r}.")

    def plan(self, profile: Profile, *, speedup: float | None = None) -> Plan:
        if speedup is None or self.gate_step is not None:
            return self._plan(profile)
        gates = range(profile.num_steps - 1, self.warm_up - 1, -1)
        plans = (replace(self, gate_step=gate)._plan(profile) for gate in gates)
        why = f"{self.warm_up} steps of warm-up, self-attention every {self.sp_interval} steps before the gate"
        return mildest(self.name, plans, speedup, why) if gates else self._plan(profile)

    def _plan(self, profile: Profile) -> Plan:
        gate = self.gate_step or (10 if profile.num_steps >= 20 else max(1, round(0.4 * profile.num_steps)))
        branches = profile.meta.branches
        rows = [
            tuple(self._action(branch.kind, step, gate) for branch in branches) for step in range(profile.num_steps)
        ]
        crossing = tuple(branch.name for branch in branches if branch.kind == "cross_attention")
        notes = [
            "The cross-attention of both halves of a batch is merged at the gate; guidance is left to the pipeline."
        ]
        return Plan.from_rows(
            profile,
            rows,
            policy=self.name,
            policy_options={**self.options, "gate_step": gate},
            merges={gate: crossing} if crossing and gate < profile.num_steps else {},
            notes=notes if crossing else ["The model has no cross-attention, so there is nothing to freeze at a gate."],
        )

    def _action(self, kind: str, step: int, gate: int) -> Action:
        if kind == "cross_attention":
            between = self.warm_up <= step < gate and (step - self.warm_up) % self.fi_interval != 0
            return REUSE if step > gate or between else COMPUTE
        if "attention" not in kind:
            return COMPUTE
        between = self.warm_up <= step < gate and (step - self.warm_up) % self.sp_interval != 0
        return REUSE if between else COMPUTE
