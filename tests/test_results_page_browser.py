"""The page of `omnifx report` in a real browser; skipped where there is none."""

from __future__ import annotations

import pytest

from omnifx.results_page import MOST_PLANS, save_page
from tests.compared import METHODS, case_of, compared, results_of, row


@pytest.fixture
def opened(open_file, tmp_path):
    """Opens the page of results in a window of some width."""

    def open_page(results, samples, *, width, scheme="light"):
        return open_file(save_page(results, samples, tmp_path / "page.html"), width=width, scheme=scheme)

    return open_page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
def test_a_page_fits_its_window_and_everything_is_drawn(opened, width, scheme):
    page = opened(*compared(), width=width, scheme=scheme)
    for summary in page.locator("details > summary").filter(visible=True).all():
        summary.click()

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0 && i.width > 200)")
    assert page.evaluate(EMPTY) == []
    charts = page.locator(".chart svg")
    assert charts.count() == (3 + 1 + 3 + 3) + 1
    assert charts.first.locator("g.line").count() == len(METHODS)


def test_text_stands_out_in_both_schemes(opened):
    for scheme in ("light", "dark"):
        page = opened(*compared(), width=1600, scheme=scheme)
        assert {name: ratio for name, ratio in page.evaluate(CONTRAST).items() if ratio < 4.5} == {}


def test_a_name_in_the_legend_finds_and_hides_its_line(opened):
    page = opened(*compared(), width=1600)
    legends = page.locator("section.case").first.get_by_label("TaylorSeer", exact=True)
    lines = page.locator(".chart g.line[data-m='diffusers TaylorSeer']")
    box = legends.nth(1)  # cache-dit has one too

    page.locator("label[data-m='diffusers TaylorSeer']").first.hover()
    assert all("hot" in line.get_attribute("class") for line in lines.all())
    box.uncheck()

    assert lines.count() == 10
    assert lines.filter(visible=True).count() == 0
    assert not page.locator("label[data-m='diffusers TaylorSeer'] input").last.is_checked()  # legends agree


def test_plans_beyond_the_first_few_are_folded(opened):
    page = opened(*compared(), width=1600)
    strips = page.locator(".strip")

    shown = strips.filter(visible=True).count()
    page.get_by_text(f"{len(METHODS) - MOST_PLANS} more").first.click()

    assert (shown, strips.filter(visible=True).count()) == (MOST_PLANS, len(METHODS))


def test_long_names_fit_a_narrow_window(opened):
    rows = [row("a" * 90, 0.5, 40, setting="b" * 200), row("auto", 0.5, 41, family="ours")]
    page = opened(results_of(case_of(*rows, title="t" * 120), title="T" * 120), {}, width=400)

    assert page.evaluate("document.documentElement.scrollWidth") <= 400


EMPTY = """() => [...document.querySelectorAll(".chart svg, .strip, .card, table")].filter(e => {
  const box = e.getBoundingClientRect();
  return e.checkVisibility() && (box.width < 150 || box.height < 15);
}).map(e => e.outerHTML.slice(0, 80))"""

CONTRAST = """() => {
  const found = {}, light = text => {
    const [r, g, b] = text.match(/[0-9.]+/g).map(v => v / 255)
      .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = light(getComputedStyle(document.querySelector(".card")).backgroundColor);
  for (const name of [".soft", ".ahead", ".under", ".chart text", ".chart .label", "summary", "fieldset legend"]) {
    const style = getComputedStyle(document.querySelector(name));
    const [a, b] = [light(name.startsWith(".chart") ? style.fill : style.color), paper].sort((x, y) => y - x);
    found[name] = (a + 0.05) / (b + 0.05);
  }
  return found;
}"""
