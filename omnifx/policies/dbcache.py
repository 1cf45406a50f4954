"""Compute the first and the last blocks; skip those between while what the first ones add hardly changes.

The test is FirstBlockCache's, on the residual of the first `front` blocks: skip while ``mean|r - r'| / mean|r'|`` is
below `threshold`. The last `back` blocks run at every step, on the trunk after the first blocks plus the residual of
those between, as the last computed step left it, or, with a `predictor`, as a Taylor series (or another predictor) of
the last computed steps' residuals gives it. The first `warmup` steps compute everything, and so does the step after
`most_skips` skipped ones.
Source: DBCache of cache-dit (vipshop/cache-dit), whose settings are named F1B0 W4 MC6 R0.24: front, back, warm-up, most
skipped steps in a row, threshold. The defaults are its setting M; "taylor:1" is its Taylor calibrator, that of
TaylorSeer, arXiv:2503.06923.
Ours: the largest change over a batch's samples decides; the warm-up is not thinned out (its W steps all compute); the
other predictors, of those that need no profile.
Cost: `front` + `back` blocks at every step; the residuals of the front and of what is skipped are kept, the latter as
often as the predictor has terms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from omnifx.errors import PassError
from omnifx.policies.first_block_cache import first_blocks_change, predicting
from omnifx.policy import register
from omnifx.predictors import runtime_predictor
from omnifx.probes import Keep, Probe, Trunk, span_of
from omnifx.runtime import Decision, RuntimePolicy, Step, check_count, check_number


@register
@dataclass(frozen=True, kw_only=True)
class DBCache(RuntimePolicy[int]):
    """Skip the blocks between the first and the last ones. Its state counts the steps skipped in a row."""

    name: ClassVar[str] = "dbcache"

    front: int = 1  # blocks at the front that run at every step
    back: int = 0  # blocks at the end that run at every step
    warmup: int = 4  # first steps, all computed
    most_skips: int = 6  # skipped steps in a row
    threshold: float = 0.24  # the relative change from which a step computes
    predictor: str | None = None  # of what is skipped, as in omnifx.predictors; None: as it was last computed

    def __post_init__(self) -> None:
        for name, low in (("front", 1), ("back", 0), ("warmup", 1), ("most_skips", 1)):
            check_count(self.name, name, getattr(self, name), low)
        check_number(self.name, "threshold", self.threshold, 0.0)
        runtime_predictor(self.name, self.predictor)

    def probe(self, gm: fx.GraphModule, trunk: Trunk) -> Probe:
        count = len(trunk.ends)
        if count <= self.front + self.back:
            raise PassError(
                f"{self.name}: front={self.front} and back={self.back} leave nothing to skip of {count} blocks."
            )
        return Probe(
            signals=("change",),
            reads=(("before", trunk.start), ("after", trunk.ends[self.front - 1])),
            measure=first_blocks_change,
            keeps=(Keep("residual", like=trunk.ends[self.front - 1]),),
            span=span_of(gm, self.front, count - self.back),
            **predicting(runtime_predictor(self.name, self.predictor)),
        )

    def start(self) -> int:
        return 0

    def decide(self, state: int, signals: Sequence[float], step: Step) -> Decision[int]:
        shown = {"skipped": float(state)}
        if step.must or step.index < self.warmup:
            return Decision(True, 0, step.must or f"step {step.index} of {self.warmup} to warm up", shown)
        if state >= self.most_skips:
            return Decision(True, 0, f"{state} steps in a row were skipped", shown)
        if signals[0] < self.threshold:
            return Decision(False, state + 1, f"the front changed by {signals[0]:.4f} < {self.threshold:g}", shown)
        return Decision(True, 0, f"the front changed by {signals[0]:.4f} >= {self.threshold:g}", shown)
