"""Build an engine from an ONNX graph, with TensorRT or TensorRT-RTX: one API, two modules.

The network is strongly typed: every value has the type that it has in the ONNX file, float32, float16 or bfloat16.
TensorRT-RTX needs no GPU to build, and its engines run on every compute capability that they were built for. TensorRT
builds for the GPU that it runs on. What was built is compared with the graph's own inputs and outputs.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnifx.backends.tensorrt_library import LIBRARIES, EngineTarget, Library, difference_of_ports, io_table
from omnifx.backends.tensorrt_log import BuildLog, Switchboard, switchboard
from omnifx.backends.tensorrt_progress import BuildProgress, monitor_for
from omnifx.bundle import LayerSummary, TensorInfo
from omnifx.errors import ConfigError, ExportError

MOST_TOP_K = 3840
"""Most values that a top-k of TensorRT chooses."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How engines are built."""

    target: EngineTarget
    compute_capabilities: tuple[str, ...] = ()
    """TensorRT-RTX: such as ("8.6", "8.9", "12.0"); empty: what its engines run on by default. TensorRT: empty."""
    workspace: int | None = None
    """Most bytes that one layer may use beside its values; None: all of the GPU's memory."""
    timing_cache: Path | None = None
    """TensorRT: times of kernels that it measured, read if the file is there, and written."""

    def __post_init__(self) -> None:
        if self.target not in LIBRARIES:
            raise ConfigError(f"build: target must be one of {sorted(LIBRARIES)}, got {self.target!r}.")
        if self.target == "tensorrt" and self.compute_capabilities:
            raise ConfigError(
                f"build: TensorRT builds for the GPU that it runs on, got compute capabilities "
                f"{list(self.compute_capabilities)}. Leave them out, and build on the target machine."
            )
        if self.target == "tensorrt-rtx" and self.timing_cache is not None:
            raise ConfigError(
                "build: TensorRT-RTX has no timing cache: it chooses kernels where the engine runs. Leave it out, or "
                "build with --target tensorrt."
            )
        if self.workspace is not None and self.workspace <= 0:
            raise ConfigError(f"build: workspace must be > 0 (bytes), got {self.workspace!r}.")

    @property
    def library(self) -> Library:
        """The module that builds."""
        return LIBRARIES[self.target]


def parse_capabilities(text: str) -> tuple[str, ...]:
    """Compute capabilities such as "8.6" from a list such as "86,89,120" or "8.6 8.9 12.0".

    Raises: ConfigError.
    """
    found = []
    for part in re.split(r"[\s,;]+", text.strip()):
        digits = part.lower().removeprefix("sm").lstrip("_").replace(".", "")
        if not re.fullmatch(r"\d{2,3}", digits):
            raise ConfigError(f"build: compute capabilities must be a list such as 86,89,120, got {text!r}.")
        found.append(f"{digits[:-1]}.{digits[-1]}")
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Built:
    """An engine, in a file."""

    summary: LayerSummary | None
    log: BuildLog
    seconds: float


