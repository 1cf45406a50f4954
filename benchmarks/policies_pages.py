"""Write what `benchmarks.policies` measured into the page of each policy, and the overview of all.

    python -m benchmarks.policies_pages [--results benchmarks/results/policies.json] [--docs docs/policies] [--check]

The figures of `benchmarks.policies_plot` are drawn beside the overview, `README.md`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.pages import Figures, grid, parser_of, with_block, write_or_check
from benchmarks.policies_plot import fidelity_figure
from omnifx.pictures import save_figure
from omnifx.policy import policies

COMMAND = "python -m benchmarks.policies_pages"
SHARES = (0.7, 0.53, 0.42, 0.35, 0.27)
"""Shares of compute that the overview compares methods at: the best row of a method that costs no more."""


def conditions(found: Figures) -> str:
    """What was sampled, in words."""
    return (
        f"{found['model']} ({found['sampler']}), {found['steps']} steps, {found['samples']} samples in batches of "
        f"{found['batch']}"
    )


def _decibels(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1f}"


def policy_block(name: str, figures: list[Figures]) -> str:
    """What a policy's page shows: all of its settings, in the order in which they were measured."""
    rows = []
    for found in figures:
        for row in (row for row in found["rows"] if row["method"] == name):
            rows.append(
                [
                    found["model"],
                    f"`{row['setting']}`",
                    f"{row['compute']:.3f}",
                    f"{row['time']:.2f}",
                    _decibels(row["PSNR dB"]),
                    _decibels(row["p10 dB"]),
                    f"{row['SSIM']:.4f}",
                    f"{row['Frechet']:.2f}",
                    f"{row['class']:.3f}",
                    f"{row['cache KiB']:.0f}",
                ]
            )
    head = ["model", "setting", "compute", "time", "PSNR", "p10", "SSIM", "Frechet", "class", "KiB"]
    parts = [grid(head, rows)] if rows else []
    for found in figures:
        reasons = dict.fromkeys(r["reason"] for r in found["refused"] if r["method"] == name)
        parts += [f"Refused on {found['model']}: {reason}" for reason in reasons]
    if not parts:
        return ""
    told = (
        "**Measured** on the digits models (`python -m benchmarks.policies`); [README](README.md) explains the columns."
    )
    return "\n\n".join([told, *parts])


def best_at(rows: list[Figures], method: str, share: float) -> Figures | None:
    """The row of a method with the highest PSNR that computes at most `share`."""
    able = [r for r in rows if r["method"] == method and r["compute"] <= share and r["PSNR dB"] is not None]
    return max(able, key=lambda row: row["PSNR dB"], default=None)


def overview(found: Figures) -> str:
    """The best row of each method at each share of compute."""
    rows = found["rows"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines: list[list[str]] = []
    for method in methods:
        line = [method]
        for share in SHARES:
            row = best_at(rows, method, share)
            line.append(f"{row['PSNR dB']:.1f} ({row['compute']:.2f})" if row else "-")
        least = min((row for row in rows if row["method"] == method), key=lambda row: row["compute"])
        lines.append(
            [*line, f"{least['compute']:.2f}", f"{max(r['cache KiB'] for r in rows if r['method'] == method):.0f}"]
        )
    lines.sort(key=lambda line: -float(line[2].split()[0]) if line[2] != "-" else 0.0)
    head = ["method", *(f"at most {share:g}" for share in SHARES), "least compute", "KiB"]
    guards = found["uncached"]
    return "\n\n".join(
        [
            f"## {conditions(found)}",
            f"![fidelity over compute](policies-{found['model']}.png)",
            f"Uncached: Frechet {guards['Frechet']:.2f}, class {guards['class']:.3f}.",
            grid(head, lines),
        ]
    )


def pages(results: Path, docs: Path) -> dict[Path, str]:
    """What every page should hold."""
    figures = json.loads(results.read_text(encoding="utf-8"))["figures"]
    wanted = {}
    for name in policies():
        path = docs / f"{name}.md"
        wanted[path] = with_block(path.read_text(encoding="utf-8"), policy_block(name, figures), COMMAND)
    path = docs / "README.md"
    wanted[path] = with_block(path.read_text(encoding="utf-8"), "\n\n".join(map(overview, figures)), COMMAND)
    return wanted


def main(arguments: list[str] | None = None) -> int:
    """Write or check all pages; the exit status is 1 if a checked page differs."""
    parser = parser_of(__doc__, results="benchmarks/results/policies.json", docs="docs/policies")
    args = parser.parse_args(arguments)
    status = write_or_check(pages(args.results, args.docs), check=args.check, command=COMMAND)
    if not args.check:
        for found in json.loads(args.results.read_text(encoding="utf-8"))["figures"]:
            path = save_figure(fidelity_figure(found), args.docs / f"policies-{found['model']}.png")
            print(f"drawn to {path}")
    return status


if __name__ == "__main__":
    sys.exit(main())
