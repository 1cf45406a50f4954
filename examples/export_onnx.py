"""Export a planned model as a bundle of ONNX graphs, and sample with it where neither torch.compile nor the model is.

Run: python -m examples.export_onnx --out digits-bundle
The same from the command line, with the files that examples.calibrate_and_plan writes:
    omnifx export examples.export_onnx:make --plan plans/plan-2x.json --out digits-bundle
With --triton, the bundle is also written as a model that NVIDIA's Triton Inference Server serves.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

import omnifx
from examples.digits.models import load_dit
from examples.digits.sampling import NOISE_SCHEDULE, sample_dit
from omnifx.bundle import contents

BATCH = 16


def make() -> tuple[Any, dict[str, Tensor]]:
    """What `omnifx export` asks for: a model, and one call's arguments."""
    labels = torch.arange(BATCH) % 10
    noise = torch.randn(BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return load_dit(), {"hidden_states": noise, "timestep": torch.full((BATCH,), 500), "class_labels": labels}


def make_sampled() -> tuple[Any, dict[str, Tensor], Any]:
    """The same, and the scheduler of 50 steps: then the bundle says how it is sampled, which servers need to know."""
    return *make(), scheduler_of(50)


def scheduler_of(steps: int) -> Any:
    """What `sample_dit` samples with."""
    scheduler: Any = DDIMScheduler(clip_sample=True, **NOISE_SCHEDULE)
    scheduler.set_timesteps(steps)
    return scheduler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the bundle's folder; without it, it is thrown away")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--triton", type=Path, help="a model repository, to be written or added to")
    parser.add_argument("--smoke", action="store_true", help="few steps and graphs: a minute")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.steps, arguments.policy = 6, "fora"
    folder = arguments.out or Path(tempfile.mkdtemp()) / "bundle"

    def generate(model: Any, seed: int) -> Tensor:
        seeds = range(BATCH * seed, BATCH * (seed + 1))
        return sample_dit(model, seeds=seeds, labels=torch.arange(BATCH) % 10, steps=arguments.steps)

    model, example = make()
    profile = omnifx.calibrate(model, generate, policy=arguments.policy, options={"lowering": "eager"})
    plan = omnifx.make_plan(profile, policy=arguments.policy)
    manifest = omnifx.export(model, example, plan, folder, profile=profile, scheduler=scheduler_of(arguments.steps))
    print(contents(manifest))

    runner = omnifx.load_bundle(folder)
    print(f"onnxruntime differs from PyTorch by {runner.check():.1e} of an output's norm at most")
    plain, cached = generate(model, 7), generate(runner, 7)
    error = (plain - cached).square().mean()
    print(f"a generation that was not measured: {float(10 * torch.log10(4 / error)):.1f} dB to the uncached samples")
    print(runner.stats)
    if arguments.triton is not None:
        print(f"wrote {omnifx.write_triton(folder, arguments.triton, name='digits')}")


if __name__ == "__main__":
    main()
