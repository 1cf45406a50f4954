"""Compile graphs ahead of time with Inductor: machine code in one .pt2 package, without any weights in it.

Each graph becomes a shared library. It is told its weights when it is loaded, by name, so that all graphs of a bundle
read the same tensors. Of what Inductor makes, the package holds what runs: the libraries, kernels of a GPU and their
tables; neither sources nor, ever, a pickle.
"""

from __future__ import annotations

import json
import logging
import platform
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from omnifx.backends.as_module import as_module, example_inputs
from omnifx.errors import ConfigError, ExportError

_FIXED: dict[str, Any] = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
    # Only makes Inductor hand the weights over, beside the files: they are never packaged.
    "aot_inductor.package_constants_on_disk_format": "pickle_weights",
    "aot_inductor.output_path": "",
}
"""Options that decide what a package is."""
_LEFT_OUT = (".cpp", ".h", ".o", ".kernel_metadata.json")
CPUS = ("DEFAULT", "AVX2", "AVX512")
"""Capabilities of x86 processors as torch names them, each holding those before it."""


@dataclass(frozen=True)
class Compiled:
    """One graph as machine code."""

    files: tuple[str, ...]
    weights: dict[str, Tensor]
    """What it must be given when it is loaded, contiguous, by name."""
    cpu: str
    """The capability of a processor that it was compiled for."""


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ConfigError for options that Inductor does not have, or that are not the user's to choose."""
    known = set(torch._inductor.list_options())
    if unknown := sorted(set(options) - known):
        raise ConfigError(
            f"export: inductor has no option {unknown[0]!r}; torch._inductor.list_options() names all of them."
        )
    if taken := sorted(set(options) & set(_FIXED)):
        raise ConfigError(f"export: the option {taken[0]!r} decides where weights are, and cannot be chosen. Drop it.")


def compile_graph(
    gm: fx.GraphModule, state: Sequence[tuple[str, Tensor]], *, name: str, folder: Path, options: Mapping[str, Any]
) -> Compiled:
    """Compile one graph for the device that its inputs are on.

    Args:
        gm: Takes the parameters of `state`, then its inputs; it is not changed.
        state: Parameters by name.
        name: For messages.
        folder: Of its own, where Inductor writes.
        options: Of Inductor.

    Raises: ExportError for what Inductor cannot compile.
    Memory: weights are not copied, but for those that are not contiguous.
    """
    module = as_module(gm, [(key, tensor.contiguous()) for key, tensor in state])
    inputs = example_inputs(module)
    logger = logging.getLogger("torch._inductor")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, inputs, strict=False)
            made = torch._inductor.aot_compile(
                program.module(),
                inputs,
                options={**options, **_FIXED, "aot_inductor.output_path": str(folder)},
            )
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = (lines or [type(error).__name__])[0][:400]
        raise ExportError(f"export: Inductor cannot compile {name}: {reason} OMNIFX_DEBUG=1 shows all.") from error
    finally:
        logger.setLevel(level)
    assert isinstance(made, list)  # with aot_inductor.package it is one
    files = tuple(str(file) for file in made if isinstance(file, str) and not file.endswith(_LEFT_OUT))
    weights: dict[str, Tensor] = {}
    for part in made:
        if not isinstance(part, str):
            weights |= {key: _as_compiled(name, key, *entry) for key, entry in part.items()}
    return Compiled(files, weights, _cpu_of(files))


def _as_compiled(name: str, key: str, value: Tensor, properties: Any) -> Tensor:
    """A weight as the machine code expects it."""
    view = value.detach().as_strided(properties.shape, properties.stride, properties.offset)
    if not view.is_contiguous():
        raise ExportError(
            f"export: Inductor lays out the weight {key} of {name} as {tuple(view.stride())}, which a bundle does not "
            "hold. Please report this with the model's class and the options."
        )
    return view


def write_package(path: Path, graphs: Mapping[str, Compiled]) -> None:
    """Write all graphs into one package."""
    from torch._inductor.package import package_aoti

    package_aoti(str(path), {name: list(graph.files) for name, graph in graphs.items()})


def builder_of(graphs: Mapping[str, Compiled], device: torch.device, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a package was made with and for, as manifests hold it."""
    found = {
        "torch": torch.__version__,
        "device": device.type,
        "machine": platform.machine(),
        "cpu": max((graph.cpu for graph in graphs.values()), key=lambda cpu: CPUS.index(cpu) if cpu in CPUS else 0),
        "options": dict(options),
    }
    return found | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def _cpu_of(files: Sequence[str]) -> str:
    """The capability that a graph's code takes for granted, as torch names it."""
    for file in files:
        if file.endswith("_metadata.json"):
            about = json.loads(Path(file).read_text(encoding="utf-8"))
            words = str(about.get("AOTI_CPU_ISA", "")).split()
            if known := [cpu for cpu in CPUS if cpu in words]:
                return known[-1]
    return torch.backends.cpu.get_cpu_capability()


__all__ = ["CPUS", "Compiled", "builder_of", "check_options", "compile_graph", "write_package"]
