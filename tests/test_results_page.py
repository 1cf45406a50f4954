"""The page, the figures and the tables of a comparison: what they say, what they escape, and what may be missing."""

from __future__ import annotations

import base64
import io
import re

import matplotlib.image
import pytest
import torch

from omnifx.charts import drift_charts, frontier, frontier_charts, looks_of, plot_of
from omnifx.errors import ConfigError, ResultsError
from omnifx.markdown import END, plain, start_of
from omnifx.results import Metric, Results, Timeline
from omnifx.results_figures import save_figures
from omnifx.results_page import page_of, plan_groups, save_page
from omnifx.results_text import block_name, markdown_of, tables_of
from omnifx.sample_grids import factor_of, grid_of
from omnifx.timelines import Cell, cells_of, letters_in
from tests.compared import (
    FRECHET,
    METHODS,
    PSNR,
    STEPS,
    TIMESTEPS,
    case_of,
    compared,
    digits,
    results_of,
    row,
    uncached,
    value,
)
from tests.test_page import EVIL, Elements

# -- the page ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page() -> str:
    return page_of(*compared())


def test_a_page_says_who_is_ahead_what_was_refused_and_how_it_was_measured(page):
    text = " ".join(Elements(page).text.split())

    assert "omnifx is ahead of every other way at 3 of 3 shares of the compute." in text
    assert "ahead: +3.0 ± 0.0 dB" in text
    assert "Frechet no worse" in text
    assert "no mask for 20 steps" in text
    assert "python -m benchmarks.frontier" in text
    assert "To the uncached samples of the same seeds." in text
    assert "900 to 902" in text
    assert "Combines the last 3 outputs." in text
    assert all(text.count(method.split()[-1]) > 3 for method in METHODS)


def test_a_defeat_stands_in_the_first_lines():
    case = case_of(uncached(), row("auto", 0.5, 40, family="ours"), row("diffusers X", 0.5, 45))

    text = Elements(page_of(results_of(case)).split("</style>")[1]).text

    assert " ".join(text.split()).startswith("Frontier omnifx is behind at 1 of 1 share of the compute.")
    assert "behind: -5.0 ± 0.0 dB" in text


def test_a_page_needs_nothing_from_elsewhere(page):
    elements = Elements(page)

    addresses = [a[key] for _, a in elements.tags for key in ("src", "href") if key in a]
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert "http" not in page
    assert "url(" not in page
    assert "@import" not in page


def test_links_and_names_within_the_page_are_whole(page):
    tags = Elements(page).tags
    ids = [a["id"] for _, a in tags if "id" in a]

    assert sorted(set(ids)) == sorted(ids)
    assert {a["href"][1:] for tag, a in tags if "href" in a and a["href"].startswith("#")} <= set(ids)
    assert {a["aria-labelledby"] for _, a in tags if "aria-labelledby" in a} <= set(ids)
    assert all(a.get("alt") for tag, a in tags if tag == "img")
    assert all(a.get("aria-label") or a.get("aria-hidden") for tag, a in tags if tag == "svg")
    assert all(a.get("scope") in ("col", "row") for tag, a in tags if tag == "th")
    assert [tag for tag, _ in tags if tag in ("h1", "h2")] == ["h1", "h2", "h2", "h2"]


def test_samples_are_pictures_with_differences_below(page):
    pictures = [a for tag, a in Elements(page).tags if tag == "img"]
    kept = 1 + sum(family != "policy" for family, _ in METHODS.values())

    sizes = {tuple(matplotlib.image.imread(_decoded(a["src"]), format="png").shape) for a in pictures}
    assert len(pictures) == (2 * kept - 1) + 3
    assert sizes == {(8, 8 * 9 - 1, 4), (3 * 17 - 1, 8 * 21 - 1, 4)}
    assert all("pixelated" in a["class"] for a in pictures)


def _decoded(uri: str) -> io.BytesIO:
    return io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))


def test_whatever_comes_from_results_is_escaped(tmp_path):
    evil = row(
        EVIL,
        0.5,
        40,
        setting=EVIL,
        metrics={EVIL: value(40)},
        drift=(0.1, 0.2),
        bands=(0.1, 0.2),
        timeline=Timeline(steps="<F'\"", notes=(EVIL,)),
    )
    metric = Metric(name=EVIL, unit=EVIL, better="higher", about=EVIL)
    texts = {"title": EVIL, "model": EVIL, "sampler": EVIL, "refused": {EVIL: EVIL}, "seeds": {EVIL: EVIL}}
    ours = evil.model_copy(update={"family": "ours"})
    other = evil.model_copy(update={"method": f"{EVIL} 2", "family": "solver"})
    found = results_of(case_of(uncached(metrics={}), evil, ours, other, **texts), metrics=(metric,), title=EVIL)
    found = found.model_copy(update={"environment": {EVIL: EVIL, "command": EVIL}})

    made = page_of(found)
    elements = Elements(made)
    written = markdown_of(found)

    assert "<script>alert" not in made
    assert [tag for tag, _ in elements.tags].count("script") == 1  # our own
    assert elements.text.count(EVIL) > 10
    assert [a["data-m"] for tag, a in elements.tags if tag == "label"].count(EVIL) >= 1
    assert "<script" not in written.replace(f"`{EVIL}`", "")
    assert save_figures(found, {}, tmp_path)  # matplotlib takes no text for a formula


