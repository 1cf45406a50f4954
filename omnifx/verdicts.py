"""Who is ahead at which share of the compute, and by how much: what `omnifx report` says in words and tables.

Ways are compared where they cost the same: at a share of the uncached compute, by the first metric that is no guard.
A row counts at a share if it was tuned for it, or if it costs at most 5% more. Differences are taken within each set of
seeds where both sides have the same sets; one that is not larger than its spread over the sets is no lead.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from omnifx.results import Case, Family, Metric, Results, Row, Value

MARGIN = 1.05
"""A row counts at a share up to so many times it: whole steps do not divide evenly."""
MOST_SHARES = 6
COMMON_SHARES = (0.5, 0.4, 0.3, 0.25)

FAMILIES: dict[Family, str] = {
    "ours": "omnifx",
    "policy": "omnifx's other policies",
    "peer": "other packages",
    "solver": "fewer steps and other solvers",
    "uncached": "uncached",
}
RIVALS: tuple[Family, ...] = ("peer", "solver", "policy")

Word = Literal["ahead", "level", "behind"]


@dataclass(frozen=True)
class Lead:
    """How much better one figure is than another, in the metric's unit; negative if it is worse."""

    mean: float
    spread: float | None
    """Over sets of seeds; None where there is one set."""

    @property
    def word(self) -> Word:
        if abs(self.mean) <= (self.spread or 0.0):
            return "level"
        return "ahead" if self.mean > 0 else "behind"


@dataclass(frozen=True)
class Rival:
    """The best row of a family at a share, and how far ours is ahead of it."""

    family: Family
    row: Row
    value: Value
    lead: Lead | None
    """None where ours has no row."""


@dataclass(frozen=True)
class Guard:
    """A metric that only catches broken settings: ours beside the uncached samples."""

    metric: Metric
    ours: Value
    uncached: Value
    lead: Lead
    """Ours over uncached; its spread is the uncached samples' own."""


@dataclass(frozen=True)
class Verdict:
    """Ours against the best of each other family, at one share of the compute."""

    share: float
    metric: Metric
    ours: Row | None
    rivals: tuple[Rival, ...]
    guards: tuple[Guard, ...]

    @property
    def value(self) -> Value | None:
        """Our figure."""
        return self.ours.metrics[self.metric.name] if self.ours is not None else None

    @property
    def against(self) -> Rival | None:
        """The best of all others."""
        sign = 1.0 if self.metric.better == "higher" else -1.0
        return max(self.rivals, key=lambda rival: sign * rival.value.mean, default=None)

    @property
    def lead(self) -> Lead | None:
        """Ours over the best of all others; None where either is missing."""
        return self.against.lead if self.against is not None else None

    def __str__(self) -> str:
        if self.ours is None:
            return "omnifx has no row here"
        if self.against is None or self.lead is None:
            return "nothing to compare with"
        lead, name = self.lead, f"{self.against.row.method} (at {share_text(self.against.row.compute)})"
        size = f"{lead_text(lead, self.metric, sign=False)}"
        if lead.word == "level":
            return f"level with {name}: the difference of {size} is within its spread"
        return f"ahead of {name} by {size}" if lead.word == "ahead" else f"behind {name} by {size}"


def leading(results: Results) -> Metric | None:
    """The metric that ways are ranked by: the first that is no guard."""
    return next((metric for metric in results.metrics if not metric.guard), None)


def shares_of(case: Case) -> tuple[float, ...]:
    """Shares of the compute to compare at, largest first: those that rows were tuned for; else those that ours cost;
    else common ones."""
    if tuned := {row.target for row in case.rows if row.target is not None}:
        return tuple(sorted(tuned, reverse=True))
    found: list[float] = []
    for compute in sorted(row.compute for row in case.rows if row.family == "ours"):
        if compute > 0 and (not found or compute > MARGIN * found[-1]):
            found.append(compute)
    return tuple(sorted(found[:MOST_SHARES], reverse=True)) or COMMON_SHARES


def counts_at(row: Row, share: float) -> bool:
    """Whether a row is compared at a share: tuned for it, or not more than 5% dearer."""
    return row.family != "uncached" and (row.target == share or row.compute <= MARGIN * share)


def best(rows: Iterable[Row], metric: Metric) -> Row | None:
    """The row with the best figure; None if none has one."""
    able = [row for row in rows if metric.name in row.metrics]
    sign = 1.0 if metric.better == "higher" else -1.0
    return max(able, key=lambda row: sign * row.metrics[metric.name].mean, default=None)


def best_by_method(case: Case, share: float, metric: Metric) -> dict[str, Row]:
    """The best row of each method at a share, ours first, then from best to worst."""
    rows = [row for row in case.rows if counts_at(row, share)]
    found = {method: best((r for r in rows if r.method == method), metric) for method in {r.method for r in rows}}
    sign = 1.0 if metric.better == "higher" else -1.0
    order = sorted(
        (row for row in found.values() if row is not None),
        key=lambda row: (row.family != "ours", -sign * row.metrics[metric.name].mean, row.method),
    )
    return {row.method: row for row in order}


