"""Capture for export through Dynamo, where `torch.export` fails or is wrong: as a compiled model is captured.

Dynamo lifts parameters to inputs under names of its own; they are told by identity, and get the model's names back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from torch.utils import _pytree as pytree

from omnifx.errors import ExportError
from omnifx.graph import PLAIN_NAME, output_of
from omnifx.passes.use_attention import UseAttention


def dynamo_graph(
    model: nn.Module, arguments: Mapping[str, Any], leaves: Mapping[str, Tensor], table: dict[Any, Any]
) -> tuple[fx.GraphModule, list[tuple[str, Tensor]], Any]:
    """One call of a model as a functional ATen graph.

    Args:
        model: The model, in eval mode.
        arguments: One call's arguments by name.
        leaves: The tensors among them, by path.
        table: Decompositions.

    Returns: The graph, whose inputs are parameters and buffers, then all `leaves` in order; these parameters by name;
        and what the model returned.
    Raises: ExportError if it is not one graph.
    """
    graphs: list[fx.GraphModule] = []
    given: list[Sequence[Any]] = []

    def keep(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        graphs.append(gm)
        return make_boxed_func(gm.forward)

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        run = aot_module_simplified(gm, example_inputs, fw_compiler=keep, inference_compiler=keep, decompositions=table)

        def called(*values: Any) -> Any:
            given.append(values)
            return run(*values)

        return called

    with torch.no_grad():
        output = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(**arguments)
    if len(graphs) != 1 or len(given) != 1:
        raise ExportError(f"export: Dynamo captured {type(model).__name__} as {len(graphs)} graphs, expected one.")
    flat = [value for value in pytree.tree_leaves(output) if value is not None]
    gm = graphs[0]
    if len(output_of(gm).args[0]) != len(flat):  # type: ignore[arg-type]
        raise ExportError(f"export: the graph of {type(model).__name__} also writes to its inputs or buffers.")
    state = _in_order(gm, given[0], model, leaves)
    UseAttention()(gm)
    gm.graph.lint()
    gm.recompile()
    return gm, state, output


def _in_order(
    gm: fx.GraphModule, values: Sequence[Any], model: nn.Module, leaves: Mapping[str, Tensor]
) -> list[tuple[str, Tensor]]:
    """Bring the inputs into their order, and tell which parameters they are."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    if len(placeholders) != len(values):
        raise ExportError(f"export: {len(placeholders)} inputs were captured, but {len(values)} were given.")
    known = {id(value): name for name, value in (*model.named_parameters(), *model.named_buffers())}
    paths = {id(value): path for path, value in leaves.items()}
    by_path: dict[str, fx.Node] = {}
    state: list[tuple[str, Tensor]] = []
    held: list[fx.Node] = []
    for number, (node, value) in enumerate(zip(placeholders, values, strict=True)):
        if id(value) in paths:
            by_path[paths[id(value)]] = node
        elif isinstance(value, Tensor):
            state.append((known.get(id(value), f"captured.{number}"), value.detach()))
            held.append(node)
        else:
            raise ExportError(f"export: the graph takes {value!r} as an input. Pass a tensor instead.")
    mode = placeholders[0].meta["val"].fake_mode
    for path, value in leaves.items():
        if path not in by_path:  # Dynamo leaves out what the model does not read
            with gm.graph.inserting_before(placeholders[0]):
                node = gm.graph.placeholder(f"unread_{len(by_path)}")
            node.meta["val"] = mode.from_tensor(value)
            by_path[path] = node
    body = next(node for node in gm.graph.nodes if node.op != "placeholder")
    for node in (*held, *(by_path[path] for path in leaves)):
        body.prepend(node)
    for path, node in by_path.items():
        node.meta[PLAIN_NAME] = path
    return state


__all__ = ["dynamo_graph"]
