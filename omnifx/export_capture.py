"""Capture for export: `torch.export` of a model on example inputs, as the passes want it, and proof that it is right.

The result is the form that `omnifx.capture` gives a compiled model: a functional ATen graph, parameters bound to their
names as the first inputs, a flat output. Attention stays one operator. Branches have the same names as in a compiled
model, so a plan that was made there fits.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree

from omnifx.errors import ExportError
from omnifx.export_dynamo import dynamo_graph
from omnifx.graph import PLAIN_NAME
from omnifx.passes.clean_capture import CleanCapture

aten = torch.ops.aten

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Difference from the eager model, relative to its output's norm, up to which a capture counts as right."""

_KEPT_WHOLE = (aten.scaled_dot_product_attention.default, aten.gelu.default, aten.silu.default)
"""Operators that targets know as one, and that decompositions would take apart."""


@dataclass(frozen=True)
class Leaf:
    """A tensor of a call, by its path among the arguments: ``added_cond_kwargs.resolution``."""

    name: str
    value: Tensor


@dataclass(frozen=True)
class Returned:
    """What a call returns: how many values, which of them the graph computes, and how they are named."""

    container: str
    """"tuple", "tensor", or the qualified name of a mapping's class."""
    fields: tuple[str, ...]
    """Names of a mapping's values, empty otherwise."""
    computed: tuple[int | None, ...]
    """For each value the position of the graph's output, None where the model returns None."""


@dataclass(frozen=True)
class Captured:
    """A captured model."""

    gm: fx.GraphModule
    """Inputs: parameters and buffers, then `leaves`, in order."""
    state: tuple[tuple[str, Tensor], ...]
    """Parameters, buffers and constants by name, in the order of the graph's first inputs."""
    leaves: tuple[Leaf, ...]
    constants: dict[str, Any]
    """Arguments that are no tensors, by path: the graph is right for these values."""
    parameters: tuple[str, ...]
    """Names of the arguments of the model's `forward`, in order."""
    returned: Returned

    @property
    def static(self) -> range:
        """Positions of the inputs that are parameters and buffers."""
        return range(len(self.state))

    def run(self, leaves: Mapping[str, Tensor]) -> Sequence[Any]:
        """The graph's outputs for these values of the leaves."""
        tensors = [tensor for _, tensor in self.state]
        found: Sequence[Any] = self.gm(*tensors, *(leaves[leaf.name] for leaf in self.leaves))
        return found


def capture_for_export(model: nn.Module, arguments: Mapping[str, Any], *, dynamo: bool = False) -> Captured:
    """Capture one call of a model.

    Args:
        model: In eval mode, on the device that its parameters are on.
        arguments: One call's arguments by the names of its `forward`; see `bind_arguments`.
        dynamo: Whether to go through Dynamo instead of `torch.export`.

    Raises: ExportError if torch cannot export it, or the model draws random numbers or writes to its buffers.
    Memory: what a call of the model takes; parameters are not copied.
    """
    if model.training:
        raise ExportError(f"export: {type(model).__name__} is in training mode. Call model.eval() first.")
    arguments = dict(arguments)
    accepted = tuple(inspect.signature(model.forward).parameters)
    if "return_dict" in accepted:
        arguments["return_dict"] = False
    how = "Dynamo" if dynamo else "torch.export"
    with torch.no_grad(), _quietly():
        try:
            captured = (_by_dynamo if dynamo else _by_export)(model, arguments, accepted)
        except ExportError:
            raise
        except Exception as error:
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ExportError(
                f"export: {how} cannot capture {type(model).__name__}: {first.strip()} Do these inputs fit it? "
                "OMNIFX_DEBUG=1 shows all."
            ) from error
    CleanCapture()(captured.gm)
    captured.gm.recompile()
    return captured


def _decompositions() -> dict[Any, Any]:
    table = dict(torch.export.default_decompositions())
    for target in _KEPT_WHOLE:
        table.pop(target, None)
    return table


