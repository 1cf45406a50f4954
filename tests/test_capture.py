"""Capture: what it adds to `compile_fx`: the order of arguments, and fused operators taken apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from omnifx.capture import call_order, encoder_layer
from tests.toys import distance, noise


def layer_arguments(x: Tensor, *, gelu: bool, norm_first: bool) -> tuple[Any, ...]:
    """What nn.TransformerEncoderLayer hands to its fused operator."""
    shapes = [(96, 32), (96,), (32, 32), (32,)]
    attention = [noise(*shape, seed=i) / 6 for i, shape in enumerate(shapes)]
    norms = [1 + 0.1 * noise(32, seed=10 + i) for i in range(4)]
    shapes = [(64, 32), (64,), (32, 64), (32,)]
    feed_forward = [noise(*shape, seed=20 + i) / 6 for i, shape in enumerate(shapes)]
    return (x, 32, 2, *attention, gelu, norm_first, 1e-5, *norms, *feed_forward)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_layer_taken_apart_computes_what_the_fused_one_does(gelu: bool, norm_first: bool) -> None:
    arguments = layer_arguments(noise(2, 7, 32, seed=30), gelu=gelu, norm_first=norm_first)

    expected = torch._transformer_encoder_layer_fwd(*arguments)

    assert distance(encoder_layer(*arguments), expected) < 1e-6


def test_an_encoder_layer_with_a_mask_stays_whole() -> None:
    arguments = layer_arguments(noise(2, 7, 32), gelu=True, norm_first=True)

    assert encoder_layer(*arguments, torch.zeros(7, 7, dtype=torch.bool), 0) is NotImplemented


class Reversed(nn.Module):
    """Uses its arguments in another order than that of its signature."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, t: Tensor, *, text: Tensor, more: dict[str, Tensor], **rest: Tensor) -> Tensor:
        return rest["last"] + more["mask"] * text * self.weight + t + x


def test_inputs_are_ordered_as_in_the_signature_whatever_comes_first_in_the_graph() -> None:
    seen: dict[str, int] = {}

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
        seen.update(zip(names, call_order(example_inputs), strict=True))
        return gm.forward

    with torch.no_grad():
        torch.compile(Reversed(), backend=backend)(
            noise(4), last=noise(4, seed=1), more={"mask": noise(4, seed=2)}, text=noise(4, seed=3), t=noise(4, seed=4)
        )

    order = sorted((position, name) for name, position in seen.items() if position)
    assert [name.strip("_").split("_")[-1] for _, name in order] == ["x", "t", "text", "mask", "last"]
    assert [position for name, position in seen.items() if "weight" in name] == [0]


def test_outside_of_a_compilation_no_order_is_known() -> None:
    assert call_order([noise(4), 3]) == [0, 0]
