"""Write what `benchmarks.policies` measured into the page of each policy, and the overview of all.

    python -m benchmarks.policies_pages [--results benchmarks/results/policies.json] [--docs docs/policies] [--check]

Between `START` and `END` a page belongs to this command; the rest of it is written by hand. The figures of
`benchmarks.policies_plot` are drawn beside the overview, `README.md`. With --check nothing is written, and the exit
status says whether a page differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.policies_plot import fidelity_figure
from omnifx.pictures import save_figure
from omnifx.policy import policies

START, END = "<!-- measured: python -m benchmarks.policies_pages -->", "<!-- end of what was measured -->"
SHARES = (0.7, 0.52, 0.42, 0.35)
"""Shares of compute that the overview compares methods at: the best row of a method that costs no more."""

Figures = dict[str, Any]


def conditions(found: Figures) -> str:
    """What was sampled, in words."""
    return (
        f"{found['model']} ({found['sampler']}), {found['steps']} steps, {found['samples']} samples in batches of "
        f"{found['batch']}"
    )


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
                    f"{row['PSNR dB']:.1f}",
                    f"{row['p10 dB']:.1f}",
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
    able = [row for row in rows if row["method"] == method and row["compute"] <= share]
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


def with_block(page: str, block: str) -> str:
    """A page with its measured part replaced, or added at its end; without a block, as it is."""
    if not block:
        return page
    own = f"{START}\n{block}\n{END}\n"
    if START not in page:
        return f"{page.rstrip()}\n\n{own}"
    before, rest = page.split(START, 1)
    return f"{before}{own}{rest.split(END, 1)[1].lstrip(chr(10))}"


def pages(results: Path, docs: Path) -> dict[Path, str]:
    """What every page should hold."""
    figures = json.loads(results.read_text(encoding="utf-8"))["figures"]
    wanted = {}
    for name in policies():
        path = docs / f"{name}.md"
        wanted[path] = with_block(path.read_text(encoding="utf-8"), policy_block(name, figures))
    path = docs / "README.md"
    wanted[path] = with_block(path.read_text(encoding="utf-8"), "\n\n".join(overview(found) for found in figures))
    return wanted


def main(arguments: list[str] | None = None) -> int:
    """Write or check all pages; the exit status is 1 if a checked page differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/policies.json"))
    parser.add_argument("--docs", type=Path, default=Path("docs/policies"))
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(arguments)
    wanted = pages(args.results, args.docs)
    old = [path for path, text in wanted.items() if path.read_text(encoding="utf-8") != text]
    if args.check:
        for path in old:
            print(f"{path} does not hold what {args.results} says; run python -m benchmarks.policies_pages")
        return int(bool(old))
    for path in old:
        path.write_text(wanted[path], encoding="utf-8")
        print(f"written to {path}")
    for found in json.loads(args.results.read_text(encoding="utf-8"))["figures"]:
        path = save_figure(fidelity_figure(found), args.docs / f"policies-{found['model']}.png")
        print(f"drawn to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
