"""Run a bundle's engines in TensorRT or TensorRT-RTX: values are bound by address, and nothing is copied.

TensorRT's contexts hold no memory of their own here: all contexts of one CUDA stream share one scratch buffer, as large
as the largest engine wants it, since work on a stream is done in order. Another stream, a generation that runs at the
same time, gets contexts and a scratch buffer of its own. Written against a fake of the API: no engine was ever run.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from omnifx.backends.tensorrt_library import LIBRARIES, EngineTarget, difference_of_ports, io_table
from omnifx.backends.tensorrt_log import BuildLog, switchboard
from omnifx.bundle import EngineInfo, Manifest, TensorInfo
from omnifx.errors import BundleError, ConfigError, ExportError

MOST_LANES = 8
"""CUDA streams whose contexts are kept; of more, those longest unused are given up."""
MOST_GRAPHS = 256
"""CUDA graphs that are kept for one CUDA stream."""


class Gpu(Protocol):
    """What is asked of CUDA beside TensorRT: enough to stand in for it in tests."""

    device: torch.device
    alignment: int
    """Bytes that addresses of inputs and outputs must be multiples of."""
    capability: str

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """Makes the device the current one."""

    def stream(self) -> int:
        """Handle of the thread's current CUDA stream."""

    def enqueue(self, run: Callable[[int], None]) -> None:
        """Call `run` with the handle of a stream that it may enqueue work on, ordered as if on the current one."""

    def capture(self, run: Callable[[int], None]) -> Callable[[], None]:
        """A CUDA graph of what `run` enqueues; what is given launches it on the current stream."""

    def synchronize(self) -> None:
        """Wait for all work."""


class Cuda:
    """A CUDA device through PyTorch. Raises BundleError if it is not there."""

    alignment = 256

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise BundleError(f"load_bundle: engines run on a CUDA device, got {str(device)!r}. Say device='cuda'.")
        if not torch.cuda.is_available():
            raise BundleError(
                "load_bundle: engines run on an NVIDIA GPU, but torch finds none here. Run the bundle with "
                "runtime='onnxruntime', or install a CUDA build of torch where the GPU is."
            )
        self.device = torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())
        major, minor = torch.cuda.get_device_capability(self.device)
        self.capability = f"{major}.{minor}"
        self._side = torch.cuda.Stream(self.device)
        self._capturing = threading.Lock()

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """Makes the device the current one."""
        return torch.cuda.device(self.device)

    def stream(self) -> int:
        """Handle of the thread's current CUDA stream."""
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def enqueue(self, run: Callable[[int], None]) -> None:
        """On the current stream; around the default one, on which TensorRT would wait for the whole device."""
        current = torch.cuda.current_stream(self.device)
        if current.cuda_stream:
            run(int(current.cuda_stream))
            return
        self._side.wait_stream(current)
        run(int(self._side.cuda_stream))
        current.wait_stream(self._side)

    def capture(self, run: Callable[[int], None]) -> Callable[[], None]:
        """A CUDA graph of what `run` enqueues."""
        graph = torch.cuda.CUDAGraph()
        with self._capturing, torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run(self.stream())
        return graph.replay

    def synchronize(self) -> None:
        """Wait for all work."""
        torch.cuda.synchronize(self.device)


@dataclass
class TensorRTStats:
    """What a runtime holds, and what it did."""

    lanes: int = 0
    """CUDA streams that have contexts."""
    contexts: int = 0
    scratch_bytes: int = 0
    """Of all lanes."""
    graphs: int = 0
    """CUDA graphs that are held."""
    replays: int = 0
    """Runs that were launches of such a graph."""
    copies: int = 0
    """Inputs that had to be copied, because their addresses were not aligned."""


@dataclass
class _Lane:
    """What belongs to one CUDA stream."""

    scratch: Tensor
    contexts: dict[str, Any] = field(default_factory=dict)
    spare: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    """Room for outputs that nobody keeps."""
    warm: OrderedDict[tuple[Any, ...], None] = field(default_factory=OrderedDict)
    """What ran once, and may be captured."""
    graphs: OrderedDict[tuple[Any, ...], Callable[[], None]] = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0


