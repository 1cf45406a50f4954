"""What `omnifx report` does with results: tables on the console, a page, figures, a page of Markdown."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from omnifx import verdicts
from omnifx.errors import ConfigError, ResultsError
from omnifx.markdown import with_block
from omnifx.results import Results
from omnifx.results_figures import drawings_of, figure_name, save_figures
from omnifx.results_page import save_page
from omnifx.results_text import block_name, caption_of, markdown_of, tables_of

Samples = Mapping[str, Mapping[str, Tensor]]


def show(results: Results, console: Console) -> None:
    """Print the tables of all cases."""
    everything: list[verdicts.Verdict] = []
    for case in results.cases:
        console.print(f"\n[bold]{escape(case.title)}[/]: {escape(case.model)}, {escape(case.sampler)}", highlight=False)
        found = verdicts.verdicts_of(case, results)
        everything += found
        for content in tables_of(case, results):
            table = Table(title=escape(content.title), title_justify="left")
            for i, name in enumerate(content.head):
                table.add_column(escape(name), no_wrap=i == 0)
            for row in content.rows:
                table.add_row(*map(escape, row))
            console.print(table)
        if case.refused:
            names = ", ".join(case.refused)
            console.print(f"refused: {escape(names)}; --html tells why", highlight=False)
    console.print(f"\n{verdicts.tally_text(verdicts.tally(everything))}", highlight=False)
    console.print(escape(caption_of(results).replace("`", "").replace("\\", "")), highlight=False)


def write(
    results: Results, folder: Path, *, html: Path | None, figures: Path | None, markdown: Path | None
) -> list[Path]:
    """Write what was asked for; returns the paths.

    Raises: ConfigError if a file cannot be written; ResultsError if samples are not usable.
    """
    samples = samples_of(results, folder) if html is not None or figures is not None else {}
    written = [save_page(results, samples, html)] if html is not None else []
    written += save_figures(results, samples, figures) if figures is not None else []
    if markdown is not None:
        try:
            markdown.write_text(page_with(results, samples, markdown, figures), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"the page {markdown} could not be written: {error.strerror}. Name a file.") from error
        written.append(markdown)
    return written


def check(results: Results, folder: Path, *, html: Path | None, figures: Path | None, markdown: Path | None) -> None:
    """Compare a page of Markdown with what would be written; with `figures`, its links too.

    Raises: ConfigError if there is no page to compare; ResultsError if it differs.
    """
    if markdown is None or html is not None:
        raise ConfigError("report: --check compares a page of Markdown; give --markdown FILE, and no --html.")
    samples = samples_of(results, folder) if figures is not None else {}
    if not markdown.exists() or markdown.read_text(encoding="utf-8") != page_with(results, samples, markdown, figures):
        raise ResultsError(f"report: {markdown} does not hold what {folder} does. Write it anew without --check.")


def samples_of(results: Results, folder: Path) -> dict[str, dict[str, Tensor]]:
    """The samples of all cases."""
    return {case.name: results.samples_of(folder, case) for case in results.cases}


def page_with(results: Results, samples: Samples, markdown: Path, figures: Path | None) -> str:
    """The page of Markdown with the block of these results; links to figures are relative to it."""
    links: dict[str, dict[str, str]] = {}
    if figures is not None:
        base = Path(os.path.relpath(figures, markdown.parent))
        for case in results.cases:
            names = drawings_of(case, results, samples.get(case.name, {}))
            links[case.name] = {name: (base / figure_name(case, name)).as_posix() for name in names}
    page = markdown.read_text(encoding="utf-8") if markdown.is_file() else f"# {results.title}\n"
    return with_block(page, markdown_of(results, links), block_name(results))
