"""Tables of conditions, and what tells that the weights are no longer those that made a value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import omnifx
from omnifx.conditions import Conditions, Table
from omnifx.session import find_session
from omnifx.weights import WeightWatch, checksums
from tests.toys import EAGER, Pattern, Reference, generate, letters_of, toy

STEPS = 7
PLAN = "FrrFrrF"


class Counted:
    """The conditions' graph ``t @ weight``, counting its runs."""

    def __init__(self) -> None:
        self.weight = torch.arange(4.0).reshape(2, 2)
        self.runs = 0

    def run(self, args: list[Any]) -> list[Tensor]:
        self.runs += 1
        return [args[0] @ args[1]]

    def table(self, budget: int = 2**20) -> Table:
        return Table(Conditions(run=self.run, names=("gate",), weights=(1,), flops=8), budget=budget)

    def args(self, t: float) -> list[Any]:
        return [torch.full((1, 2), t), self.weight]


def read(table: Table, graph: Counted, t: float, version: int = 0, copies: bool = False) -> Tensor:
    values, _ = table.read(((t,),), graph.args(t), version=version, copies=copies)
    return values["gate"]


def test_a_row_is_computed_once() -> None:
    graph = Counted()
    table = graph.table()

    for t in (1.0, 2.0, 1.0, 2.0):
        assert torch.equal(read(table, graph, t), torch.full((1, 2), t) @ graph.weight)

    assert graph.runs == 2


def test_another_version_of_the_weights_empties_the_table() -> None:
    graph = Counted()
    table = graph.table()
    read(table, graph, 1.0)
    graph.weight = graph.weight * 3

    assert torch.equal(read(table, graph, 1.0, version=1), torch.ones(1, 2) @ graph.weight)
    assert graph.runs == 2


def test_weights_changed_behind_pytorchs_back_empty_the_table_when_a_generation_begins() -> None:
    graph = Counted()
    table = graph.table()
    table.check(graph.args(1.0))
    read(table, graph, 1.0)
    graph.weight.data += 1.0

    table.check(graph.args(1.0))

    assert torch.equal(read(table, graph, 1.0), torch.ones(1, 2) @ graph.weight)


def test_unchanged_weights_keep_the_table() -> None:
    graph = Counted()
    table = graph.table()
    for _ in range(3):
        table.check(graph.args(1.0))
        read(table, graph, 1.0)

    assert graph.runs == 1


def test_the_longest_unused_rows_make_room() -> None:
    graph = Counted()
    table = graph.table(budget=2 * 2 * 4)  # two rows
    for t in (1.0, 2.0, 1.0, 3.0, 1.0):
        read(table, graph, t)

    assert graph.runs == 3
    assert table.held_bytes <= 16
    read(table, graph, 2.0)
    assert graph.runs == 4


def test_rows_are_copied_where_the_next_run_overwrites_them() -> None:
    graph = Counted()
    shared = torch.zeros(1, 2)

    def run(args: list[Any]) -> list[Tensor]:
        return [torch.matmul(args[0], args[1], out=shared)]

    table = Table(Conditions(run=run, names=("gate",), weights=(1,), flops=8))
    first = read(table, graph, 1.0, copies=True)
    read(table, graph, 2.0, copies=True)

    assert torch.equal(first, torch.ones(1, 2) @ graph.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.complex64])
def test_checksums_see_one_changed_element(dtype: torch.dtype) -> None:
    weight = torch.arange(1, 16).reshape(3, 5).to(dtype)
    changed = weight.clone()
    changed.view(torch.uint8)[2, 3] ^= 4

    assert not torch.equal(checksums([weight]), checksums([changed]))
    assert torch.equal(checksums([weight, weight.T]), checksums([weight.clone(), weight.T.clone()]))


# -- in a generation ---------------------------------------------------------------------------------------------------


def prepared(model: nn.Module) -> Any:
    fast = torch.compile(model, backend="omnicache", options={**EAGER, "policy": Pattern(pattern="Frr")})
    for seed in (0, 1):
        generate(fast, seed=seed, steps=STEPS)
    return fast


def test_later_generations_read_the_table() -> None:
    fast = prepared(toy())
    (runner,) = find_session(fast).runners
    (table,) = runner._tables.values()
    flops = [log.speedup for log in omnifx.stats(fast).generations]

    def refuse(args: list[Any]) -> Any:
        raise AssertionError("all rows are there")

    object.__setattr__(table.conditions, "run", refuse)
    generate(fast, seed=2, steps=STEPS)

    assert omnifx.stats(fast).generations[-1].speedup >= flops[-1]


def test_a_timestep_layer_written_by_data_between_generations_is_noticed() -> None:
    model = toy()
    fast = prepared(model)
    model.blocks[0].ada.weight.data += 0.05  # type: ignore[union-attr,operator]

    image = generate(fast, seed=2, steps=STEPS)

    letters = letters_of(omnifx.stats(fast).generations[-1])
    assert letters == PLAN
    assert torch.allclose(image, generate(Reference(model, letters), seed=2, steps=STEPS), atol=2e-5)


def test_another_label_has_rows_of_its_own() -> None:
    model = toy()
    fast = prepared(model)

    image = generate(fast, seed=2, steps=STEPS, label=7)

    assert torch.allclose(image, generate(Reference(model, PLAN), seed=2, steps=STEPS, label=7), atol=2e-5)


def test_a_watch_keeps_no_view_of_weights_that_come_and_go() -> None:
    watch = WeightWatch((0, 1))
    kept = [torch.zeros(4, 4), torch.zeros(4, 4)]
    held = []

    for weights in (kept, kept, kept, [torch.zeros(4, 4), torch.zeros(4, 4)]):
        watch.look(weights)
        assert [sample.tolist() for sample in watch.probes(weights)] == [[0.0, 0.0]]
        held.append(len(watch._views))

    assert held == [0, 1, 1, 0]


def test_a_watch_counts_what_was_written() -> None:
    weights = [torch.zeros(4, 4), torch.zeros(4, 4)]
    watch = WeightWatch((0, 1))
    versions = []

    for write in (None, None, weights[1]):
        if write is not None:
            write.add_(1.0)
        watch.look(weights)
        versions.append(watch.version)

    assert versions == [1, 1, 2]
