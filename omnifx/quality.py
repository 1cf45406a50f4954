"""What a calibration measured of plans rather than of the model: the PSNR that speedups buy, and how long a step takes.

Both are kept with a profile, so that a plan can be asked for by its quality or its time.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

MOST_PSNR = 120.0
"""dB that equal samples count as: beyond the rounding of float32."""


class QualityPoint(BaseModel):
    """Generations that followed one plan, against the uncached samples of the same seeds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    asked: float = Field(ge=1.0)
    """The speedup that the policy was asked for; asked again, it gives the same plan."""
    speedup: float = Field(gt=0.0)
    """FLOPs uncached over planned."""
    psnr: FiniteFloat
    """dB, the mean over samples."""
    psnr_p10: FiniteFloat
    """dB: one sample in ten is worse."""
    error: float = Field(ge=0.0)
    """dB: standard error of the mean."""


class Quality(BaseModel):
    """What PSNR the plans of one policy reach with one profile, from the mildest to the strongest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: str
    options: dict[str, Any]
    """The policy's, as JSON has them."""
    data_range: float = Field(gt=0.0)
    """Largest possible value of a sample minus the smallest."""
    num_samples: int = Field(ge=1)
    points: tuple[QualityPoint, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if any(a.speedup >= b.speedup for a, b in itertools.pairwise(self.points)):
            raise ValueError("the points must be of plans with rising speedups")
        return self

    def is_of(self, policy: str, options: Mapping[str, Any]) -> bool:
        """Whether it was measured with this policy and these options."""
        return self.policy == policy and self.options == plain_options(options)

    def at(self, speedup: float) -> QualityPoint | None:
        """What is expected of a plan of this speedup: dB linear in the logarithm of the speedup, between two measured
        plans; None beyond them."""
        for point in self.points:
            if math.isclose(point.speedup, speedup, rel_tol=1e-6):
                return point
        for a, b in itertools.pairwise(self.points):
            if a.speedup < speedup < b.speedup:
                share = math.log(speedup / a.speedup) / math.log(b.speedup / a.speedup)
                return QualityPoint(
                    asked=speedup,
                    speedup=speedup,
                    psnr=a.psnr + share * (b.psnr - a.psnr),
                    psnr_p10=a.psnr_p10 + share * (b.psnr_p10 - a.psnr_p10),
                    error=max(a.error, b.error),
                )
        return None

    def measured(self, speedup: float) -> bool:
        """Whether a plan of this speedup was measured itself."""
        return any(math.isclose(point.speedup, speedup, rel_tol=1e-6) for point in self.points)

    def with_points(self, *points: QualityPoint) -> Self:
        """The same with further points."""
        known = {round(point.speedup, 6): point for point in (*self.points, *points)}
        return self.model_copy(update={"points": tuple(known[key] for key in sorted(known))})


class Refinement(BaseModel):
    """Which variant of a policy's plans for one speedup came out best, in generations that followed them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: str
    options: dict[str, Any]
    """The policy's before, as JSON has them."""
    asked: float = Field(ge=1.0)
    """The speedup that the policy was asked for."""
    better: dict[str, Any]
    """Options of the best variant that differ."""
    psnr: FiniteFloat
    """dB of that variant, the mean over samples."""
    plain_psnr: FiniteFloat
    """dB of the policy as it was."""

    def is_of(self, policy: str, options: Mapping[str, Any]) -> bool:
        """Whether it was measured with this policy and these options."""
        return self.policy == policy and self.options == plain_options(options)


class Timing(BaseModel):
    """How long one call of the model takes, as its first generation showed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step_ms: float = Field(gt=0.0)
    """The graph that computes everything: the median over the steps behind the first two."""
    overhead_ms: float = Field(ge=0.0)
    """What comes before any graph: reading the inputs, and deciding what to run."""
    device: str
    """Where, and how it was lowered."""
    latent_shape: tuple[int, ...]
    """Of one call."""


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """A policy's options as they come back from a file: tuples are lists, and objects their text."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(options), default=str))
    return plain


__all__ = ["MOST_PSNR", "Quality", "QualityPoint", "Refinement", "Timing", "plain_options"]
