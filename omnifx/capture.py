"""Capture: from Dynamo's graph to AOTAutograd's functional ATen graph, with parameters as inputs.

Dynamo's graph goes through `compile_fx` with an inner compiler of ours, so that decompositions, mutated inputs and
aliased outputs stay the business of those who do them for Inductor.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch.utils import _pytree as pytree

from omnifx.graph import ARGUMENT, PLAIN_NAME, SETTING
from omnifx.weights import plain


class InnerCompiler(Protocol):
    """Receives the ATen graph, fake inputs, the positions of parameters and buffers, and what `compile_fx` passes
    on."""

    def __call__(
        self, graph: fx.GraphModule, inputs: Sequence[Any], static: tuple[int, ...], arguments: dict[str, Any]
    ) -> Any:
        """Return a callable that takes one list of inputs."""


def capture(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    inner: InnerCompiler,
    *,
    patches: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Run `compile_fx` on a Dynamo graph with `inner` as its last stage; `patches` are options of Inductor."""
    state, names = state_inputs(gm)
    settings = setting_inputs(gm)
    order = call_order(example_inputs)
    origins = origins_of(example_inputs)

    def with_static(graph: fx.GraphModule, inputs: Sequence[Any], **arguments: Any) -> Any:
        static = set(arguments.get("static_input_idxs") or ())
        if len(inputs) == len(origins):  # AOTAutograd kept the inputs in their order, so Dynamo's word on them holds
            static |= {i for i, origin in enumerate(origins) if origin in state or origin in settings}
            placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
            for node, origin in zip(placeholders, origins, strict=True):
                node.meta[ARGUMENT] = order[origin]
                node.meta[PLAIN_NAME] = names[origin]
                node.meta[SETTING] = origin in settings
        return inner(graph, inputs, tuple(sorted(static)), arguments)

    with functorch_config.patch(enable_autograd_cache=False):  # a hit there would return plain Inductor code
        compiled: object = compile_fx(
            gm,
            list(example_inputs),
            inner_compile=cast("Any", with_static),
            config_patches=patches or None,
            decompositions=_decompositions(patches or {}),
        )
    return cast("Callable[..., Any]", compiled)


def _decompositions(patches: dict[str, Any]) -> dict[Any, Callable[..., Any]]:
    """Inductor's own, and those of fused operators that hold whole branches."""
    with inductor_config.patch(patches):
        return {**select_decomp_table(), torch.ops.aten._transformer_encoder_layer_fwd.default: encoder_layer}


def encoder_layer(
    x: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Any:
    """What ``aten._transformer_encoder_layer_fwd`` computes. nn.TransformerEncoderLayer is this one operator in eval
    mode, though it holds two residual branches. With a mask it stays whole: NotImplemented."""
    if mask is not None:
        return NotImplemented

    def attention(x: Tensor) -> Tensor:
        qkv = F.linear(x, qkv_weight, qkv_bias).unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2]).transpose(1, 2).flatten(2)
        return F.linear(out, proj_weight, proj_bias)

    def feed_forward(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    if norm_first:
        x = x + attention(norm(x, norm_weight_1, norm_bias_1))
        return x + feed_forward(norm(x, norm_weight_2, norm_bias_2))
    x = norm(x + attention(x), norm_weight_1, norm_bias_1)
    return norm(x + feed_forward(x), norm_weight_2, norm_bias_2)


def call_order(values: Sequence[Any]) -> list[int]:
    """For each of these values, its position (from 1) among the arguments that the model was called with, in the order
    of its signature; 0 for what is no argument. Dynamo orders a graph's inputs by their first use instead."""
    try:
        translator = InstructionTranslator.current_tx()
    except AttributeError:  # nothing was ever compiled in this thread
        translator = None
    if translator is None:
        return [0] * len(values)
    code = translator.f_code
    varying = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + varying]
    given = pytree.tree_leaves([translator.f_locals.get(name) for name in names])
    positions = {id(value): position for position, value in reversed(list(enumerate(given, 1)))}
    return [positions.get(id(value), 0) if isinstance(value, Tensor) else 0 for value in values]


def state_inputs(gm: fx.GraphModule) -> tuple[tuple[int, ...], list[str]]:
    """Positions of a Dynamo graph's inputs that are parameters or buffers, and plain names of all inputs."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    static = tuple(i for i, node in enumerate(placeholders) if _is_state(node))
    return static, [node.name.removeprefix("l_").strip("_").removeprefix("kwargs_") for node in placeholders]


def setting_inputs(gm: fx.GraphModule) -> frozenset[int]:
    """Positions of a Dynamo graph's inputs that are plain numbers of a module, such as a LoRA's scale: Dynamo makes
    them inputs when they changed once."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    return frozenset(
        i
        for i, node in enumerate(placeholders)
        if getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False)
        and "NNModuleSource(" in str(getattr(node, "_dynamo_source", None) or node.meta["grapharg"])
    )


def origins_of(values: Sequence[Any]) -> list[int]:
    """For each input of AOTAutograd's graph the position of the value it comes from: tensor subclasses are replaced by
    the plain tensors inside."""
    return [i for i, value in enumerate(values) for _ in plain([value])]


def _is_state(node: fx.Node) -> bool:
    """Whether a Dynamo placeholder is a parameter or buffer of a module, rather than an argument of the call."""
    source = str(getattr(node, "_dynamo_source", None) or node.meta.get("grapharg", ""))
    name = str(node.target)
    return any(mark in name or mark in source for mark in ("_parameters", "_buffers"))


def root_module() -> nn.Module | None:
    """The module whose `forward` Dynamo is compiling."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    translator = InstructionTranslator.current_tx()
    if translator is None or not translator.f_code.co_argcount:
        return None
    first = translator.f_locals.get(translator.f_code.co_varnames[0])  # mostly called self
    return first if isinstance(first, nn.Module) else None
