"""Measure a model with a sampler of your own: uncached against plans and fewer steps, on the same seeds.

`omnifx bench` needs a function that returns (model, generate); `generate(model, seed)` runs one generation with the
model it is given, and returns its samples. Here they are digits.

Run: omnifx bench examples.bench_digits:dit --out found --features examples.bench_digits:features
The same from Python: python -m examples.bench_digits --out found
"""

import argparse
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from examples.digits.models import load_classifier, load_dit, load_flow
from examples.digits.sampling import sample_dit, sample_flow
from omnifx.bench import run_bench, table_of
from omnifx.bench_targets import script_target
from omnifx.bench_ways import Settings

BATCH = 25  # samples of one generation


def dit() -> tuple[Any, Any]:
    """The DiT that predicts noise, with DDIM."""

    def generate(model: Any, seed: int, steps: int = 50) -> Tensor:
        return sample_dit(model, seeds=seeds_of(seed), labels=labels(), steps=steps)

    return load_dit(), generate


def flow() -> tuple[Any, Any]:
    """The flow model, with Euler's method and guidance in one batch."""

    def generate(model: Any, seed: int, steps: int = 50) -> Tensor:
        return sample_flow(model, seeds=seeds_of(seed), labels=labels(), steps=steps)

    return load_flow(), generate


def features(samples: Tensor) -> Tensor:
    """[N, 1, 8, 8] -> [N, 32]: what a classifier sees in them, for the Frechet distance."""
    return classifier().features(samples)


@cache
def classifier() -> Any:
    """Loaded once."""
    return load_classifier()


def seeds_of(seed: int) -> range:
    """The seeds of a generation's samples: no two generations share one."""
    return range(BATCH * seed, BATCH * (seed + 1))


def labels() -> Tensor:
    """Every class in turn."""
    return torch.arange(BATCH) % 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the results; without it, they are thrown away")
    parser.add_argument("--smoke", action="store_true", help="few steps and samples, no Inductor: seconds")
    arguments = parser.parse_args()
    out = arguments.out or Path(tempfile.mkdtemp())
    settings = (
        Settings(samples=2 * BATCH, runs=1, repeats=1, lowering="eager") if arguments.smoke else Settings(samples=100)
    )

    results = run_bench(
        script_target(dit(), title="digits DiT", steps=12 if arguments.smoke else None),
        out,
        policies=("auto",) if arguments.smoke else ("auto", "omnicache"),
        speedups=(2.0,) if arguments.smoke else (1.5, 2.0, 3.0),
        settings=settings,
        features=features,
        features_name="the digits classifier's 32",
    )
    Console().print(table_of(results.cases[0]))
    print(f"the results are in {out}" if arguments.out else "give --out FOLDER to keep the results")


if __name__ == "__main__":
    main()