def test_a_row_of_a_table_is_one_line_whatever_it_holds():
    assert plain("a|b\nc<d>*e*") == r"a\|b c&lt;d>\*e\*"


# -- what may be missing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "found",
    [
        results_of(),
        results_of(case_of()),
        results_of(case_of(uncached())),
        results_of(case_of(row("peer", 0.5, 40))),
        results_of(case_of(uncached(metrics={}), row("auto", 0.5, 40, family="ours"))),
        results_of(case_of(row("auto", 0.0, 40, family="ours", time=0.0))),
        results_of(case_of(row("auto", 0.5, 40, family="ours", drift=(0.0,), bands=(0.0,)))),
        results_of(case_of(row("auto", 0.5, 40, family="ours", metrics={}, timeline=Timeline(steps="FFz")))),
        results_of(case_of(row("auto", 0.5, 40, family="ours", timeline=Timeline(steps="")))),
        results_of(case_of(row("auto", 0.5, 40, metrics={"Frechet": value(1)})), metrics=(FRECHET,)),
    ],
    ids=lambda found: None,
)
def test_what_is_missing_is_left_out(found: Results, tmp_path):
    text = Elements(page_of(found)).text

    assert "How it was measured" in text
    assert "Samples" not in text
    assert "Refused" not in text
    assert markdown_of(found).startswith("Measured 2026-11-21 by `python -m benchmarks.frontier`: torch 2.13.0")
    save_figures(found, {}, tmp_path)


def test_unknown_letters_and_plans_without_shares_are_shown():
    plain = uncached(timeline=Timeline(steps="FFF"))
    case = case_of(plain, row("auto", 0.5, 40, family="ours", metrics={}, timeline=Timeline(steps="FFz")))

    (group,) = plan_groups(case, results_of(case))

    assert [strip.text for strip in group.strips] == ["2 F, 1 z"]
    assert letters_in(case.rows)["z"].label == "other"


def test_samples_that_do_not_fit_are_refused():
    case = case_of(uncached(samples="plain"), row("auto", 0.5, 40, family="ours", samples="auto"))

    assert grid_of(case, {"auto": torch.zeros(2, 1, 4, 4)}) is None
    with pytest.raises(ResultsError, match=r"samples 'auto' have shape \[1, 1, 4, 4\], the uncached ones \[2, 1"):
        grid_of(case, {"plain": torch.zeros(2, 1, 4, 4), "auto": torch.zeros(1, 1, 4, 4)})
    with pytest.raises(ResultsError, match=r"samples 'plain' have shape \[2, 4\], expected"):
        grid_of(case, {"plain": torch.zeros(2, 4)})


def test_a_page_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"could not be written: Is a directory\. Name a file"):
        save_page(results_of(), {}, tmp_path)


# -- charts ------------------------------------------------------------------------------------------------------------


def test_every_method_has_a_look_of_its_own_and_packages_a_colour():
    looks = looks_of(digits())

    assert len({(look.colour, look.shape, look.hollow) for look in looks.values()}) == len(METHODS)
    assert next(iter(looks.values())).ours
    groups = {look.group: look.colour for look in looks.values()}
    assert groups == {
        "omnifx": "ours",
        "cache-dit": "peer0",
        "diffusers": "peer1",
        "fewer steps and other solvers": "solver",
        "omnifx's other policies": "policy",
    }


def test_a_line_joins_the_best_rows_of_a_method():
    rows = [row("peer", compute, decibels) for compute, decibels in ((0.3, 30), (0.4, 29), (0.5, 33), (0.5, 31))]

    assert [r.compute for r in frontier(rows, PSNR, lambda r: r.compute)] == [0.3, 0.5]
    (line,) = frontier_charts(case_of(*rows), results_of())[0].lines
    assert [mark.joined for mark in line.marks] == [True, False, True, False]


def test_each_metric_has_a_chart_and_guards_have_their_uncached_level():
    charts = frontier_charts(digits(), results_of(digits()))
    (over_time,) = frontier_charts(digits(), results_of(digits()), "time")

    assert [chart.title for chart in charts] == [f"{name} over compute" for name in ("PSNR", "LPIPS", "Frechet")]
    assert [chart.log for chart in charts] == [False, True, False]
    assert charts[2].level == value(1.1, 0.2)
    assert "does not rank" in charts[2].note
    assert over_time.lines[0].marks[0].x == pytest.approx(0.35)


def test_broken_settings_do_not_take_the_room_of_the_others():
    rows = [row("auto", 0.3, 60, family="ours"), row("peer", 0.3, 2)]
    rows += [row("other", 0.3 + i / 100, 40 + i / 10) for i in range(10)]
    plot = plot_of(frontier_charts(case_of(*rows), results_of())[0])

    assert 30 < plot.y_range[0] < 40
    assert plot.y_range[1] > 60  # ours is always shown
    assert plot.beyond == 1
    assert plot.y(2.0) == plot.y(plot.y_range[0])


