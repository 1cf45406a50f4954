"""The reference of a bundle: its first steps as PyTorch runs them, against which every runtime is compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from omnifx.bundle import Manifest, file_info
from omnifx.bundle_loading import Runtime, open_bundle, own_runtime
from omnifx.bundle_runner import BundleRunner
from omnifx.errors import BundleError, ExportError
from omnifx.export_capture import TOLERANCE
from omnifx.export_graphs import Graph
from omnifx.export_schedule import Schedule

MOST_REFERENCE_STEPS = 8
"""Steps that are recorded at most."""


@dataclass
class TorchEngine:
    """Runs the graphs of an export in PyTorch, operator by operator: what a runtime must agree with."""

    graphs: Mapping[str, Graph]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def run(self, name: str, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor | None]) -> None:
        """Run a graph once."""
        made = self.graphs[name].run(inputs)
        for key, place in outputs.items():
            if place is not None:
                place.copy_(made[key])


def with_reference(folder: Path, manifest: Manifest, example: Mapping[str, Tensor], schedule: Schedule) -> Manifest:
    """Record the first steps as PyTorch runs them, and compare the bundle's runtime with them, if it is here."""
    stored = {f"input.{name}": value for name, value in example.items()}
    generator = torch.Generator().manual_seed(0)
    num_steps = _covering(manifest)
    moving = [name for name, info in manifest.call.inputs.items() if info.role in ("latents", "varying")]
    for k in range(num_steps):
        for name in moving:
            value = example[name]
            fresh = torch.randn(value.shape, generator=generator).to(value.device)
            moved = value.float() * 0.97**k + 0.05 * k * fresh if value.is_floating_point() else value
            stored[f"input.{k}.{name}"] = moved.to(value.dtype)
    device = next(iter(example.values())).device
    constants = {name: value.to(device) for name, value in schedule.constants.items()}
    runner = BundleRunner(manifest, TorchEngine(schedule.graphs, device), constants, folder=folder)
    for k, outputs in enumerate(runner.replay(stored, num_steps)):
        stored |= {f"output.{k}.{i}": value for i, value in enumerate(outputs)}
    save_file({name: value.contiguous().cpu() for name, value in stored.items()}, folder / "reference.safetensors")
    manifest = manifest.model_copy(update={"reference": file_info(folder, "reference.safetensors")})
    _compare(folder, manifest, device)
    return manifest


def _covering(manifest: Manifest) -> int:
    """The first steps that together run every graph, but `MOST_REFERENCE_STEPS` at most."""
    left = {run.variant for step in manifest.steps for run in step.runs}
    for k, step in enumerate(manifest.steps[:MOST_REFERENCE_STEPS]):
        left -= {run.variant for run in step.runs}
        if not left:
            return k + 1
    return min(len(manifest.steps), MOST_REFERENCE_STEPS)


def _compare(folder: Path, manifest: Manifest, device: torch.device) -> None:
    """Raise ExportError if the bundle's runtime gives something else than PyTorch did."""
    if (runtime := own_runtime(manifest)) != "onnxruntime":
        return _compare_in(runtime, folder, manifest, device)
    if manifest.producer.dtype == "bfloat16":
        return None  # onnxruntime has hardly any operator of this type on the CPU
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")  # weights stay mapped: nothing is copied
    if manifest.producer.dtype == "float16":
        # The CPU computes in float32. Without these, all weights are cast when a graph is loaded, or before it runs.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    # One session at a time: each maps the weights for itself, and the model holds them as well.
    return _compare_in(runtime, folder, manifest, torch.device("cpu"), options=options, most_sessions=1)


def _compare_in(runtime: Runtime, folder: Path, manifest: Manifest, device: torch.device, **options: Any) -> None:
    try:
        error = open_bundle(folder, manifest, runtime=runtime, device=device, **options).check()
    except BundleError as refusal:
        raise ExportError(f"export: the bundle does not run, and was not written: {refusal}") from refusal
    allowed = TOLERANCE[getattr(torch, manifest.producer.dtype)]
    if not error <= allowed:
        raise ExportError(
            f"export: in {runtime} the bundle differs from PyTorch by {error:.1e} of an output's norm (allowed: "
            f"{allowed:g}). Nothing was written. Please report this with the model's class."
        )


__all__ = ["TorchEngine", "with_reference"]
