"""The frontier of quality over compute: omnifx beside every peer, through its own package, and beside fewer steps.

    python -m benchmarks.frontier [--cases dit-50 flow-20 ...] [--shares .5 .4 .3 .25] [--samples 20] [--sets 5]
        [--top 6] [--out benchmarks/results/frontier] [--again METHOD ...] [--smoke]

Each rival's settings are tried on tuning seeds (OUT/tuning.json has them all). For each share of compute the `--top`
methods, each with its best setting there, and the sampler's own solver with fewer steps are reported, on other seeds. A
rival may take up to `TOLERANCE` more compute than the share; omnifx what its plans for that speedup take, at most .05
of a step more (`omnifx.policy.SLACK`). The default of omnifx has no setting to tune: it is asked for the share. What
needs a calibration gets one, from a third set of seeds.

Samples are made in batches of one set; peers that decide at run time decide for a batch. Compute is what ran: FLOPs of
matrix products, convolutions and attention over the uncached ones; calls over steps where nothing else is done. All
runs are eager, on one thread; for speed see `benchmarks.speed`.

What is measured is kept after each row (OUT/parts), so that a run that was interrupted, or that adds a case, goes on
where it stopped; several processes may measure different cases. ``--again`` measures a method anew. OUT is a folder for
`omnifx report`.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor

import omnifx
from benchmarks import frontier_cases as cases
from benchmarks.frontier_cases import METRICS, Case, Way
from benchmarks.frontier_runs import Bench, Seeds
from benchmarks.peers import NotHere
from benchmarks.results import environment
from omnifx.comparing import bands
from omnifx.errors import ConfigError, OmnifxError
from omnifx.plan import Plan
from omnifx.results import Case as FoundCase
from omnifx.results import Results, Row, Timeline, Value

TOLERANCE = 0.03
"""Share of compute that a rival may take beyond what is asked, so that its grid of settings is no handicap."""
KEPT_SAMPLES = 6


@dataclass
class Part:
    """What is known of one case, on disk after every change."""

    folder: Path
    name: str
    conditions: dict[str, Any]
    tuned: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    samples: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, name: str, conditions: dict[str, Any], again: Iterable[str] = ()) -> Part:
        """What an earlier run left, if it was measured under the same conditions; without the methods in `again`."""
        part = cls(folder, name, conditions)
        path, drop = folder / f"{name}.json", set(again)
        if path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))
            if known["conditions"] != conditions:
                raise SystemExit(
                    f"frontier: {path} was measured under other conditions: {known['conditions']}, now {conditions}. "
                    "Name another --out, or remove it."
                )
            part.tuned = [entry for entry in known["tuned"] if entry["method"] not in drop]
            part.rows = [Row.model_validate(row) for row in known["rows"] if row["method"] not in drop]
            part.refused = {method: why for method, why in known["refused"].items() if method not in drop}
        if (tensors := folder / f"{name}.safetensors").exists():
            part.samples = load_file(tensors)
        return part

    @property
    def computes(self) -> dict[tuple[str, str], float]:
        """The share of compute of every setting that was tuned."""
        found = ((entry["method"], entry["setting"], entry["compute"]) for entry in self.tuned)
        return {(method, setting): compute for method, setting, compute in found if compute is not None}

    def save(self) -> None:
        """Write it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = {row.samples for row in self.rows}
        self.samples = {key: value for key, value in self.samples.items() if key in kept}
        if self.samples:
            save_file(self.samples, self.folder / f"{self.name}.safetensors")
        whole = {
            "conditions": self.conditions,
            "tuned": self.tuned,
            "refused": self.refused,
            "rows": [row.model_dump(mode="json", exclude_defaults=True) for row in self.rows],
        }
        path = self.folder / f"{self.name}.json"
        path.with_suffix(".new").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".new").replace(path)

    def found(self, case: Case, seeds: Seeds) -> FoundCase:
        """As `omnifx report` takes it."""
        order = {"uncached": 0, "ours": 1, "policy": 2, "peer": 3, "solver": 4}
        rows = sorted(self.rows, key=lambda row: (order[row.family], row.method, -row.compute))
        return FoundCase(
            name=case.name,
            title=case.title,
            model=type(case.load()).__name__,
            sampler=case.sampler,
            steps=case.steps,
            seeds=seeds.words,
            rows=tuple(rows),
            refused=self.refused,
        )


