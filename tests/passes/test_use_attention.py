from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from omnifx.errors import PassError
from omnifx.graph import graph_text
from omnifx.passes.use_attention import UseAttention
from tests.toys import noise

aten = torch.ops.aten


def traced(function: Any, *args: Tensor) -> fx.GraphModule:
    with torch.no_grad():
        return make_fx(function, tracing_mode="fake")(*args)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}])
def test_the_kernel_of_the_device_becomes_the_common_operator(options: dict[str, Any]) -> None:
    given = [noise(2, 3, 8, 4, seed=seed) for seed in range(3)]
    gm = traced(lambda q, k, v: (F.scaled_dot_product_attention(q, k, v, **options) * 2,), *given)
    before = gm(*given)
    assert "flash_attention" in graph_text(gm)

    assert UseAttention()(gm) is True

    assert [node.target for node in gm.graph.nodes if node.op == "call_function"] == [
        aten.scaled_dot_product_attention.default,
        aten.mul.Tensor,
    ]
    assert torch.equal(gm(*given)[0], before[0])


def test_a_mask_stays() -> None:
    given = [noise(2, 3, 8, 4, seed=seed) for seed in range(3)]
    mask = noise(2, 1, 8, 8, seed=9)
    gm = traced(lambda q, k, v, m: (F.scaled_dot_product_attention(q, k, v, attn_mask=m),), *given, mask)
    before = gm(*given, mask)

    UseAttention()(gm)

    assert torch.equal(gm(*given, mask)[0], before[0])


def test_what_a_training_step_keeps_is_refused() -> None:
    def both(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)

    gm = traced(both, *[noise(2, 3, 8, 4, seed=seed) for seed in range(3)])
    with pytest.raises(PassError, match="more than the result of"):
        UseAttention()(gm)


def test_without_attention_nothing_changes() -> None:
    gm = traced(lambda x: (x.relu(),), noise(2))

    assert UseAttention()(gm) is False
