"""NarrowLinears: only those columns of a linear layer are computed that something uses."""

import pytest
import torch
from torch import Tensor, nn

from omnifx.graph import branches_of, clone, graph_text, total_flops
from omnifx.passes.eliminate import Eliminate
from omnifx.passes.narrow_linears import NarrowLinears
from omnifx.passes.read_cuts import ReadCuts
from tests.toys import TINY, trace


class Chunked(nn.Module):
    """A linear layer of which the parts at `used` are returned."""

    def __init__(self, used: tuple[int, ...], *, bias: bool = True, whole: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 24, bias=bias)
        self.used = used
        self.whole = whole

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.linear(x)
        parts = y.chunk(6, dim=1)
        return (*(parts[i] + 1.0 for i in self.used), *((y.sum(),) if self.whole else ()))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("used", [(2,), (2, 5), (0, 1, 4)])
def test_unused_columns_are_not_computed_and_the_rest_is_the_same(used: tuple[int, ...], bias: bool) -> None:
    traced = trace(Chunked(used, bias=bias), torch.randn(3, 8))
    narrow = clone(traced.gm)

    changed = NarrowLinears()(narrow)

    assert changed is True
    assert total_flops(narrow) == total_flops(traced.gm) * len(used) // 6
    for got, expected in zip(traced.run(narrow), traced.run(), strict=True):
        assert torch.allclose(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("model", [Chunked((0, 1, 2, 3, 4, 5)), Chunked((1,), whole=True)])
def test_a_product_that_is_used_whole_is_left_alone(model: Chunked) -> None:
    traced = trace(model, torch.randn(3, 8))
    before = graph_text(traced.gm)

    changed = NarrowLinears()(traced.gm)

    assert changed is False
    assert graph_text(traced.gm) == before


def test_a_reuse_step_computes_the_gates_alone() -> None:
    tiny = TINY["dit"]()
    traced = trace(tiny.model, **tiny.inputs)
    names = tuple(branches_of(traced.gm))
    ReadCuts(branches=names)(traced.gm)
    Eliminate(freed=names)(traced.gm)
    before = total_flops(traced.gm)

    assert NarrowLinears()(traced.gm) is True

    assert total_flops(traced.gm) < before
