"""Compute the first block; if what it adds hardly changed since the last computed step, reuse what the others added.

``r = trunk after block 0 - trunk before it``; the rest is skipped while ``mean|r - r'| / mean|r'| <= threshold``, with
r' of the last computed step. Skipped: the trunk behind the last block is the trunk after block 0 plus the residual of
all other blocks, as the last computed step left it.
Source: FirstBlockCache of ParaAttention, as in diffusers (`hooks/first_block_cache.py`), on TeaCache, arXiv:2411.19108.
Ours: the largest change over a batch's samples decides, where the source takes the mean over the whole batch; the
residual of the text's trunk is kept only if something behind the last block reads it; with a `predictor` the others'
residual is predicted from those of the last computed steps, as DBCache does.
Cost: the first block at every step; two trunks kept (r' and the residual) for each stream, with a predictor as many
residuals as it has terms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from omnifx.errors import PassError
from omnifx.policy import register
from omnifx.predictors import Predictor, runtime_predictor
from omnifx.probes import Keep, Measured, Probe, Trunk, Values, change, span_of
from omnifx.runtime import Decision, RuntimePolicy, Step, check_number


def first_blocks_change(values: Values, old: Values) -> Measured:
    """How much the residual of the first blocks changed since it was kept."""
    residual = values["after"] - values["before"]
    return {"change": change(residual, old["residual"], values["latents"])}, {"residual": residual}


def predicting(predictor: Predictor | None) -> dict[str, Any]:
    """What a probe needs, so that its residuals are predicted; nothing without a predictor."""
    if predictor is None:
        return {}
    return {"window": predictor.terms, "weights": lambda stored, step: predictor.weights(stored, step, None)}


@register
@dataclass(frozen=True, kw_only=True)
class FirstBlockCache(RuntimePolicy[None]):
    """Skip all blocks but the first while its residual changes little."""

    name: ClassVar[str] = "first-block-cache"

    threshold: float = (
        0.05  # largest relative change that is skipped; diffusers' default, 0.08 on FLUX in ParaAttention
    )

    predictor: str | None = None  # of the others' residual, as in omnifx.predictors; None: as it was last computed

    def __post_init__(self) -> None:
        check_number(self.name, "threshold", self.threshold, 0.0)
        runtime_predictor(self.name, self.predictor)

    def probe(self, gm: fx.GraphModule, trunk: Trunk) -> Probe:
        if len(trunk.ends) < 2:
            raise PassError(f"{self.name} needs two blocks, and the latents' trunk has {len(trunk.ends)}.")
        return Probe(
            signals=("change",),
            reads=(("before", trunk.start), ("after", trunk.ends[0])),
            measure=first_blocks_change,
            keeps=(Keep("residual", like=trunk.ends[0]),),
            span=span_of(gm, 1, len(trunk.ends)),
            **predicting(runtime_predictor(self.name, self.predictor)),
        )

    def start(self) -> None:
        return None

    def decide(self, state: None, signals: Sequence[float], step: Step) -> Decision[None]:
        if step.must:
            return Decision(True, None, step.must)
        if signals[0] <= self.threshold:
            return Decision(False, None, f"the first block changed by {signals[0]:.4f} <= {self.threshold:g}")
        return Decision(True, None, f"the first block changed by {signals[0]:.4f} > {self.threshold:g}")
