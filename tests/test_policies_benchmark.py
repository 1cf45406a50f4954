"""The benchmark of all policies: what it runs, what it keeps apart, and that the pages say what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import quality_page
from benchmarks.pages import END, start_of, with_block
from benchmarks.policies import BASELINES, Bench, Setting, calibrate, settings_of
from benchmarks.policies_pages import COMMAND, best_at, main, pages, policy_block
from benchmarks.policies_plot import FAMILIES, best_so_far, fidelity_figure
from benchmarks.quality import CASES, FIRST_CALIBRATION_SEED
from omnifx.errors import ConfigError
from omnifx.policies.fora import Fora
from omnifx.policy import policies

RESULTS, DOCS = Path("benchmarks/results/policies.json"), Path("docs/policies")


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench("flow", steps=6, samples=4, lowering="eager")


@pytest.mark.parametrize("model", ["dit", "flow"])
def test_every_policy_has_settings_that_can_be_made(model: str) -> None:
    settings = settings_of(model, 50)

    assert {s.method for s in settings} == {*policies(), *BASELINES} - {"full"}
    assert len({(s.method, s.label) for s in settings}) == len(settings)
    for setting in settings:
        assert (setting.policy is None) == (setting.method in BASELINES)


def test_every_method_but_the_second_order_solver_is_drawn() -> None:
    drawn = [method for _, methods in FAMILIES.values() for method in methods]

    assert sorted(drawn) == sorted({*policies(), *BASELINES} - {"full", "fewer steps, 2nd order"})


def test_a_planned_row(bench: Bench) -> None:
    row = bench.measure(Setting(method="fora", options={"interval": 2}))

    assert row["full steps"] == 3
    assert row["variants"] == 2
    assert 0.5 <= row["compute"] < 0.55
    assert 15 < row["PSNR dB"] < 80
    assert row["SSIM"] < 1
    assert row["cache KiB"] > 0
    assert row["time"] > 0


def test_a_row_decided_at_run_time_counts_its_probes(bench: Bench) -> None:
    row = bench.measure(Setting(method="first-block-cache", options={"threshold": 10.0}))

    assert row["full steps"] == 1
    assert row["compute"] > 1 / 6 + 5 * 0.02  # the first block runs at every step


def test_fewer_steps_cost_their_share_and_nothing_is_kept(bench: Bench) -> None:
    row = bench.measure(Setting(method="fewer steps", calls=3))

    assert (row["compute"], row["cache KiB"]) == (0.5, 0.0)
    assert row["PSNR dB"] < 60


def test_all_calls_of_the_extrapolation_are_the_uncached_run(bench: Bench) -> None:
    assert bench.measure(Setting(method="extrapolated output", calls=6))["PSNR dB"] is None


def test_what_a_policy_refuses_is_an_error_of_the_row(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="speedup"):
        bench.measure(Setting(method="omnicache", speedup=6.0))


def test_seeds_of_the_calibration_are_not_reported() -> None:
    with pytest.raises(ValueError, match="both calibrated on and reported"):
        calibrate(
            CASES["dit"],
            Fora(),
            steps=4,
            batch=2,
            lowering="eager",
            taken=range(FIRST_CALIBRATION_SEED, FIRST_CALIBRATION_SEED + 1),
        )


def test_the_line_drawn_goes_through_the_best_rows() -> None:
    points = [(0.5, 30.0), (0.4, 31.0), (0.3, 20.0), (0.6, 35.0)]
    rows = [{"compute": c, "PSNR dB": p} for c, p in points]

    assert best_so_far(rows) == [(0.3, 20.0), (0.4, 31.0), (0.6, 35.0)]


def row(method: str, compute: float, psnr: float) -> dict[str, object]:
    return {
        "method": method, "setting": "interval=2", "full steps": 1.0, "compute": compute, "time": 0.5, "PSNR dB": psnr,
        "p10 dB": psnr, "SSIM": 0.9, "Frechet": 3.0, "class": 1.0, "cache KiB": 8.0, "variants": 2,
    }  # fmt: skip


def found(*rows: dict[str, object]) -> dict[str, object]:
    return {
        "model": "dit", "sampler": "DDIM", "steps": 50, "samples": 4, "batch": 4, "rows": list(rows),
        "refused": [{"method": "t-gate", "setting": "defaults", "reason": "no text"}],
        "uncached": {"Frechet": 3.0, "class": 1.0},
    }  # fmt: skip


def test_the_best_row_costs_no_more_than_asked() -> None:
    rows = [row("fora", 0.5, 40.0), row("fora", 0.4, 38.0), row("goc", 0.4, 50.0)]

    best = best_at(rows, "fora", 0.45)

    assert best is not None
    assert best["PSNR dB"] == 38.0
    assert best_at(rows, "fora", 0.3) is None


def test_a_page_keeps_what_is_written_by_hand() -> None:
    block = policy_block("fora", [found(row("fora", 0.5, 41.25))])
    page = with_block("# FORA\n\nText.\n", block, COMMAND)

    assert page.startswith("# FORA\n\nText.\n")
    assert "| dit | `interval=2` | 0.500 | 0.50 | 41.2 |" in page
    assert page.count(start_of(COMMAND)) == page.count(END) == 1
    assert with_block(page, block, COMMAND) == page
    assert with_block(page + "\nMore.\n", block, COMMAND).endswith("More.\n")
    assert "Refused on dit: no text" in policy_block("t-gate", [found()])
    assert policy_block("pab", [found()]) == ""


def test_a_figure_is_drawn_of_every_method_that_has_rows() -> None:
    figure = fidelity_figure(found(row("fora", 0.5, 40.0), row("goc", 0.4, 50.0)))

    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "fora" in labels
    assert "goc" in labels
    assert "toca" not in labels


def test_the_pages_hold_what_was_measured() -> None:
    assert main(["--check"]) == 0
    assert quality_page.main(["--check"]) == 0
    assert set(pages(RESULTS, DOCS)) == {DOCS / f"{name}.md" for name in [*policies(), "README"]}
