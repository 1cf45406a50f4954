"""The page of `omnifx explain` in a real browser; skipped where there is none."""

import pytest

from tests.test_page import flux_like, report


@pytest.fixture
def opened(open_file, tmp_path):
    """Opens a report's page in a window of some width."""

    def open_page(found, *, width: int, scheme: str = "light"):
        return open_file(found.save_html(tmp_path / "page.html"), width=width, scheme=scheme)

    return open_page


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_fits_its_window_and_shows_every_branch(opened, tmp_path, width, scheme):
    found = flux_like()
    page = opened(found, width=width, scheme=scheme)

    page.screenshot(path=tmp_path / f"folded_{width}_{scheme}.png", full_page=True)
    folded = page.locator("svg g.branch").filter(visible=True).count()
    for summary in page.locator(".map summary").all():
        summary.click()
    unfolded = page.locator("svg g.branch").filter(visible=True).count()
    page.screenshot(path=tmp_path / f"unfolded_{width}_{scheme}.png", full_page=True)

    assert (folded, unfolded) == (4, len(found.branches))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert all(path.stat().st_size > 10_000 for path in tmp_path.glob("*.png"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(opened, scheme):
    page = opened(flux_like(2, 2), width=1280, scheme=scheme)

    ratios = page.evaluate(CONTRAST)

    assert ratios
    assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}


def test_a_table_is_sorted_by_its_buttons(opened):
    page = opened(flux_like(3, 5), width=1280)
    table = page.locator("table.sortable").first

    table.get_by_role("button", name="Count").click()

    assert table.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
    assert [row.inner_text() for row in table.locator("tbody tr td:nth-child(2)").all()] == ["5", "3", "3", "3"]


def test_an_empty_report_fits_a_narrow_window(opened):
    page = opened(report(model="A" * 80), width=390)

    assert page.evaluate("document.documentElement.scrollWidth") <= 390


CONTRAST = """() => {
  const style = getComputedStyle(document.documentElement), probe = document.createElement("span"), found = {};
  document.body.append(probe);
  const light = name => {
    probe.style.color = style.getPropertyValue(name);
    const [r, g, b] = getComputedStyle(probe).color.match(/[0-9.]+/g).map(v => v / 255)
      .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  for (const ink of ["--ink", "--soft", "--link", "--cut"]) for (const paper of ["--page", "--card", "--faint"]) {
    const [a, b] = [light(ink), light(paper)].sort((x, y) => y - x);
    found[ink + " on " + paper] = (a + 0.05) / (b + 0.05);
  }
  return found;
}"""
