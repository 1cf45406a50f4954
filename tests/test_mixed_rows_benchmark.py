"""The benchmark of mixed rows: branches are really replaced, and its page holds what was measured."""

import json

import pytest
import torch

from benchmarks import mixed_rows_page
from benchmarks.frontier_cases import CASES
from benchmarks.mixed_rows import Network, main, recorded


def test_the_page_holds_what_was_measured():
    assert mixed_rows_page.main(["--check"]) == 0


def test_a_step_fed_its_own_branches_is_that_step():
    case = CASES["flow-20"]
    network = Network(case.load())
    first, second = recorded(network, case, range(2))[:2]

    for reused in network.kinds().values():
        own = network.mixed(second.inputs, {name: second.branches[name] for name in reused})
        torch.testing.assert_close(own, second.output, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(
            network.mixed(second.inputs, {name: first.branches[name] for name in reused}), second.output, atol=1e-4
        )
    assert network.costs(second.inputs)["nothing"] < 0.02
    assert sum(network.costs(second.inputs)[kind] for kind in ("MLPs", "attention")) == pytest.approx(1.0, abs=0.02)


def test_more_of_the_network_leaves_less_of_the_error(tmp_path):
    rows = main(["--smoke", "--out", str(tmp_path / "rows.json")])

    left = {row["computed"]: row["leaves"] for row in rows}
    assert max(left["MLPs"], left["attention"]) < left["nothing"] < 1.0
    assert json.loads((tmp_path / "rows.json").read_text())["figures"] == rows
