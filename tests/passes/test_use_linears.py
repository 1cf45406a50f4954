from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from omnifx.graph import graph_text
from omnifx.passes.use_linears import UseLinears

aten = torch.ops.aten


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3, bias=False)
        self.position = nn.Parameter(torch.randn(1, 3))

    def forward(self, x: Tensor) -> Any:
        return self.two(self.one(x).relu()) + self.position * 2


def unlifted(model: nn.Module, *args: Tensor) -> fx.GraphModule:
    """The decomposed graph with parameters as attributes."""
    program: Any = torch.export.export(model.eval(), args, strict=False).run_decompositions()
    graph: fx.Graph = program.graph
    root, specs = nn.Module(), program.graph_signature.input_specs
    for node, spec in zip([n for n in graph.nodes if n.op == "placeholder"], specs, strict=True):
        if spec.target is not None:
            name = spec.target.replace(".", "_")
            root.register_parameter(name, nn.Parameter(program.state_dict[spec.target].detach(), requires_grad=False))
            with graph.inserting_before(node):
                attribute = graph.create_node("get_attr", name)
            attribute.meta = dict(node.meta)
            node.replace_all_uses_with(attribute)
            graph.erase_node(node)
    return fx.GraphModule(root, graph)


def test_products_with_transposed_weights_are_linear_layers_again() -> None:
    gm = unlifted(Layers(), torch.randn(2, 4))
    before = gm(torch.ones(2, 4))[0]

    assert UseLinears()(gm)

    text = graph_text(gm)
    assert text.count("linear(") == 2
    assert "permute" not in text
    left = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    assert aten.mul.Tensor not in left, "what the parameter alone decides was computed once"
    torch.testing.assert_close(gm(torch.ones(2, 4))[0], before, rtol=1e-6, atol=1e-6)
    targets = [node.target for node in gm.graph.nodes if node.op == "get_attr"]
    assert "one_weight" in targets, "the weight is read as the model holds it"


def test_only_the_rows_of_a_weight_that_are_read_become_a_parameter() -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias[2:4], x, self.weight.t()[:, 2:4])

    gm = unlifted(Narrow(), torch.randn(2, 4))
    before = gm(torch.ones(2, 4))[0]

    UseLinears()(gm)

    shapes = {tuple(gm.get_buffer(str(n.target)).shape) for n in gm.graph.nodes if n.op == "get_attr"}
    assert shapes == {(2, 4), (2,)}
    torch.testing.assert_close(gm(torch.ones(2, 4))[0], before, rtol=1e-6, atol=1e-6)


def test_what_would_be_larger_than_its_parameters_is_not_folded() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.row = nn.Parameter(torch.randn(1, 100))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.row.expand(100, 100).sin()

    gm = unlifted(Wide(), torch.randn(100, 100))
    before = graph_text(gm)

    assert not UseLinears()(gm)
    assert graph_text(gm) == before


def test_without_products_and_parameters_nothing_changes() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu()

    gm = unlifted(Plain(), torch.randn(2))

    assert not UseLinears()(gm)
    assert graph_text(gm) == "x | relu = relu(x) | return(relu)"
