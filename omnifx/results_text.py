"""`Results` as tables of text: for the console, and for a page in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from omnifx import charts, verdicts
from omnifx.markdown import grid, plain
from omnifx.results import Case, Metric, Results, Row, name_of
from omnifx.verdicts import FAMILIES, RIVALS, Guard, Rival, Verdict, share_text


@dataclass(frozen=True)
class TextTable:
    """A table whose cells are plain text."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables_of(case: Case, results: Results) -> list[TextTable]:
    """The verdict at each share, and the best row of each method there; without a metric that ranks, all rows."""
    found = verdicts.verdicts_of(case, results)
    if not found:
        return [_all_rows(case, results)]
    return [_verdict_table(found), _method_table(case, results, found[0].metric)]


def caption_of(results: Results) -> str:
    """How the figures came about, in a line: command, date, versions, device."""
    environment = dict(results.environment)
    command, date = environment.pop("command", None), environment.pop("date", None)
    parts = [f"Measured {date}" if date else "Measured", f"by `{str(command).replace('`', '')}`" if command else ""]
    rest = ", ".join(f"{plain(name)} {plain(str(value))}" for name, value in environment.items())
    return f"{' '.join(filter(None, parts))}{': ' if rest else ''}{rest}."


def block_name(results: Results) -> str:
    """What marks the block of these results in a page."""
    return f"omnifx report {name_of(results.title)}"


def markdown_of(results: Results, figures: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """The tables as Markdown, with figures and what a reader needs to repeat the run.

    Args:
        results: What was found.
        figures: For each case, by its name, pictures to show: what they are, and their addresses.
    """
    everything = [verdict for case in results.cases for verdict in verdicts.verdicts_of(case, results)]
    parts = [caption_of(results), plain(verdicts.tally_text(verdicts.tally(everything)))]
    for case in results.cases:
        parts += [f"## {plain(case.title)}", f"{plain(case.model)}, {plain(case.sampler)}, {case.steps} steps."]
        pictures = (figures or {}).get(case.name, {})
        parts += [f"![{plain(case.title)}: {what}]({address})" for what, address in pictures.items()]
        for table in tables_of(case, results):
            rows = [[plain(cell) for cell in row] for row in table.rows]
            parts += [f"**{plain(table.title)}**", grid([plain(cell) for cell in table.head], rows)]
        parts += [f"Seeds: {'; '.join(f'{plain(k)}: {plain(v)}' for k, v in case.seeds.items())}."] * bool(case.seeds)
        if case.refused:
            reasons = [f"- {plain(name)}: {plain(reason)}" for name, reason in case.refused.items()]
            parts.append("\n".join(["Refused:", "", *reasons]))
    parts.append(_definitions(results))
    return "\n\n".join(parts)


def _definitions(results: Results) -> str:
    lines = []
    for metric in results.metrics:
        guard = " A guard: it does not rank." if metric.guard else ""
        about = f" {plain(verdicts.sentence(metric.about))}" if metric.about else ""
        lines.append(f"- **{plain(metric.heading)}**: {metric.better} is better.{guard}{about}")
    lines += [
        "- **±**: one standard deviation over sets of seeds; a difference that is not larger than its own is level.",
        "- **at a share**: rows tuned for it, or of at most 5% more compute; what each costs stands in brackets.",
    ]
    return "\n".join(lines)


def _verdict_table(found: Sequence[Verdict]) -> TextTable:
    metric = found[0].metric
    families = [family for family in RIVALS if any(r.family == family for v in found for r in v.rivals)]
    guards = any(verdict.guards for verdict in found)
    rows = []
    for verdict in found:
        rivals = {rival.family: rival for rival in verdict.rivals}
        row = [share_text(verdict.share), _cell(verdict.ours, verdict) if verdict.ours is not None else "-"]
        row += [_rival(rivals[family], verdict) if family in rivals else "-" for family in families]
        row += ["; ".join(map(_guard, verdict.guards))] * guards
        rows.append((*row, str(verdict)))
    head = ["compute", "omnifx", *(f"best of {FAMILIES[family]}" for family in families)]
    return TextTable(metric.heading, (*head, *["guards"] * guards, "verdict"), tuple(rows))


def _method_table(case: Case, results: Results, metric: Metric) -> TextTable:
    best = verdicts.best_at_shares(case, results)
    rows = []
    for method in charts.looks_of(case):
        own = [best[share].get(method) for share in best]
        cells = [
            f"{verdicts.value_text(row.metrics[metric.name], metric)} ({share_text(row.compute)})" if row else "-"
            for row in own
        ]
        rows += [(method, *cells)] if any(own) else []
    head = ("method", *(f"at {share_text(share)}" for share in best))
    return TextTable(f"Best of each method: {metric.heading} (compute)", head, tuple(rows))


def _all_rows(case: Case, results: Results) -> TextTable:
    rows = [
        (
            row.method,
            row.setting,
            share_text(row.compute),
            *(verdicts.value_text(row.metrics.get(metric.name), metric) for metric in results.metrics),
        )
        for row in case.rows
    ]
    return TextTable("All rows", ("method", "setting", "compute", *(m.heading for m in results.metrics)), tuple(rows))


def _cell(row: Row, verdict: Verdict) -> str:
    value = verdicts.value_text(row.metrics[verdict.metric.name], verdict.metric)
    return f"{value} ({row.method}, {share_text(row.compute)})"


def _rival(rival: Rival, verdict: Verdict) -> str:
    ahead = f": {verdicts.lead_text(rival.lead, verdict.metric)}" if rival.lead is not None else ""
    return f"{_cell(rival.row, verdict)}{ahead}"


def _guard(guard: Guard) -> str:
    return f"{guard.metric.label} {'worse' if guard.lead.word == 'behind' else 'no worse'}"
