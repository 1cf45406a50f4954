"""FLOPs of nodes from shapes alone: the numbers of torch's own counter, and no operator that is overlooked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from omnifx.flops import is_attention, node_flops, num_bytes, numel
from omnifx.graph import total_flops
from tests.toys import TINY, noise, toy, toy_inputs, trace


def traced_flops(function: Callable[..., Any], *args: torch.Tensor) -> int:
    class Model(nn.Module):
        def forward(self, *values: torch.Tensor) -> Any:
            return function(*values)

    return total_flops(trace(Model(), *args).gm)


@pytest.mark.parametrize(
    ("function", "shapes", "flops"),
    [
        (torch.matmul, [(4, 8), (8, 16)], 2 * 4 * 8 * 16),
        (torch.matmul, [(3, 4, 8), (3, 8, 16)], 2 * 3 * 4 * 8 * 16),
        (F.linear, [(4, 8), (16, 8), (16,)], 2 * 4 * 8 * 16),
        (lambda x, w: F.conv2d(x, w, padding=1), [(2, 3, 8, 8), (5, 3, 3, 3)], 2 * 2 * 5 * 64 * 27),
        (F.scaled_dot_product_attention, [(1, 2, 6, 4), (1, 2, 9, 4), (1, 2, 9, 4)], 2 * 2 * (2 * 6 * 9 * 4)),
        (lambda x, y: F.gelu(x + y) * x.softmax(-1), [(4, 8), (4, 8)], 0),
        (lambda x, y: torch.cat([x, y]).reshape(8, 8).t(), [(4, 8), (4, 8)], 0),
    ],
    ids=["mm", "bmm", "linear", "conv", "attention", "pointwise", "views"],
)
def test_operators_cost_what_the_formulas_say(
    function: Callable[..., Any], shapes: list[tuple[int, ...]], flops: int
) -> None:
    assert traced_flops(function, *(noise(*shape, seed=i) for i, shape in enumerate(shapes))) == flops


@pytest.mark.parametrize("name", ["toy", "dit", "flux"])
def test_whole_models_cost_what_torchs_counter_says(name: str) -> None:
    if name == "toy":
        model, args, kwargs = toy(2), toy_inputs(), {}
    else:
        tiny = TINY[name]()
        model, args, kwargs = tiny.model, (), tiny.inputs
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)

    counted = total_flops(trace(model, *args, **kwargs).gm)

    assert counted == counter.get_total_flops() > 0


def test_an_operator_from_outside_torch_is_heavy() -> None:
    @torch.library.custom_op("omnifx_tests::opaque", mutates_args=())
    def opaque(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @opaque.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    assert traced_flops(lambda x: opaque(x) + x, noise(4, 8)) >= 2 * 32


def test_a_fused_encoder_layer_costs_its_products() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 32, batch_first=True).eval()
    width, tokens, hidden = 8, 6, 32
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x, src_mask=mask)

    counted = total_flops(trace(Masked(), noise(1, tokens, width)).gm)

    assert counted == 2 * tokens * (4 * width * width + 2 * width * hidden) + 4 * tokens * tokens * width


def test_attention_is_told_from_other_products() -> None:
    nodes = [node for node in trace(toy(1), *toy_inputs()).gm.graph.nodes if node_flops(node)]

    assert sum(map(is_attention, nodes)) == 1


def test_sizes_of_tuples_add_up() -> None:
    value = (torch.zeros(2, 3), [torch.zeros(4, dtype=torch.float16)], None, 7)

    assert (numel(value), num_bytes(value)) == (10, 4 * 6 + 2 * 4)