def _by_dynamo(model: nn.Module, arguments: dict[str, Any], accepted: tuple[str, ...]) -> Captured:
    found = leaves_of_call(arguments)
    tensors = {path: value for path, value in found.items() if isinstance(value, Tensor)}
    constants = {path: value for path, value in found.items() if not isinstance(value, Tensor)}
    for path, value in constants.items():
        _require_plain(path, value)
    gm, state, eager = dynamo_graph(model, arguments, tensors, _decompositions())
    flat: list[Any] = pytree.tree_leaves(eager, is_leaf=lambda value: value is None)
    given = iter(range(len(flat)))
    computed = tuple(None if value is None else next(given) for value in flat)
    leaves = tuple(Leaf(path, value) for path, value in tensors.items())
    return Captured(gm, tuple(state), leaves, constants, accepted, _container(eager, computed))


def _by_export(model: nn.Module, arguments: dict[str, Any], accepted: tuple[str, ...]) -> Captured:
    program = torch.export.export(model, (), arguments, strict=False)
    program = program.run_decompositions(_decompositions())
    return _captured(model, program, arguments, accepted, model(**arguments))


def _captured(
    model: nn.Module, program: Any, arguments: dict[str, Any], accepted: tuple[str, ...], eager: Any
) -> Captured:
    gm: fx.GraphModule = program.graph_module
    signature = program.graph_signature
    if changed := [spec for spec in signature.output_specs if spec.kind is not OutputKind.USER_OUTPUT]:
        raise ExportError(
            f"export: {type(model).__name__} writes to {changed[0].target or 'its inputs'} when it is called; a static "
            "graph cannot. Make its forward free of side effects."
        )
    paths, values = _leaves_of(arguments)
    user = [spec for spec in signature.input_specs if spec.kind is InputKind.USER_INPUT]
    if len(user) != len(paths):
        raise ExportError(f"export: {len(user)} inputs were captured, but the call has {len(paths)}. This is a bug.")
    state, leaves, constants = [], [], {}
    given = iter(zip(paths, values, strict=True))
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for node, spec in zip(placeholders, signature.input_specs, strict=True):
        if spec.kind is not InputKind.USER_INPUT:
            tensors = program.state_dict if spec.target in program.state_dict else program.constants
            state.append((spec.target, tensors[spec.target].detach()))
            continue
        path, value = next(given)
        if isinstance(spec.arg, ConstantArgument) or not isinstance(value, Tensor):
            _require_plain(path, value if not node.users else node)
            constants[path] = value
            gm.graph.erase_node(node)
        else:
            leaves.append(Leaf(path, value))
            node.meta[PLAIN_NAME] = path
    returned = _returned(gm, eager)
    return Captured(gm, tuple(state), tuple(leaves), constants, accepted, returned)


def _require_plain(path: str, value: Any) -> None:
    if not isinstance(value, bool | int | float | str | None):
        raise ExportError(f"export: {path} is {value!r}, which a static graph cannot take. Pass a tensor.")


def _returned(gm: fx.GraphModule, eager: Any) -> Returned:
    """What the model returns; takes values that are None out of the graph's output."""
    end = gm.graph.output_node()
    flat: list[Any] = list(end.args[0])  # type: ignore[arg-type]
    kept = [i for i, value in enumerate(flat) if isinstance(value, fx.Node)]
    end.args = (tuple(flat[i] for i in kept),)
    computed = tuple(kept.index(i) if i in kept else None for i in range(len(flat)))
    return _container(eager, computed)


def _container(eager: Any, computed: tuple[int | None, ...]) -> Returned:
    if isinstance(eager, Tensor):
        return Returned("tensor", (), computed)
    if isinstance(eager, Mapping):
        return Returned(f"{type(eager).__module__}.{type(eager).__qualname__}", tuple(map(str, eager)), computed)
    if isinstance(eager, tuple | list) and len(eager) == len(computed):
        return Returned("tuple", (), computed)
    raise ExportError(
        f"export: the model returns {type(eager).__name__} that is neither a tensor, a flat tuple nor a mapping. Wrap "
        "it in a module that returns one."
    )


