"""Probe the first blocks, skip the rest while they change little, and align the cached residual to what they say.

With s the trunk after the first `depth` blocks and x the trunk before them, ``d_y = mean|s - s'| / mean|s'|`` and
``d_x`` alike (primes: the last step) give each step's error, d_y itself or |d_y - d_x|, which is added up; while the
sum is below `threshold` the step is skipped. Its trunk behind the last block is ``x + r2 + g (r1 - r2)``, r1 and r2
being the residuals of the whole stack at the last two computed steps and
``g = clip(mean|p - p2| / mean|p1 - p2|, 1, 1.5)`` from the probes' residuals p = s - x. A computed step goes on from s.
The first `retention` of the steps (rounded down, and the one after) and the last one compute.
Source: DiCache, arXiv:2508.17356 (Bujiazi/DiCache, FLUX): error d_y with threshold 0.4 and retention 0.2, or d_y - d_x
with 0.08 and 0.
Ours: errors and g are those of each sample, and the largest error decides; where the number of steps is not known,
the retention is that of 50 steps.
Cost: `depth` blocks at every step; six trunks are kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from omnifx.errors import ConfigError, PassError
from omnifx.policy import register
from omnifx.probes import Keep, Measured, Probe, Trunk, Values, change, span_of
from omnifx.runtime import Decision, RuntimePolicy, Step, check_count, check_number

USUAL_STEPS = 50


def probe_changes(values: Values, old: Values) -> Measured:
    """How much the trunk changed since the last step, before and after the probed blocks."""
    x, s, latents = values["before"], values["after"], values["latents"]
    d_y, d_x = change(s, old["after"], latents), change(x, old["before"], latents)
    return {"d_y": d_y, "d_x": d_x, "difference": (d_y - d_x).abs()}, {"residual": s - x, "after": s, "before": x}


def aligned(start: Tensor, residuals: Sequence[Tensor], marks: Sequence[Tensor]) -> Tensor:
    """The trunk behind the last block, on the line through two earlier residuals."""
    (r1, r2), (p, p1, p2) = residuals, marks
    axes = list(range(1, p.dim()))
    moved = (p1.float() - p2.float()).abs().mean(axes, keepdim=True)
    g = (p.float() - p2.float()).abs().mean(axes, keepdim=True) / moved
    g = torch.where(moved > 0, g.clamp(1.0, 1.5), torch.ones_like(g))
    return start + (r2 + g.to(r1.dtype) * (r1 - r2))


@register
@dataclass(frozen=True, kw_only=True)
class DiCache(RuntimePolicy[float]):
    """Skip all but the first blocks while they change little. Its state is the sum of errors."""

    name: ClassVar[str] = "dicache"
    uses_steps: ClassVar[str] = f"its retention is that of {USUAL_STEPS} steps, and the last step may be skipped"

    depth: int = 1  # blocks that are probed at every step
    error: Literal["d_y", "difference"] = "d_y"  # what is added up
    threshold: float | None = None  # sum of errors from which a step computes; None: 0.4 for d_y, 0.08 for difference
    retention: float | None = None  # share of the steps that compute at first; None: 0.2 for d_y, 0 for difference

    def __post_init__(self) -> None:
        check_count(self.name, "depth", self.depth, 1)
        if self.error not in ("d_y", "difference"):
            raise ConfigError(f"{self.name}: error must be 'd_y' or 'difference', got {self.error!r}.")
        if self.threshold is not None:
            check_number(self.name, "threshold", self.threshold, 0.0)
        if self.retention is not None:
            check_number(self.name, "retention", self.retention, 0.0, 1.0)

    def probe(self, gm: fx.GraphModule, trunk: Trunk) -> Probe:
        if len(trunk.ends) <= self.depth:
            raise PassError(f"{self.name}: depth={self.depth} leaves nothing to skip of {len(trunk.ends)} blocks.")
        after = trunk.ends[self.depth - 1]
        return Probe(
            signals=("d_y", "d_x", "difference"),
            reads=(("before", trunk.start), ("after", after)),
            measure=probe_changes,
            keeps=(
                Keep("residual", like=after),
                Keep("after", like=after, every=True),
                Keep("before", like=trunk.start, every=True),
            ),
            span=span_of(gm, 0, len(trunk.ends)),
            restore=aligned,
            window=2,
        )

    def start(self) -> float:
        return 0.0

    def decide(self, state: float, signals: Sequence[float], step: Step) -> Decision[float]:
        default_threshold, default_retention = (0.4, 0.2) if self.error == "d_y" else (0.08, 0.0)
        threshold = default_threshold if self.threshold is None else self.threshold
        retention = default_retention if self.retention is None else self.retention
        if step.must:
            return Decision(True, 0.0, step.must)
        if step.index <= int(retention * (step.total or USUAL_STEPS)):
            return Decision(True, 0.0, f"step {step.index} is among the first {retention:.0%}")
        if step.is_last:
            return Decision(True, 0.0, "the last step")
        total = state + (signals[0] if self.error == "d_y" else signals[2])
        if total < threshold:
            return Decision(False, total, f"{total:.4f} < {threshold:g}", {"accumulated": total})
        return Decision(True, 0.0, f"{total:.4f} >= {threshold:g}", {"accumulated": total})
