"""A comparison as `benchmarks.frontier` would find it, made up: many methods, plans, samples, and a video."""

from __future__ import annotations

import torch
from torch import Tensor

from omnifx.results import Case, Family, Metric, Results, Row, Timeline, Value

PSNR = Metric(name="PSNR", unit="dB", better="higher", about="To the uncached samples of the same seeds.")
LPIPS = Metric(name="LPIPS", better="lower")
FRECHET = Metric(name="Frechet", better="lower", guard=True, about="Between features of a classifier.")
STEPS = 20
TIMESTEPS = tuple(float(951 - 50 * i) for i in range(STEPS))
METHODS: dict[str, tuple[Family, float]] = {
    "auto": ("ours", 44.0),
    "cache-dit DBCache": ("peer", 30.0),
    "cache-dit TaylorSeer": ("peer", 38.0),
    "diffusers FirstBlockCache": ("peer", 12.0),
    "diffusers TaylorSeer": ("peer", 41.0),
    "diffusers MagCache": ("peer", 33.0),
    "fewer steps": ("solver", 35.0),
    "UniPC": ("solver", 36.0),
    "fora": ("policy", 34.0),
    "omnicache": ("policy", 40.0),
    **{f"other {i}": ("policy", 31.0 + i) for i in range(7)},
}
"""Families, and PSNR at half of the compute."""


def value(mean: float, spread: float = 0.5) -> Value:
    """A figure of three sets of seeds, with that standard deviation."""
    return Value(mean=mean, spread=spread, sets=(mean - spread, mean, mean + spread))


def row(
    method: str, compute: float, decibels: float, *, family: Family = "peer", spread: float = 0.5, **more: object
) -> Row:
    """A row with figures."""
    figures = {"PSNR": value(decibels, spread), "LPIPS": value(10 ** (-decibels / 20), 1e-4)}
    fields = {"setting": f"at={compute:g}", "metrics": {**figures, "Frechet": value(1.2, 0.2)}, **more}
    return Row(method=method, family=family, compute=compute, **fields)  # type: ignore[arg-type]


def uncached(**more: object) -> Row:
    """The row that others are compared with."""
    fields = {"metrics": {"Frechet": value(1.1, 0.2)}, **more}
    return Row(method="uncached", family="uncached", setting="", compute=1.0, **fields)  # type: ignore[arg-type]


def case_of(*rows: Row, name: str = "digits", **more: object) -> Case:
    """A case of these rows."""
    fields = {"title": "Digits", "model": "DiT", "sampler": "DDIM", "steps": STEPS, **more}
    return Case(name=name, rows=rows, **fields)  # type: ignore[arg-type]


def results_of(*cases: Case, metrics: tuple[Metric, ...] = (PSNR, LPIPS, FRECHET), title: str = "Frontier") -> Results:
    """Results of these cases."""
    environment = {"command": "python -m benchmarks.frontier", "date": "2026-11-21", "torch": "2.13.0", "threads": 1}
    return Results(title=title, environment=environment, metrics=metrics, cases=cases)


def digits() -> Case:
    """Every method tuned for three shares, with all that a row may hold."""
    rows = [uncached(timeline=Timeline(steps="F" * STEPS, timesteps=TIMESTEPS), samples="uncached", time=1.0)]
    for method, (family, decibels) in METHODS.items():
        for share in (0.5, 0.4, 0.3):
            quality = decibels - 30 * (0.5 - share)
            steps = round(STEPS * share) if family == "solver" else STEPS
            letters = "F" * steps if family == "solver" else ("Fs" if family == "ours" else "Fr") * (STEPS // 2)
            error = 10 ** (-quality / 20)
            rows.append(
                row(
                    method,
                    share,
                    quality,
                    family=family,
                    target=share,
                    time=share + 0.05,
                    drift=(0.0, *(error * (i + 1) / steps for i in range(1, steps))),
                    bands=tuple(error * (1 + i) for i in range(8)),
                    timeline=Timeline(
                        steps=letters,
                        timesteps=TIMESTEPS[:: STEPS // steps][:steps],
                        notes=("Combines the last 3 outputs.",) if family == "ours" else (),
                    ),
                    samples=f"{method.replace(' ', '-')}" if share == 0.4 and family != "policy" else None,
                )
            )
    refused = {"cache-dit SCM": "no mask for 20 steps"}
    return case_of(*rows, refused=refused, seeds={"calibration": "900 to 902", "report": "0 to 299"})


def video() -> Case:
    """One plan, one set of seeds, nothing to compare with."""
    figures = {"PSNR": Value(mean=33.0, sets=(33.0,))}
    ours = Row(method="auto", family="ours", setting="", compute=0.5, metrics=figures, samples="auto")
    return case_of(uncached(samples="uncached"), ours, name="video", title="Moving digits", steps=6)


def compared() -> tuple[Results, dict[str, dict[str, Tensor]]]:
    """Both cases, and their samples."""
    results = results_of(digits(), video())
    shapes = {"digits": (10, 1, 8, 8), "video": (4, 3, 12, 16, 20)}
    samples: dict[str, dict[str, Tensor]] = {}
    for case in results.cases:
        generator = torch.Generator().manual_seed(0)
        base = torch.rand(shapes[case.name], generator=generator) * 2 - 1
        keys = [row.samples for row in case.rows if row.samples is not None]
        samples[case.name] = {
            key: base + (0.01 * i * torch.randn(base.shape, generator=generator)) for i, key in enumerate(keys)
        }
    return results, samples
