from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import make_boxed_func

from omnifx.capture import capture
from omnifx.errors import PassError
from omnifx.graph import analysis_of, clone, graph_text
from omnifx.passes.bind_sizes import BindSizes
from omnifx.passes.find_branches import FindBranches
from omnifx.sizes import SizeInputs, late_guards, shapes_of
from tests.toys import FreeDiT, free_toy, lively, noise


class Asks(nn.Module):
    """A branch whose own value is asked for the size of what comes after it."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16, bias=False)
        self.down = nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, ::2]  # half as many tokens: a size that is no input
        hidden = torch.relu(self.up(x))
        x = x + self.down(hidden)
        return x.reshape(-1, 8)[: hidden.shape[0] * hidden.shape[1] - 1]


def captured(
    model: nn.Module, *args: Tensor, dynamic: bool = True
) -> tuple[fx.GraphModule, list[Any], tuple[int, ...], list[Any]]:
    """The ATen graph of one call, its fake inputs, which of them are parameters, and what it was called with."""
    found: list[Any] = []
    real: list[Any] = []

    def inner(
        graph: fx.GraphModule, inputs: Sequence[Any], static: tuple[int, ...], arguments: dict[str, Any]
    ) -> Callable[..., Any]:
        found.append((graph, list(inputs), static))

        def run(*values: Any) -> Any:
            real[:] = values
            return graph.forward(*values)

        return make_boxed_func(run)

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=lambda gm, inputs: capture(gm, inputs, inner), dynamic=dynamic)(*args)
    ((gm, inputs, static),) = found
    return gm, inputs, static, real


def toy_call(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return noise(batch, 4, 8, 12), torch.full((batch,), 500.0), torch.arange(batch)


def test_every_size_is_made_of_the_sizes_that_are_inputs() -> None:
    gm, *_ = captured(lively(Asks()), noise(3, 5, 8))
    assert "sym_size" in graph_text(gm)

    assert BindSizes()(gm)

    assert "sym_size" not in graph_text(gm)
    sizes = [n for n in gm.graph.nodes if n.op == "call_function" and isinstance(n.meta["val"], torch.SymInt)]
    assert sizes
    assert all(isinstance(parent.meta["val"], torch.SymInt) for node in sizes for parent in node.all_input_nodes)


def test_the_graph_computes_the_same_bits() -> None:
    gm, _, _, real = captured(free_toy(), *toy_call())
    bound = clone(gm)

    BindSizes()(bound)

    with torch.no_grad():
        assert all(map(torch.equal, gm.forward(*real), bound.forward(*real)))


def test_a_graph_with_static_sizes_stays_as_it_is() -> None:
    gm, *_ = captured(free_toy(), *toy_call(), dynamic=False)
    before = graph_text(gm)

    assert not BindSizes()(gm)

    assert graph_text(gm) == before


def test_sizes_that_tensors_are_still_asked_for_are_refused() -> None:
    gm, *_ = captured(lively(Asks()), noise(3, 5, 8))

    with pytest.raises(PassError, match="still ask tensors for their sizes"):
        BindSizes().ensures(gm)


def test_branches_are_those_of_the_static_graph() -> None:
    found = []
    for dynamic in (False, True):
        gm, _, static, _ = captured(free_toy(2), *toy_call(), dynamic=dynamic)
        BindSizes()(gm)
        FindBranches(static=frozenset(static))(gm)
        found.append(analysis_of(gm))

    one, other = ([(b.name, b.kind, b.flops, b.cache_bytes, b.dependence) for b in a.branches] for a in found)
    assert one == other
    assert len(one) == 4
    assert found[0].inputs.sizes == ()
    assert len(found[1].inputs.sizes) == 3
    assert [found[1].inputs.plain_name(i) for i in found[1].inputs.small] == ["t", "y"]


def test_a_whole_number_that_is_no_size_may_be_a_timestep() -> None:
    class Stepped(FreeDiT):
        def forward(self, x: Tensor, t: Any, y: Tensor, text: Tensor | None = None) -> Tensor:
            return super().forward(x, torch.full((x.shape[0],), 1.0) * t, y)

    x, _, y = toy_call()
    gm, _, static, _ = captured(lively(Stepped(1)), x, 500, y)  # type: ignore[arg-type]
    BindSizes()(gm)
    FindBranches(static=frozenset(static))(gm)

    inputs = analysis_of(gm).inputs
    assert len(inputs.sizes) == 3
    assert len(inputs.small) == 2


def test_numbers_come_from_the_arguments_of_a_call() -> None:
    gm, inputs, _, _ = captured(lively(Asks()), noise(3, 5, 8))
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    sizes = SizeInputs(placeholders)
    where = next(i for i, value in enumerate(inputs) if isinstance(value, Tensor) and value.dim() == 3)
    args = [7 if i in sizes.positions.values() else None for i in range(len(inputs))]

    at = sizes.at(args)

    assert sizes.tell(inputs[where])
    assert at.shape(inputs[where]) == (7, 7, 8)
    assert at.strides(inputs[where]) == (56, 8, 1)
    assert at.num_bytes(inputs[where]) == 7 * 7 * 8 * 4
    assert sizes.at(list(args)) == at


def test_guards_that_come_too_late_for_dynamo_are_collected() -> None:
    gm, inputs, _, _ = captured(lively(Asks()), noise(3, 5, 8))
    sizes = SizeInputs([node for node in gm.graph.nodes if node.op == "placeholder"])
    where = next(value for value in inputs if isinstance(value, Tensor) and value.dim() == 3)

    with late_guards(shapes_of(inputs)) as guards:
        assert where.shape[0] * where.shape[1] < 1000

    positions = list(sizes.positions.values())
    few, many = ([size if i in positions else None for i in range(len(inputs))] for size in (4, 100))
    assert sizes.at(few).allows(guards)
    assert not sizes.at(many).allows(guards)
