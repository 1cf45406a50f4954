"""A stand-in for TensorRT and a GPU: engines that compute in PyTorch, from and to the addresses that they were given.

It keeps the rules of the real API and fails where one is broken: every input and output has an address that is aligned,
scratch memory is large enough and is overwritten by each run, contexts of two streams share none, and what is captured
runs only when it is replayed, at the addresses of that time.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnifx.bundle import EngineInfo, Manifest, TensorInfo, file_info
from omnifx.export_graphs import Graph

VERSION = "1.7.1.116"
DTYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64", "bool": "BOOL"}


class DataType(Enum):
    """As TensorRT names types."""

    FLOAT = 0
    HALF = 1
    BF16 = 2
    INT64 = 3
    BOOL = 4


class TensorIOMode(Enum):
    """Of an engine's tensors."""

    INPUT = 0
    OUTPUT = 1


class ExecutionContextAllocationStrategy(Enum):
    """Who gives a context its scratch memory."""

    STATIC = 0
    USER_MANAGED = 1


@dataclass
class FakeGpu:
    """A device whose streams are numbers."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    alignment: int = 64
    capability: str = "8.9"
    synchronized: int = 0
    captured: int = 0
    recording: list[Callable[[], None]] | None = None
    _local: threading.local = field(default_factory=threading.local)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def on(self, stream: int) -> Iterator[None]:
        """The current stream of this thread."""
        self._local.stream = stream
        yield
        self._local.stream = 0

    def stream(self) -> int:
        return getattr(self._local, "stream", 0)

    def enqueue(self, run: Callable[[int], None]) -> None:
        run(self.stream() or 999)  # never the default stream

    def capture(self, run: Callable[[int], None]) -> Callable[[], None]:
        self.recording = recorded = []
        run(self.stream() or 999)
        self.recording = None
        self.captured += 1
        assert len(recorded) == 1

        def replay() -> None:
            for each in recorded:
                each()

        return replay

    def synchronize(self) -> None:
        self.synchronized += 1


@dataclass
class FakeTensorRT:
    """The module."""

    gpu: FakeGpu
    graphs: Mapping[str, Graph]
    fails: str = ""
    """The engine whose runs fail."""
    runs: list[tuple[str, int, int]] = field(default_factory=list)
    """Engine, stream and scratch address of each run."""
    caches: list[Any] = field(default_factory=list)
    __version__: str = VERSION
    DataType: Any = DataType
    TensorIOMode: Any = TensorIOMode
    ExecutionContextAllocationStrategy: Any = ExecutionContextAllocationStrategy

    @property
    def __name__(self) -> str:
        return "fake_tensorrt"

    class ILogger:
        """Base of loggers."""

    def Runtime(self, logger: Any) -> Any:
        """What loads engines."""
        self.logger = logger
        return self

    def deserialize_cuda_engine(self, data: bytes) -> Any:
        """An engine, or None."""
        try:
            return FakeEngine(self, json.loads(data))
        except ValueError:
            self.logger.log(_Severity("ERROR"), "Serialization assertion failed")
            return None


@dataclass(frozen=True)
class _Severity:
    name: str


@dataclass
class FakeCache:
    """Kernels that were compiled."""

    blob: bytes = b"kernels"
    loaded: bytes | None = None

    def deserialize(self, blob: bytes) -> bool:
        self.loaded = blob
        return True

    def serialize(self) -> bytes:
        return self.blob


@dataclass
class FakeConfig:
    """How a context is made."""

    trt: FakeTensorRT
    strategy: Any = ExecutionContextAllocationStrategy.STATIC
    cache: Any = None

    def create_runtime_cache(self) -> FakeCache:
        self.trt.caches.append(FakeCache())
        return self.trt.caches[-1]  # type: ignore[no-any-return]

    def set_runtime_cache(self, cache: Any) -> bool:
        self.cache = cache
        return True

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy


@dataclass
class FakeEngine:
    """An engine; what it computes is a graph in PyTorch."""

    trt: FakeTensorRT
    raw: dict[str, Any]

    @property
    def device_memory_size_v2(self) -> int:
        return int(self.raw["scratch"])

    @property
    def ports(self) -> dict[str, tuple[TensorInfo, TensorIOMode]]:
        found = {}
        for key, mode in (("inputs", TensorIOMode.INPUT), ("outputs", TensorIOMode.OUTPUT)):
            found |= {name: (TensorInfo.model_validate(info), mode) for name, info in self.raw[key].items()}
        return found

    @property
    def num_io_tensors(self) -> int:
        return len(self.ports)

    def get_tensor_name(self, i: int) -> str:
        return list(self.ports)[i]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.ports[name][0].shape

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[DTYPES[self.ports[name][0].dtype]]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self.ports[name][1]

    def create_runtime_config(self) -> FakeConfig:
        return FakeConfig(self.trt)

    def create_execution_context(self, config: FakeConfig) -> Any:
        assert config.strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        assert config.cache is self.trt.caches[0], "every context compiles anew"
        return FakeContext(self)


@dataclass
class FakeContext:
    """A context: addresses and scratch memory."""

    engine: FakeEngine
    addresses: dict[str, int] = field(default_factory=dict)
    scratch: tuple[int, int] | None = None

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.engine.device_memory_size_v2, "scratch memory is too small"
        self.scratch = (address, size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address, f"{name} has no memory"
        assert address % self.engine.trt.gpu.alignment == 0, f"{name} is not aligned"
        self.addresses[name] = address
        return name in self.engine.ports

    def is_stream_capturable(self, stream: int) -> bool:
        return True

    def execute_async_v3(self, stream: int) -> bool:
        trt, name = self.engine.trt, self.engine.raw["name"]
        assert stream, "TensorRT waits for the whole device on the default stream"
        assert self.scratch is not None, "no scratch memory was given"
        assert self.addresses.keys() == self.engine.ports.keys(), "an input or output has no address"
        if trt.fails == name:
            trt.logger.log(_Severity("ERROR"), "an illegal memory access was encountered")
            return False
        addresses, scratch = dict(self.addresses), self.scratch

        def run() -> None:
            trt.runs.append((name, stream, scratch[0]))
            self._compute(addresses, scratch)

        if trt.gpu.recording is not None:
            trt.gpu.recording.append(run)
        else:
            run()
        return True

    def _compute(self, addresses: dict[str, int], scratch: tuple[int, int]) -> None:
        ports = self.engine.ports
        inputs = {n: at(a, ports[n][0]).clone() for n, a in addresses.items() if ports[n][1] is TensorIOMode.INPUT}
        ctypes.memset(scratch[0], 0x7F, scratch[1])
        made = self.engine.trt.graphs[self.engine.raw["name"]].run(inputs)
        for name, (info, mode) in ports.items():
            if mode is TensorIOMode.OUTPUT:
                at(addresses[name], info).copy_(made[name])


def at(address: int, info: TensorInfo) -> Tensor:
    """The tensor at an address."""
    dtype: torch.dtype = getattr(torch, info.dtype)
    size = dtype.itemsize
    for side in info.shape:
        size *= side
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype).reshape(info.shape)


def with_engines(manifest: Manifest, folder: Path, *, scratch: Mapping[str, int] | None = None) -> Manifest:
    """Write engines of the stand-in for all graphs into a folder, and list them."""
    files = {}
    for i, (name, variant) in enumerate(manifest.variants.items()):
        ports = {
            "inputs": {port: info.model_dump(mode="json") for port, info in variant.inputs.items()},
            "outputs": {port: info.model_dump(mode="json") for port, info in variant.outputs.items()},
        }
        size = (scratch or {}).get(name, 1000 * (i + 1))
        (folder / f"{name}.engine").write_text(json.dumps({"name": name, "scratch": size, **ports}), encoding="utf-8")
        files[name] = file_info(folder, f"{name}.engine")
    builder = {"name": "tensorrt_rtx", "version": VERSION, "compute_capabilities": ["8.6", "8.9", "12.0"]}
    return manifest.model_copy(update={"engines": {"tensorrt-rtx": EngineInfo(files=files, builder=builder)}})


__all__ = ["FakeGpu", "FakeTensorRT", "at", "with_engines"]
