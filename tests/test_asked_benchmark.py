"""The benchmark of what was asked: its tables, its page, and that nothing reported was calibrated on."""

import json

import pytest

from benchmarks import asked_page
from benchmarks.asked import COMPARED, SAMPLES, main
from benchmarks.quality import FIRST_CALIBRATION_SEED

ASKED = {
    "model": "dit",
    "steps": 50,
    "asked dB": 45.0,
    "speedup": 5.0,
    "expected dB": 47.45,
    "expected error": 0.37,
    "measured dB": 47.64,
    "measured error": 0.33,
    "off by dB": 0.19,
    "calibration": "3 x 50 samples",
}
MOVED = {
    "model": "dit",
    "measured at": "50 steps",
    "used at": "20 steps",
    "speedup": 2.0,
    "transferred dB": 50.6,
    "own dB": 50.8,
    "loss dB": 0.2,
    "error dB": 0.4,
}


def test_the_page_holds_what_was_measured():
    assert asked_page.main(["--check"]) == 0


def test_tables_show_promises_beside_what_came_of_them(tmp_path):
    refused = {"model": "dit", "steps": 20, "asked dB": 99.0, "refused": "auto: min_psnr=99 dB is out of reach"}
    timed = {"model": "dit", "steps": 50, "lowering": "eager", "speedup": 2.0}
    timed |= {"uncached ms": 100.0, "asked ms": 60.0, "expected ms": 59.0, "measured ms": 58.0}
    sized = {**MOVED, "measured at": "8 x 8", "used at": "12 x 12"}
    figures = {"psnr": [ASKED, refused], "time": [timed], "steps": [MOVED], "sizes": [sized]}
    results, page = tmp_path / "asked.json", tmp_path / "asking.md"
    results.write_text(json.dumps({"figures": figures}))
    page.write_text("# Page\n")

    assert asked_page.main(["--results", str(results), "--docs", str(page)]) == 0

    text = page.read_text()
    assert "| dit | 50 | 45 | 5.00 | 47.5 ± 0.4 | 47.6 ± 0.3 | +0.2 | 3 x 50 samples |" in text
    assert "| dit | 20 | 99 | refused |" in text
    assert "| dit | 50 | eager | 2.00 | 100 | 60 | 59 | 58 |" in text
    assert "| dit | 50 steps | 20 steps | 2 | 50.6 ± 0.4 | 50.8 | +0.2 |" in text
    assert "| dit | 8 x 8 | 12 x 12 | 2 | 50.6 ± 0.4 | 50.8 | +0.2 |" in text
    assert "guidance" not in text  # what was not measured has no heading
    assert asked_page.main(["--results", str(results), "--docs", str(page), "--check"]) == 0


def test_reported_seeds_are_not_calibrated_on():
    assert max(SAMPLES, COMPARED) < FIRST_CALIBRATION_SEED


@pytest.mark.slow
def test_the_benchmark_measures_what_it_promises(tmp_path):
    main(["--smoke", "--parts", "psnr", "steps", "--out", str(tmp_path / "asked.json")])

    figures = json.loads((tmp_path / "asked.json").read_text())["figures"]
    (row,) = figures["psnr"]
    assert row["expected dB"] >= row["asked dB"]
    assert [row["used at"] for row in figures["steps"]] == ["8 steps", "8 steps"]
