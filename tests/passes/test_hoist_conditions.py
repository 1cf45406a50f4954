"""HoistConditions: what timesteps and labels alone decide is computed in a graph of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omnifx.errors import PassError
from omnifx.graph import CONDITIONS, EXTRA_INPUTS, EXTRA_OUTPUTS, branches_of, clone, graph_text, total_flops
from omnifx.passes.eliminate import Eliminate
from omnifx.passes.hoist_conditions import HoistConditions, hoisted_key
from omnifx.passes.narrow_linears import NarrowLinears
from omnifx.passes.read_cuts import ReadCuts
from tests.toys import TINY, Traced, noise, toy, toy_inputs, trace


class Gated(nn.Module):
    """x * gate(t) + table, whose gate takes two linear layers."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 64), nn.Linear(64, width)
        self.width = width

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        gate = self.down(torch.relu(self.up(t[:, None] * torch.ones(1, self.width))))
        return x * gate[:, None]


def reusing(traced: Traced) -> Any:
    """A copy of the graph that reads all cuts."""
    gm = clone(traced.gm)
    names = tuple(branches_of(traced.gm))
    ReadCuts(branches=names)(gm)
    Eliminate(freed=names)(gm)
    return gm


def test_the_split_graphs_compute_the_same_bits() -> None:
    traced = trace(Gated(), noise(2, 40, 16), torch.tensor([3.0, 4.0]))
    split = clone(traced.gm)

    assert HoistConditions()(split) is True

    conditions = split.meta[CONDITIONS]
    values = traced.run(conditions)
    assert [label.partition(":")[0] for label in split.meta[EXTRA_INPUTS]] == ["condition"]
    assert torch.equal(traced.run(split, extra=values)[0], traced.run()[0])


def test_no_work_is_done_twice_and_none_is_lost() -> None:
    traced = trace(Gated(), noise(2, 40, 16), torch.tensor([3.0, 4.0]))
    split = clone(traced.gm)
    HoistConditions()(split)

    assert total_flops(split) == 0
    assert total_flops(split.meta[CONDITIONS]) == total_flops(traced.gm) > 0


class Checked(nn.Module):
    """The toy, and a look at what came out."""

    def __init__(self) -> None:
        super().__init__()
        self.toy = toy(1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.toy(x, t, y)
        torch.ops.aten._assert_async.msg(out.abs().max() < 1e9, "too large")
        return out


def test_what_checks_values_of_the_caches_stays_with_them() -> None:
    gm = reusing(trace(Checked(), *toy_inputs()))

    assert HoistConditions()(gm) is True

    checks = [["assert" in str(node.target) for node in graph.graph.nodes] for graph in (gm, gm.meta[CONDITIONS])]
    assert list(map(any, checks)) == [True, False]


def test_a_reuse_step_keeps_the_ends_of_the_trunk_alone() -> None:
    tiny = TINY["dit"]()
    gm = reusing(trace(tiny.model, **tiny.inputs))
    NarrowLinears()(gm)
    before = total_flops(gm)

    HoistConditions()(gm)

    assert total_flops(gm) < 0.5 * before
    assert total_flops(gm) + total_flops(gm.meta[CONDITIONS]) == before


def test_the_conditions_read_no_cache() -> None:
    gm = reusing(trace(toy(2, text=16), *toy_inputs(text=16)))
    own = sum(node.op == "placeholder" for node in gm.graph.nodes) - len(gm.meta[EXTRA_INPUTS])

    HoistConditions()(gm)

    conditions = gm.meta[CONDITIONS]
    assert sum(node.op == "placeholder" for node in conditions.graph.nodes) == own
    assert conditions.meta[EXTRA_INPUTS] == []
    assert conditions.meta[EXTRA_OUTPUTS] == [label for label in gm.meta[EXTRA_INPUTS] if "condition:" in label]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x, t: x * t[:, None, None],  # nothing to save
        lambda m, x, t: x * m.up(x * t[:, None, None]).mean(),  # depends on the latents
        lambda m, x, t: x * torch.rand(1) + m.down(m.up(torch.ones(1, 16) * 2.0)).sum(),  # depends on nothing
    ],
    ids=["light", "latents", "constant"],
)
def test_a_graph_without_conditions_that_pay_is_left_alone(function: Any) -> None:
    class Model(Gated):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return function(self, x, t)

    traced = trace(Model(), noise(2, 40, 16), torch.tensor([3.0, 4.0]))
    before = graph_text(traced.gm)

    assert HoistConditions()(traced.gm) is False
    assert graph_text(traced.gm) == before


def test_values_larger_than_the_weights_that_make_them_are_computed_each_time() -> None:
    """A timestep for each token: a table of them would be larger than the layer."""

    class PerToken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 8)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x * self.layer(t[..., None])

    traced = trace(PerToken(), noise(2, 400, 8), torch.rand(2, 400))

    assert HoistConditions()(traced.gm) is False


def test_a_graph_that_reads_other_conditions_than_promised_is_refused() -> None:
    traced = trace(Gated(), noise(2, 40, 16), torch.tensor([3.0, 4.0]))
    HoistConditions()(traced.gm)
    traced.gm.meta[EXTRA_INPUTS] = ["condition:other"]

    with pytest.raises(PassError, match=r"reads .*condition:other.*, but the conditions' graph returns"):
        HoistConditions().ensures(traced.gm)


class Mixed(nn.Module):
    """x * both(time(t) + text(c)): of an export's two kinds of knowledge, each alone and both together."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.time, self.text, self.both = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        alone = self.time(t[:, None] * torch.ones(1, 16)) + self.text(c)
        return x * self.both(alone)[:, None]


def test_an_export_hoists_by_inputs_and_then_what_rests_on_both() -> None:
    given = (noise(2, 40, 16), torch.tensor([3.0, 4.0]), noise(2, 16))
    traced = trace(Mixed(), *given)
    split = clone(traced.gm)
    shapes = {tuple(n.meta["val"].shape): n.name for n in split.graph.nodes if n.op == "placeholder"}
    t, c = shapes[(2,)], shapes[(2, 16)]

    assert HoistConditions(inputs=(t,), kind="timestep", always=True)(split)
    assert HoistConditions(inputs=(c,), kind="invariant", always=True)(split)
    hoisted = [node.name for node in split.graph.nodes if node.name.startswith(("timestep_", "invariant_"))]
    assert HoistConditions(inputs=(t, c, *hoisted), kind="condition", always=True)(split) is True

    kinds = [label.partition(":")[0] for label in split.meta[EXTRA_INPUTS]]
    assert kinds[-1] == "condition"
    both = split.meta[hoisted_key("condition")]
    assert [label.partition(":")[0] for label in both.meta[EXTRA_INPUTS]] == ["timestep", "invariant"]
    time, text = (traced.run(split.meta[hoisted_key(kind)]) for kind in ("timestep", "invariant"))
    conditions = traced.run(both, extra=[*time, *text])
    Eliminate()(split)
    assert split.meta[EXTRA_INPUTS] == both.meta[EXTRA_OUTPUTS]
    assert torch.equal(traced.run(split, extra=conditions)[0], traced.run()[0])


def test_an_export_may_hoist_what_is_larger_than_its_weights() -> None:
    traced = trace(Gated(), noise(200, 2, 16), torch.arange(200.0))
    node = next(n for n in traced.gm.graph.nodes if n.op == "placeholder" and tuple(n.meta["val"].shape) == (200,))

    assert not HoistConditions(inputs=(node.name,), kind="timestep")(clone(traced.gm))
    assert HoistConditions(inputs=(node.name,), kind="timestep", always=True)(clone(traced.gm))
