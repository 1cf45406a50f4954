"""Time and memory of the analysis of a FLUX-size model: 19 + 38 blocks of width 3072, on the meta device (no weights).

    python -m benchmarks.analysis [--out FILE]

Bound: `FindBranches` under 20 seconds.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

import omnifx
from benchmarks.results import save, table


def main() -> None:
    """Capture and analyse; print seconds, branches and peak memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--double", type=int, default=19)
    parser.add_argument("--single", type=int, default=38)
    parser.add_argument("--out", default="")
    args = parser.parse_args()

    from diffusers import FluxTransformer2DModel

    from omnifx.passes.find_branches import FindBranches

    spent: list[float] = []
    original = FindBranches.call

    def timed(self: FindBranches, gm: torch.fx.GraphModule) -> bool:
        start = time.perf_counter()
        changed = original(self, gm)
        spent.append(time.perf_counter() - start)
        return changed

    FindBranches.call = timed  # type: ignore[method-assign]
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=args.double, num_single_layers=args.single, guidance_embeds=True)
        inputs = {
            "hidden_states": torch.zeros(1, 4096, 64),
            "encoder_hidden_states": torch.zeros(1, 512, 4096),
            "pooled_projections": torch.zeros(1, 768),
            "timestep": torch.zeros(1),
            "guidance": torch.zeros(1),
            "img_ids": torch.zeros(4096, 3),
            "txt_ids": torch.zeros(512, 3),
        }
    start = time.perf_counter()
    report = omnifx.explain(model.eval(), **inputs, return_dict=False)
    row = {
        "blocks": args.double + args.single,
        "branches": len(report.branches),
        "cacheable": len(report.cacheable),
        "TFLOP": report.flops / 1e12,
        "reuse share": report.reuse_flops / report.flops,
        "cache MiB": report.cache_bytes / 2**20,
        "FindBranches s": sum(spent),
        "capture and all s": time.perf_counter() - start,
        "peak GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    table([row], "analysis")
    if args.out:
        save(args.out, row)
    if sum(spent) > 20:
        raise SystemExit("FindBranches took over 20 s")


if __name__ == "__main__":
    main()
