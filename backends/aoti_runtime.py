"""Run a bundle's graphs as AOTInductor compiled them: machine code from one package, on one copy of the weights.

All graphs are given the same tensors, mapped from the bundle's file of weights, so that neither graphs nor processes
hold weights of their own. Nothing is unpickled: a package that holds anything but machine code is refused unopened.
"""

from __future__ import annotations

import platform
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnifx.backends.aoti import CPUS
from omnifx.backends.weights_file import StoredTensor, map_tensors
from omnifx.bundle import EngineInfo, Manifest, num_bytes
from omnifx.errors import BundleError, ConfigError

_CODE = "data/aotinductor/"
_ABOUT = ("archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id")
_ALIGNMENT = 16
"""Bytes, which code for GPUs takes for granted."""


class AotiRuntime:
    """The graphs of one bundle, loaded.

    It may be called from several threads. PyTorch's binding holds the interpreter's lock while a graph runs, so the
    graphs of one process take turns in Python; from C++ they run at once.

    Args:
        folder: Where the bundle lies; its files were looked at.
        manifest: Of the bundle.
        device: Of the kind that the graphs were compiled for.
        num_runners: Runs of one graph that may be under way at once, which share its weights.

    Raises: BundleError if the bundle was not made for this torch, device or processor, or lacks a graph or a weight.
    Memory: the weights once, on the host as pages of their file, until this object goes; the temporaries of one run for
        each that is under way. Machine code stays loaded until the process ends.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, device: torch.device, num_runners: int = 1) -> None:
        if not isinstance(num_runners, int) or num_runners < 1:
            raise ConfigError(f"load_bundle: num_runners must be a number >= 1, got {num_runners!r}.")
        engine = manifest.engines.get("aoti")
        if engine is None:
            raise BundleError(f"{folder} was not exported for 'aoti'. Export it with target='aoti'.")
        if missing := sorted(set(manifest.variants) - set(engine.files)):
            raise BundleError(f"{folder} has no compiled graph {missing[0]}. Export it anew.")
        _check_builder(engine.builder, device)
        self.device = device
        self.weights = map_tensors(folder / manifest.weights.path, _places(engine), device)
        self._inputs = {name: tuple(variant.inputs) for name, variant in manifest.variants.items()}
        self._outputs = {name: tuple(variant.outputs) for name, variant in manifest.variants.items()}
        self._loaders: dict[str, Any] = {}
        for path in dict.fromkeys(folder / file.path for file in engine.files.values()):
            _check_package(path)
        for name in manifest.variants:
            self._loaders[name] = self._loaded(folder / engine.files[name].path, name, num_runners)

    def _loaded(self, path: Path, name: str, num_runners: int) -> Any:
        index = self.device.index if self.device.index is not None else -1
        try:
            loader = torch._C._aoti.AOTIModelPackageLoader(str(path), name, False, num_runners, index)
            wanted = loader.get_constant_fqns()
        except RuntimeError as error:
            raise BundleError(
                f"{path}: the graph {name} cannot be loaded: {_first_line(error)} Export it anew."
            ) from error
        given = {key: self.weights.get(f"{name}:{key}", self.weights.get(key)) for key in wanted}
        if missing := sorted(key for key, value in given.items() if value is None):
            raise BundleError(f"{path}: the graph {name} wants the weight {missing[0]}, which is not in the bundle.")
        if given:
            lent = {key: _lent(value) for key, value in given.items() if value is not None}
            loader.load_constants(lent, False, True, True)  # active, all of them, ours to keep alive
        return loader

    def run(self, name: str, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor | None]) -> None:
        """Run a graph once. Inputs are contiguous; what it made is copied to the outputs, None ones are not kept."""
        made = self._loaders[name].boxed_run([_aligned(inputs[key]) for key in self._inputs[name]])
        for key, value in zip(self._outputs[name], made, strict=True):
            place = outputs[key]
            if place is not None:
                place.copy_(value)


def _places(engine: EngineInfo) -> dict[str, StoredTensor]:
    for name, info in engine.weights.items():
        if info.bytes != num_bytes(info):
            raise BundleError(f"load_bundle: the weight {name} has {info.bytes} bytes, expected {num_bytes(info)}.")
    return {
        name: StoredTensor(info.offset, info.shape, getattr(torch, info.dtype)) for name, info in engine.weights.items()
    }


def _check_builder(builder: Mapping[str, Any], device: torch.device) -> None:
    """Raise BundleError unless machine code of this builder runs here."""
    torch_made, torch_here = (str(version).partition("+")[0] for version in (builder.get("torch"), torch.__version__))
    if torch_made != torch_here:
        raise BundleError(
            f"load_bundle: this bundle was compiled with torch {torch_made}, but torch {torch_here} is installed. "
            "Install that one, or export it anew."
        )
    if builder.get("device") != device.type:
        raise BundleError(
            f"load_bundle: this bundle was compiled for {builder.get('device')}, not for {device.type}. Load it with "
            f"device={builder.get('device')!r}, or export the model from {device.type}."
        )
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if builder.get("gpu", "") != gpu:
        raise BundleError(
            f"load_bundle: this bundle was compiled on {builder.get('gpu')}, but here is {gpu}. Export it here."
        )
    machine, cpu = builder.get("machine"), builder.get("cpu")
    here = torch.backends.cpu.get_cpu_capability()
    enough = CPUS.index(cpu) <= CPUS.index(here) if cpu in CPUS and here in CPUS else cpu == here
    if machine != platform.machine() or not enough:
        raise BundleError(
            f"load_bundle: this bundle was compiled for {machine} with {cpu}, but this machine is "
            f"{platform.machine()} with {here}. Export it on such a machine; for older x86 processors export with "
            "inductor={'cpp.simdlen': 256}."
        )


def _check_package(path: Path) -> None:
    """Raise BundleError for a package that holds more than machine code: torch would unpickle some of it."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path} is no package of compiled graphs: {error}. Export it anew.") from error
    for name in names:
        inner = name.partition("/")[2]
        weights = inner.endswith(("weights_config.json", ".pt", ".pkl"))
        if ".." in Path(name).parts or weights or not (inner in _ABOUT or inner.startswith(_CODE)):
            raise BundleError(
                f"{path} holds {inner or name}, which is not machine code: weights of a bundle are never pickled, and "
                f"lie in its weights' file. Export it anew."
            )


def _lent(value: Tensor) -> Tensor:
    """The same memory without a claim to it: torch's loader never lets go of tensors that it was given to share, so
    weights would stay when a bundle is dropped."""
    if not value.numel():
        return value
    storage = torch._C._construct_storage_from_data_pointer(value.data_ptr(), value.device, value.nbytes)
    return torch.empty(0, dtype=value.dtype, device=value.device).set_(storage, 0, value.shape, value.stride())


def _aligned(value: Tensor) -> Tensor:
    return value.clone() if value.data_ptr() % _ALIGNMENT else value


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


__all__ = ["AotiRuntime"]