def tune(bench: Bench, part: Part, ways: Sequence[Way], tick: Callable[[str], None]) -> None:
    """Try every rival's setting on the tuning seeds, unless it is known."""
    known = {(entry["method"], entry["setting"]) for entry in part.tuned}
    for way in ways:
        tick(f"tuning {way.method}")
        if (way.method, way.setting) in known:
            continue
        try:
            samples, compute = bench.run(bench.ready(way), bench.seeds.tuning)
            psnr = bench.judge(samples, bench.seeds.tuning)["psnr"]
        except (NotHere, OmnifxError) as error:
            psnr, compute = None, None
            part.refused.setdefault(way.method, str(error).splitlines()[0])
        except Exception as error:
            if way.peer is None:
                raise
            psnr, compute = None, None
            part.refused.setdefault(way.method, f"{type(error).__name__}: {str(error).splitlines()[:1]}")
        if psnr is not None and not math.isfinite(psnr):
            psnr = None  # it changed nothing
        part.tuned.append({"method": way.method, "setting": way.setting, "compute": compute, "psnr": psnr})
        part.save()
    worked = {entry["method"] for entry in part.tuned if entry["psnr"] is not None}
    part.refused = {method: why for method, why in part.refused.items() if method not in worked}


def chosen(part: Part, ways: Sequence[Way], share: float, top: int) -> list[Way]:
    """The `top` methods for about this share of compute, each with the setting that has the best PSNR on the tuning
    seeds, and the sampler's own solver with fewer steps."""
    known = {(entry["method"], entry["setting"]): entry for entry in part.tuned}
    best: dict[str, tuple[float, Way]] = {}
    for way in ways:
        entry = known[way.method, way.setting]
        if entry["psnr"] is None or entry["compute"] > share + TOLERANCE:
            continue
        if way.method not in best or entry["psnr"] > best[way.method][0]:
            best[way.method] = (entry["psnr"], way)
    ranked = [way for _, way in sorted(best.values(), key=lambda pair: pair[0], reverse=True)]
    return ranked[:top] + [
        way for way in ranked[top:] if way.calls is not None and way.solver is None and not way.order
    ]


def report(bench: Bench, part: Part, way: Way, share: float) -> Row:
    """Measure a way on all sets of reported seeds."""
    ready = bench.ready(way)
    found: list[dict[str, float]] = []
    computes, first = [], bench.seeds.sets[0]
    key, spectrum = "", ()
    for seeds in bench.seeds.sets:
        samples, compute = bench.run(ready, seeds)
        found.append(bench.judge(samples, seeds))
        computes.append(compute)
        if seeds is first:
            key = omnifx.results.name_of(f"{way.method} {way.setting}")
            part.samples[key] = samples[:KEPT_SAMPLES].contiguous()
            spectrum = bands(samples, bench.uncached(first))
    metrics = {
        metric.name: Value.of(one[metric.name] for one in found) for metric in METRICS if metric.name in found[0]
    }
    return Row(
        method=way.method,
        family=way.family,
        setting=way.setting,
        compute=sum(computes) / len(computes),
        target=share,
        metrics={name: value for name, value in metrics.items() if value is not None},
        drift=bench.drift(ready, first),
        bands=spectrum,
        timeline=None if ready.plan is None else timeline_of(ready.plan),
        samples=key,
    )


def timeline_of(plan: Plan) -> Timeline:
    """A plan's steps and notes."""
    return Timeline(steps=plan.timeline().splitlines()[1], timesteps=plan.timesteps, notes=plan.notes)


def uncached_row(bench: Bench, part: Part) -> Row:
    """The guards of the uncached samples themselves."""
    found = [bench.judge(bench.uncached(seeds), seeds) for seeds in bench.seeds.sets]
    metrics = {metric.name: Value.of(one[metric.name] for one in found) for metric in METRICS if metric.guard}
    part.samples["uncached"] = bench.uncached(bench.seeds.sets[0])[:KEPT_SAMPLES].contiguous()
    return Row(
        method="uncached",
        family="uncached",
        setting=f"{bench.case.steps} steps",
        compute=1.0,
        metrics={name: value for name, value in metrics.items() if value is not None},
        samples="uncached",
    )


def measure(
    case: Case,
    part: Part,
    seeds: Seeds,
    *,
    shares: Sequence[float],
    top: int,
    only: Sequence[str],
    bars: Progress,
) -> None:
    """All rows of a case that are not known yet."""
    bench = Bench(case, seeds, part.computes)
    wanted = [way for way in cases.rivals(case, shares) if not only or way.method in only]
    mine = [way for way in cases.ours(shares) if not only or way.method in only]
    bar = bars.add_task(case.name, total=len(wanted))

    def tick(label: str) -> None:
        bars.update(bar, description=f"{case.name}: {label}", advance=1)

    if not any(row.family == "uncached" for row in part.rows):
        part.rows.append(uncached_row(bench, part))
        part.save()
    tune(bench, part, wanted, tick)
    bench.computes = part.computes
    todo = [(way, share) for share in shares for way in chosen(part, wanted, share, top)]
    todo += [(way, share) for way in mine for share in shares if math.isclose(way.speedup or 0.0, 1.0 / share)]
    bars.update(bar, total=len(todo), completed=0)
    for way, share in todo:
        tick(f"{way.method}, {way.setting}")
        same = [row for row in part.rows if (row.method, row.setting) == (way.method, way.setting)]
        if any(row.target == share for row in same):
            continue
        try:
            row = same[0].model_copy(update={"target": share}) if same else report(bench, part, way, share)
        except ConfigError as error:
            part.refused[f"{way.method}, {way.setting}"] = str(error)
            continue
        part.rows.append(row)
        part.save()
    bars.remove_task(bar)


