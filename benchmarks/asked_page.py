"""Write what `benchmarks.asked` measured into its page.

python -m benchmarks.asked_page [--results benchmarks/results/asked.json] [--docs docs/asking.md] [--check]
"""

from __future__ import annotations

import json
import sys

from benchmarks.pages import Figures, grid, parser_of, with_block, write_or_check

COMMAND = "python -m benchmarks.asked_page"


def _spread(value: float, error: float) -> str:
    return f"{value:.1f} ± {error:.1f}"


def asked_table(rows: list[Figures]) -> str:
    """PSNR asked, expected and measured."""
    lines = []
    for row in rows:
        start = [row["model"], str(row["steps"]), f"{row['asked dB']:g}"]
        if "refused" in row:
            lines.append([*start, "refused", "", "", "", row["refused"].partition(": ")[2]])
            continue
        figures = [
            f"{row['speedup']:.2f}",
            _spread(row["expected dB"], row["expected error"]),
            _spread(row["measured dB"], row["measured error"]),
            f"{row['off by dB']:+.1f}",
        ]
        lines.append([*start, *figures, row["calibration"]])
    head = ["model", "steps", "asked, dB", "speedup", "expected, dB", "measured, dB", "difference", "rollouts"]
    return grid(head, lines)


def time_table(rows: list[Figures]) -> str:
    """Milliseconds asked, expected and measured."""
    keys = ("uncached ms", "asked ms", "expected ms", "measured ms")
    lines = [
        [row["model"], str(row["steps"]), row["lowering"], f"{row['speedup']:.2f}", *(f"{row[k]:.0f}" for k in keys)]
        for row in rows
    ]
    return grid(["model", "steps", "lowering", "speedup", "uncached, ms", "asked", "expected", "measured"], lines)


def compared_table(rows: list[Figures]) -> str:
    """Transferred plans beside plans that were measured there."""
    lines = [
        [
            row["model"],
            row["measured at"],
            row["used at"],
            f"{row['speedup']:g}",
            _spread(row["transferred dB"], row["error dB"]),
            f"{row['own dB']:.1f}",
            f"{row['loss dB']:+.1f}",
        ]
        for row in rows
    ]
    return grid(["model", "measured at", "used at", "speedup", "transferred, dB", "measured there, dB", "loss"], lines)


def block_of(figures: dict[str, list[Figures]]) -> str:
    """All tables, each under its heading."""
    tables = {
        "psnr": ("### `min_psnr`", asked_table),
        "time": ("### `target_ms`", time_table),
        "steps": ("### Other numbers of steps", compared_table),
        "sizes": ("### Other resolutions", compared_table),
        "others": ("### Other seeds, labels, batch sizes and guidance", compared_table),
    }
    parts = [f"{title}\n\n{table(figures[part])}" for part, (title, table) in tables.items() if figures.get(part)]
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    """Write or check the page; the exit status is 1 if the checked page differs."""
    args = parser_of(__doc__, results="benchmarks/results/asked.json", docs="docs/asking.md").parse_args(arguments)
    found = json.loads(args.results.read_text(encoding="utf-8"))
    page = with_block(args.docs.read_text(encoding="utf-8"), block_of(found["figures"]), COMMAND)
    return write_or_check({args.docs: page}, check=args.check, command=COMMAND)


if __name__ == "__main__":
    sys.exit(main())