def bind_arguments(model: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """Example inputs, a mapping or a sequence of arguments, as arguments by name.

    Raises: ExportError if they do not fit the model's `forward`.
    """
    if isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    else:
        args, kwargs = tuple(example_inputs), {}
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise ExportError(f"export: the example inputs do not fit {type(model).__name__}: {error}.") from error
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = inspect.signature(model.forward).parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            found |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            raise ExportError(f"export: {type(model).__name__} takes any number of arguments (*{name}). Wrap it.")
        else:
            found[name] = value
    return found


def _leaves_of(arguments: Mapping[str, Any]) -> tuple[list[str], list[Any]]:
    """Paths and values of all leaves, in the order in which torch.export flattens them."""
    pairs, _ = pytree.tree_flatten_with_path(dict(arguments))
    return [path_name(path) for path, _ in pairs], [value for _, value in pairs]


def path_name(path: Sequence[Any]) -> str:
    """A path within the arguments of a call as text: ``added_cond_kwargs.resolution``."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def leaves_of_call(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All leaves of a call's arguments by path."""
    return dict(zip(*_leaves_of(arguments), strict=True))


def with_leaves(arguments: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with some leaves replaced."""
    pairs, spec = pytree.tree_flatten_with_path(dict(arguments))
    values = [leaves.get(path_name(path), value) for path, value in pairs]
    replaced: dict[str, Any] = pytree.tree_unflatten(values, spec)
    return replaced


def varied(leaf: Leaf, *, moves: bool, seed: int) -> Tensor:
    """Other values of the same kind: new noise of the same size where it moves, the rows in another order elsewhere."""
    value = leaf.value
    if not moves or not value.is_floating_point():
        return value.roll(1, 0) if value.dim() and value.shape[0] > 1 else value.clone()
    generator = torch.Generator().manual_seed(seed)
    fresh = torch.randn(value.shape, generator=generator).to(value.device, torch.float32)
    spread = value.float().std() if value.numel() > 1 else value.float().abs()
    return (fresh * spread + value.float().mean()).to(value.dtype)


def verify(captured: Captured, model: nn.Module, arguments: Mapping[str, Any], leaves: Mapping[str, Tensor]) -> float:
    """How far the capture is from the eager model on other inputs, relative to the output's norm.

    Raises: ExportError if it is further than `TOLERANCE` of its type.
    """
    changed = with_leaves(arguments, leaves)
    if "return_dict" in captured.parameters:
        changed["return_dict"] = False
    with torch.no_grad():
        true = [value for value in pytree.tree_leaves(model(**changed)) if isinstance(value, Tensor)]
        got = list(captured.run(leaves))
    worst = 0.0
    for number, (a, b) in enumerate(zip(true, got, strict=True)):
        error = difference(b, a)
        if not error <= TOLERANCE.get(a.dtype, 0.0):
            raise ExportError(
                f"export: what was captured of {type(model).__name__} differs from the model by {error:.1e} of "
                f"output {number}'s norm on a second set of inputs (allowed: {TOLERANCE.get(a.dtype, 0.0):g}). Nothing "
                "was written. Its forward may depend on values that the capture took as constants."
            )
        worst = max(worst, error)
    return worst


def difference(got: Tensor, true: Tensor) -> float:
    """The distance of two tensors over the norm of the second; infinite where shapes or types differ."""
    if got.shape != true.shape or got.dtype != true.dtype:
        return float("inf")
    a, b = got.detach().double().cpu(), true.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp_min(1e-30)) if a.numel() else 0.0


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


__all__ = [
    "TOLERANCE",
    "Captured",
    "Leaf",
    "Returned",
    "bind_arguments",
    "capture_for_export",
    "difference",
    "leaves_of_call",
    "varied",
    "verify",
    "with_leaves",
]
