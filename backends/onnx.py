"""Write a graph as ONNX: static shapes, weights outside of the file, shared by all graphs of a bundle.

The graph's parameters become attributes of a module again, so that names survive; `torch.export` traces that module
anew, and torch's exporter converts it. Attention is taken apart into matrix products and a softmax up to opset 22, and
runtimes fuse it again; from 23 on it is one operator.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx

from omnifx.backends.as_module import as_module, example_inputs
from omnifx.backends.weights_file import WeightsFile
from omnifx.errors import ExportError
from omnifx.passes.use_linears import UseLinears

OPSETS = (18, 25)
"""The first and last opset that can be asked for."""
INLINE_BYTES = 1024
"""Tensors up to this size stay in the ONNX file: shapes and scalars, which converters must see."""


@dataclass(frozen=True)
class Written:
    """What was written of one graph."""

    operators: dict[str, int]
    """How many nodes of each type."""
    weights_bytes: int
    """Bytes of its weights in the shared file."""


def require_onnx() -> None:
    """Raise ExportError unless the packages that write ONNX are here."""
    try:
        import onnx  # noqa: F401
        import onnx_ir  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(f"export: ONNX needs {error.name}, which is missing. pip install 'omnifx[onnx]'.") from error


def write_onnx(
    gm: fx.GraphModule,
    state: Sequence[tuple[str, Tensor]],
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    path: Path,
    weights: WeightsFile,
    opset: int,
) -> Written:
    """Write one graph.

    Args:
        gm: Takes the parameters of `state`, then its inputs; it is not changed.
        state: Parameters by name.
        inputs: Names of the other inputs, in order.
        outputs: Names of the outputs, in order.
        path: The file; `weights` must lie in the same folder.
        weights: Receives the weights.
        opset: Of the standard operators.

    Raises: ExportError for an operator that has no ONNX form.
    Memory: weights are not copied, but for those that are folded.
    """
    import onnx_ir as ir

    module = as_module(gm, state)
    UseLinears()(module)
    with torch.no_grad(), _quietly():
        try:
            exported = torch.export.export(module, example_inputs(module), strict=False)
            program = torch.onnx.export(
                exported, (), dynamo=True, opset_version=opset, verbose=False, optimize=True, external_data=False
            )
        except Exception as error:
            raise ExportError(f"export: {path.stem} has no ONNX form: {_reason(error)}.") from error
    assert program is not None  # with dynamo=True it returns one
    model = program.model
    for value, name in zip(model.graph.inputs, inputs, strict=True):
        value.name = name
    _name_outputs(model, outputs)
    total = 0
    for value in model.graph.initializers.values():
        tensor: Any = value.const_value
        if tensor is None or tensor.nbytes <= INLINE_BYTES:
            continue
        offset = weights.add(_memory(tensor))
        total += tensor.nbytes
        value.const_value = ir.ExternalTensor(
            weights.path.name,
            offset,
            tensor.nbytes,
            tensor.dtype,
            shape=tensor.shape,
            name=value.name or "",
            base_dir=path.parent,
        )
    model.graph.name = path.stem
    model.producer_name = "omnifx"
    model.doc_string = None
    for node in model.graph:
        node.metadata_props.clear()  # stack traces of the exporting machine
    ir.save(model, path)
    operators: dict[str, int] = {}
    for node in model.graph:
        operators[node.op_type] = operators.get(node.op_type, 0) + 1
    return Written(operators, total)


def _name_outputs(model: Any, names: Sequence[str]) -> None:
    """Give the outputs their names; one that is also an input, or given twice, goes through an Identity."""
    import onnx_ir as ir

    taken = set(model.graph.inputs)
    for i, name in enumerate(names):
        value = model.graph.outputs[i]
        if value in taken or value.is_initializer():
            node = ir.node("Identity", [value])
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            model.graph.append(node)
            value = model.graph.outputs[i] = node.outputs[0]
        taken.add(value)
        value.name = name


def _memory(tensor: Any) -> memoryview:
    """The bytes of an ONNX tensor, as they lie in a file."""
    raw = getattr(tensor, "raw", None)
    if isinstance(raw, Tensor):
        from omnifx.backends.weights_file import bytes_of

        return bytes_of(raw)
    return memoryview(tensor.tobytes())


def _reason(error: BaseException) -> str:
    """The innermost message of an exporter's error, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:400]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what torch's exporter says of packages that are not there."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), _operators_read_once():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _operators_read_once() -> contextlib.AbstractContextManager[Any]:
    """torch's exporter reads the library of all operators anew for every graph, which takes longer than a small graph
    itself; inside, it is read once. Where the exporter looks otherwise, nothing is changed."""
    try:
        from torch.onnx._internal.exporter import _registration

        library = _registration.onnxscript_apis
        read = library.get_torchlib_ops
    except (ImportError, AttributeError):
        return contextlib.nullcontext()

    def once() -> Any:
        if not _LIBRARY:
            _LIBRARY.extend(read())
        return _LIBRARY

    return mock.patch.object(library, "get_torchlib_ops", once)


_LIBRARY: list[Any] = []

__all__ = ["OPSETS", "Written", "require_onnx", "write_onnx"]