@dataclass
class EngineBuilder:
    """Builds engines for one target.

    Args:
        options: How.
        progress: Told what is done.

    Raises: ExportError if the package, the GPU (for TensorRT) or a compute capability is missing.
    """

    options: BuildOptions
    progress: BuildProgress

    def __post_init__(self) -> None:
        self.trt = self.options.library.load("build")
        self.capabilities = self._capabilities()
        self.device = _gpu_name() if self.options.target == "tensorrt" else ""

    @property
    def description(self) -> dict[str, Any]:
        """What a manifest says of the builder, and what an engine depends on beside its graph."""
        found: dict[str, Any] = {
            "name": self.options.library.module,
            "version": str(self.trt.__version__),
            "compute_capabilities": list(self.capabilities),
            "flags": ["STRONGLY_TYPED"],
        }
        if self.options.workspace is not None:
            found["workspace_bytes"] = self.options.workspace
        if self.device:
            found["device"] = self.device
        return found

    def build(
        self,
        graph: Path,
        out: Path,
        *,
        inputs: Mapping[str, TensorInfo],
        outputs: Mapping[str, TensorInfo],
        operators: Mapping[str, str],
    ) -> Built:
        """Build one engine.

        Args:
            graph: The ONNX file; its weights lie beside it.
            out: Where the engine goes; what is there is replaced at once.
            inputs: What the engine must take.
            outputs: What it must give.
            operators: Types of the graph's nodes, by name.

        Raises: ExportError for an operator or a limit of TensorRT's, and for an engine that differs from the graph.
        Memory: on the host, up to twice the graph's weights.
        """
        log, board = BuildLog(), switchboard(self.trt)
        start = time.perf_counter()
        with board.lock:
            board.current, board.stopped = log, None
            try:
                self._build(graph, out, board, log, inputs, outputs)
            except ExportError:
                if board.stopped is not None:
                    raise board.stopped from None
                raise
            finally:
                board.current = BuildLog()
            if board.stopped is not None:
                raise board.stopped
        return Built(log.summary(operators), log, time.perf_counter() - start)

    def _build(
        self,
        graph: Path,
        out: Path,
        board: Switchboard,
        log: BuildLog,
        inputs: Mapping[str, TensorInfo],
        outputs: Mapping[str, TensorInfo],
    ) -> None:
        trt = self.trt
        builder = trt.Builder(board.logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, board.logger)
        if not parser.parse_from_file(str(graph)):
            raise self._refused(graph, parser, log)
        config = self._config(builder)
        cache = self._timing_cache(config)
        monitor = monitor_for(trt, self.progress, board)
        config.progress_monitor = monitor
        engine = builder.build_serialized_network(network, config)
        if board.stopped is not None:
            raise ExportError(f"build: {graph.name} was interrupted.")
        if engine is None:
            raise self._failed(graph, log)
        self._compare(graph, log, engine, board, inputs, outputs)
        partial = out.with_name(f".{out.name}.partial")
        with partial.open("wb") as file:
            file.write(memoryview(engine))
        os.replace(partial, out)
        if cache is not None and self.options.timing_cache is not None:
            _replace_bytes(self.options.timing_cache, memoryview(config.get_timing_cache().serialize()))

    def _config(self, builder: Any) -> Any:
        trt, options = self.trt, self.options
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if options.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
        if options.compute_capabilities:
            config.num_compute_capabilities = len(options.compute_capabilities)
            for i, capability in enumerate(options.compute_capabilities):
                if not config.set_compute_capability(_member(trt, capability), i):
                    raise ExportError(f"build: {options.library.title} does not take compute capability {capability}.")
        return config

    def _timing_cache(self, config: Any) -> Any | None:
        path = self.options.timing_cache
        if path is None:
            return None
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        if cache is None or not config.set_timing_cache(cache, False):
            raise ExportError(
                f"build: the timing cache {path} is of another GPU, driver or version. Give another file."
            )
        return cache

    def _capabilities(self) -> tuple[str, ...]:
        """Of the engines: as asked for and known to the library, or of this machine's GPU."""
        if self.options.target == "tensorrt":
            return (_gpu_capability(),)
        known = _known(self.trt)
        for capability in self.options.compute_capabilities:
            if capability in known:
                continue
            rest = (
                f"{self.options.library.title} {self.trt.__version__} builds for {', '.join(known)}. For this GPU "
                "build with --target tensorrt, on the machine that has it."
            )
            if capability.partition(".")[0] in ("9", "10"):
                generation = "Hopper" if capability.startswith("9") else "data-centre Blackwell"
                raise ExportError(f"build: {generation} ({capability}) is no target of TensorRT-RTX: {rest}")
            raise ExportError(f"build: compute capability {capability} is no target of TensorRT-RTX: {rest}")
        return self.options.compute_capabilities

    def _refused(self, graph: Path, parser: Any, log: BuildLog) -> ExportError:
        title = self.options.library.title
        for i in range(parser.num_errors):
            error = parser.get_error(i)
            if operator := error.node_operator():
                return ExportError(
                    f"build: {title} {self.trt.__version__} cannot build {graph.name}: the operator {operator} (node "
                    f"{error.node_name() or 'unnamed'}) is not supported as it stands: {error.desc()}. Export with "
                    "another opset, or write that part of the model otherwise; onnxruntime still runs the bundle."
                )
        return ExportError(f"build: {title} {self.trt.__version__} cannot read {graph.name}: {log.reason()}")

    def _failed(self, graph: Path, log: BuildLog) -> ExportError:
        said, title = log.reason(), f"{self.options.library.title} {self.trt.__version__}"
        if "K exceeds the maximum" in said:
            advice = f"It chooses at most {MOST_TOP_K} values at once: plan with fewer tokens."
        elif "within workspace limit" in said and self.options.workspace is not None:
            advice = f"The workspace of {self.options.workspace:,} bytes is too small for one of its layers: give more."
        elif "Attention operation was not supported" in said:
            advice = "Export with --opset 20, where attention is matrix products and a softmax, or in float16."
        else:
            advice = "Try another opset, or the other library; onnxruntime still runs the bundle."
        return ExportError(f"build: {title} failed at {graph.name}: {said}. {advice}")

    def _compare(
        self,
        graph: Path,
        log: BuildLog,
        engine: Any,
        board: Switchboard,
        inputs: Mapping[str, TensorInfo],
        outputs: Mapping[str, TensorInfo],
    ) -> None:
        """Raise ExportError unless the engine takes and gives what the graph does."""
        tables = (log.inputs, log.outputs) if log.inputs is not None and log.outputs is not None else None
        if tables is None:  # a builder that lists nothing is one with a GPU
            tables = io_table(self.trt, self.trt.Runtime(board.logger).deserialize_cuda_engine(engine))
        for word, wanted, found in (("takes", inputs, tables[0]), ("gives", outputs, tables[1])):
            if problem := difference_of_ports(wanted, found):
                raise ExportError(f"build: the engine of {graph.name} {word} other values than the graph: {problem}.")