class TensorRTRuntime:
    """Engines of one bundle. May be called from several threads, each with a CUDA stream of its own or not.

    Args:
        folder: The bundle.
        manifest: Its manifest; files were looked at.
        target: Which engines: "tensorrt" or "tensorrt-rtx".
        device: A CUDA device.
        cuda_graphs: Whether to capture a CUDA graph where a graph runs a second time on the same addresses.
        runtime_cache: TensorRT-RTX: a file for the kernels that it compiles on this machine, read and written.
        max_lanes: CUDA streams whose contexts are kept.
        gpu: Stands in for CUDA.
        trt: Stands in for the module.

    Raises: BundleError if there is no GPU, no engine for it, or another version of the library.
    Memory: on the device the weights of each engine, and for each CUDA stream the largest engine's scratch memory.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        target: EngineTarget,
        *,
        device: torch.device,
        cuda_graphs: bool = False,
        runtime_cache: str | Path | None = None,
        max_lanes: int = MOST_LANES,
        gpu: Gpu | None = None,
        trt: Any | None = None,
    ) -> None:
        self._name, self._title = f"load_bundle, runtime {target!r}", LIBRARIES[target].title
        if not isinstance(max_lanes, int) or max_lanes < 1:
            raise ConfigError(f"{self._name}: max_lanes must be a number >= 1, got {max_lanes!r}.")
        if runtime_cache is not None and target != "tensorrt-rtx":
            raise ConfigError(f"{self._name}: runtime_cache is for TensorRT-RTX: TensorRT compiles nothing here.")
        info = _engines_of(folder, manifest, target, self._name)
        self._gpu = gpu if gpu is not None else Cuda(device)
        self.device = self._gpu.device
        self._check_capability(info)
        try:
            self._trt = trt if trt is not None else LIBRARIES[target].load(self._name)
        except ExportError as error:
            raise BundleError(str(error)) from error
        self._check_version(info)
        self._cuda_graphs, self._max_lanes = cuda_graphs, max_lanes
        self._cache_file = Path(runtime_cache) if runtime_cache is not None else None
        self._lanes: OrderedDict[int, _Lane] = OrderedDict()
        self._lock = threading.RLock()
        self._replays = self._copies = 0
        self._outputs = {name: variant.outputs for name, variant in manifest.variants.items()}
        with self._gpu.active():
            self._engines = self._load(folder, manifest, info)
            self._runtime_cache = self._make_runtime_cache()
        self._scratch_bytes = max((_scratch_of(engine) for engine in self._engines.values()), default=0)

    # -- loading -------------------------------------------------------------------------------------------------------

    def _check_capability(self, info: EngineInfo) -> None:
        built, here = list(info.builder.get("compute_capabilities", ())), self._gpu.capability
        if (built and here not in built) or (not built and here.partition(".")[0] in ("9", "10")):
            raise BundleError(
                f"{self._name}: the GPU has compute capability {here}, but the engines were built for "
                f"{', '.join(built) or 'GeForce and RTX GPUs'}. Build for it: omnifx build BUNDLE; Hopper and "
                "data-centre GPUs take --target tensorrt."
            )

    def _check_version(self, info: EngineInfo) -> None:
        built, here = str(info.builder.get("version", "")), str(self._trt.__version__)
        if built != here:
            raise BundleError(
                f"{self._name}: the engines were built by version {built or 'unknown'}, but {self._title} {here} is "
                "here. Install that version, or build them anew: omnifx build BUNDLE."
            )

    def _load(self, folder: Path, manifest: Manifest, info: EngineInfo) -> dict[str, Any]:
        board, engines = switchboard(self._trt), {}
        with board.lock:
            board.current = log = BuildLog()
            self._runtime = self._trt.Runtime(board.logger)
            for name, file in info.files.items():
                engine = self._runtime.deserialize_cuda_engine((folder / file.path).read_bytes())
                if engine is None:
                    raise BundleError(f"{self._name}: {file.path} cannot be loaded: {log.reason()}")
                variant = manifest.variants[name]
                for wanted, found in zip((variant.inputs, variant.outputs), io_table(self._trt, engine), strict=True):
                    if problem := difference_of_ports(wanted, found):
                        raise BundleError(f"{self._name}: {file.path} is not the engine of {name}: {problem}.")
                engines[name] = engine
        return engines

    def _make_runtime_cache(self) -> Any | None:
        """TensorRT-RTX compiles kernels when a context is made; the next context takes them from here."""
        engine = next(iter(self._engines.values()), None)
        if engine is None or not hasattr(engine, "create_runtime_config"):
            return None
        config = engine.create_runtime_config()
        if not hasattr(config, "create_runtime_cache"):
            return None
        cache = config.create_runtime_cache()
        if self._cache_file is not None and self._cache_file.is_file():
            cache.deserialize(self._cache_file.read_bytes())  # refuses what is of another GPU or version
        return cache

    # -- running -------------------------------------------------------------------------------------------------------

    def run(self, name: str, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor | None]) -> None:
        """Enqueue one graph on the current CUDA stream. Inputs are contiguous; None outputs are not kept."""
        with self._gpu.active(), self._lane() as lane, lane.lock:
            values = {key: self._aligned(value) for key, value in inputs.items()}
            for key, given in outputs.items():
                values[key] = given if given is not None else self._spare(lane, name, key)
            addresses = {key: value.data_ptr() for key, value in values.items()}
            call = (name, *addresses.values())
            if (replay := lane.graphs.get(call)) is not None:
                lane.graphs.move_to_end(call)
                self._count(replays=1)
                replay()
                return
            context = self._context(lane, name)
            for key, address in addresses.items():
                if not context.set_tensor_address(key, address):
                    raise BundleError(f"{self._name}: {name} does not take {key}.")
            if self._cuda_graphs and call in lane.warm and _capturable(context, self._gpu.stream()):
                self._capture(lane, call, lambda stream: self._execute(name, context, stream))
            else:
                self._gpu.enqueue(lambda stream: self._execute(name, context, stream))
                if self._cuda_graphs:
                    lane.warm[call] = None
                    while len(lane.warm) > MOST_GRAPHS:
                        lane.warm.popitem(last=False)

    def _capture(self, lane: _Lane, call: tuple[Any, ...], run: Callable[[int], None]) -> None:
        """Capture a graph, keep it, and launch it: capturing runs nothing."""
        if len(lane.graphs) >= MOST_GRAPHS:
            self._gpu.synchronize()  # the one that goes may be under way
            lane.graphs.popitem(last=False)
        lane.graphs[call] = replay = self._gpu.capture(run)
        replay()

    def _execute(self, name: str, context: Any, stream: int) -> None:
        if not context.execute_async_v3(stream):
            raise BundleError(f"{self._name}: {name} could not be run: {switchboard(self._trt).current.reason()}")

    @contextlib.contextmanager
    def _lane(self) -> Iterator[_Lane]:
        """What belongs to the current CUDA stream."""
        handle = self._gpu.stream()
        with self._lock:
            lane = self._lanes.get(handle)
            if lane is None:
                self._make_room()
                scratch = torch.empty(max(1, self._scratch_bytes), dtype=torch.uint8, device=self.device)
                lane = self._lanes[handle] = _Lane(scratch)
            self._lanes.move_to_end(handle)
            lane.users += 1
        try:
            yield lane
        finally:
            with self._lock:
                lane.users -= 1

    def _make_room(self) -> None:
        """Give up lanes that were not used for longest, when nothing of theirs is under way."""
        idle = [handle for handle, lane in self._lanes.items() if not lane.users]
        if idle and len(self._lanes) >= self._max_lanes:
            self._gpu.synchronize()
            del self._lanes[idle[0]]

    def _context(self, lane: _Lane, name: str) -> Any:
        if name in lane.contexts:
            return lane.contexts[name]
        engine, user_managed = self._engines[name], self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        with self._lock:
            if self._runtime_cache is not None:
                config = engine.create_runtime_config()
                config.set_execution_context_allocation_strategy(user_managed)
                config.set_runtime_cache(self._runtime_cache)
                context = engine.create_execution_context(config)
            else:
                context = engine.create_execution_context(user_managed)
            if context is None:
                raise BundleError(f"{self._name}: no context for {name}: {switchboard(self._trt).current.reason()}")
            self._save_runtime_cache()
        context.set_device_memory(lane.scratch.data_ptr(), lane.scratch.numel())
        lane.contexts[name] = context
        return context

    def _save_runtime_cache(self) -> None:
        if self._cache_file is not None and self._runtime_cache is not None:
            partial = self._cache_file.with_name(f".{self._cache_file.name}.partial")
            partial.write_bytes(memoryview(self._runtime_cache.serialize()))
            os.replace(partial, self._cache_file)

    def _aligned(self, value: Tensor) -> Tensor:
        """The value, at an address that TensorRT takes."""
        if value.data_ptr() % self._gpu.alignment == 0:
            return value
        self._count(copies=1)
        return value.clone()

    def _spare(self, lane: _Lane, name: str, output: str) -> Tensor:
        if (name, output) not in lane.spare:
            info: TensorInfo = self._outputs[name][output]
            dtype: torch.dtype = getattr(torch, info.dtype)
            lane.spare[name, output] = torch.empty(info.shape, dtype=dtype, device=self.device)
        return lane.spare[name, output]

    def _count(self, *, replays: int = 0, copies: int = 0) -> None:
        with self._lock:
            self._replays += replays
            self._copies += copies

    @property
    def stats(self) -> TensorRTStats:
        """What is held, and what was done so far."""
        with self._lock:
            lanes = list(self._lanes.values())
            return TensorRTStats(
                lanes=len(lanes),
                contexts=sum(len(lane.contexts) for lane in lanes),
                scratch_bytes=sum(lane.scratch.numel() for lane in lanes),
                graphs=sum(len(lane.graphs) for lane in lanes),
                replays=self._replays,
                copies=self._copies,
            )


def _engines_of(folder: Path, manifest: Manifest, target: EngineTarget, name: str) -> EngineInfo:
    info = manifest.engines.get(target)
    if info is None:
        raise BundleError(
            f"{name}: {folder} has no engines for it, only for {sorted(manifest.engines) or 'nothing'}. Build them: "
            f"omnifx build {folder} --target {target}"
        )
    if missing := sorted(manifest.variants.keys() - info.files.keys()):
        raise BundleError(f"{name}: the engine of {missing[0]} is missing. omnifx build {folder} --target {target}")
    return info


def _scratch_of(engine: Any) -> int:
    size = getattr(engine, "device_memory_size_v2", None)
    return int(size if size is not None else engine.device_memory_size)


def _capturable(context: Any, stream: int) -> bool:
    """TensorRT-RTX tells whether a context's work can be captured; TensorRT's can, where shapes are static."""
    return not hasattr(context, "is_stream_capturable") or bool(context.is_stream_capturable(stream))


__all__ = ["Cuda", "Gpu", "TensorRTRuntime", "TensorRTStats"]