def test_drift_leaves_out_what_no_logarithm_shows():
    charts = drift_charts(digits(), results_of(digits()))

    assert [chart.title for chart in charts] == [f"At {share} of the compute" for share in (".50", ".40", ".30")]
    ours = charts[0].lines[0]
    assert ours.look.ours
    assert len(ours.marks) == STEPS - 1
    deep = case_of(row("auto", 0.5, 40, family="ours", drift=(1e-9, 0.1)))
    assert plot_of(drift_charts(deep, results_of())[0]).y_range[0] > 5e-6
    solver = next(line for line in charts[0].lines if line.look.method == "UniPC")
    assert solver.marks[-1].x == STEPS


# -- plans and samples -------------------------------------------------------------------------------------------------


def test_steps_of_other_samplers_lie_at_their_timesteps():
    half = Timeline(steps="FFs", timesteps=(951.0, 901.0, 826.0))

    assert cells_of(half, TIMESTEPS, STEPS) == (Cell("F", 0, 1), Cell("F", 1, 2.5), Cell("s", 2.5, 20))
    assert cells_of(Timeline(steps="Fr"), TIMESTEPS, STEPS) == (Cell("F", 0, 10), Cell("r", 10, 20))
    rising = Timeline(steps="Fr", timesteps=(0.0, 1.0))
    assert [cell.start for cell in cells_of(rising, TIMESTEPS, STEPS)] == [0, 10]


def test_differences_of_all_ways_are_amplified_alike():
    small, large = torch.full((1, 8, 1, 4, 4), 0.015), torch.full((1, 8, 1, 4, 4), 0.9)

    assert factor_of([]) == 1
    assert factor_of([small]) == 50
    assert factor_of([small, small, large]) == 50
    assert factor_of([torch.zeros(1, 1, 1, 4, 4)]) == 200


def test_equal_samples_have_a_clear_difference_and_others_a_colour():
    case = case_of(uncached(samples="plain"), row("auto", 0.5, 40, family="ours", samples="auto"))
    base = torch.zeros(1, 1, 2, 2)
    other = base.clone()
    other[0, 0, 0, 0], other[0, 0, 1, 1] = 0.02, -0.02

    grid = grid_of(case, {"plain": base, "auto": other})

    difference = grid.strips[1].difference
    assert grid.factor == 50
    assert (difference[..., 3] > 0).tolist() == [[True, False], [False, True]]
    assert difference[0, 0, 0] > difference[0, 0, 2]  # red where it is higher
    assert difference[1, 1, 2] > difference[1, 1, 0]
    assert grid.strips[0].samples[0, 0].tolist() == [128, 128, 128, 255]


def test_large_samples_and_many_channels_are_reduced_and_that_is_said():
    case = case_of(uncached(samples="plain"))

    grid = grid_of(case, {"plain": torch.zeros(1, 16, 256, 384)})

    assert grid.strips[0].samples.shape == (128, 192, 4)
    assert grid.notes[1:] == ("Of 16 channels, the first 3 are shown.", "Reduced from 384x256 to 192x128.")


# -- figures and tables ------------------------------------------------------------------------------------------------


def test_figures_are_drawn_for_each_case(tmp_path):
    paths = save_figures(*compared(), tmp_path / "new")

    assert [path.name for path in paths] == [
        *(f"digits-{name}.png" for name in ("frontier", "error", "plans", "samples")),
        *(f"video-{name}.png" for name in ("frontier", "samples")),
    ]
    for path in paths:
        picture = matplotlib.image.imread(path)
        assert picture.shape[1] > 600
        assert len({*map(tuple, picture[::7, ::7].reshape(-1, picture.shape[2]).round(2).tolist())}) > 5


def test_tables_hold_the_verdict_and_each_method():
    verdict, methods = tables_of(digits(), results_of(digits()))

    assert verdict.rows[0][:2] == (".50", "44.0 ± 0.5 (auto, .50)")
    assert verdict.rows[0][-1] == "ahead of diffusers TaylorSeer (at .50) by 3.0 ± 0.0 dB"
    assert [line[0] for line in methods.rows] == list(looks_of(digits()))
    assert methods.rows[0] == ("auto", "44.0 ± 0.5 (.50)", "41.0 ± 0.5 (.40)", "38.0 ± 0.5 (.30)")


def test_a_page_of_markdown_has_captions_and_figures():
    found = results_of(digits())
    written = markdown_of(found, {"digits": {"frontier": "pictures/digits-frontier.png"}})

    assert written.startswith("Measured 2026-11-21 by `python -m benchmarks.frontier`: torch 2.13.0, threads 1.")
    assert "![Digits: frontier](pictures/digits-frontier.png)" in written
    assert "- cache-dit SCM: no mask for 20 steps" in written
    tables = [line for line in written.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {8, 5}
    assert start_of(block_name(found)) == "<!-- measured: omnifx report Frontier -->"
    assert END not in written
