"""Pages of the documentation that show measured figures: the parts between two marks belong to commands."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omnifx.markdown import END, grid, start_of, with_block

__all__ = ["END", "Figures", "grid", "number", "parser_of", "start_of", "with_block", "write_or_check"]

Figures = dict[str, Any]


def write_or_check(wanted: dict[Path, str], *, check: bool, command: str) -> int:
    """Write the pages that differ, or name them; returns the exit status, 1 if a checked page differs."""
    old = [path for path, text in wanted.items() if path.read_text(encoding="utf-8") != text]
    for path in old:
        if check:
            print(f"{path} does not hold what was measured; run {command}")
        else:
            path.write_text(wanted[path], encoding="utf-8")
            print(f"written to {path}")
    return int(check and bool(old))


def parser_of(description: str | None, *, results: str, docs: str) -> argparse.ArgumentParser:
    """The options that all such commands have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(results))
    parser.add_argument("--docs", type=Path, default=Path(docs))
    parser.add_argument(
        "--check", action="store_true", help="write nothing; the exit status says whether a page differs"
    )
    return parser


def number(form: str) -> Callable[[float | None], str]:
    """Formats a figure; nothing where there is none."""
    return lambda value: "" if value is None else format(value, form)
