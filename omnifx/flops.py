"""FLOPs of one node of a captured graph, from shapes alone.

A node that costs FLOPs is *heavy*; everything else moves or combines values and is *light*. The formulas are those of
`torch.utils.flop_counter` (a multiply-add counts as 2), with the attention operators it does not know. An operator from
outside torch is opaque: it counts as heavy, so that no analysis ever looks through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, flop_registry

LIGHT_NAMESPACES = frozenset({"aten", "prims", "prim", "inductor", "_operator", "math", "profiler", "torchvision"})


OPAQUE_FLOPS: dict[object, Callable[[fx.Node], int]] = {}
"""Opaque operators of which somebody knows the cost."""

UNBACKED = 64
"""What an unbacked size (how many tokens a mask keeps, say) counts as: only running the graph would tell."""


def hint(size: Any) -> int:
    """A plain number for a size that may be symbolic; never adds a guard."""
    if isinstance(size, int):
        return size
    if isinstance(size, torch.SymInt):
        node = size.node
        if (known := getattr(node, "_hint", None)) is not None and not callable(known):
            return int(known)
        expression, env = node.expr, node.shape_env
        values = {symbol: _value_of(symbol, env) for symbol in expression.free_symbols}
        return max(0, int(expression.xreplace(values)))
    return int(size)


def _value_of(symbol: Any, env: Any) -> Any:
    values = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val  # torch 2.13; before
    return values.get(symbol, sympy.Integer(UNBACKED))


def numel(value: Any) -> int:
    """Elements of a tensor, or of all tensors in a tuple."""
    return sum(math.prod(hint(s) for s in leaf.shape) for leaf in tensors_in(value))


def num_bytes(value: Any) -> int:
    """Bytes of a tensor, or of all tensors in a tuple."""
    return sum(math.prod(hint(s) for s in leaf.shape) * leaf.element_size() for leaf in tensors_in(value))


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors in a value of `node.meta["val"]`."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def node_flops(node: fx.Node) -> int:
    """FLOPs of one node; 0 for light ones. Shapes come from `node.meta["val"]`; symbolic sizes count with their
    hints."""
    if node.op != "call_function" or not tensors_in(node.meta.get("val")):
        return 0
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return _attention(node) if "attention" in target.name() else _opaque(node)
    if not isinstance(target, torch._ops.OpOverload):
        return 0
    name = target.overloadpacket.__name__
    if "scaled_dot_product" in name or name in ("_flash_attention_forward", "_efficient_attention_forward"):
        return _attention(node)
    if target.overloadpacket in flop_registry:
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), _shape_stub)
        return int(flop_registry[target.overloadpacket](*args, **kwargs, out_val=_shape_stub_value(node.meta["val"])))
    if name.startswith("_weight_int") or name in ("_int_mm", "mv", "_grouped_mm", "_scaled_grouped_mm"):
        return _matrix_product(node)
    if name in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention", "_triton_multi_head_attention"):
        return _layer(node)
    if target.namespace not in LIGHT_NAMESPACES:
        return OPAQUE_FLOPS.get(target, _opaque)(node)
    if target._can_decompose() and target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
        return _by_decomposition(node)
    return 0


def is_attention(node: fx.Node) -> bool:
    """Whether the node is a fused attention operator by its name, or by that of the operator it wraps."""
    if node.op != "call_function":
        return False
    wrapped = node.args[0] if node.args and isinstance(node.args[0], torch._ops.OpOverload) else ""
    return any(word in f"{node.target} {wrapped}" for word in ("attention", "attn"))


def is_opaque(node: fx.Node) -> bool:
    """Whether nothing is known of what the node computes, but perhaps its name: an operator from outside torch, or one
    of higher order (which may wrap such an operator) other than flex_attention."""
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return "attention" not in node.target.name()
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in LIGHT_NAMESPACES


def _values(node: fx.Node) -> list[torch.Tensor]:
    return [leaf for arg in node.all_input_nodes for leaf in tensors_in(arg.meta.get("val"))]


def _attention(node: fx.Node) -> int:
    """2 products of [.., Nq, D] x [.., D, Nk]; the layout is [batch, heads, tokens, width] or [batch, tokens, heads,
    width]."""
    query, key, value = (arg.meta["val"] for arg in node.args[:3])  # type: ignore[union-attr]
    shape_q, shape_k, shape_v = ([hint(s) for s in t.shape] for t in (query, key, value))
    tokens = -3 if "_flash_attention_forward" in str(node.target) or "_efficient" in str(node.target) else -2
    if "scaled_dot_product" in str(node.target) or "flex" in str(node.target):
        tokens = -2
    num_keys = shape_k[tokens]
    return 2 * math.prod(shape_q) * num_keys + 2 * math.prod(shape_q[:-1]) * num_keys * shape_v[-1]


def _matrix_product(node: fx.Node) -> int:
    first = _values(node)[0]
    return 2 * numel(node.meta["val"]) * hint(first.shape[-1])


def _layer(node: fx.Node) -> int:
    """Every token by every weight, and self-attention."""
    first = _values(node)[0]
    width = hint(first.shape[-1])
    weights = sum(numel(value) for value in _values(node) if value.dim() == 2 and hint(value.shape[-1]) >= width)
    return 2 * numel(first) // width * weights + 4 * numel(first) * hint(first.shape[1])


def _opaque(node: fx.Node) -> int:
    """An operator nobody can look into: at least as many FLOPs as values it touches."""
    return sum(map(numel, _values(node))) + numel(node.meta["val"])


def _by_decomposition(node: fx.Node) -> int:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: arg.meta["val"])
    mode = next((t.fake_mode for t in _values(node) if hasattr(t, "fake_mode")), None)
    if mode is None:
        return 0
    with mode, FlopCounterMode(display=False) as counter:
        node.target(*args, **kwargs)  # type: ignore[operator]
    return int(counter.get_total_flops())


def _shape_stub_value(value: Any) -> Any:
    """What the formulas of `torch.utils.flop_counter` read of a value: the shapes of its tensors."""
    return pytree.tree_map(lambda v: torch.Size(map(hint, v.shape)) if isinstance(v, torch.Tensor) else v, value)


def _shape_stub(arg: Any) -> Any:
    return _shape_stub_value(arg.meta.get("val")) if isinstance(arg, fx.Node) else arg
