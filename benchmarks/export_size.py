"""A model at its real size, exported and built once: time, peak memory, bytes, and what each engine holds.

    python -m benchmarks.export_size [--depth 28] [--width 1152] [--dtype float16] [--batch 2] [--sm 86,89] [--out FILE]

As it comes this is DiT-XL/2 (28 x 1152, 256 tokens) with random weights: sizes, times and kernels do not depend on
their values. Export and build run in a process of their own each, whose largest resident memory is reported, beside
what it was with the model loaded. The plan computes every other step. Nothing is run on a GPU. Needs 8 GB of memory and
minutes.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import omnifx
from benchmarks.results import save, table
from omnifx.bundle import Manifest
from omnifx.plan import COMPUTE, REUSE, Plan, PlanStep
from omnifx.session import fingerprint_of

HEAD = 72
TIMESTEPS = (999.0, 749.0, 499.0, 249.0)


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_dit(depth: int, width: int, dtype: torch.dtype, batch: int) -> tuple[Any, dict[str, Any]]:
    """A DiT of diffusers for latents of 32 x 32, and one call's arguments."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # never in float32: that would be twice the memory
    try:
        model = DiTTransformer2DModel(
            num_attention_heads=width // HEAD, attention_head_dim=HEAD, num_layers=depth, sample_size=32
        )
    finally:
        torch.set_default_dtype(before)
    latents = torch.randn(batch, 4, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    arguments = {
        "hidden_states": latents,
        "timestep": torch.full((batch,), int(TIMESTEPS[0])),
        "class_labels": torch.arange(batch) % 1000,
    }
    return model.eval(), arguments


def every_other_step(model: Any, names: tuple[str, ...]) -> Plan:
    """Full and reuse in turn, for all branches of these names."""
    return Plan(
        policy="every other step",
        model=type(model).__name__,
        fingerprint=fingerprint_of(model, names),
        timesteps=TIMESTEPS,
        branches=names,
        variants=((COMPUTE,) * len(names), (REUSE,) * len(names)),
        steps=tuple(PlanStep(variant=k % 2) for k in range(len(TIMESTEPS))),
        reuse_flops=(1.0, 0.1),
    )


def export(folder: Path, depth: int, width: int, dtype: str, batch: int) -> dict[str, Any]:
    """Write the bundle; what it took."""
    model, arguments = make_dit(depth, width, getattr(torch, dtype), batch)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    loaded, start, cpu = peak_bytes(), time.perf_counter(), time.process_time()
    names = tuple(f"transformer_blocks.{i}.{part}" for i in range(depth) for part in ("attn1", "ff"))
    omnifx.export(model, arguments, every_other_step(model, names), folder, progress=False)
    return {
        "model_weights_bytes": weights,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes": peak_bytes(),
        "peak_bytes_with_the_model_loaded": loaded,
    }


def build(folder: Path, capabilities: str) -> dict[str, Any]:
    """Build the engines; what it took."""
    start, cpu = time.perf_counter(), time.process_time()
    omnifx.build_engines(folder, "tensorrt-rtx", compute_capabilities=capabilities, progress=False)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes": peak_bytes(),
    }


def rows_of(manifest: Manifest) -> list[dict[str, Any]]:
    """One row for each graph."""
    engines, rows = manifest.engines["tensorrt-rtx"], []
    for name, variant in manifest.variants.items():
        layers = engines.builds[name].layers
        assert layers is not None  # TensorRT-RTX lists them
        rows.append(
            {
                "graph": name,
                "weights_mib": variant.params_bytes / 2**20,
                "engine_mib": engines.files[name].bytes / 2**20,
                "build_seconds": engines.builds[name].seconds,
                "layers": layers.layers,
                "matrix_products": layers.matrix_products,
                "attentions": layers.attentions,
                "attention_kernels": layers.fused_attentions,
                "scratch_mib": layers.scratch_bytes / 2**20,
            }
        )
    return rows


def _own_process(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.export_size", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=28)
    parser.add_argument("--width", type=int, default=1152, help=f"a multiple of {HEAD}")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--sm", default="86,89,120", help="compute capabilities of the engines")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", choices=("export", "build"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    size = (arguments.depth, arguments.width, arguments.dtype, arguments.batch)
    if arguments.part == "export":
        print(json.dumps(export(arguments.folder, *size)))
        return
    if arguments.part == "build":
        print(json.dumps(build(arguments.folder, arguments.sm)))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "bundle"
        given = [f"--{name}={value}" for name, value in zip(("depth", "width", "dtype", "batch"), size, strict=True)]
        exported = _own_process("--part", "export", "--folder", folder, *given)
        built = _own_process("--part", "build", "--folder", folder, "--sm", arguments.sm)
        manifest = Manifest.load(folder)
    rows = rows_of(manifest)
    table(rows, f"DiT {arguments.depth} x {arguments.width}, {arguments.dtype}, batch {arguments.batch}")
    for word, part in (("export", exported), ("build", built)):
        seconds = f"{part['seconds']:.0f} s, {part['cpu_seconds']:.0f} s of CPU"
        print(f"{word}: {seconds}, peak {part['peak_bytes'] / 2**30:.2f} GiB")
    loaded, weights = exported["peak_bytes_with_the_model_loaded"], exported["model_weights_bytes"]
    print(f"before the export, with the model's {weights / 2**30:.2f} GiB of weights: {loaded / 2**30:.2f} GiB")
    if arguments.out is not None:
        version = manifest.engines["tensorrt-rtx"].builder["version"]
        size_of = {"depth": size[0], "width": size[1], "dtype": size[2], "batch": size[3], "sm": arguments.sm}
        figures = {"size": size_of, "tensorrt_rtx": version, "export": exported, "build": built, "graphs": rows}
        save(arguments.out, figures | {"weights_bin_bytes": manifest.weights.bytes})


if __name__ == "__main__":
    main()
