"""Folders of results: what is written is read again, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from omnifx.errors import ResultsError
from omnifx.results import Case, Metric, Results, Row, Timeline, Value, name_of


def results(**more: object) -> Results:
    rows = (
        Row(method="uncached", family="uncached", setting="", compute=1.0, samples="uncached"),
        Row(
            method="auto",
            family="ours",
            setting="speedup=2",
            compute=0.5,
            metrics={"psnr": Value(mean=40.0, spread=1.0, sets=(39.0, 41.0))},
            drift=(0.0, 0.1),
            bands=(0.01, 0.02),
            timeline=Timeline(steps="FFss"),
            samples="auto",
        ),
    )
    case = Case(name="toy", title="Toy", model="Toy", sampler="Euler", steps=4, rows=rows)
    fields = {
        "title": "A comparison",
        "environment": {"command": "pytest", "threads": 1},
        "metrics": (Metric(name="psnr", unit="dB", better="higher"),),
        "cases": (case,),
    }
    return Results(**{**fields, **more})


def test_reads_what_it_wrote(tmp_path: Path) -> None:
    samples = {"toy": {"uncached": torch.zeros(2, 1, 4, 4), "auto": torch.ones(2, 1, 4, 4)}}
    path = results().save(tmp_path / "found", samples)
    loaded = Results.load(tmp_path / "found")
    assert loaded == results() == Results.load(path)
    assert loaded.samples_of(path, loaded.cases[0])["auto"].equal(torch.ones(2, 1, 4, 4))


def test_samples_may_be_missing_but_not_broken(tmp_path: Path) -> None:
    found = results()
    found.save(tmp_path)
    assert found.samples_of(tmp_path, found.cases[0]) == {}
    (tmp_path / "toy.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ResultsError, match=r"toy\.safetensors is corrupt"):
        found.samples_of(tmp_path, found.cases[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "format 2 is not known"),
        ({"metrics": []}, "metrics .'psnr'. are not listed"),
        ({"title": 3}, "title"),
        ({"more": 1}, "more"),
    ],
)
def test_refuses_other_files(tmp_path: Path, change: dict[str, object], said: str) -> None:
    path = results().save(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ResultsError, match=said):
        Results.load(path)


def test_refuses_names_that_leave_the_folder(tmp_path: Path) -> None:
    path = results().save(tmp_path)
    path.write_text(path.read_text().replace('"toy"', '"../toy"'))
    with pytest.raises(ResultsError, match=r"cases.0.name"):
        Results.load(path)
    with pytest.raises(ResultsError, match="cannot read"):
        Results.load(tmp_path / "nowhere")
    with pytest.raises(ResultsError, match="samples are of case 'other'"):
        results().save(tmp_path, {"other": {}})


def test_value_needs_finite_figures() -> None:
    assert Value.of([1.0, float("inf")]) is None
    assert Value.of([]) is None
    assert Value.of([2.0]) == Value(mean=2.0, spread=None, sets=(2.0,))
    both = Value.of([1.0, 3.0])
    assert both is not None
    assert both.mean == 2.0
    assert both.spread == pytest.approx(2**0.5)


def test_metrics_have_names_for_people() -> None:
    assert Metric(name="psnr_p10", unit="dB", better="higher").heading == "PSNR p10, dB"
    assert Metric(name="class", better="higher").heading == "class"


def test_name_of_text() -> None:
    assert name_of("DiT, 50 steps/../x") == "DiT-50-steps-..-x"
    assert name_of("...") == "case"
