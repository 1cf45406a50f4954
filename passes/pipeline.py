"""The passes of a variant in the order they run: a table of contents."""

from __future__ import annotations

from dataclasses import dataclass

from omnifx.graph import Pass
from omnifx.grid import Grid
from omnifx.passes.correct_noise import CorrectNoise
from omnifx.passes.eliminate import Eliminate
from omnifx.passes.follow_trends import FollowTrends, Form
from omnifx.passes.hoist_conditions import HoistConditions
from omnifx.passes.measure_noise import MeasureNoise
from omnifx.passes.narrow_linears import NarrowLinears
from omnifx.passes.predict_cuts import PredictCuts
from omnifx.passes.read_cuts import ReadCuts
from omnifx.passes.write_cuts import WriteCuts
from omnifx.plan import COMPUTE, PREDICT, REUSE, Action, Row


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
    terms: int = 0
    """Stored values of each predicted cut that are inputs; 0 if no branch is predicted."""
    stores: bool = False
    """Whether what it predicts is returned, to be stored."""
    trend: Form | None = None
    """How what it predicts follows the trends of a prior."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Reused branches, whose cuts are inputs."""
        return self._branches_that(REUSE)

    @property
    def predicts(self) -> tuple[str, ...]:
        """Predicted branches, of whose cuts several stored values are inputs."""
        return self._branches_that(PREDICT)

    @property
    def cached(self) -> tuple[str, ...]:
        """Branches that are not computed."""
        return tuple(name for name, action in zip(self.branches, self.row, strict=True) if action != COMPUTE)

    def _branches_that(self, does: Action) -> tuple[str, ...]:
        return tuple(name for name, action in zip(self.branches, self.row, strict=True) if action == does)

    @property
    def label(self) -> str:
        """A short name for dumps and tables: full, reuse, predict, or the number of reused and predicted branches, with
        its extras."""
        counts = {word: len(names) for word, names in (("reuse", self.reads), ("predict", self.predicts)) if names}
        alone = len(self.row) in counts.values()
        base = "-".join(word if alone else f"{word}{count}" for word, count in counts.items()) or "full"
        extras = [
            word
            for word, on in (
                ("write", self.writes),
                ("measure", self.measures),
                ("correct", self.corrects),
                ("store", self.stores),
                ("trend", self.trend),
            )
            if on
        ]
        return "+".join([base, *extras])


def pipeline(spec: VariantSpec, grids: tuple[tuple[int, Grid], ...], *, hoists: bool = True) -> tuple[Pass, ...]:
    """The passes that turn the captured graph (analysed by `FindBranches`) into the variant `spec`."""
    passes: list[Pass] = []
    if spec.measures:
        passes.append(MeasureNoise(branches=spec.branches))
    if spec.corrects:
        passes.append(CorrectNoise(branches=spec.cached, grids=grids))  # before ReadCuts: it asks what the cuts change
    if spec.reads:
        passes.append(ReadCuts(branches=spec.reads))
    if spec.predicts:
        passes.append(PredictCuts(branches=spec.predicts, terms=spec.terms, stores=spec.stores))
    if spec.trend:
        passes.append(FollowTrends(branches=spec.predicts, form=spec.trend))  # on what PredictCuts made
    if spec.writes:
        passes.append(WriteCuts(branches=spec.writes))
    passes.append(Eliminate(freed=spec.cached))  # what reading the cuts left behind
    if spec.cached:
        passes.append(NarrowLinears())  # after Eliminate: only then is it known which columns nothing uses
    if spec.cached and hoists:
        passes.append(HoistConditions())  # last: of the conditions, only what the reuse step still needs
    return tuple(passes)
