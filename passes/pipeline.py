"""The passes of a variant in the order they run: a table of contents."""

from __future__ import annotations

from dataclasses import dataclass

from omnifx.graph import Pass
from omnifx.grid import Grid
from omnifx.passes.correct_noise import CorrectNoise
from omnifx.passes.eliminate import Eliminate
from omnifx.passes.hoist_conditions import HoistConditions
from omnifx.passes.measure_noise import MeasureNoise
from omnifx.passes.narrow_linears import NarrowLinears
from omnifx.passes.read_cuts import ReadCuts
from omnifx.passes.write_cuts import WriteCuts
from omnifx.plan import COMPUTE, REUSE, Row


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

    @property
    def reads(self) -> tuple[str, ...]:
        """Reused branches, whose cuts are inputs."""
        return tuple(name for name, action in zip(self.branches, self.row, strict=True) if action == REUSE)

    @property
    def label(self) -> str:
        """A short name for dumps and tables: full, reuse, or the number of reused branches, with its extras."""
        computed = self.row.count(COMPUTE)
        base = (
            "full" if computed == len(self.row) else ("reuse" if not computed else f"reuse{len(self.row) - computed}")
        )
        extras = [
            word for word, on in (("write", self.writes), ("measure", self.measures), ("correct", self.corrects)) if on
        ]
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
    if spec.reads:
        passes.append(NarrowLinears())  # after Eliminate: only then is it known which columns nothing uses
    if spec.reads and hoists:
        passes.append(HoistConditions())  # last: of the conditions, only what the reuse step still needs
    return tuple(passes)