def best_at_shares(case: Case, results: Results) -> dict[float, dict[str, Row]]:
    """`best_by_method` at each share; empty where no metric ranks."""
    metric = leading(results)
    return {share: best_by_method(case, share, metric) for share in shares_of(case)} if metric is not None else {}


def uncached_of(case: Case) -> Row | None:
    """The row of the uncached run."""
    return next((row for row in case.rows if row.family == "uncached"), None)


def verdicts_of(case: Case, results: Results) -> tuple[Verdict, ...]:
    """One verdict for each share where there is something to say; none without a metric that ranks."""
    metric = leading(results)
    if metric is None:
        return ()
    found = [_verdict_at(case, share, metric, results.metrics) for share in shares_of(case)]
    return tuple(verdict for verdict in found if verdict.ours is not None or verdict.rivals)


def lead_of(ours: Value, theirs: Value, metric: Metric) -> Lead:
    """How much better `ours` is; its spread is that of the differences within each set, if both have as many sets."""
    sign = 1.0 if metric.better == "higher" else -1.0
    if len(ours.sets) == len(theirs.sets) > 1:
        differences = [sign * (a - b) for a, b in zip(ours.sets, theirs.sets, strict=True)]
        return Lead(statistics.fmean(differences), statistics.stdev(differences))
    spreads = [value.spread for value in (ours, theirs) if value.spread is not None]
    return Lead(sign * (ours.mean - theirs.mean), math.hypot(*spreads) if spreads else None)


def tally(verdicts: Iterable[Verdict]) -> Counter[Word]:
    """At how many shares ours is ahead, level and behind."""
    return Counter(verdict.lead.word for verdict in verdicts if verdict.lead is not None)


def tally_text(count: Counter[Word]) -> str:
    """A tally in words; it says plainly where ours is behind."""
    total = sum(count.values())
    if not total:
        return "There is nothing to compare with at any share of the compute."
    words: dict[Word, str] = {"ahead": "ahead of every other way", "level": "level with the best", "behind": "behind"}
    parts = [f"{text} at {count[word]}" for word, text in words.items() if count[word]]
    shares = f" of {total} share{'s' if total > 1 else ''} of the compute"
    return f"omnifx is {', '.join([parts[0] + shares, *parts[1:]])}."


def number_text(number: float, metric: Metric | None = None, spread: float | None = None) -> str:
    """A figure with the digits that matter: one for dB, else two of its spread, or about four of its own."""
    if metric is not None and metric.unit == "dB":
        return f"{number:.1f}"
    if spread:
        return f"{number:.{min(max(1 - math.floor(math.log10(spread)), 0), 6)}f}"
    size = abs(number)
    return f"{number:.{0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 1 else 4}f}"


def value_text(value: Value | None, metric: Metric, none: str = "-") -> str:
    """A figure with its spread."""
    return none if value is None else _with_spread(value.mean, value.spread, metric)


def lead_text(lead: Lead, metric: Metric, *, sign: bool = True) -> str:
    """A difference with its spread and unit."""
    text = _with_spread(lead.mean if sign else abs(lead.mean), lead.spread, metric)
    return f"{'+' if sign and lead.mean > 0 else ''}{text} {metric.unit}".rstrip()


def share_text(share: float) -> str:
    """A share of the compute, as the tables have them: .50."""
    return f"{share:.3f}".removesuffix("0").replace("0.", ".", 1) if share < 1 else f"{share:.2f}"


def sentence(text: str) -> str:
    """A text as a sentence: with a capital, and an end."""
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith(('.', '!', '?')) else '.'}" if text else ""


def _with_spread(number: float, spread: float | None, metric: Metric) -> str:
    text = number_text(number, metric, spread)
    digits = len(text.partition(".")[2])
    return text if spread is None else f"{text} ± {spread:.{digits}f}"


def _verdict_at(case: Case, share: float, metric: Metric, metrics: Iterable[Metric]) -> Verdict:
    rows = [row for row in case.rows if counts_at(row, share)]
    ours = best((row for row in rows if row.family == "ours"), metric)
    rivals = []
    for family in RIVALS:
        row = best((row for row in rows if row.family == family), metric)
        if row is None:
            continue
        value = row.metrics[metric.name]
        lead = lead_of(ours.metrics[metric.name], value, metric) if ours is not None else None
        rivals.append(Rival(family, row, value, lead))
    guards = _guards(ours, uncached_of(case), metrics) if ours is not None else ()
    return Verdict(share, metric, ours, tuple(rivals), guards)


def _guards(ours: Row, uncached: Row | None, metrics: Iterable[Metric]) -> tuple[Guard, ...]:
    found = []
    for metric in metrics:
        mine, plain = ours.metrics.get(metric.name), uncached.metrics.get(metric.name) if uncached else None
        if metric.guard and mine is not None and plain is not None:
            sign = 1.0 if metric.better == "higher" else -1.0
            lead = Lead(sign * (mine.mean - plain.mean), plain.spread)
            found.append(Guard(metric, mine, plain, lead))
    return tuple(found)
