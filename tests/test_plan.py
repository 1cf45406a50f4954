"""Plans: what they count, what they refuse, and the way through a file."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnifx.errors import PlanError
from omnifx.plan import COMPUTE, PREDICT, REUSE, Action, Correction, Plan, is_action, partial, partial_tokens
from omnifx.tokens import Selection
from tests.profiles import make_profile


def toy_plan(actions: list[Action], **fields: Any) -> Plan:
    return Plan.uniform(make_profile(len(actions)), actions, policy="toy", **fields)


def saved(plan: Plan, path: Path, **changes: Any) -> Path:
    """The plan's file, with some of its fields changed."""
    plan.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


@given(st.lists(st.sampled_from([COMPUTE, REUSE]), max_size=40))
@settings(max_examples=50, deadline=None)
def test_equal_rows_share_a_variant_and_the_rows_come_back(tail: list[Action]) -> None:
    actions = [COMPUTE, *tail]

    plan = toy_plan(actions)

    assert len(plan.variants) == len(set(actions))
    assert [row[0] for row in plan.rows] == actions
    assert plan.num_reuse_steps == actions.count(REUSE)
    assert plan.speedup == pytest.approx(len(actions) / actions.count(COMPUTE))  # toy branches are the whole model


def test_speedup_is_the_ratio_of_flops() -> None:
    profile = make_profile(4, branch_flops=(60, 15))

    plan = Plan.from_rows(profile, [(COMPUTE,) * 2, (REUSE, COMPUTE), (REUSE,) * 2, (COMPUTE,) * 2], policy="toy")

    assert plan.reuse_flops == pytest.approx((1.0, 0.4, 0.25))
    assert plan.speedup == pytest.approx(4 / 2.65)


def test_a_plan_comes_back_from_its_file(tmp_path: Path) -> None:
    correction = Correction(gamma=0.5, filter="low", cutoff=0.25)
    plan = toy_plan(
        [COMPUTE, COMPUTE, REUSE],
        policy_options={"interval": 2, "cutoff": None},
        corrections=[None, None, correction],
        notes=["a sentence."],
    )

    plan.save(tmp_path / "plan.json")

    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.reads_noise


def test_the_timeline_shows_every_kind_of_step() -> None:
    profile = make_profile(4)
    rows = [(COMPUTE, COMPUTE), (REUSE, REUSE), (REUSE, COMPUTE), (REUSE, REUSE)]

    plan = Plan.from_rows(profile, rows, policy="toy", corrections=[None, None, None, Correction(gamma=1.0)])

    assert plan.timeline().splitlines()[1] == "Frmc"
    assert "4 steps, 3 reuse, 3 variants" in str(plan)


def test_a_reuse_before_anything_was_computed_is_refused() -> None:
    with pytest.raises(PlanError, match="step 0 reuses a branch, but nothing was computed before it"):
        toy_plan([REUSE, COMPUTE])


def test_rows_that_do_not_fit_the_branches_are_refused() -> None:
    with pytest.raises((PlanError, ValueError)):
        Plan.from_rows(make_profile(2), [(COMPUTE,), (REUSE,)], policy="toy")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 2}, "format 2 is not known; this omnifx reads format 1"),
        ({"steps": []}, "0 steps for 3 timesteps"),
        ({"steps": [{"variant": 0}, {"variant": 7}, {"variant": 0}]}, r"steps \[1\] name a variant that is not in"),
        ({"variants": [["compute"], ["reuse"]]}, r"variants \[0, 1\] do not have one action for each of the 2"),
        ({"variants": [["compute", "skipped"]]}, "variants.0.1"),
        ({"reuse_flops": [1.0]}, "2 variants but 1 FLOPs ratios"),
        ({"steps": [{"variant": 0, "correction": {"gamma": 99.0}}]}, "steps.0.correction.gamma"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_plan_file_that_breaks_a_rule_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    path = saved(toy_plan([COMPUTE, REUSE, COMPUTE]), tmp_path / "plan.json", **changes)

    with pytest.raises(PlanError, match=says) as refusal:
        Plan.load(path)

    assert str(path) in str(refusal.value)
    assert "Make it anew with `omnifx plan`" in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"text"', b"\xff\xfe\x00", b'{"policy": "x"}', b"\x00" * 64])
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)

    with pytest.raises(PlanError, match="is not a plan"):
        Plan.load(path)