def command_line(options: BuildOptions, graph: Path, engine: Path) -> str:
    """The line that builds the same engine with NVIDIA's own tool, from the bundle's folder."""
    parts = [options.library.command, f"--onnx={graph}", f"--saveEngine={engine}"]
    if options.target == "tensorrt":
        parts.append("--stronglyTyped")
    if options.compute_capabilities:
        parts.append(f"--computeCapabilities={','.join(c.replace('.', '') for c in options.compute_capabilities)}")
    if options.workspace is not None:
        parts.append(f"--memPoolSize=workspace:{max(1, options.workspace >> 20)}M")
    if options.timing_cache is not None:
        parts.append(f"--timingCacheFile={options.timing_cache}")
    parts += ["--profilingVerbosity=detailed", "--skipInference"]
    return " ".join(map(shlex.quote, parts))


@dataclass(frozen=True)
class Source:
    """What an engine is built from."""

    onnx_sha256: str
    weights_sha256: str
    operators: dict[str, str]
    """Types of the nodes, by name."""


def read_source(graph: Path, sha256: str) -> Source:
    """Look at an ONNX file, and hash the weights that it reads: those of other graphs may change.

    Raises: ExportError if the package onnx is missing.
    """
    try:
        import onnx
    except ImportError as error:
        raise ExportError("build: onnx is missing. pip install 'omnifx[onnx]'.") from error
    model = onnx.load(graph, load_external_data=False)
    digest = hashlib.sha256()
    for tensor in model.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            digest.update(f"{tensor.data_type} {list(tensor.dims)}\0".encode())
            _hash_part(digest, graph.parent / place["location"], int(place["offset"]), int(place["length"]))
    return Source(sha256, digest.hexdigest(), {node.name: node.op_type for node in model.graph.node})


def _hash_part(digest: Any, path: Path, offset: int, length: int) -> None:
    with path.open("rb") as file:
        file.seek(offset)
        while length > 0 and (part := file.read(min(length, 2**24))):
            digest.update(part)
            length -= len(part)


def _known(trt: Any) -> tuple[str, ...]:
    names = [name.removeprefix("SM") for name in trt.ComputeCapability.__members__ if re.fullmatch(r"SM\d+", name)]
    return tuple(f"{name[:-1]}.{name[-1]}" for name in names)


def _member(trt: Any, capability: str) -> Any:
    return trt.ComputeCapability.__members__[f"SM{capability.replace('.', '')}"]


def _gpu_capability() -> str:
    import torch

    if not torch.cuda.is_available():
        raise ExportError(
            "build: TensorRT builds for the GPU of the machine that it runs on, and here is none. Copy the bundle "
            "there and run `omnifx build BUNDLE --target tensorrt`, or build for RTX GPUs with --target tensorrt-rtx."
        )
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def _gpu_name() -> str:
    import torch

    return str(torch.cuda.get_device_name())


def _replace_bytes(path: Path, data: memoryview) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)


__all__ = [
    "MOST_TOP_K",
    "BuildOptions",
    "Built",
    "EngineBuilder",
    "Source",
    "command_line",
    "parse_capabilities",
    "read_source",
]
