from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from omnifx.graph import graph_text
from omnifx.passes.clean_capture import CleanCapture


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def exported(function: Callable[..., Any], *args: Tensor) -> fx.GraphModule:
    program = torch.export.export(Function(function).eval(), args, strict=False).run_decompositions()
    gm: fx.GraphModule = program.graph_module
    return gm


def test_copies_that_copy_nothing_and_equal_nodes_go() -> None:
    def wasteful(x: Tensor) -> Tensor:
        once = nn.functional.dropout(x, 0.5, training=False).squeeze(1) * 1
        return once.view(2, 3).relu() + x.to(torch.float32).relu()

    gm = exported(wasteful, torch.randn(2, 3))

    assert CleanCapture()(gm)
    assert graph_text(gm) == "args_0 | relu = relu(args_0) | add = add(relu) | return(add)"


def test_the_values_stay_the_same_bits() -> None:
    def busy(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.transpose(0, 1).contiguous().view(-1)[0:6]
        return rows.sin() + rows.sin(), (y.squeeze(0) / 1.0).expand(2, 3).permute(0, 1) * 2

    x, y = torch.randn(2, 3), torch.randn(1, 2, 3)
    gm = exported(busy, x, y)
    before = gm(x, y)

    CleanCapture()(gm)

    assert all(map(torch.equal, gm(x, y), before))


def test_a_copy_that_changes_type_shape_or_layout_stays() -> None:
    def needed(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x.to(torch.float64), x.t().contiguous(), x[0:1]

    gm = exported(needed, torch.randn(2, 3))

    CleanCapture()(gm)

    clean = (
        "args_0 | _to_copy = _to_copy(args_0) | permute = permute(args_0) | clone = clone(permute) | "
        "slice_1 = slice(args_0) | return(_to_copy, clone, slice_1)"
    )
    assert graph_text(gm) == clean
    assert CleanCapture()(gm) is False
    assert graph_text(gm) == clean
