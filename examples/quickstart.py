"""The whole of omnifx in one line: a trained diffusion transformer, compiled with backend="omnicache".

The first generation runs in full and is measured; from the second on, steps reuse what the plan says they may.
Run: python -m examples.quickstart
"""

import argparse
import time
from typing import Any

import torch

import omnifx
from examples.digits.models import load_dit
from examples.digits.sampling import sample_dit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--speedup", type=float, default=2.0, help="FLOPs uncached over planned")
    parser.add_argument("--smoke", action="store_true", help="few steps, no Inductor: seconds")
    arguments = parser.parse_args()
    options: Any = {"speedup": arguments.speedup}
    if arguments.smoke:
        arguments.steps = 10
        options |= {"speedup": 1.5, "lowering": "eager", "profile_cache": False}

    model: Any = torch.compile(load_dit(), backend="omnicache", options=options)

    labels = torch.arange(16) % 10
    for number in range(3):
        start = time.perf_counter()
        samples = sample_dit(model, seeds=range(16 * number, 16 * (number + 1)), labels=labels, steps=arguments.steps)
        print(f"generation {number}: {list(samples.shape)} in {time.perf_counter() - start:.2f} s")
    print(omnifx.stats(model))


if __name__ == "__main__":
    main()
