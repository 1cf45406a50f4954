"""Hollow tensors: zeros on the CPU that take no memory until somebody writes to them.

A model on the meta device has shapes but no values, and some models ask for values between their graphs: a mixture of
experts counts the tokens of each expert. Hollow tensors have values, all of them zero, whatever the size of the model.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from omnifx.graph import SMALL


def hollow_like(tensor: Tensor) -> Tensor:
    """Zeros of the same shape, strides and type on the CPU. Memory: none until written; only addresses are taken."""
    if tensor.numel() == 0:
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    raw = np.zeros(length * tensor.element_size(), dtype=np.uint8)  # calloc: pages come when they are written
    return torch.from_numpy(raw).view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


def hollow_model(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device whose parameters and buffers are hollow."""
    made: nn.Module = copy.deepcopy(model)._apply(hollow_like)
    return made


def hollow_arguments(arguments: Any) -> Any:
    """The same arguments, with hollow tensors in place of those on the meta device."""
    return tree_map_only(Tensor, lambda tensor: hollow_like(tensor) if tensor.is_meta else tensor, arguments)


class Hollowing(TorchDispatchMode):
    """Runs a hollow model eagerly without its work: what is large and floating-point is not computed, but is zero.

    Small values, numbers and indices are computed, since they decide what comes next.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        aliases = any(value.alias_info is not None for value in func._schema.returns)
        if not any(map(_is_large, tree_leaves((args, kwargs)))) or (aliases and not func._schema.is_mutable):
            return func(*args, **kwargs)
        if func._schema.is_mutable:  # zeros stay zeros
            in_place = func.overloadpacket.__name__.endswith("_") and _is_large(args[0])
            return args[0] if in_place else func(*args, **kwargs)
        try:
            made = func(*tree_map_only(Tensor, _on_meta, args), **tree_map_only(Tensor, _on_meta, kwargs))
        except (NotImplementedError, RuntimeError):  # its shape depends on values
            return func(*args, **kwargs)
        if not all(isinstance(value, Tensor) and value.is_floating_point() for value in tree_leaves(made)):
            return func(*args, **kwargs)
        return tree_map_only(Tensor, hollow_like, made)


def _is_large(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > SMALL


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
