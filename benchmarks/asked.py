"""Whether plans keep what was asked of them, and what they lose where they are used on other things than were measured.

    python -m benchmarks.asked [--models dit flow] [--parts psnr time steps sizes others] [--steps 50 20] [--samples N]
                               [--lowering eager|inductor] [--out FILE] [--smoke]

psnr    `min_psnr=`: PSNR asked, expected by the plan, and measured on seeds that no calibration saw
time    `target_ms=`: milliseconds asked, expected, and measured of the model's calls of one generation; on one thread
steps   plans transferred from another number of steps, and plans measured at these steps
sizes   plans used at other resolutions than were measured, and plans measured at these
others  plans used with other seeds, labels, batch sizes and guidance than were measured, and plans measured with these

Reported seeds begin at 0, those of calibrations at 1,000,000. PSNR is of a range of 2, its mean over samples is given
with its standard error.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import omnifx
from benchmarks.quality import BATCH, CASES, FIRST_CALIBRATION_SEED, Case, Figures, labels_of
from benchmarks.results import save, table
from examples.digits.data import NUM_CLASSES
from omnifx.errors import ConfigError
from omnifx.metrics import psnr
from omnifx.plan import Plan
from omnifx.profile import Profile
from omnifx.transfer import resampled

ASKED = (45.0, 50.0, 55.0)
SAMPLES = 100
"""Of a calibration's rollouts, and as many that are reported, where a PSNR is promised."""
ROLLED = {("dit", 50): (1.5, 2.5, 4.0, 6.0), ("flow", 50): (3.0, 5.0, 8.0)}
"""Speedups that rollouts begin with; elsewhere 1.5, 2, 3 and 4."""
PARTS = ("psnr", "time", "steps", "sizes", "others")
COMPARED = 40
"""Samples of a transferred plan, the same ones as of the plan that it is compared with."""
CALIBRATION_BATCH = 8
CALIBRATION_RUNS = 3
TRANSFERS = ((50, 20), (50, 30), (20, 50))
SPEEDUPS = (2.0, 3.0)
SIZES = ((8, 12), (8, 16), (16, 8))
"""Pixels of a side; of the flow model, as the DiT takes one size alone."""
SHARES = (0.6, 0.4)
"""Of the uncached milliseconds, asked for as `target_ms`."""


def sampled(case: Case, model: Any, seeds: Sequence[int], labels: Tensor, steps: int, batch: int = BATCH) -> Tensor:
    """Samples of these seeds and labels, in batches."""
    parts = [
        case.sample(model, seeds=seeds[i : i + batch], labels=labels[i : i + batch], steps=steps)
        for i in range(0, len(seeds), batch)
    ]
    return torch.cat(parts)


def calibrated(
    case: Case, *, steps: int, lowering: str, labels: Tensor | None = None, first: int = FIRST_CALIBRATION_SEED
) -> Profile:
    """A profile of a few samples of calibration seeds."""
    chosen = labels_of(CALIBRATION_BATCH) if labels is None else labels

    def generate(model: Any, run: int) -> Tensor:
        start = first + run * len(chosen)
        return case.sample(model, seeds=range(start, start + len(chosen)), labels=chosen, steps=steps)

    torch._dynamo.reset()  # or its memory of other batch sizes makes the batch size symbolic
    options = {"lowering": lowering}
    return omnifx.calibrate(case.load(), generate, runs=CALIBRATION_RUNS, options=options, progress=False)


def reached(
    case: Case, profile: Profile, plan: Plan, true: Tensor, *, labels: Tensor, lowering: str, first: int = 0
) -> tuple[float, float]:
    """PSNR of samples that follow a plan: mean and standard error. Raises RuntimeError if a step ran unplanned."""
    torch._dynamo.reset()
    options = {"profile": profile, "plan": plan, "profile_cache": False, "lowering": lowering}
    model = torch.compile(case.load(), backend="omnicache", options=options)
    samples = sampled(case, model, range(first, first + len(true)), labels, profile.num_steps)
    for log in omnifx.stats(model).generations:
        if log.reasons:
            raise RuntimeError(f"generation {log.number} did not follow its plan: {log.reasons}")
    values = psnr(samples, true)
    return float(values.mean()), float(values.std()) / len(values) ** 0.5


