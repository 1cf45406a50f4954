"""Skip all blocks while the first block's modulated input, rescaled by a polynomial, changes little.

``d = mean|M - M'| / mean|M'|`` with M the first block's modulated input (what its first attention reads) and M' that
of the last step, skipped or not. The polynomial makes of it an estimate of the output's relative change, which is added
up; a step computes if it is the first, the last, or the sum reaches `threshold`, and then the sum starts anew. Skipped:
the trunk behind the last block is the trunk before the first one plus the residual of all blocks, as the last computed
step left it.
Source: TeaCache, arXiv:2411.19108; polynomials and thresholds of ali-vilab/TeaCache are in `teacache.json`. Those for
CogVideoX are not among them: they belong to another signal, the timestep's embedding.
Ours: a step whose estimate is negative computes (the published polynomials bend down beyond the changes that they were
fitted on). For a model without a published polynomial one is fitted to generations that run in full: those of
`omnifx.calibrate`, or else the first one (of degree 4, or less where that would be more than half as many numbers as
points; not used outside of the changes it was fitted on).
``coefficients="identity"`` takes d itself instead. The largest d over a batch's samples decides.
Cost: the embedding and the first modulation at every step; M and the residual are kept, and while it is fitted the
output.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from omnifx.errors import ConfigError
from omnifx.policy import register
from omnifx.probes import Keep, Measured, Probe, Trunk, Values, change, span_of
from omnifx.runtime import Decision, RuntimePolicy, Step, check_number

DEGREE = 4
FEWEST_POINTS = 3
DEFAULT_THRESHOLD = 0.1
"""What the source uses for most models as its careful setting."""


@cache
def published() -> dict[str, Any]:
    """Published polynomials by class of model: coefficients (highest power first), threshold, source."""
    text = resources.files("omnifx.policies").joinpath("teacache.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def input_change(values: Values, old: Values) -> Measured:
    """How much the modulated input changed since the last step."""
    modulated = values["modulated"]
    return {"change": change(modulated, old["modulated"], values["latents"])}, {"modulated": modulated}


def output_change(values: Values, old: Values) -> Measured:
    """How much the output changed since the last computed step: what a polynomial is fitted to."""
    output = values["output"]
    return {"output_change": change(output, old["output"], values["latents"])}, {"output": output}


@register
@dataclass(frozen=True, kw_only=True)
class TeaCache(RuntimePolicy[float]):
    """Skip all blocks while the estimated change adds up to little. Its state is that sum."""

    name: ClassVar[str] = "teacache"
    uses_steps: ClassVar[str] = "the last step is not known to be the last, and may be skipped"

    threshold: float | None = None  # sum from which a step computes; None: the model's published one, else 0.1
    coefficients: tuple[float, ...] | Literal["identity"] | None = (
        None  # highest power first; None: published, or fitted
    )
    within: tuple[float, float] | None = None  # changes that the polynomial holds for; others are taken for the nearest

    def __post_init__(self) -> None:
        if self.threshold is not None:
            check_number(self.name, "threshold", self.threshold, 0.0)
        given = self.coefficients
        if given is not None and given != "identity":
            if isinstance(given, str) or not given:
                raise ConfigError(
                    f"{self.name}: coefficients must be numbers, highest power first, or 'identity', got {given!r}."
                )
            for value in given:
                check_number(self.name, "coefficients", value, -math.inf)

    def for_model(self, model: str) -> tuple["TeaCache", str]:
        known = published().get(model)
        threshold = self.threshold
        if threshold is None:
            threshold = known["threshold"] if known and self.coefficients is None else DEFAULT_THRESHOLD
        if self.coefficients == "identity":
            return replace(self, threshold=threshold), f"{self.name}: no polynomial, as coefficients='identity' asks"
        if self.coefficients is not None or known is None:
            return replace(self, threshold=threshold), ""
        chosen = replace(self, threshold=threshold, coefficients=tuple(known["coefficients"]))
        return chosen, f"{self.name}: polynomial of {model} from {known['source']}; threshold {threshold:g}"

    @property
    def learns(self) -> bool:
        return self.coefficients is None

    def learned(self, measured: Sequence[dict[str, float]]) -> tuple["TeaCache", str]:
        points = [(m["change"], m["output_change"]) for m in measured if {"change", "output_change"} <= m.keys()]
        points = [(x, y) for x, y in points if 0.0 <= x < math.inf and 0.0 <= y < math.inf]
        if len(points) < FEWEST_POINTS:
            return self, ""
        x, y = torch.tensor(points, dtype=torch.float64).T
        degree = min(DEGREE, max(1, (len(points) - 1) // 2))
        powers = torch.stack([x**power for power in range(degree, -1, -1)], dim=1)
        coefficients = tuple(torch.linalg.lstsq(powers, y[:, None], driver="gelsd").solution[:, 0].tolist())
        fitted = replace(self, coefficients=coefficients, within=(float(x.min()), float(x.max())))
        text = ", ".join(f"{c:.6g}" for c in coefficients)
        return fitted, (
            f"{self.name}: the polynomial ({text}) was fitted to {len(points)} steps, for changes in "
            f"[{x.min():.4g}, {x.max():.4g}]"
        )

    def probe(self, gm: fx.GraphModule, trunk: Trunk) -> Probe:
        fits = self.learns and trunk.output != ""
        return Probe(
            signals=("change",),
            reads=(("modulated", trunk.modulated), ("before", trunk.start)),
            measure=input_change,
            keeps=(Keep("modulated", like=trunk.modulated, every=True),),
            span=span_of(gm, 0, len(trunk.ends)),
            ends=(("output", trunk.output),) if fits else (),
            finish=output_change if fits else None,
            finish_signals=("output_change",) if fits else (),
            finish_keeps=(Keep("output", like=trunk.output),) if fits else (),
        )

    def start(self) -> float:
        return 0.0

    def estimate(self, moved: float) -> float:
        """The polynomial's value at a change of the modulated input."""
        if self.coefficients is None or self.coefficients == "identity":
            return moved
        if not math.isfinite(moved):
            return math.inf
        if self.within is not None:
            moved = min(max(moved, self.within[0]), self.within[1])
        value = 0.0
        for coefficient in self.coefficients:
            value = value * moved + float(coefficient)
        if value < 0.0:  # no change is negative: the polynomial says nothing here
            return math.inf if self.within is None else 0.0
        return value

    def decide(self, state: float, signals: Sequence[float], step: Step) -> Decision[float]:
        if step.must or step.is_last:
            return Decision(True, 0.0, step.must or "the last step")
        estimate = self.estimate(signals[0])
        total = state + estimate
        threshold = DEFAULT_THRESHOLD if self.threshold is None else self.threshold
        shown = {"estimate": estimate, "accumulated": total}
        if total < threshold:
            return Decision(False, total, f"{total:.4f} < {threshold:g}", shown)
        return Decision(True, 0.0, f"{total:.4f} >= {threshold:g}", shown)
