"""TensorRT and TensorRT-RTX: two modules with one API, and what builder and runtime both ask of them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from omnifx.bundle import DType, TensorInfo
from omnifx.errors import ExportError

EngineTarget = Literal["tensorrt", "tensorrt-rtx"]


@dataclass(frozen=True)
class Library:
    """One of the two modules."""

    target: EngineTarget
    module: str
    title: str
    command: str
    """Its tool for the command line."""

    def load(self, who: str) -> Any:
        """The module, for `who`. Raises ExportError if it is not installed, or cannot be loaded."""
        try:
            return importlib.import_module(self.module)
        except ImportError as error:
            raise ExportError(
                f"{who}: {self.title} is missing here ({error}). pip install 'omnifx[{self.target}]'"
                + ("." if self.target == "tensorrt-rtx" else ", or use NVIDIA's TensorRT container.")
            ) from error


LIBRARIES: dict[str, Library] = {
    "tensorrt": Library("tensorrt", "tensorrt", "TensorRT", "trtexec"),
    "tensorrt-rtx": Library("tensorrt-rtx", "tensorrt_rtx", "TensorRT-RTX", "tensorrt_rtx"),
}


def difference_of_ports(wanted: Mapping[str, TensorInfo], found: Mapping[str, TensorInfo]) -> str:
    """What differs between the inputs or outputs of two graphs, in words; empty if nothing does."""
    if missing := sorted(wanted.keys() - found.keys()):
        return f"{missing[0]} is missing"
    if more := sorted(found.keys() - wanted.keys()):
        return f"{more[0]} is not known"
    for name, info in wanted.items():
        other = found[name]
        if (info.shape, info.dtype) != (other.shape, other.dtype):
            return f"{name} is {other.dtype}{list(other.shape)}, not {info.dtype}{list(info.shape)}"
    return ""


_TYPES: dict[str, DType] = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32", "INT8": "int8",
    "UINT8": "uint8", "BOOL": "bool",
}  # fmt: skip


def io_table(trt: Any, engine: Any) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo]]:
    """Inputs and outputs of an engine that is loaded, as a manifest has them."""
    if engine is None:
        raise ExportError("build: the engine that was built cannot be loaded again.")
    tables: tuple[dict[str, TensorInfo], dict[str, TensorInfo]] = ({}, {})
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        info = TensorInfo(
            shape=tuple(int(size) for size in engine.get_tensor_shape(name)),
            dtype=_TYPES[engine.get_tensor_dtype(name).name],
        )
        tables[engine.get_tensor_mode(name) != trt.TensorIOMode.INPUT][name] = info
    return tables


__all__ = ["LIBRARIES", "EngineTarget", "Library", "difference_of_ports", "io_table"]