def asked_rows(name: str, *, steps: int, samples: int, lowering: str, asked: Sequence[float]) -> list[Figures]:
    """`min_psnr=`: what was asked, expected and measured."""
    case, batch = CASES[name], min(BATCH, samples)
    rollouts, runs = samples // batch, 1

    def generate(model: Any, run: int) -> Tensor:
        first = FIRST_CALIBRATION_SEED + run * batch
        return case.sample(model, seeds=range(first, first + batch), labels=labels_of(batch), steps=steps)

    torch._dynamo.reset()
    started = time.perf_counter()
    profile = omnifx.calibrate(
        case.load(),
        generate,
        runs=runs,
        rollouts=rollouts,
        speedups=ROLLED.get((name, steps), (1.5, 2.0, 3.0, 4.0)),
        min_psnr=asked,
        data_range=2.0,
        options={"lowering": lowering},
        progress=False,
    )
    seconds = time.perf_counter() - started
    labels = labels_of(samples)
    true = sampled(case, case.load(), range(samples), labels, steps)
    (quality,) = profile.meta.quality
    spent = 1 + sum(1 / point.speedup for point in quality.points)
    rows = []
    for wanted in asked:
        row: Figures = {"model": name, "steps": steps, "asked dB": wanted}
        try:
            plan = omnifx.make_plan(profile, min_psnr=wanted)
        except ConfigError as error:
            rows.append({**row, "refused": str(error)})
            continue
        point = quality.at(plan.speedup)
        assert point is not None  # the plan was chosen by it
        mean, error = reached(case, profile, plan, true, labels=labels, lowering=lowering)
        rows.append(
            {
                **row,
                "speedup": plan.speedup,
                "expected dB": plan.expected_psnr,
                "expected error": point.error,
                "measured dB": mean,
                "measured error": error,
                "off by dB": mean - (plan.expected_psnr or 0.0),
                "points": [(round(p.speedup, 3), round(p.psnr, 2)) for p in quality.points],
                "calibration": f"{rollouts} x {batch} samples, {spent:.1f} uncached generations each",
                "calibration s": seconds,
            }
        )
    return rows


def time_rows(name: str, *, steps: int, lowering: str, shares: Sequence[float], repeats: int) -> list[Figures]:
    """`target_ms=`: what was asked, expected and measured, of a model that calibrates itself."""
    case, batch = CASES[name], BATCH
    torch._dynamo.reset()
    first = _timed_model(case, {"lowering": lowering, "target_ms": 1e9}, steps, batch, repeats=1)
    ((profile, _),) = omnifx.plans(first[0])
    timing = profile.meta.timing
    assert timing is not None  # the digits models are one graph each
    whole = steps * profile.meta.num_streams * (timing.step_ms + timing.overhead_ms)
    rows = []
    for share in shares:
        torch._dynamo.reset()
        options = {"lowering": lowering, "target_ms": share * whole}
        model, spent = _timed_model(case, options, steps, batch, repeats=repeats)
        ((_, plan),) = omnifx.plans(model)
        note = next(note for note in plan.notes if " ms for the model's calls" in note)
        rows.append(
            {
                "model": name,
                "steps": steps,
                "batch": batch,
                "lowering": lowering,
                "uncached ms": first[1],
                "asked ms": share * whole,
                "speedup": plan.speedup,
                "expected ms": float(note.split()[1]),
                "measured ms": spent,
            }
        )
    return rows


def _timed_model(case: Case, options: Figures, steps: int, batch: int, *, repeats: int) -> tuple[Any, float]:
    """A compiled model behind its first generation, and the least milliseconds that its calls took in later ones."""
    compiled = torch.compile(case.load(), backend="omnicache", options={**options, "profile_cache": False})
    spent = [0.0]

    def clocked(**inputs: Any) -> Any:
        started = time.perf_counter()
        result = compiled(**inputs)
        spent[-1] += 1e3 * (time.perf_counter() - started)
        return result

    for number in range(2 + repeats):  # the first is measured, the second warms up
        spent.append(0.0)
        first = FIRST_CALIBRATION_SEED + number * batch
        case.sample(clocked, seeds=range(first, first + batch), labels=labels_of(batch), steps=steps)
    return compiled, min(spent[3:])


def step_rows(
    name: str, measured: int, used: int, *, samples: int, lowering: str, speedups: Sequence[float] = SPEEDUPS
) -> list[Figures]:
    """Plans for another number of steps than was measured."""
    case, labels = CASES[name], labels_of(samples)
    own = calibrated(case, steps=used, lowering=lowering)
    moved = resampled(calibrated(case, steps=measured, lowering=lowering), steps=used)
    true = sampled(case, case.load(), range(samples), labels, used)
    row: Figures = {"model": name, "measured at": f"{measured} steps", "used at": f"{used} steps"}
    measure = partial(reached, true=true, labels=labels, lowering=lowering)
    return [_compared(row, case, (moved, own), speedup, measure) for speedup in speedups]


def size_rows(
    name: str,
    measured: int,
    used: int,
    *,
    steps: int,
    samples: int,
    lowering: str,
    speedups: Sequence[float] = SPEEDUPS,
) -> list[Figures]:
    """Plans used at another resolution than was measured."""
    labels = labels_of(samples)
    there, here = (
        replace(CASES[name], sample=partial(CASES[name].sample.func, cfg=2.0, size=size))  # type: ignore[attr-defined]
        for size in (measured, used)
    )
    profiles = tuple(calibrated(case, steps=steps, lowering=lowering) for case in (there, here))
    true = sampled(here, here.load(), range(samples), labels, steps)
    row: Figures = {"model": name, "measured at": f"{measured} x {measured}", "used at": f"{used} x {used}"}
    measure = partial(reached, true=true, labels=labels, lowering=lowering)
    return [_compared(row, here, (profiles[0], profiles[1]), speedup, measure) for speedup in speedups]


