"""The frontier benchmark: what it keeps apart, how it chooses, and that every peer really does less."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import frontier, peers
from benchmarks.frontier import Part, chosen, main, tune, verdicts
from benchmarks.frontier_cases import CASES, METRICS, Way, labels_of, ours, rivals
from benchmarks.frontier_runs import Bench, Extrapolated, Seeds
from benchmarks.peers import NotHere
from benchmarks.quality import evenly_spread
from omnifx.reporting import check
from omnifx.results import Results

STEPS = 8
SHORT = dataclasses.replace(CASES["flow-20"], name="short", title="Short", steps=STEPS)


def part_of(tmp_path: Path, **more: Any) -> Part:
    return Part(tmp_path, "short", {"samples": 2}, **more)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(SHORT, Seeds.of(1, 2), {})


def test_no_seed_has_two_uses() -> None:
    Seeds.of(5, 20)
    with pytest.raises(ValueError, match="seeds 1000000 to 1000023 would have two uses"):
        Seeds((range(999_990, 1_000_100),))
    with pytest.raises(ValueError, match="seeds 5 to 9"):
        Seeds((range(10), range(5, 15)))


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_extrapolation_is_exact_for_polynomials_of_its_order(order: int) -> None:
    steps, calls = 12, 6
    times = [1000.0 * (1 - k / steps) for k in range(steps)]
    asked: list[float] = []

    def model(*, timestep: torch.Tensor) -> tuple[torch.Tensor]:
        asked.append(float(timestep))
        return ((timestep / 1000).double() ** order,)

    skipping = Extrapolated(model, steps, calls, order)
    for _ in range(2):
        found = [float(skipping(timestep=torch.tensor([time]))[0]) for time in times]
    known = sorted(evenly_spread(steps, calls))[order]
    assert len(asked) == 2 * calls
    assert found[known:] == pytest.approx([(time / 1000) ** order for time in times[known:]])
    wrong = [(time / 1000) ** (order + 1) for time in times[known:]]
    assert order == 0 or found[known:] != pytest.approx(wrong)


PEERS = [
    peers.TaylorSeer(),
    peers.FirstBlockCache(threshold=0.3),
    peers.PAB(),
    peers.FasterCache(guided=True),
    peers.MagCache(threshold=1.0, max_skip=1, retention=0.1),
    peers.DBCache(threshold=1e3),
    peers.DBCache(threshold=1e3, order=1),
]


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: f"{peer.name} {getattr(peer, 'order', '')}")
def test_peers_do_less_and_forget_the_generation_before(bench: Bench, peer: peers.Peer) -> None:
    if isinstance(peer, peers.DBCache):
        pytest.importorskip("cache_dit", reason="cache-dit is not installed")
    way = Way(method=peer.name, family="peer", setting="", peer=lambda: dataclasses.replace(peer))  # type: ignore[type-var]
    ready = bench.ready(way)
    first, compute = bench.run(ready, bench.seeds.tuning)
    bench.run(ready, bench.seeds.sets[0])
    again, _ = bench.run(ready, bench.seeds.tuning)

    assert 0.3 < compute < 0.97
    assert 15 < bench.judge(first, bench.seeds.tuning)["psnr"] < 80
    assert again.allclose(first, atol=1e-5)


def test_a_peer_that_cannot_run_says_why() -> None:
    pytest.importorskip("cache_dit", reason="cache-dit is not installed")
    with pytest.raises(NotHere, match=r"cache-dit refuses Linear: .*transformer_blocks"):
        peers.DBCache().attach(torch.nn.Linear(1, 1), STEPS, print)


def test_uncached_work_counts_as_one(bench: Bench) -> None:
    own = next(way for way in rivals(SHORT, [0.5]) if way.method == "fewer steps: Euler, 1st order")
    ready = bench.ready(dataclasses.replace(own, calls=STEPS))
    samples, compute = bench.run(ready, bench.seeds.sets[0])

    assert compute == 1.0
    assert samples.equal(bench.uncached(bench.seeds.sets[0]))
    assert bench.drift(ready, bench.seeds.sets[0]) == (0.0,) * STEPS
    _, counted = bench.run(dataclasses.replace(ready, compute=None), bench.seeds.sets[0])
    assert counted == pytest.approx(1.0)


@pytest.mark.parametrize("name", list(CASES))
def test_every_setting_has_a_name_of_its_own(name: str) -> None:
    shares = [0.5, 0.4, 0.3, 0.25]
    ways = [*rivals(CASES[name], shares), *ours(shares)]

    assert len({(way.method, way.setting) for way in ways}) == len(ways)
    assert {way.family for way in ways} == {"solver", "peer", "policy", "ours"}


def test_settings_are_chosen_on_the_tuning_seeds_and_within_the_share(tmp_path: Path) -> None:
    def entry(method: str, setting: str, compute: float, psnr: float | None) -> dict[str, Any]:
        return {"method": method, "setting": setting, "compute": compute, "psnr": psnr}

    tuned = [
        entry("a", "dear", 0.55, 60.0),
        entry("a", "right", 0.52, 50.0),
        entry("a", "worse", 0.4, 40.0),
        entry("b", "only", 0.5, 45.0),
        entry("c", "broken", 0.5, None),
        entry("d", "last", 0.5, 20.0),
    ]
    ways = [Way(method=e["method"], family="peer", setting=e["setting"]) for e in tuned]
    part = part_of(tmp_path, tuned=tuned)

    assert [way.setting for way in chosen(part, ways, 0.5, 5)] == ["right", "only", "last"]
    assert [way.setting for way in chosen(part, ways, 0.5, 1)] == ["right"]
    assert [way.setting for way in chosen(part, ways, 0.4, 5)] == ["worse"]


def test_what_refuses_is_told_and_what_fails_of_ours_is_not_hidden(bench: Bench, tmp_path: Path) -> None:
    class Refuses(peers.Peer):
        name = "refuses"

        def prepare(self, *_: Any) -> None:
            raise ValueError("no such block")

    part = part_of(tmp_path)
    tune(bench, part, [Way(method="refuses", family="peer", setting="", peer=Refuses)], lambda _: None)
    assert part.refused == {"refuses": "refuses refuses PixArtTransformer2DModel: no such block"}
    with pytest.raises(AssertionError):
        tune(bench, part, [Way(method="wrong", family="solver", setting="")], lambda _: None)


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "flow-20", dataclasses.replace(CASES["flow-20"], steps=STEPS))
    smoke = ["--smoke", "--out", str(tmp_path), "--methods", "omnifx", "fewer steps: Euler, 1st order"]
    found = main(smoke)
    case = found.cases[0]

    assert Results.load(tmp_path) == found
    assert {row.family for row in case.rows} == {"uncached", "ours", "solver"}
    own = next(row for row in case.rows if row.family == "ours")
    assert own.compute == 0.5
    assert own.timeline is not None
    assert len(own.timeline.steps) == len(own.drift) == STEPS
    assert own.drift[0] < 1e-5  # step 0 is computed
    assert own.drift[-1] > 1e-4
    assert own.metrics["psnr"].spread is not None
    assert set(own.metrics) == {metric.name for metric in METRICS} - {"frame", "change"}  # of videos
    (verdict,) = verdicts(case, [0.5])
    assert verdict["ahead dB"] == own.metrics["psnr"].mean - verdict["its dB"]
    assert set(found.samples_of(tmp_path, case)) == {row.samples for row in case.rows}

    monkeypatch.setattr(frontier, "report", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(Bench, "ready", lambda *_: pytest.fail("made ready again"))
    assert main(smoke).cases == found.cases
    with pytest.raises(SystemExit, match="measured under other conditions"):
        main(["--cases", "flow-20", "--out", str(tmp_path)])


def test_the_page_holds_what_was_measured() -> None:
    folder = Path("benchmarks/results/frontier")
    check(Results.load(folder), folder, html=None, figures=Path("docs/frontier"), markdown=Path("docs/frontier.md"))


def test_labels_have_every_class() -> None:
    assert labels_of(20).bincount().tolist() == [2] * 10
