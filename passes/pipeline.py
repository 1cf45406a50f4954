"""The passes of a variant in the order they run: a table of contents."""

from __future__ import annotations

from dataclasses import dataclass

from omnifx.graph import Pass
from omnifx.grid import Grid
from omnifx.passes.combine_output import CombineOutput
from omnifx.passes.correct_noise import CorrectNoise
from omnifx.passes.eliminate import Eliminate
from omnifx.passes.follow_trends import FollowTrends, Form
from omnifx.passes.guard_tokens import GuardTokens
from omnifx.passes.hoist_conditions import HoistConditions
from omnifx.passes.measure_noise import MeasureNoise
from omnifx.passes.narrow_linears import NarrowLinears
from omnifx.passes.predict_cuts import PredictCuts
from omnifx.passes.read_cuts import ReadCuts
from omnifx.passes.read_spans import ReadSpans
from omnifx.passes.score_tokens import ScoreTokens
from omnifx.passes.write_cuts import WriteCuts
from omnifx.passes.write_spans import WriteSpans
from omnifx.plan import COMPUTE, PREDICT, REUSE, SKIP, Action, Row, partial, partial_tokens
from omnifx.spans import Span
from omnifx.tokens import Selection


@dataclass(frozen=True)
class VariantSpec:
    """What one static graph does: its row of actions, and which values it takes and gives beside the model's own."""

    branches: tuple[str, ...]
    row: Row
    writes: tuple[str, ...]
    """Computed branches and spans whose cuts are returned."""
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
    spans: tuple[Span, ...] = ()
    """Ranges of blocks that are reused or written as one; their actions end the row."""
    selection: Selection | None = None
    """How tokens are chosen, in it or, by the scores it returns, in later steps."""
    combines: int | None = None
    """Full steps whose outputs and latents its output is combined of; None if it is not combined."""
    combines_noise: bool = False
    """Whether the measured noise is a term of the combination."""

    @property
    def reused(self) -> tuple[str, ...]:
        """Reused branches, inside of reused spans or not."""
        return self._branches_that(REUSE, partial(0))

    @property
    def reads(self) -> tuple[str, ...]:
        """Branches reused whole, whose cuts are inputs."""
        covered = {name for span in self.reads_spans for name in span.branches}
        return tuple(name for name in self.reused if name not in covered)

    @property
    def predicts(self) -> tuple[str, ...]:
        """Predicted branches, of whose cuts several stored values are inputs."""
        return self._branches_that(PREDICT)

    @property
    def cached(self) -> tuple[str, ...]:
        """Branches of which nothing is computed."""
        return self._branches_that(REUSE, PREDICT, SKIP, partial(0))

    @property
    def skips(self) -> bool:
        """Whether nothing of the network is left."""
        return SKIP in self.row

    @property
    def partial(self) -> tuple[tuple[str, int], ...]:
        """Branches of which some tokens are computed, and how many."""
        actions = zip(self.branches, self.row, strict=False)
        return tuple((name, k) for name, action in actions if (k := partial_tokens(action)))

    @property
    def computed(self) -> tuple[str, ...]:
        """Branches that are computed whole."""
        return self._branches_that(COMPUTE)

    @property
    def reads_spans(self) -> tuple[Span, ...]:
        """Reused spans, whose deltas are inputs."""
        actions = self.row[len(self.branches) :]
        reused = [span for span, action in zip(self.spans, actions, strict=True) if action == REUSE]
        return tuple(s for s in reused if not any(t != s and t.first <= s.first and s.last <= t.last for t in reused))

    @property
    def writes_spans(self) -> tuple[Span, ...]:
        """Spans whose deltas are returned."""
        return tuple(span for span in self.spans if span.name in self.writes)

    def _branches_that(self, *do: Action) -> tuple[str, ...]:
        return tuple(name for name, action in zip(self.branches, self.row, strict=False) if action in do)

    @property
    def label(self) -> str:
        """A short name for dumps and tables: full, reuse, predict, skip, or the number of reused and predicted branches
        or of tokens computed, with its extras."""
        if self.skips:
            return "skip"
        counts = {word: len(names) for word, names in (("reuse", self.reused), ("predict", self.predicts)) if names}
        alone = len(self.branches) in counts.values()
        words = [word if alone else f"{word}{count}" for word, count in counts.items()]
        if self.partial:
            some = f"of{len(self.branches) - len(self.computed)}" if self.computed else ""
            tokens = f"partial{sum(k for _, k in self.partial)}{some}"
            words = [tokens, *(word for word in words if not word.startswith("reuse"))]
        base = "-".join(words) or ("reuse0" if self.reads_spans else "full")
        extras = [
            word
            for word, on in (
                ("write", self.writes),
                ("measure", self.measures),
                ("correct", self.corrects),
                ("store", self.stores),
                ("trend", self.trend),
                ("combine", self.combines is not None),
                ("score", self.selection is not None and self.computed),
            )
            if on
        ]
        return "+".join([base, *(span.name for span in self.reads_spans), *extras])


def pipeline(
    spec: VariantSpec, grids: tuple[tuple[int, Grid], ...], *, hoists: bool = True, folds: tuple[Pass, ...] = ()
) -> tuple[Pass, ...]:
    """The passes that turn the captured graph (analysed by `FindBranches`) into the variant `spec`.

    `folds` are what an export does of its own: they take out of every variant what is known before a step.
    """
    passes: list[Pass] = []
    if spec.measures:
        passes.append(MeasureNoise(branches=spec.branches))
    if spec.corrects:
        changed = (*spec.cached, *(name for name, _ in spec.partial))
        passes.append(CorrectNoise(branches=changed, grids=grids))  # before ReadCuts: it asks what the cuts change
    if spec.combines is not None:  # before ReadCuts, as CorrectNoise; a skipped step ends here, and all that is dead
        combine = CombineOutput(
            branches=spec.cached, history=spec.combines, noise=spec.combines_noise, reuse=not spec.skips
        )
        passes.append(combine)
    if spec.skips:
        return (*passes, Eliminate(freed=spec.cached))
    if spec.reads:
        passes.append(ReadCuts(branches=spec.reads))
    if spec.predicts:
        passes.append(PredictCuts(branches=spec.predicts, terms=spec.terms, stores=spec.stores))
    if spec.trend:
        passes.append(FollowTrends(branches=spec.predicts, form=spec.trend))  # on what PredictCuts made
    if spec.writes:
        spanning = {span.name for span in spec.spans}
        passes.append(WriteCuts(branches=tuple(name for name in spec.writes if name not in spanning)))
    if spec.writes_spans:
        passes.append(WriteSpans(spans=spec.writes_spans))
    if spec.reads_spans:
        passes.append(ReadSpans(spans=spec.reads_spans))  # after WriteSpans: it replaces what that subtracts
    passes.append(Eliminate(freed=spec.cached))  # what reading the cuts left behind
    if spec.selection is not None and spec.partial:  # after Eliminate: what only reused branches shared is its own now
        passes.append(GuardTokens(partial=spec.partial, selection=spec.selection))
        passes.append(Eliminate())
    if spec.selection is not None and spec.computed:  # after Eliminate: attentions that are gone tell nothing
        passes.append(ScoreTokens(branches=spec.branches, selection=spec.selection))
    passes += folds  # before NarrowLinears: what is taken out has the same name in every variant
    if spec.cached or spec.partial:
        passes.append(NarrowLinears())  # after Eliminate: only then is it known which columns nothing uses
    if (spec.cached or spec.partial) and hoists:
        passes.append(HoistConditions())  # last: of the conditions, only what the reuse step still needs
    return tuple(passes)