def other_rows(name: str, *, steps: int, samples: int, lowering: str) -> list[Figures]:
    """Plans for other seeds, labels, batch sizes and guidance than were measured."""
    case, rows = CASES[name], []
    half = torch.arange(NUM_CLASSES // 2)
    own = partial(calibrated, case, steps=steps, lowering=lowering)
    usual, all_labels = own(), labels_of(samples)
    later = half.repeat(-(-samples // len(half)))[:samples] + len(half)
    cases: list[tuple[str, str, Profile, Case, Tensor, Callable[[], Profile]]] = [
        ("1 seed", "others", own(labels=labels_of(1)), case, all_labels, lambda: usual),
        ("labels 0-4", "labels 5-9", own(labels=half), case, later, lambda: own(labels=half + len(half))),
        ("batch 1", "batch 50", own(labels=labels_of(1)), case, all_labels, lambda: own(labels=labels_of(BATCH))),
    ]
    if name == "flow":
        for scale in (1.0, 3.0, 4.0):
            other = replace(case, sample=partial(case.sample.func, cfg=scale))  # type: ignore[attr-defined]
            measure = partial(calibrated, other, steps=steps, lowering=lowering)
            cases.append(("cfg 2", f"cfg {scale:g}", usual, other, all_labels, measure))
    for measured, used, profile, where, labels, anew in cases:
        true = sampled(where, where.load(), range(samples), labels, steps)
        rows.append(
            _compared(
                {"model": name, "measured at": measured, "used at": used},
                where,
                (profile, anew()),
                2.0,
                partial(reached, true=true, labels=labels, lowering=lowering),
            )
        )
    return rows


def _compared(
    row: Figures,
    case: Case,
    profiles: tuple[Profile, Profile],
    speedup: float,
    measure: Callable[..., tuple[float, float]],
) -> Figures:
    """A row with the PSNR of a transferred plan and of one measured there; refusals are told."""
    found = {}
    for what, profile in zip(("transferred", "own"), profiles, strict=True):
        plan = omnifx.make_plan(profile, speedup=speedup)
        found[what] = (*measure(case, profile, plan), plan.timeline().splitlines()[1])
    (moved, error, moved_plan), (own, _, own_plan) = found["transferred"], found["own"]
    return {
        **row,
        "speedup": speedup,
        "transferred dB": moved,
        "own dB": own,
        "loss dB": own - moved,
        "error dB": error,
        "plans": [moved_plan, own_plan],
    }


def show(figures: Figures, console: Console) -> None:
    """Print the tables."""
    for part, rows in figures.items():
        refused = [row for row in rows if "refused" in row]
        if kept := [row for row in rows if "refused" not in row]:
            hidden = ("plans", "points", "calibration", "calibration s")
            table([{key: value for key, value in row.items() if key not in hidden} for row in kept], part)
        for row in refused:
            console.print(f"{row['model']}, {row['steps']} steps: {row['refused']}", highlight=False)


def main(arguments: list[str] | None = None) -> Figures:
    """Measure all parts, print them, and write them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 20], help="of the part psnr")
    parser.add_argument("--samples", type=int, help=f"default: {SAMPLES} for psnr, {COMPARED} for the others")
    parser.add_argument("--lowering", choices=["inductor", "eager"], default="eager", help="of all generations")
    parser.add_argument("--out", default="", help="a JSON file to write")
    parser.add_argument("--smoke", action="store_true", help="10 steps, 8 samples, one PSNR: a minute")
    args = parser.parse_args(arguments)
    parts = args.parts or (["psnr"] if args.smoke else PARTS)
    torch.set_num_threads(1)
    console, figures = Console(), {}
    for part in parts:
        figures[part] = []
        for name in ["dit"] if args.smoke else args.models:
            samples = 8 if args.smoke else args.samples or (SAMPLES if part == "psnr" else COMPARED)
            for rows in _rows_of(part, name, args.steps, samples, lowering=args.lowering, smoke=args.smoke):
                figures[part] += rows
                show({part: rows}, console)
                if args.out:
                    save(args.out, figures, quiet=True)  # after every table: what is measured is not lost
    return figures


def _rows_of(part: str, name: str, counts: Sequence[int], samples: int, *, lowering: str, smoke: bool) -> Any:
    """The tables of one part and model, one after the other."""
    if part == "psnr":
        for steps in (10,) if smoke else counts:
            yield asked_rows(name, steps=steps, samples=samples, lowering=lowering, asked=(30.0,) if smoke else ASKED)
    elif part == "time":
        yield time_rows(name, steps=10 if smoke else 50, lowering=lowering, shares=SHARES, repeats=1 if smoke else 3)
    elif part == "steps":
        for measured, used in ((10, 8),) if smoke else TRANSFERS:
            yield step_rows(name, measured, used, samples=samples, lowering=lowering)
    elif part == "sizes":
        for measured, used in SIZES if name == "flow" else ():
            yield size_rows(name, measured, used, steps=10 if smoke else 20, samples=samples, lowering=lowering)
    else:
        yield other_rows(name, steps=10 if smoke else 20, samples=samples, lowering=lowering)


if __name__ == "__main__":
    main()
