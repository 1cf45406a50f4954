"""Other resolutions: what omnifx compiles, keeps and gains where plain torch.compile compiles anew.

    python -m benchmarks.shapes [--steps 20] [--lowering inductor|eager] [--out FILE]

A PixArt-like model runs two generations at each of six resolutions, one resolution after another, through plain
torch.compile and through omnifx, with ``dynamic`` unset, True and False. Inductor's caches on disk are off.

graphs          compiled by Dynamo after all resolutions; all but the first are recompilations
compile s       seconds by which the first generation at each resolution exceeds the second one, added up; what the
                very first is compared with is plain's second, as omnifx runs it in full, and measures
plan kept       resolutions, of those after the first, whose generations followed the plan measured at the first
over plain      seconds of the second generation, over plain's with the same ``dynamic``, at all resolutions but the
                first, where it is the one that compiles the reuse variant: geometric mean, and range
difference      largest relative difference of the second generation's latents from plain's

The exit status is 1 if omnifx compiles more graphs than plain, or a plan was not kept.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

import omnifx
from benchmarks import models
from benchmarks.results import save, table

RESOLUTIONS = ((32, 32), (32, 48), (48, 32), (24, 40), (48, 48), (32, 64))
"""Height and width of the latents; tokens are a quarter of their product."""

DYNAMIC = {"automatic": None, "dynamic": True, "static": False}


@dataclass(frozen=True)
class Ran:
    """Two generations at one resolution."""

    first_seconds: float
    second_seconds: float
    latents: Tensor
    kept: bool
    """Whether both followed a plan; False for plain torch.compile."""


def case() -> models.Case:
    """The model: 3 x 192, 32 text tokens."""
    return models.pixart(depth=3, width=192, tokens=256)


def at_size(original: models.Case, height: int, width: int) -> models.Case:
    """The same model on latents of another size."""

    def inputs(seed: int) -> dict[str, Any]:
        latents = models.noise((1, original.channels, height, width), seed)
        return {**original.inputs(seed), "hidden_states": latents}

    return replace(original, inputs=inputs)


def measure(dynamic: bool | None, method: str, *, steps: int, lowering: str) -> dict[str, Any]:
    """One row: all resolutions through one compiled model."""
    torch._dynamo.reset()
    counters.clear()
    original = case()
    compiled = _compiled(original, dynamic, method, lowering)
    ran = []
    for height, width in RESOLUTIONS:
        there = at_size(original, height, width)
        seconds, latents = [], torch.empty(0)
        for seed in (0, 1):
            start = time.perf_counter()
            latents = models.generate(compiled, there, seed=seed, steps=steps)
            seconds.append(time.perf_counter() - start)
        ran.append(Ran(seconds[0], seconds[1], latents, method == "omnifx" and _followed(compiled)))
    row: dict[str, Any] = {
        "method": method,
        "graphs": counters["stats"]["unique_graphs"],
        "first_seconds": [r.first_seconds for r in ran],
        "second_seconds": [r.second_seconds for r in ran],
        "kept": [r.kept for r in ran],
        "latents": [r.latents for r in ran],
        "late_compilations": 0,
    }
    if method == "omnifx":
        stats = omnifx.stats(compiled)
        row["late_compilations"] = stats.recompilations
        row["notes"] = stats.notes
    return row


def _compiled(original: models.Case, dynamic: bool | None, method: str, lowering: str) -> Callable[..., Any]:
    model: Any
    if method == "plain":
        backend = "inductor" if lowering == "inductor" else "aot_eager"
        model = torch.compile(original.model, backend=backend, dynamic=dynamic)
    else:
        options = {"policy": "omnicache", "lowering": lowering, "profile_cache": False}
        model = torch.compile(original.model, backend="omnicache", dynamic=dynamic, options=options)
    return model  # type: ignore[no-any-return]


def _followed(compiled: Callable[..., Any]) -> bool:
    """Whether the last two generations followed a plan: no step was computed for want of one, and some reused."""
    last = omnifx.stats(compiled).generations[-2:]
    return len(last) == 2 and all(not log.reasons and log.speedup > 1.0 for log in last)


def compile_seconds(row: dict[str, Any], full_seconds: float) -> float:
    """Seconds of the first generations beyond those of running; `full_seconds` is a first one that computes all."""
    running = [full_seconds, *row["second_seconds"][1:]]
    return float(sum(max(0.0, a - b) for a, b in zip(row["first_seconds"], running, strict=True)))


def compared(name: str, plain: dict[str, Any], fast: dict[str, Any]) -> dict[str, Any]:
    """Both rows of one setting of ``dynamic``, as figures."""
    ratios = [a / b for a, b in zip(fast["second_seconds"], plain["second_seconds"], strict=True)]
    full = plain["second_seconds"][0]
    return {
        "dynamic": name,
        "plain_graphs": plain["graphs"],
        "graphs": fast["graphs"],
        "late_compilations": fast["late_compilations"],
        "plain_compile_seconds": compile_seconds(plain, full),
        "compile_seconds": compile_seconds(fast, full),
        "kept": fast["kept"][1:],
        "seconds": fast["second_seconds"],
        "plain_seconds": plain["second_seconds"],
        "over_plain": ratios,
        "over_plain_mean": math.exp(sum(map(math.log, ratios[1:])) / len(ratios[1:])),
        "difference": max(
            float((a - b).norm() / b.norm()) for a, b in zip(fast["latents"], plain["latents"], strict=True)
        ),
        "notes": fast.get("notes", []),
    }


def broken_bounds(figures: dict[str, Any]) -> list[str]:
    """Which of the project's own bounds a comparison breaks; empty if none."""
    broken = {
        f"{figures['graphs']} graphs, plain {figures['plain_graphs']}": figures["graphs"] > figures["plain_graphs"],
        f"the plan was kept at {sum(figures['kept'])} of {len(figures['kept'])}": not all(figures["kept"]),
    }
    return [f"{figures['dynamic']}: {text}" for text, is_broken in broken.items() if is_broken]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all rows, print them, and fail if omnifx breaks one of its own bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lowering", default="inductor", choices=["eager", "inductor"])
    parser.add_argument("--out", default="")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    with inductor_config.patch(force_disable_caches=True):
        for name, dynamic in DYNAMIC.items():
            found = []
            for method in ("plain", "omnifx"):
                print(f"{name}, {method} ...", file=sys.stderr, flush=True)
                found.append(measure(dynamic, method, steps=args.steps, lowering=args.lowering))
            rows.append(compared(name, *found))
    table([shown(row) for row in rows], f"{len(RESOLUTIONS)} resolutions, {args.steps} steps, {args.lowering}")
    broken = [text for row in rows for text in broken_bounds(row)]
    if args.out:
        save(args.out, {"resolutions": RESOLUTIONS, "steps": args.steps, "rows": rows, "broken_bounds": broken})
    if broken:
        raise SystemExit("\n".join(["omnifx breaks its own bounds:", *broken]))


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A comparison as printed."""
    later = row["over_plain"][1:]
    return {
        "dynamic": row["dynamic"],
        "graphs": f"{row['graphs']}, plain {row['plain_graphs']}",
        "compile s": f"{row['compile_seconds']:.0f}, plain {row['plain_compile_seconds']:.0f}",
        "plan kept": f"{sum(row['kept'])} of {len(row['kept'])}",
        "over plain": f"{row['over_plain_mean']:.2f} ({min(later):.2f} to {max(later):.2f})",
        "difference": row["difference"],
    }


if __name__ == "__main__":
    main()
