"""What TensorRT says while it builds an engine, and what of it is known of the engine then.

Without a GPU an engine cannot be loaded, so nothing can be asked of it. But with detailed verbosity the builder lists
each layer with its kernel and the ONNX nodes that it came from, and each input and output: that is read here.
"""

from __future__ import annotations

import re
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from omnifx.bundle import DType, LayerSummary, TensorInfo

_LAYER = re.compile(r"^\s*Name: (?P<name>.+?), LayerType: (?P<kind>\w+)", re.MULTILINE)
_TACTIC = re.compile(r"TacticName: ([^,\n]*)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_PORT = re.compile(
    r"^\s*Name: (?P<name>.+?), IOMode: (?P<mode>Input|Output), DataType: (?P<type>\w+), "
    r"Dimensions: \[(?P<shape>[-\d,]*)\]",
    re.MULTILINE,
)
_SCRATCH = re.compile(r"Total Activation Memory: (\d+) bytes")
_WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")
_FUSED_ATTENTION = re.compile(r"mha|attention", re.IGNORECASE)

TYPES: dict[str, DType] = {
    "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Int64": "int64", "Int32": "int32", "Int8": "int8",
    "UInt8": "uint8", "Uint8": "uint8", "Bool": "bool",
}  # fmt: skip
"""TensorRT's names of types, as it prints them, and ours."""
MATRIX_PRODUCTS = frozenset({"MatMul", "Gemm", "Einsum"})
ATTENTIONS = frozenset({"Softmax", "Attention"})
"""ONNX operators that an attention has one of."""
MOST_KEPT = 40
"""Last messages that are kept, for an error's text."""


@dataclass(frozen=True)
class Layer:
    """One layer of an engine."""

    name: str
    kind: str
    """As the builder calls it: kgen (a generated kernel), gemm, runtime_fusion, ..."""
    tactic: str
    nodes: tuple[str, ...]
    """Names of the ONNX nodes that it computes, or parts of them."""


@dataclass
class BuildLog:
    """The messages of one build; may be told of them from several threads.

    Memory: the last messages, and the list of layers; not the rest, which is megabytes.
    """

    echo: Callable[[str], None] | None = None
    """Told of warnings."""
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    last: deque[str] = field(default_factory=lambda: deque(maxlen=MOST_KEPT))
    layers: tuple[Layer, ...] = ()
    inputs: dict[str, TensorInfo] | None = None
    """As the engine has them; None if the builder did not list them."""
    outputs: dict[str, TensorInfo] | None = None
    scratch_bytes: int = 0
    weights_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def hear(self, severity: str, text: str) -> None:
        """Take a message in; `severity` is the name that TensorRT gives it."""
        with self._lock:
            self.last.append(text[:2000])
            if severity in ("ERROR", "INTERNAL_ERROR"):
                self.errors.append(text)
            elif severity == "WARNING":
                self.warnings.append(text)
                if self.echo is not None:
                    self.echo(text)
            if "IOMode: " in text or ", LayerType: " in text:
                self._read_table(text)
            elif found := _SCRATCH.search(text):
                self.scratch_bytes = int(found[1])
            elif found := _WEIGHTS.search(text):
                self.weights_bytes = int(found[1])

    def _read_table(self, text: str) -> None:
        layers = []
        for line in text.splitlines():
            if (found := _LAYER.match(line)) is not None:
                tactic = _TACTIC.search(line)
                nodes = tuple(dict.fromkeys(_NODE.findall(line)))
                layers.append(Layer(found["name"], found["kind"], tactic[1].strip() if tactic else "", nodes))
        self.layers = (*self.layers, *layers)
        for found in _PORT.finditer(text):
            shape = tuple(int(size) for size in found["shape"].split(",") if size)
            dtype = TYPES.get(found["type"])
            if dtype is None:
                self.errors.append(f"{found['name']} has the type {found['type']}, which is not known here")
                continue
            self.inputs, self.outputs = self.inputs or {}, self.outputs or {}
            ports = self.inputs if found["mode"] == "Input" else self.outputs
            ports[found["name"]] = TensorInfo(shape=shape, dtype=dtype)

    @property
    def nodes(self) -> frozenset[str]:
        """Names of all ONNX nodes that something of is in the engine."""
        return frozenset(name for layer in self.layers for name in layer.nodes)

    def reason(self) -> str:
        """Why a build failed, on one line: the first error, without where in TensorRT's source it arose."""
        said = self.errors[0] if self.errors else (self.last[-1] if self.last else "no message")
        return " ".join(said.split())[:600]

    def summary(self, operators: Mapping[str, str]) -> LayerSummary | None:
        """What the engine consists of; None if the builder listed no layers.

        Args:
            operators: Types of the ONNX nodes, by name.
        """
        if not self.layers:
            return None
        types = Counter(operators.get(name, "") for name in self.nodes)
        return LayerSummary(
            layers=len(self.layers),
            kinds=dict(sorted(Counter(layer.kind for layer in self.layers).items())),
            matrix_products=sum(types[name] for name in MATRIX_PRODUCTS),
            attentions=sum(types[name] for name in ATTENTIONS),
            fused_attentions=sum(_is_fused_attention(layer) for layer in self.layers),
            scratch_bytes=self.scratch_bytes,
            weights_bytes=self.weights_bytes,
        )


def _is_fused_attention(layer: Layer) -> bool:
    """Whether a layer is one kernel for a whole attention; names that ONNX nodes gave it do not count."""
    name = layer.name
    for node in sorted(layer.nodes, key=len, reverse=True):
        name = name.replace(node, "")
    return _FUSED_ATTENTION.search(name) is not None or "mha" in layer.tactic


@dataclass
class Switchboard:
    """The one logger of a process: TensorRT keeps the first that it is given, whatever it is given later.

    Messages go to the log of the build, or the load, that is under way.
    """

    trt: Any
    current: BuildLog = field(default_factory=BuildLog)
    lock: threading.RLock = field(default_factory=threading.RLock)
    """Held while something is built or loaded."""
    stopped: BaseException | None = None
    """What was raised in a callback: an interrupt. It must not pass through TensorRT, and is raised behind it."""

    def __post_init__(self) -> None:
        board = self

        class Logger(self.trt.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                board.trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                try:
                    board.current.hear(severity.name, msg)
                except BaseException as error:  # noqa: BLE001
                    board.stopped = board.stopped or error

        self.logger = Logger()


_SWITCHBOARDS: dict[str, Switchboard] = {}


def switchboard(trt: Any) -> Switchboard:
    """The logger of a module of TensorRT."""
    return _SWITCHBOARDS.setdefault(trt.__name__, Switchboard(trt))


__all__ = ["BuildLog", "Layer", "Switchboard", "switchboard"]
