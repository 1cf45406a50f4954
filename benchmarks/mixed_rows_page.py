"""Write what `benchmarks.mixed_rows` measured into the page of the policy `auto`.

python -m benchmarks.mixed_rows_page [--results FILE] [--docs docs/policies/auto.md] [--check]
"""

from __future__ import annotations

import json
import sys

from benchmarks.pages import Figures, grid, parser_of, with_block, write_or_check

COMMAND = "python -m benchmarks.mixed_rows_page"


def table_of(rows: list[Figures]) -> str:
    """A line for each case and kind of mixed step: what it costs, and what it leaves of the error at each gap."""
    gaps = sorted({row["gap"] for row in rows})
    kinds = dict.fromkeys((row["case"], row["computed"]) for row in rows)
    found = {(row["case"], row["computed"], row["gap"]): row for row in rows}
    lines = []
    for case, kind in kinds:
        at = [found[case, kind, gap] for gap in gaps]
        left = [f"{row['leaves']:.2f}" for row in at]
        pays = max(row["pays to"] for row in at)
        lines.append([case, kind, f"{at[0]['cost']:.2f}", *left, f"{at[0]['rival']:.2f}", f"{pays:.2f}"])
    head = ["case", "computed", "cost", *(f"leaves, {gap} behind" for gap in gaps), "whole steps leave", "pays below"]
    return grid(head, lines)


def main(arguments: list[str] | None = None) -> int:
    """Write or check the page; the exit status is 1 if the checked page differs."""
    parser = parser_of(__doc__, results="benchmarks/results/mixed_rows.json", docs="docs/policies/auto.md")
    args = parser.parse_args(arguments)
    rows = json.loads(args.results.read_text(encoding="utf-8"))["figures"]
    page = with_block(args.docs.read_text(encoding="utf-8"), table_of(rows), COMMAND)
    return write_or_check({args.docs: page}, check=args.check, command=COMMAND)


if __name__ == "__main__":
    sys.exit(main())