@given(keep=st.floats(0.0, 0.99))
@settings(max_examples=30, deadline=None)
def test_a_truncated_plan_file_is_refused(tmp_path_factory: pytest.TempPathFactory, keep: float) -> None:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    toy_plan([COMPUTE, REUSE, COMPUTE]).save(path)
    text = path.read_text().rstrip()
    path.write_text(text[: int(keep * len(text))])

    with pytest.raises(PlanError, match="is not a plan"):
        Plan.load(path)


def test_a_missing_plan_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot read .*nowhere.json: .* Make one with `omnifx plan`"):
        Plan.load(tmp_path / "nowhere.json")


OLDEST = Selection(score="none", staleness=0.1)


def test_a_partial_plan_comes_back_from_its_file_and_counts_its_steps(tmp_path: Path) -> None:
    plan = toy_plan([COMPUTE, partial(64), partial(0), REUSE], selection=OLDEST)

    plan.save(tmp_path / "plan.json")

    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.num_reuse_steps == 3
    assert plan.timeline().endswith("Ftrr")


def test_plans_from_before_there_were_tokens_still_load(tmp_path: Path) -> None:
    path = saved(toy_plan([COMPUTE, REUSE]), tmp_path / "plan.json")
    old = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("selection", "tokens")}
    path.write_text(json.dumps(old))

    assert Plan.load(path) == toy_plan([COMPUTE, REUSE])


def test_partial_branches_without_a_selection_are_refused() -> None:
    with pytest.raises(PlanError, match="no selection says which tokens they compute"):
        toy_plan([COMPUTE, partial(3)])


def test_a_first_step_that_computes_some_tokens_is_refused() -> None:
    with pytest.raises(PlanError, match="step 0 reuses a branch"):
        toy_plan([partial(3), COMPUTE], selection=OLDEST)


@pytest.mark.parametrize("text", ["partial:-1", "partial:07", "partial:", "partial:3.5", "compute\n", "skipped", ""])
def test_what_is_no_action_is_refused(text: str) -> None:
    assert not is_action(text)
    with pytest.raises(PlanError):
        toy_plan([COMPUTE, text], selection=OLDEST)


@pytest.mark.parametrize(("action", "tokens"), [(COMPUTE, None), (REUSE, None), (partial(0), 0), (partial(12), 12)])
def test_an_action_says_how_many_tokens_it_computes(action: Action, tokens: int | None) -> None:
    assert is_action(action)
    assert partial_tokens(action) == tokens


def test_a_branch_is_predicted_or_partial_but_not_both() -> None:
    with pytest.raises(PlanError, match=r"is predicted in some steps and partial in others"):
        toy_plan([COMPUTE, PREDICT, partial(3)], weights=[(), (1.0,), ()], terms=1, selection=OLDEST)


def test_a_partial_branch_beside_a_predicted_one_counts_as_stored_and_kept() -> None:
    rows = [(COMPUTE, COMPUTE), (PREDICT, partial(3)), (PREDICT, REUSE), (COMPUTE, COMPUTE)]

    plan = Plan.from_rows(
        make_profile(4), rows, policy="toy", weights=[(), (1.0,), (1.0,), ()], terms=2, selection=OLDEST
    )

    assert plan.kept == plan.branches
    assert plan.timeline().endswith("FtpF")
    assert plan.stored_before()[2:] == (((0,), (1, 0)), ((0,), (1, 0)))
