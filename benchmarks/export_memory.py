"""Peak memory of an export, over the weights of the model: a DiT of random weights, exported in a process of its own.

Run: python -m benchmarks.export_memory --blocks 12 --width 1024
Resident memory is what the kernel counts, pages of mapped files included. What Python and its packages hold before the
model is there does not count: the process exports a tiny model first.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import omnifx
from benchmarks.export_size import TIMESTEPS, every_other_step
from omnifx.example_inputs import lively


@dataclass(frozen=True)
class Peak:
    """What one export took."""

    weights_bytes: int
    peak_bytes: int
    """Beyond what was resident before the model was made; the model's own weights are in it."""
    seconds: float

    @property
    def ratio(self) -> float:
        """Peak over weights."""
        return self.peak_bytes / self.weights_bytes


def peak_of(*, target: str, blocks: int, width: int, dtype: str) -> Peak:
    """Export once in a process of its own."""
    words = ("--inside", "--target", target, "--blocks", blocks, "--width", width, "--dtype", dtype)
    command = [sys.executable, "-m", "benchmarks.export_memory", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the export failed: {done.stderr[-2000:]}")
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def measure(target: str, blocks: int, width: int, dtype: torch.dtype) -> Peak:
    """Export in this process."""
    with tempfile.TemporaryDirectory() as folder:
        _export(_model(1, 64, dtype), Path(folder) / "warm", target)
        gc.collect()
        before = _kilobytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        model = _model(blocks, width, dtype)
        start = time.perf_counter()
        _export(model, Path(folder) / "bundle", target)
        seconds = time.perf_counter() - start
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return Peak(weights, (_kilobytes("VmHWM") - before) * 1024, seconds)


def _kilobytes(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None  # Linux
    return int(found[1])


def _model(blocks: int, width: int, dtype: torch.dtype) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=width // 64, attention_head_dim=64, in_channels=4, num_layers=blocks, sample_size=16
    )
    return lively(model.to(dtype).eval(), 0)


def _export(model: Any, folder: Path, target: str) -> None:
    dtype = next(model.parameters()).dtype
    example: dict[str, Tensor] = {
        "hidden_states": torch.randn(1, 4, 16, 16).to(dtype),
        "timestep": torch.tensor([int(TIMESTEPS[1])]),
        "class_labels": torch.tensor([3]),
    }
    names = tuple(branch.name for branch in omnifx.explain(model, **example).branches if branch.cacheable)
    plan = every_other_step(model, names)
    omnifx.export(model, example, plan, folder, target=target, progress=False)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="onnx", choices=["onnx", "aoti"])
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16"])
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        print(json.dumps(vars(measure(given.target, given.blocks, given.width, getattr(torch, given.dtype)))))
        return
    peak = peak_of(target=given.target, blocks=given.blocks, width=given.width, dtype=given.dtype)
    print(
        f"{given.target}, {given.dtype}: {peak.peak_bytes / 2**20:,.0f} MiB at most for "
        f"{peak.weights_bytes / 2**20:,.0f} MiB of weights: {peak.ratio:.2f} times; {peak.seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
