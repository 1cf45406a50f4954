"""docs/models.md: the zoo as a table, with what is pinned and what was measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import diffusers
import torch

from tests.zoo.entry import Entry
from tests.zoo.examine import LETTERS, Found
from tests.zoo.models import LEFT_OUT, ZOO

PATH = Path(__file__).parents[2] / "docs" / "models.md"
"""Where the table is kept."""

PINNED = ("model", "graphs", "branches", "not cached", "depend on", "FLOPs left")
MEASURED = ("replay", "reference", "generation", "recompilations")
COLUMNS = (*PINNED, *MEASURED, "note")

Row = tuple[str, ...]


def pinned_cells(entry: Entry) -> Row:
    """The first cells of a row, which an entry pins."""
    return (
        entry.name,
        str(entry.graphs),
        entry.branches,
        str(entry.left_alone),
        entry.dependence,
        f"{entry.left:.1%}",
    )


def measured_cells(found: Found) -> Row:
    """The cells of a row that an examination fills in."""
    generation = _error(found.followed_error) if found.followed == LETTERS else "in full"
    return _error(found.replay_error), _error(found.reference_error), generation, str(found.recompilations)


def remarks(entry: Entry) -> str:
    """The last cell of a row, which is pinned as well."""
    return " ".join(filter(None, (entry.in_full, entry.note)))


def row_of(entry: Entry, found: Found) -> Row:
    """A whole row."""
    return (*pinned_cells(entry), *measured_cells(found), remarks(entry))


def pinned_in(row: Row) -> Row:
    """The cells of a whole row that its entry pins."""
    return (*row[: len(PINNED)], row[-1])


def rows_in(text: str) -> dict[str, Row]:
    """The rows of a document's table by model."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]
    return {row[0].strip("`"): (row[0].strip("`"), *row[1:]) for row in rows}


def reasons_in(text: str) -> dict[str, str]:
    """The classes that a document says are left out, with their reasons."""
    return dict(re.findall(r"^- `(\w+)`: (.*)$", text, flags=re.MULTILINE))


def text_of(rows: Mapping[str, Row]) -> str:
    """The rows as a Markdown table, in the zoo's order."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS)]
    lines += [(f"`{name}`", *rows[name][1:]) for name in ZOO if name in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def document(rows: Mapping[str, Row]) -> str:
    """The whole document."""
    classes = len({entry.cls for entry in ZOO.values()})
    left_out = "\n".join(f"- `{name}`: {reason}" for name, reason in LEFT_OUT.items())
    return HEAD.format(
        diffusers=diffusers.__version__,
        torch=str(torch.__version__),
        models=len(ZOO),
        classes=classes,
        table=text_of(rows),
        left_out=left_out,
    )


def _error(error: float) -> str:
    return "0" if error == 0.0 else f"{error:.0e}"


HEAD = """\
# Models

<!-- Written by `python -m tests.zoo --out docs/models.md`; a test compares it with the zoo. -->

{models} tiny models of {classes} transformer classes of diffusers {diffusers}, captured by
`torch.compile(model, backend="omnicache")` with torch {torch} on a CPU, in float32. No model has an adapter: the
branches are found in the graph. `make zoo` measures the table again.

- **graphs**: what Dynamo captures the model as; more than one means graph breaks, and each graph reuses its own part.
- **branches**: residual branches by kind, over all graphs. *not cached* counts those among them that are left alone.
- **depend on**: the latents (reuse is an approximation), the timestep, or neither (reuse within a generation is exact).
  What may be a timestep counts as one.
- **FLOPs left**: share of a full step that a step costs which reuses everything. These models have 4 to 512 tokens, so
  embedders and modulation weigh far more than in the models people use.
- **replay**: error of a reuse step that is fed its own step's caches; 0 means equal bits.
- **reference**: error of step 1 with step 0's caches, against the eager model whose attention and feed-forward modules
  give out what they gave at step 0 (forward hooks).
- **generation**: error of a generation of four steps (full, reuse, reuse, full) that omnifx plans and follows
  itself, against the same reference; *in full* where it reuses nothing.
- **recompilations** after the first step of eight, with other latents and timesteps at each.

{table}

## Left out

Classes below `diffusers.models.transformers` that are not in the table:

{left_out}
"""
