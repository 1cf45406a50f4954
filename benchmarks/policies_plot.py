"""Fidelity over compute of every policy: what `benchmarks.policies_pages` draws."""

from __future__ import annotations

from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "forecast": ("#000000", ("auto",)),
    "whole steps": ("#0072B2", ("fora", "omnicache", "lemica")),
    "predicted cuts": ("#009E73", ("taylorseer", "goc", "eoc")),
    "some tokens": ("#CC79A7", ("toca", "duca")),
    "some kinds": ("#E69F00", ("smoothcache", "pab", "t-gate")),
    "ranges of blocks": ("#56B4E9", ("delta-dit", "magcache")),
    "decided at run time": (
        "#D55E00",
        ("teacache", "adacache", "first-block-cache", "dbcache", "easycache", "dicache"),
    ),
    "no cache": ("#555555", ("fewer steps", "extrapolated output")),
}
"""Colours (of Okabe and Ito) and methods; a method's marker tells it from the others of its colour. The 2nd-order
solver is not drawn: it goes to another image."""

_MARKERS = ("o", "s", "^", "D", "v", "P")
_MOST_DB = 70.0  # beyond, nothing is left to tell apart


def best_so_far(rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(compute, dB) of the rows that no row of the same method beats in both."""
    found: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda row: (row["compute"], -row["PSNR dB"])):
        if not found or row["PSNR dB"] > found[-1][1]:
            found.append((row["compute"], row["PSNR dB"]))
    return found


def fidelity_figure(figures: dict[str, Any]) -> Figure:
    """PSNR over the share of compute: all rows as marks, a line through the best rows of each method."""
    figure = Figure(figsize=(10.0, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for family, (colour, methods) in FAMILIES.items():
        axes.plot([], [], " ", label=f"$\\bf{{{family.replace(' ', chr(92) + ' ')}}}$")
        for marker, method in zip(_MARKERS, methods, strict=False):
            own = [row for row in figures["rows"] if row["method"] == method and row["PSNR dB"] is not None]
            rows = [row for row in own if row["PSNR dB"] < _MOST_DB]
            if not rows:
                continue
            axes.scatter(
                [r["compute"] for r in rows],
                [r["PSNR dB"] for r in rows],
                s=22,
                color=colour,
                marker=marker,
                alpha=0.35,
            )
            best = best_so_far(rows)
            axes.plot(*zip(*best, strict=True), color=colour, marker=marker, ms=5, lw=1.3, label=method)
    axes.set_xlabel("compute: share of the uncached FLOPs")
    axes.set_ylabel("PSNR to the uncached samples, dB")
    axes.set_title(f"{figures['model']}: {figures['sampler']}, {figures['steps']} steps, {figures['samples']} samples")
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure
