"""Turn the fused attentions of one device back into the operator that every target knows.

Before:  _scaled_dot_product_flash_attention_for_cpu(q, k, v, ..., attn_mask) -> getitem(0) -> permute
After:   scaled_dot_product_attention(q, k, v, attn_mask) -> permute
Numerics: bitwise equal where PyTorch chooses the same kernel again, as it does on the same device; close otherwise.

A graph that came through Dynamo holds the kernel that PyTorch chose for the device it was captured on.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from omnifx.errors import PassError
from omnifx.graph import Pass, argument_of

aten = torch.ops.aten

_FUSED = {
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}


@dataclass(frozen=True, kw_only=True)
class UseAttention(Pass):
    """Replace the first result of each fused attention."""

    def call(self, gm: fx.GraphModule) -> bool:
        found = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in _FUSED]
        for node in found:
            mask = argument_of(node, "attn_mask") or argument_of(node, "attn_bias")
            causal, scale = argument_of(node, "is_causal", False), argument_of(node, "scale")
            with gm.graph.inserting_before(node):
                whole = gm.graph.call_function(
                    aten.scaled_dot_product_attention.default,
                    (*node.args[:3], mask, 0.0, causal),
                    {"scale": scale} if scale is not None else {},
                )
            whole.meta = {**node.meta, "val": node.meta["val"][0]}
            for user in list(node.users):
                if user.target is operator.getitem and user.args[1] == 0:
                    user.replace_all_uses_with(whole)
                    gm.graph.erase_node(user)
                elif user.target is operator.getitem and not user.users:
                    gm.graph.erase_node(user)
            if not node.users:
                gm.graph.erase_node(node)
        return bool(found)

    def ensures(self, gm: fx.GraphModule) -> None:
        if left := [node.name for node in gm.graph.nodes if node.op == "call_function" and node.target in _FUSED]:
            raise PassError(f"{self.name}: more than the result of {left} is read, which only a training step does.")


__all__ = ["UseAttention"]
