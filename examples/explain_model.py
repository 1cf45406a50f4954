"""See what omnifx finds in a model, without weights: the model stands on the meta device, whatever its size.

Run: python -m examples.explain_model
"""

import argparse
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel

import omnifx


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="two blocks instead of 28: seconds")
    arguments = parser.parse_args()

    make: Any = PixArtTransformer2DModel  # its default config is PixArt-alpha at 1024 pixels
    with torch.device("meta"):
        model = make(num_layers=2 if arguments.smoke else 28).eval()
        inputs = {
            "hidden_states": torch.empty(1, 4, 128, 128),
            "encoder_hidden_states": torch.empty(1, 120, 1152),
            "timestep": torch.empty(1, dtype=torch.int64),
            "added_cond_kwargs": {"resolution": torch.empty(1, 2), "aspect_ratio": torch.empty(1, 1)},
            "return_dict": False,
        }

    report = omnifx.explain(model, **inputs)

    print(report)
    by_kind: dict[str, int] = {}
    for branch in report.branches:
        by_kind[branch.kind] = by_kind.get(branch.kind, 0) + branch.flops
    for kind, flops in by_kind.items():
        print(f"{kind}: {flops / report.flops:.1%} of the FLOPs")


if __name__ == "__main__":
    main()
