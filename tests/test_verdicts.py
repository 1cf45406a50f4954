"""Who is ahead at which share of the compute: equal cost, equal seeds, and plain words for a defeat."""

from __future__ import annotations

import pytest

from omnifx.results import Value
from omnifx.verdicts import (
    Lead,
    best_by_method,
    lead_of,
    lead_text,
    leading,
    share_text,
    shares_of,
    tally,
    tally_text,
    value_text,
    verdicts_of,
)
from tests.compared import FRECHET, LPIPS, PSNR, case_of, compared, digits, results_of, row, uncached, value


def verdict(*rows):
    (found,) = verdicts_of(case := case_of(uncached(), *rows), results_of(case))
    return found


def test_the_best_of_each_family_is_compared_at_a_share():
    found = verdicts_of(digits(), results_of(digits()))

    assert [v.share for v in found] == [0.5, 0.4, 0.3]
    assert [(r.family, r.row.method) for r in found[0].rivals] == [
        ("peer", "diffusers TaylorSeer"),
        ("solver", "UniPC"),
        ("policy", "omnicache"),
    ]
    assert str(found[0]) == "ahead of diffusers TaylorSeer (at .50) by 3.0 ± 0.0 dB"
    assert tally_text(tally(found)) == "omnifx is ahead of every other way at 3 of 3 shares of the compute."


def test_a_defeat_is_told_plainly():
    found = verdict(row("auto", 0.5, 40, family="ours"), row("diffusers X", 0.45, 42))

    assert found.lead.word == "behind"
    assert str(found) == "behind diffusers X (at .45) by 2.0 ± 0.0 dB"
    assert tally_text(tally([found])) == "omnifx is behind at 1 of 1 share of the compute."
    ahead = verdict(row("auto", 0.5, 40, family="ours"), row("diffusers X", 0.5, 38))
    both = tally_text(tally([found, ahead]))
    assert both == "omnifx is ahead of every other way at 1 of 2 shares of the compute, behind at 1."


def test_differences_are_taken_within_sets_of_seeds():
    ours = Value(mean=41.0, spread=2.0, sets=(39.0, 41.0, 43.0))
    theirs = Value(mean=40.0, spread=2.0, sets=(38.0, 40.0, 42.0))

    assert lead_of(ours, theirs, PSNR) == Lead(1.0, 0.0)
    assert lead_of(ours, Value(mean=40.0, spread=1.5), PSNR) == Lead(1.0, 2.5)
    assert lead_of(Value(mean=41.0), Value(mean=40.0), PSNR) == Lead(1.0, None)
    assert lead_of(ours, theirs, LPIPS).mean == -1.0


@pytest.mark.parametrize(
    ("lead", "word"),
    [
        (Lead(0.4, 0.5), "level"),
        (Lead(-0.4, 0.5), "level"),
        (Lead(0.6, 0.5), "ahead"),
        (Lead(-0.6, None), "behind"),
        (Lead(0.0, None), "level"),
    ],
)
def test_a_difference_within_its_spread_is_no_lead(lead, word):
    assert lead.word == word


def test_dearer_rows_do_not_count_unless_they_were_tuned_for_the_share():
    ours = row("auto", 0.5, 40, family="ours")

    assert verdict(ours, row("peer", 0.524, 50)).against.row.method == "peer"
    assert verdict(ours, row("peer", 0.526, 50)).against is None
    assert str(verdict(ours, row("peer", 0.526, 50))) == "nothing to compare with"
    tuned = verdict(ours.model_copy(update={"target": 0.5}), row("peer", 0.56, 50, target=0.5))
    assert str(tuned) == "behind peer (at .56) by 10.0 ± 0.0 dB"


def test_a_cheaper_row_is_a_rival_too():
    found = verdict(row("auto", 0.5, 40, family="ours"), row("peer", 0.5, 38), row("peer", 0.3, 41))

    assert found.against.row.compute == 0.3


def test_shares_are_those_tuned_for_or_those_that_ours_cost():
    ours = [row("auto", compute, 40, family="ours") for compute in (0.5, 0.51, 0.3)]

    assert shares_of(case_of(*ours, row("peer", 0.2, 30))) == (0.5, 0.3)
    assert shares_of(case_of(*ours, row("peer", 0.2, 30, target=0.25))) == (0.25,)
    assert shares_of(case_of(row("peer", 0.2, 30))) == (0.5, 0.4, 0.3, 0.25)


def test_without_ours_nothing_is_claimed():
    case = case_of(uncached(), row("peer", 0.3, 30))
    found = verdicts_of(case, results_of(case))

    assert {str(v) for v in found} == {"omnifx has no row here"}
    assert tally_text(tally(found)) == "There is nothing to compare with at any share of the compute."
    assert verdicts_of(case_of(uncached()), results_of(case)) == ()
    assert verdicts_of(case, results_of(case_of(row("peer", 0.3, 30, metrics={})), metrics=(FRECHET,))) == ()


def test_guards_do_not_rank_and_are_held_against_the_uncached_spread():
    metrics = {"PSNR": value(40), "Frechet": value(1.25, 0.3)}
    found = verdict(row("auto", 0.5, 40, family="ours", metrics=metrics))
    worse = verdict(row("auto", 0.5, 40, family="ours", metrics={**metrics, "Frechet": value(1.35, 0.3)}))

    assert leading(results_of(digits(), metrics=(FRECHET, PSNR, LPIPS))) == PSNR
    assert [g.lead.word for g in found.guards] == ["level"]
    assert [g.lead.word for g in worse.guards] == ["behind"]


def test_each_method_has_one_row_at_a_share():
    results, _ = compared()
    best = best_by_method(results.cases[0], 0.4, PSNR)

    assert next(iter(best)) == "auto"
    assert {r.compute for r in best.values()} == {0.4}


def test_figures_have_the_digits_of_their_spread():
    assert value_text(value(46.38, 0.44), PSNR) == "46.4 ± 0.4"
    assert value_text(value(0.98812, 0.0109), LPIPS) == "0.988 ± 0.011"
    assert value_text(Value(mean=1234.5), LPIPS) == "1234"
    assert value_text(None, PSNR) == "-"
    assert lead_text(Lead(1.26, None), PSNR) == "+1.3 dB"
    assert lead_text(Lead(-1.26, 0.5), PSNR, sign=False) == "1.3 ± 0.5 dB"
    assert [share_text(s) for s in (0.5, 0.485, 0.05, 1.0, 1.2)] == [".50", ".485", ".05", "1.00", "1.20"]
