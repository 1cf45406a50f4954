"""ToCa with steps in between that reuse everything: full, some tokens, all reused, some tokens, ...

Source: DuCa, arXiv:2412.18911, and its released code: in a cycle of N steps the first is full, odd ones are partial
("conservative") as in ToCa, even ones skip all blocks ("aggressive"); tokens are scored by the norms of their values.
Ours: where the paper reuses the last block's output in aggressive steps, every branch reads its own cut, so that gates
and modulations follow the timestep; it costs the same FLOPs up to those.
Cost: as ToCa; one variant more, which the other policies have as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from omnifx.policies.toca import ToCa
from omnifx.policy import register
from omnifx.tokens import Score

RATIOS = {"dit": 0.05, "pixart": 0.75}
"""r0 where DuCa's differs from ToCa's."""


@register
@dataclass(frozen=True, kw_only=True)
class DuCa(ToCa):
    """ToCa's options; intervals are fixed unless asked otherwise."""

    name: ClassVar[str] = "duca"

    adaptive: bool | None = False
    score: Score | None = "kv-norm"

    @property
    def _ratio(self) -> float:
        return RATIOS.get(self.release, self.constants.ratio) if self.ratio is None else float(self.ratio)

    def _skips(self, since: int) -> bool:
        return since % 2 == 0
