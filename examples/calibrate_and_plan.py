"""Measure a model once, plan at several speedups, keep the files, and run by one of the plans.

Run: python -m examples.calibrate_and_plan --out plans
The same from the command line: omnifx calibrate examples.calibrate_and_plan:make --runs 3
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import omnifx
from examples.digits.models import load_dit
from examples.digits.sampling import sample_dit
from omnifx.pictures import plan_figure, save_figure


def generate(model: Any, seed: int, steps: int = 50) -> Tensor:
    """One ordinary generation: 16 digits, with seeds of their own."""
    return sample_dit(model, seeds=range(16 * seed, 16 * (seed + 1)), labels=torch.arange(16) % 10, steps=steps)


def make() -> tuple[Any, Any]:
    """What `omnifx calibrate` asks for: a model, and how to generate with it."""
    return load_dit(), generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the files; without it, they are thrown away")
    parser.add_argument("--smoke", action="store_true", help="few steps, no Inductor: seconds")
    arguments = parser.parse_args()
    steps, lowering = (12, "eager") if arguments.smoke else (50, "inductor")
    folder = arguments.out or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)

    model = load_dit()
    profile = omnifx.calibrate(
        model,
        lambda compiled, seed: generate(compiled, seed, steps),
        runs=3,  # from 3 on, whole runs are held back to judge the corrections
        save=folder / "digits.safetensors",
        options={"lowering": lowering},
    )

    for speedup in (1.5, 2.0):
        plan = omnifx.make_plan(profile, speedup=speedup)
        print(plan)
        plan.save(folder / f"plan-{speedup:g}x.json")
        save_figure(plan_figure(plan, profile), folder / f"plan-{speedup:g}x.png")

    options: Any = {"profile": folder / "digits.safetensors", "plan": folder / "plan-2x.json", "lowering": lowering}
    compiled: Any = torch.compile(model, backend="omnicache", options=options)
    generate(compiled, 1000, steps)
    print(omnifx.stats(compiled))
    print(f"the files are in {folder}" if arguments.out else "give --out FOLDER to keep the files")


if __name__ == "__main__":
    main()
