"""The passes of a variant in the order they run: a table of contents."""

from __future__ import annotations

from dataclasses import dataclass

from omnifx.graph import Pass
from omnifx.grid import Grid
from omnifx.passes.correct_noise import CorrectNoise
from omnifx.passes.eliminate import Eliminate
from omnifx.passes.guard_tokens import GuardTokens
from omnifx.passes.hoist_conditions import HoistConditions
from omnifx.passes.measure_noise import MeasureNoise
from omnifx.passes.narrow_linears import NarrowLinears
from omnifx.passes.read_cuts import ReadCuts
from omnifx.passes.score_tokens import ScoreTokens
from omnifx.passes.write_cuts import WriteCuts
from omnifx.plan import COMPUTE, Row, partial_tokens
from omnifx.tokens import Selection


@dataclass(frozen=True)
class VariantSpec:
    """What one static graph does: its row of actions, and which values it takes and gives beside the model's own."""

    branches: tuple[str, ...]
    row: Row
    writes: tuple[str, ...]
    """Computed branches whose cuts are returned."""
    measures: bool = False
    """Whether it also returns the noise that its old cuts would cause."""
    corrects: bool = False
    """Whether it subtracts a predicted noise."""
    selection: Selection | None = None
    """How tokens are chosen, in it or, by the scores it returns, in later steps."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Reused branches, whose cuts are inputs."""
        partial = dict(self.partial)
        rows = zip(self.branches, self.row, strict=True)
        return tuple(name for name, action in rows if action != COMPUTE and name not in partial)

    @property
    def partial(self) -> tuple[tuple[str, int], ...]:
        """Branches of which some tokens are computed, and how many."""
        return tuple((n, k) for n, action in zip(self.branches, self.row, strict=True) if (k := partial_tokens(action)))

    @property
    def label(self) -> str:
        """A short name for dumps and tables: full, reuse, the number of reused branches or of tokens computed, with its
        extras."""
        computed = self.row.count(COMPUTE)
        base = (
            "full" if computed == len(self.row) else ("reuse" if not computed else f"reuse{len(self.row) - computed}")
        )
        if self.partial:
            base = f"partial{sum(k for _, k in self.partial)}" + (f"of{len(self.row) - computed}" if computed else "")
        words = (
            ("write", self.writes), ("measure", self.measures), ("correct", self.corrects),
            ("score", self.selection is not None and computed),
        )  # fmt: skip
        extras = [word for word, on in words if on]
        return "+".join([base, *extras])


def pipeline(spec: VariantSpec, grids: tuple[tuple[int, Grid], ...], *, hoists: bool = True) -> tuple[Pass, ...]:
    """The passes that turn the captured graph (analysed by `FindBranches`) into the variant `spec`."""
    passes: list[Pass] = []
    if spec.measures:
        passes.append(MeasureNoise(branches=spec.branches))
    if spec.corrects:
        passes.append(CorrectNoise(branches=spec.reads, grids=grids))  # before ReadCuts: it asks what the cuts change
    if spec.reads:
        passes.append(ReadCuts(branches=spec.reads))
    if spec.writes:
        passes.append(WriteCuts(branches=spec.writes))
    passes.append(Eliminate(freed=spec.reads))  # what reading the cuts left behind
    if spec.selection is not None and spec.partial:  # after Eliminate: what only reused branches shared is its own now
        passes.append(GuardTokens(partial=spec.partial, selection=spec.selection))
        passes.append(Eliminate())
    if spec.selection is not None and COMPUTE in spec.row:  # after Eliminate: attentions that are gone tell nothing
        passes.append(ScoreTokens(branches=spec.branches, selection=spec.selection))
    if spec.reads or spec.partial:
        passes.append(NarrowLinears())  # after Eliminate: only then is it known which columns nothing uses
    if (spec.reads or spec.partial) and hoists:
        passes.append(HoistConditions())  # last: of the conditions, only what the reuse step still needs
    return tuple(passes)
