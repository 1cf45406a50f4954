"""Reuse, predictors, GOC and EOC on the trained digits models, all computing the same steps: PSNR to the uncached run.

    python -m benchmarks.predictors [--models dit flow] [--steps 20] [--intervals 2 3] [--samples 50] [--out FILE]

Every row computes the steps that FORA computes at the interval and reuses or predicts the others, so that rows of one
interval cost the same FLOPs. Samples have the seeds 0 .. samples - 1; the calibration (3 runs of 50 samples, for the
profile and EOC's prior) has others. Lowered eagerly: only quality is measured.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

import omnifx
from benchmarks.quality import CASES, FIRST_CALIBRATION_SEED, labels_of
from benchmarks.results import save, table
from examples.digits.quality import psnr
from omnifx.policies.eoc import Eoc
from omnifx.policies.fora import Fora
from omnifx.policies.goc import Goc
from omnifx.policy import Policy
from omnifx.profile import Profile

CALIBRATION_RUNS = 3
CALIBRATION_BATCH = 50
PREDICTORS = ("taylor:1", "taylor:2", "taylor:3", "newton:2", "average", "chebyshev:2", "fitted:3")


def policies_of(steps: int, interval: int) -> dict[str, Policy]:
    """The rows of one interval."""
    later = tuple(step for step in range(2, steps) if step % interval)
    rows: dict[str, Policy] = {"fora": Fora(interval=interval)}
    rows |= {name: Fora(interval=interval, predictor=name) for name in PREDICTORS}
    rows |= {f"goc, eta {eta}": Goc(interval=interval, eta=eta) for eta in (1.2, 0.8)}
    rows["goc, eta 1.2, all steps"] = Goc(interval=interval, steps=later)
    rows |= {f"eoc, scale {s}": Eoc(interval=interval, strength=s) for s in (0.01, 1.0)}
    rows |= {f"eoc, shift {s}": Eoc(interval=interval, form="shift", strength=s) for s in (0.5, 1.0)}
    rows["eoc, shift 0.5, all steps"] = Eoc(interval=interval, form="shift", strength=0.5, judges=False)
    return rows


def calibrate(name: str, steps: int) -> Profile:
    """A profile with a prior."""
    case = CASES[name]

    def generate(model: Any, run: int) -> Tensor:
        first = FIRST_CALIBRATION_SEED + run * CALIBRATION_BATCH
        seeds, labels = range(first, first + CALIBRATION_BATCH), labels_of(CALIBRATION_BATCH)
        return case.sample(model, seeds=seeds, labels=labels, steps=steps)

    options = {"lowering": "eager"}
    return omnifx.calibrate(case.load(), generate, policy="eoc", runs=CALIBRATION_RUNS, options=options, progress=False)


def measure(name: str, *, steps: int, intervals: list[int], samples: int) -> list[dict[str, Any]]:
    """The table of one model. Raises RuntimeError if a step ran otherwise than planned."""
    case, profile = CASES[name], calibrate(name, steps)
    arguments = {"seeds": range(samples), "labels": labels_of(samples), "steps": steps}
    uncached = case.sample(case.load(), **arguments)
    rows = []
    for interval in intervals:
        for label, policy in policies_of(steps, interval).items():
            torch._dynamo.reset()
            options = {"lowering": "eager", "policy": policy, "profile": profile, "profile_cache": False}
            compiled = torch.compile(case.load(), backend="omnicache", options=options)
            images = case.sample(compiled, **arguments)
            log = omnifx.stats(compiled).generations[-1]
            if log.reasons:
                raise RuntimeError(f"{label}: unplanned full steps: {log.reasons}.")
            quality = float(psnr(images, uncached).mean())
            rows.append({"model": name, "interval": interval, "policy": label, "PSNR dB": quality})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--intervals", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        row
        for name in args.models
        for row in measure(name, steps=args.steps, intervals=args.intervals, samples=args.samples)
    ]
    table(rows, f"{args.steps} steps, {args.samples} samples")
    if args.out:
        save(args.out, rows)


if __name__ == "__main__":
    main()
