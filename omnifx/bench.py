"""Measure a user's own pipeline: uncached against plans and against fewer steps, with the same seeds and prompts.

Results are written after every row, so that a run can be interrupted and continued; `omnifx.bench_rows` measures.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from omnifx.bench_rows import FAILED, Bench, reason_of
from omnifx.bench_targets import Target
from omnifx.bench_ways import DEFAULT_POLICIES, DEFAULT_SPEEDUPS, Settings, Way, ways_of, with_steps
from omnifx.errors import ResultsError
from omnifx.metrics import psnr
from omnifx.policy import Policy
from omnifx.results import FILE, Case, Metric, Results, Row, name_of
from omnifx.session import versions, weights_hash

METRICS = (
    Metric(name="psnr", unit="dB", better="higher", about="to the uncached samples of the same seeds, mean of samples"),
    Metric(name="p10", unit="dB", better="higher", about="PSNR that one sample in ten falls below"),
    Metric(name="ssim", better="higher", about="to the uncached samples of the same seeds"),
    Metric(
        name="frechet",
        better="lower",
        guard=True,
        about="to the uncached samples, in the named features; of these themselves, between sets of seeds",
    ),
    Metric(name="seconds", unit="s", better="lower", about="of a generation, median; without compiling"),
    Metric(name="cache", unit="MiB", better="lower", about="most that was kept from step to step"),
    Metric(name="memory", unit="MiB", better="lower", about="most that tensors held of the device in a generation"),
    Metric(name="compile", unit="s", better="lower", about="of omnifx's variants, once"),
)
SETTINGS = "settings.json"
"""The file beside the results that tells what decides their rows: only with all of it the same are they continued."""
SAME_DB = 30.0
"""Least PSNR of the uncached samples to those of the results that are continued: with less, something has changed."""


def run_bench(
    target: Target,
    out: str | Path,
    *,
    policies: Sequence[str | Policy] = DEFAULT_POLICIES,
    speedups: Sequence[float] = DEFAULT_SPEEDUPS,
    settings: Settings | None = None,
    features: Callable[[Tensor], object] | None = None,
    features_name: str = "",
    resume: bool = False,
    command: Sequence[str] = (),
    progress: bool = True,
) -> Results:
    """Measure a target uncached, through policies, and with fewer steps; all with the same seeds.

    Args:
        target: What `load_pipeline` and `pipeline_target`, or `script_target`, make.
        out: Folder for the results, in the form of `omnifx.results`; written after every row.
        policies: Objects, names, or names with options such as "fora(interval=3)".
        speedups: FLOPs uncached over planned, asked of each policy; the same number of calls is given to fewer steps.
        settings: How much is measured.
        features: Samples [N, C, (T,) H, W], float32 on the host -> [N, D], for the Frechet distance to the uncached
            samples. N should lie well above D.
        features_name: What to note of it.
        resume: Whether to keep the rows and refusals that `out` has, which must be of the same settings; what failed is
            tried again.
        command: What to note as the command.
        progress: Whether to show progress, on stderr.

    Returns: What was written; ways that are refused, or that fail, are listed with their reasons. With OMNIFX_DEBUG=1
        the first of them is raised.
    Raises: ConfigError for arguments out of range or a target that cannot be measured; ResultsError if `out` holds
        results already and is not to be continued, or was measured under other settings.
    Memory: the samples of the uncached run and of one way, on the host.
    """
    chosen = settings or Settings()
    book = _Book(Path(out), target, chosen, features_name, command)
    ways = ways_of(policies, speedups)
    book.open(resume=resume)
    with _Progress(enabled=progress) as shown:
        shown.begin(len(ways) + 1)
        bench = Bench(target, chosen, features=features, expect=shown.expect, advance=shown.advance)
        book.begin(bench)
        for way in with_steps(ways, target.steps or bench.steps):
            shown.next_row()
            if book.has(way):
                continue
            try:
                row, samples = bench.measure(way)
            except Exception as error:
                if os.environ.get("OMNIFX_DEBUG"):
                    raise
                book.refuse(way, reason_of(error))  # the other ways are measured all the same
            else:
                book.add(row, samples)
    return book.results


def table_of(case: Case) -> Table:
    """The rows of a case for a terminal: what was skipped, what it cost, and what it saved."""
    names = {name for row in case.rows for name in row.metrics}
    columns: dict[str, Callable[[Row], str]] = {
        "": lambda row: row.method,
        "setting": lambda row: row.setting,
        "steps": _steps,
        "compute": lambda row: f"{row.compute:.3f}",
        "time": lambda row: "-" if row.time is None else f"{row.time:.3f}",
        "PSNR / p10 dB": lambda row: "-" if row.family == "uncached" else _psnr(row),
        "SSIM": _figure("ssim", ".4f"),
        "Frechet": _figure("frechet", ".3g"),
        "cache MiB": _figure("cache", ".2f"),
        "peak MiB": _figure("memory", ".0f"),
    }
    absent = {"Frechet": "frechet", "peak MiB": "memory", "SSIM": "ssim"}
    shown = {head: text for head, text in columns.items() if absent.get(head) is None or absent[head] in names}
    seconds = next((_figure("seconds", ".3g")(row) for row in case.rows if row.family == "uncached"), "-")
    table = Table(title=f"{case.title}, {case.steps} steps, {case.sampler}; a generation takes {seconds} s uncached")
    for head in shown:
        words = head in ("", "setting", "steps")
        table.add_column(head, justify="left" if words else "right", no_wrap=not words)
    for row in case.rows:
        table.add_row(*(escape(text(row)) for text in shown.values()))
    return table


LETTERS = {
    "F": "full",
    "r": "reuse",
    "c": "reuse with corrected output",
    "a": "reuse combined with older outputs",
    "s": "skipped, older outputs combined",
    "p": "predicted",
    "C": "predicted, output corrected",
    "m": "some branches computed",
    "t": "some tokens computed",
}
"""What the letters of a timeline stand for, as `Plan.timeline` has them."""


def legend(case: Case) -> str:
    """What the letters in the table of a case stand for."""
    used = {letter for row in case.rows if row.timeline is not None for letter in row.timeline.steps}
    return ", ".join(f"{letter} {text}" for letter, text in LETTERS.items() if letter in used)


@dataclass
class _Book:
    """The results of a run, written after every row."""

    out: Path
    target: Target
    settings: Settings
    features_name: str
    command: Sequence[str]
    rows: list[Row] = field(default_factory=list)
    known: list[Row] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    samples: dict[str, Tensor] = field(default_factory=dict)

    def open(self, *, resume: bool) -> None:
        """Take over what there is; before anything is measured."""
        self.told = self._told()
        if not (self.out / FILE).exists():
            self._make_folder()
            return
        if not resume:
            raise ResultsError(
                f"bench: {self.out} holds results already. Continue them with --resume, or choose another folder."
            )
        old, path = Results.load(self.out), self.out / SETTINGS
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if changed := sorted(key for key in {*before, *self.told} if before.get(key) != self.told.get(key)):
            was = ", ".join(f"{key} was {before.get(key)}, now {self.told.get(key)}" for key in changed)
            raise ResultsError(
                f"bench: {self.out} holds results of other settings: {was}. Choose another folder, or the old settings."
            )
        (case,) = old.cases
        self.known = list(case.rows)
        self.refused = {way: why for way, why in case.refused.items() if not why.startswith(FAILED)}
        self.samples = old.samples_of(self.out, case)

    def begin(self, bench: Bench) -> None:
        """The uncached run is made."""
        self.bench = bench
        kept = bench.reference[: self.settings.keep]
        before = self.samples.get("uncached")
        if before is not None and len(before) == len(kept) and before.shape == kept.shape:
            nearest = float(psnr(before.float(), kept, data_range=bench.highest - bench.lowest).mean())
            if nearest < SAME_DB:
                raise ResultsError(
                    f"bench: the uncached samples are not those of {self.out}: {nearest:.1f} dB. Something else has "
                    "changed, so its rows cannot be continued. Choose another folder."
                )
        (self.out / SETTINGS).write_text(json.dumps(self.told, indent=1) + "\n", encoding="utf-8")
        self.add(next((row for row in self.known if row.family == "uncached"), bench.uncached_row()), bench.reference)

    def has(self, way: Way) -> bool:
        """Whether a row is known already, or why there is none; if so, that is taken over."""
        found = [row for row in self.known if (row.method, row.setting) == (way.method, way.setting)]
        self.rows += found
        return bool(found) or way.label in self.refused

    def add(self, row: Row, samples: Tensor) -> None:
        """A row was measured."""
        self.rows.append(row)
        if row.samples is not None:
            self.samples[row.samples] = samples[: self.settings.keep].half()
        self._save()

    def refuse(self, way: Way, reason: str) -> None:
        """A row cannot be measured."""
        self.refused[way.label] = reason
        self._save()

    def _save(self) -> None:
        rest = [row for row in self.known if row not in self.rows]  # an interrupted run loses none of them
        case = Case(
            name=name_of(self.target.title),
            title=self.target.title,
            model=type(self.target.model).__name__,
            sampler=self.target.sampler,
            steps=self.bench.steps,
            seeds=self.bench.seeds,
            rows=(*self.rows, *rest),
            refused=self.refused,
            data_range=self.bench.highest - self.bench.lowest,
            lowest=self.bench.lowest,
        )
        names = {name for row in case.rows for name in row.metrics}
        self.results = Results(
            title=f"omnifx bench: {self.target.title}",
            environment=self._environment(),
            metrics=tuple(metric for metric in METRICS if metric.name in names),
            cases=(case,),
        )
        self.results.save(self.out, {case.name: self.samples} if self.settings.keep else None)

    def _told(self) -> dict[str, str]:
        """What decides the rows: with any of it changed they are others."""
        own = {key: str(value) for key, value in asdict(self.settings).items()}
        model = self.target.model
        device = next((parameter.device.type for parameter in model.parameters()), "cpu")
        weights = {"model": type(model).__name__, "weights": weights_hash(list(model.parameters()))[:16]}
        return {
            **self.target.settings,
            **own,
            **weights,
            "features": self.features_name,
            "device": device,
            **versions(),
        }

    def _environment(self) -> dict[str, str | int]:
        device = self.bench.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}"
        return {
            "command": " ".join(self.command),
            "date": time.strftime("%Y-%m-%d"),
            **versions(),
            "python": platform.python_version(),
            "device": name,
            "threads": torch.get_num_threads(),
            "lowering": self.settings.lowering,
            "samples": len(self.bench.reference),
        }

    def _make_folder(self) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResultsError(
                f"bench: the folder {self.out} cannot be made: {error.strerror}. Choose another --out."
            ) from error


class _Progress:
    """Two bars on stderr: all rows, and the generations of the one under way."""

    def __init__(self, *, enabled: bool) -> None:
        columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not enabled, transient=True)
        self.rows = self.bar.add_task("ways")
        self.generations = self.bar.add_task("")

    def __enter__(self) -> _Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def begin(self, rows: int) -> None:
        """So many rows are to come."""
        self.bar.update(self.rows, total=rows)

    def next_row(self) -> None:
        """A row is done."""
        self.bar.advance(self.rows)

    def expect(self, name: str, generations: int) -> None:
        """Something begins that takes so many generations."""
        self.bar.reset(self.generations, total=generations, description=f"  {escape(name)}"[:40])

    def advance(self) -> None:
        """A generation is done."""
        self.bar.advance(self.generations)


def _figure(name: str, form: str) -> Callable[[Row], str]:
    """The text of a metric, with its spread."""

    def text(row: Row) -> str:
        value = row.metrics.get(name)
        if value is None:
            return "-"
        return f"{value.mean:{form}}" + (f" ± {value.spread:{form}}" if value.spread is not None else "")

    return text


def _psnr(row: Row) -> str:
    """Both figures of PSNR; samples that are all equal have none."""
    return f"{_figure('psnr', '.1f')(row)} / {_figure('p10', '.1f')(row)}" if "psnr" in row.metrics else "same"


def _steps(row: Row) -> str:
    """How many steps ran what."""
    counts: Mapping[str, int] = Counter(row.timeline.steps if row.timeline is not None else "")
    return " ".join(f"{count}{letter}" for letter, count in counts.items())


__all__ = ["METRICS", "legend", "run_bench", "table_of"]