def verdicts(found: FoundCase, shares: Sequence[float]) -> list[dict[str, Any]]:
    """For each share: omnifx, the best rival, and the difference."""
    rows = []
    for share in shares:
        at = [row for row in found.rows if row.target == share and "psnr" in row.metrics]
        own = next((row for row in at if row.method == "omnifx"), None)
        others = [row for row in at if row.family != "ours"]
        if own is None or not others:
            continue
        best = max(others, key=lambda row: row.metrics["psnr"].mean)
        mine, theirs = own.metrics["psnr"], best.metrics["psnr"]
        rows.append(
            {
                "share": share,
                "omnifx dB": mine.mean,
                "spread": mine.spread or 0.0,
                "compute": own.compute,
                "best rival": f"{best.method} ({best.setting})",
                "its compute": best.compute,
                "its dB": theirs.mean,
                "its spread": theirs.spread or 0.0,
                "ahead dB": mine.mean - theirs.mean,
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> Results:
    """Measure, write the folder, and print who is ahead."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=list(cases.CASES), help="default: all; nothing: only write OUT")
    parser.add_argument("--methods", nargs="+", default=[], help="measure only these; default: all")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.4, 0.3, 0.25])
    parser.add_argument("--top", type=int, default=6, help="rivals that are reported for each share")
    parser.add_argument("--samples", type=int, default=20, help="of one set")
    parser.add_argument("--sets", type=int, default=5, help="sets of seeds, for the spread")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/frontier"))
    parser.add_argument("--again", nargs="+", default=[], help="methods to measure anew")
    parser.add_argument("--smoke", action="store_true", help="flow-20 with a few methods, 4 samples: half a minute")
    args = parser.parse_args(arguments)
    if args.smoke:
        args.cases, args.shares, args.samples, args.sets = ["flow-20"], [0.5], 4, 2
        args.methods = args.methods or ["omnifx", "fewer steps: Euler, 1st order", "diffusers FirstBlockCache"]
    if args.samples < 2 or args.sets < 1 or not all(0.0 < share < 1.0 for share in args.shares):
        parser.error("--samples must be >= 2, --sets >= 1, and --shares in (0, 1)")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    seeds = Seeds.of(args.sets, args.samples)
    conditions = {"samples": args.samples, "sets": args.sets, "shares": args.shares}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bars,
        torch._dynamo.config.patch(recompile_limit=64),
    ):
        for name in cases.CASES if args.cases is None else args.cases:
            part = Part.load(args.out / "parts", name, conditions, args.again)
            measure(cases.CASES[name], part, seeds, shares=args.shares, top=args.top, only=args.methods, bars=bars)
    return write(args.out, seeds, conditions)


def write(out: Path, seeds: Seeds, conditions: dict[str, Any]) -> Results:
    """Join all parts into a folder for `omnifx report`, and print who is ahead."""
    parts = {
        name: Part.load(out / "parts", name, conditions)
        for name in cases.CASES
        if (out / "parts" / f"{name}.json").exists()
    }
    found = Results(
        title="omnifx beside its peers and fewer steps",
        environment={**environment(), **_packages(), "command": _command(conditions)},
        metrics=METRICS,
        cases=tuple(part.found(cases.CASES[name], seeds) for name, part in parts.items()),
    )
    path = found.save(out, {name: part.samples for name, part in parts.items() if part.samples})
    tuned = {name: part.tuned for name, part in parts.items()}
    (out / "tuning.json").write_text(json.dumps(tuned, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
    from benchmarks.results import table

    for case in found.cases:
        if rows := verdicts(case, conditions["shares"]):
            table(rows, case.title)
    return found


def _command(conditions: Mapping[str, Any]) -> str:
    """What repeats the measurement, however many runs it took."""
    shares = " ".join(f"{share:g}" for share in conditions["shares"])
    seeds = f"--samples {conditions['samples']} --sets {conditions['sets']}"
    return f"python -m benchmarks.frontier --shares {shares} {seeds}"


def _packages() -> dict[str, str]:
    import importlib.metadata

    try:
        return {"cache-dit": importlib.metadata.version("cache-dit")}
    except importlib.metadata.PackageNotFoundError:
        return {}


if __name__ == "__main__":
    main()
