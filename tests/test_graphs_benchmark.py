"""The rows of the graphs benchmark: omnifx keeps its bounds, and nothing that fails is hidden."""

import copy

import pytest

from benchmarks import graphs, models
from benchmarks.graphs import CASES, CORRECTED, METHODS, Case, Uncached, broken_bounds, empty_row, main, measure, shown


@pytest.fixture(autouse=True)
def _two_blocks(monkeypatch):
    case = models.dit(depth=2, width=64, tokens=16)
    monkeypatch.setitem(CASES, "dit", lambda: Case(copy.deepcopy(case.model), case.inputs, channels=case.channels))


def measured(method):
    return measure("dit", method, steps=6, compared=(6, 9))


@pytest.mark.parametrize(("method", "new"), [("omnifx", [2, 1, 0]), (CORRECTED, [2, 0, 0])])
def test_omnifx_keeps_its_bounds(method, new):
    """Without a correction, the variant that cannot correct is compiled once the plan is known."""
    row = measured(method)

    assert broken_bounds(row) == []
    assert row["new_graphs"] == new
    assert row["entries"] == [1] * 6
    assert row["graphs_by_steps"] == {"6": sum(new), "9": sum(new)}
    assert 0 < row["steps_saved"] < 6
    assert row["compute"] < 0.9


def test_the_uncached_model_is_one_graph_that_saves_nothing():
    row = measured("no cache")

    assert (row["graphs"], row["entries_max"], row["breaks"], row["fullgraph"]) == (1, 1, 0, "yes")
    assert (row["steps_saved"], row["compute"]) == (0, 1.0)


def test_a_hook_of_diffusers_breaks_the_graph_and_does_cache():
    row = measured("MagCache")

    assert row["problem"] == ""
    assert row["breaks"] > 0
    assert row["entries_max"] > 1
    assert row["fullgraph"].startswith("no, step 1: Unsupported")
    assert row["compute"] < 1.0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"entries_max": 2}, "enters compiled code 2 times"),
        ({"entries_max": 0}, "enters compiled code 0 times"),
        ({"graph_runs_max": 2}, "runs 2 compiled graphs"),
        ({"breaks": 1}, "1 graph breaks, uncached 0"),
        ({"fullgraph": "no, step 1: Unsupported"}, "fullgraph=True: no, step 1"),
        ({"recompilations": 1}, "1 recompilations"),
        ({"graphs_by_steps": {"20": 2, "50": 3}}, "depends on the steps"),
        ({"steps_saved": 0}, "nothing was reused"),
        ({"problem": "ValueError: no"}, "it failed: ValueError: no"),
    ],
)
def test_each_broken_bound_is_named(changes, expected):
    kept = {
        **empty_row("dit", "omnifx"),
        "entries_max": 1,
        "graph_runs_max": 1,
        "breaks": 0,
        "fullgraph": "yes",
        "recompilations": 0,
        "graphs_by_steps": {"20": 2, "50": 2},
        "steps_saved": 3,
        "compute": 0.5,
    }
    assert broken_bounds(kept) == []

    (broken,) = broken_bounds({**kept, **changes})

    assert expected in broken


class Unfit(Uncached):
    def attach(self, case, steps):
        raise TypeError(f"cannot hook {type(case.module).__name__}")


class Absent(Uncached):
    package = "a_package_that_nobody_has"


@pytest.mark.parametrize(
    ("method", "expected"),
    [(Unfit, "TypeError: cannot hook DiTTransformer2DModel"), (Absent, "a_package_that_nobody_has is not installed")],
)
def test_a_peer_that_fails_is_shown_with_its_reason(monkeypatch, method, expected):
    monkeypatch.setitem(METHODS, "peer", method)

    row = measured("peer")

    assert expected in shown(row)["remarks"]
    assert shown(row)["method"] == "peer"


def test_a_broken_bound_is_a_failure_of_the_command(monkeypatch):
    monkeypatch.setattr(graphs, "measure_alone", lambda model, method, **_: empty_row(model, method, "it crashed"))

    with pytest.raises(SystemExit, match="dit, omnifx: it failed: it crashed"):
        main(["--models", "dit", "--methods", "no cache", "omnifx"])
