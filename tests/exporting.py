"""What the tests of exports share: a plan made on a model, a runner of its schedule in PyTorch, and generations."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import omnifx
from omnifx.bundle import Constant, FileInfo, LayerSummary, Manifest
from omnifx.bundle_runner import BundleRunner
from omnifx.export_files import Files, manifest_of
from omnifx.export_reference import TorchEngine
from omnifx.export_schedule import dtype_name
from omnifx.exporter import prepare
from omnifx.plan import COMPUTE, REUSE, Plan, PlanStep, Row
from omnifx.policy import Policy
from omnifx.profile import Profile
from omnifx.session import fingerprint_of

ROOT = Path(__file__).parent.parent
TRITON = Path(os.environ.get("OMNIFX_TRITON") or ROOT / ".venv-triton")
"""Where a Triton server and its client are installed; `make .venv-triton/.installed` does that."""

NO_FILE = FileInfo(path="none", bytes=2**40, sha256="0" * 64)

Generate = Callable[[Any, int], Tensor]


@dataclass
class Planned:
    """A model, what was measured of it, and a plan."""

    model: nn.Module
    generate: Generate
    profile: Profile
    plan: Plan

    def compiled(self, folder: Path) -> Any:
        """The model as torch.compile runs it by the plan."""
        self.profile.save(folder / "profile.safetensors")
        self.plan.save(folder / "plan.json")
        options: Any = {
            "profile": folder / "profile.safetensors",
            "plan": folder / "plan.json",
            "lowering": "eager",
            "policy": self.plan.policy,
        }
        return torch.compile(self.model, backend="omnicache", options=options)


def planned(model: nn.Module, generate: Generate, policy: str | Policy, *, speedup: float | None = None) -> Planned:
    """Measure one generation, and plan."""
    profile = omnifx.calibrate(model, generate, policy=policy, options={"lowering": "eager"}, progress=False)
    return Planned(model, generate, profile, omnifx.make_plan(profile, policy=policy, speedup=speedup))


def plan_by_hand(model: nn.Module, names: Sequence[str], pattern: str, timesteps: Sequence[float]) -> Plan:
    """A plan of full (F) and reuse (r) steps for the branches of a model."""
    rows: dict[str, Row] = {"F": (COMPUTE,) * len(names), "r": (REUSE,) * len(names)}
    used = list(dict.fromkeys(pattern))
    return Plan(
        policy="by hand",
        model=type(model).__name__,
        fingerprint=fingerprint_of(model, names),
        timesteps=tuple(timesteps),
        branches=tuple(names),
        variants=tuple(rows[letter] for letter in used),
        steps=tuple(PlanStep(variant=used.index(letter)) for letter in pattern),
        reuse_flops=tuple(1.0 if letter == "F" else 0.1 for letter in used),
    )


def in_torch(model: nn.Module, example: Any, plan: Plan, **options: Any) -> BundleRunner:
    """A runner of what an export would write, whose graphs run in PyTorch."""
    prepared = prepare(model, example, plan, **options)
    schedule = prepared.schedule
    constants = {
        name: Constant(shape=tuple(value.shape), dtype=dtype_name(value), offset=0, bytes=0)
        for name, value in schedule.constants.items()
    }
    files = Files(dict.fromkeys(schedule.graphs, NO_FILE), NO_FILE, constants)
    manifest: Manifest = manifest_of(model, prepared.job, plan, schedule, files, None, 20)
    return BundleRunner(manifest, TorchEngine(schedule.graphs), schedule.constants)


def alter(path: Path, *, at: int) -> None:
    """Flip one bit of a file."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def needs_onnx() -> None:
    """Skip a test where ONNX cannot be written or run."""
    for name in ("onnx", "onnxscript", "onnx_ir", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install 'omnifx[onnx]'")


def layers_of(manifest: Manifest) -> dict[str, LayerSummary]:
    """What the engines of TensorRT-RTX consist of, by variant."""
    found = {name: build.layers for name, build in manifest.engines["tensorrt-rtx"].builds.items()}
    return {name: layers for name, layers in found.items() if layers is not None}


def build_with_rtx(folder: Path) -> None:
    """Build engines of a bundle for three generations of GPUs, where TensorRT-RTX is here, and look at what is in them:
    those that compute no branch hold no attention, and fewer matrix products than the full graph's."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        return
    manifest = omnifx.build_engines(folder, "tensorrt-rtx", compute_capabilities="86,89,120", progress=False)
    layers = layers_of(manifest)
    assert layers.keys() == manifest.variants.keys()
    for name, variant in manifest.variants.items():
        if variant.actions and "compute" not in variant.actions and not variant.tokens:
            assert layers[name].attentions == 0, name
            assert layers[name].matrix_products < layers["full"].matrix_products, name


__all__ = [
    "ROOT",
    "TRITON",
    "Planned",
    "build_with_rtx",
    "in_torch",
    "layers_of",
    "needs_onnx",
    "plan_by_hand",
    "planned",
]
