"""A graph as a module that owns its parameters under their names, which is what torch's exporters take.

Graphs of the compiler take parameters as their first inputs. Written back as attributes, their names survive an export,
and those that nothing reads are gone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from omnifx.graph import clone


def as_module(gm: fx.GraphModule, state: Sequence[tuple[str, Tensor]]) -> fx.GraphModule:
    """The module.

    Args:
        gm: Takes the parameters of `state`, then its inputs; it is not changed.
        state: Parameters by name.

    Memory: none; parameters are not copied.
    """
    copy = clone(gm)
    root = nn.Module()
    placeholders = [node for node in copy.graph.nodes if node.op == "placeholder"]
    for node, (name, tensor) in zip(placeholders, state, strict=False):
        if node.users:
            _register(root, name, tensor)
            with copy.graph.inserting_before(node):
                constant = copy.graph.create_node("get_attr", name)
            constant.meta = dict(node.meta)
            node.replace_all_uses_with(constant)
        copy.graph.erase_node(node)
    module = fx.GraphModule(root, copy.graph)
    module.graph.lint()
    module.recompile()
    return module


def example_inputs(module: fx.GraphModule) -> tuple[Tensor, ...]:
    """Zeros for the inputs of a module."""
    values = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    return tuple(torch.zeros(value.shape, dtype=value.dtype, device=value.device) for value in values)


def _register(root: nn.Module, name: str, tensor: Tensor) -> None:
    *path, last = name.split(".")
    module = root
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]  # type: ignore[assignment]
    if last not in module._parameters:
        module.register_parameter(last, nn.Parameter(tensor, requires_grad=False))


__all__ = ["as_module", "example_inputs"]
