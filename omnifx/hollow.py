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
from torch.utils._pytree import tree_map_only


def hollow_like(tensor: Tensor) -> Tensor:
    """Zeros of the same shape and type, dense, on the CPU. Memory: none until written; only addresses are taken."""
    if tensor.numel() == 0:
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    raw = np.zeros(tensor.numel() * tensor.element_size(), dtype=np.uint8)  # calloc: pages come when they are written
    return torch.from_numpy(raw).view(tensor.dtype).view(tensor.shape)


def hollow_model(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device whose parameters and buffers are hollow."""
    made: nn.Module = copy.deepcopy(model)._apply(hollow_like)
    return made


def hollow_arguments(arguments: Any) -> Any:
    """The same arguments, with hollow tensors in place of those on the meta device."""
    return tree_map_only(Tensor, lambda tensor: hollow_like(tensor) if tensor.is_meta else tensor, arguments)
