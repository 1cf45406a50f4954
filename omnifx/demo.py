"""The tour behind `omnifx demo`: a trained model, uncached and accelerated, on the same seeds, in numbers and pictures.

It needs a checkout: the digits models lie in `examples/digits`, which a wheel does not hold.
"""

from __future__ import annotations

import importlib
import json
import math
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from omnifx.errors import ConfigError
from omnifx.options import Options
from omnifx.pictures import Samples, plan_figure, samples_figure, save_figure
from omnifx.plan import Plan
from omnifx.profile import Profile
from omnifx.session import plans, stats, versions

ModelName = Literal["dit", "flow"]

CALIBRATION_SEED = 1_000_000
"""First seed of the measured generation; the reported ones count up from 0, so the two never meet."""
NUM_CLASSES = 10


@dataclass(kw_only=True)
class Row:
    """One line of the result: a way to make the samples, and what it gave."""

    name: str
    steps: int
    calls: dict[str, int]
    """How many calls of one generation ran each variant."""
    seconds: float = 0.0
    """Median of the repeated generations."""
    all_seconds: list[float] = field(default_factory=list)
    speedup: float = 1.0
    """Seconds uncached over seconds."""
    flops_ratio: float = 1.0
    """FLOPs uncached over FLOPs."""
    psnr: float | None = None
    """dB against the uncached samples of the same seeds, mean over samples; None: samples are the same."""
    psnr_p10: float | None = None
    ssim: float = 1.0
    class_consistency: float = 0.0
    frechet: float = 0.0


@dataclass(kw_only=True)
class Result:
    """What a demo found, and the files it wrote."""

    model: str
    rows: list[Row]
    num_samples: int
    plan: Plan
    files: list[Path]
    seconds: float

    def table(self) -> Table:
        """The rows for a terminal."""
        table = Table(title=f"{self.model}, {self.num_samples} samples; PSNR and SSIM against uncached")
        table.add_column("")
        for name in ("steps", "calls", "seconds", "speedup", "FLOPs", "PSNR mean / p10", "SSIM", "class ok", "Frechet"):
            table.add_column(name, justify="right", no_wrap=name != "calls")
        for row in self.rows:
            quality = "same" if row.psnr is None or row.psnr_p10 is None else f"{row.psnr:.1f} / {row.psnr_p10:.1f} dB"
            table.add_row(
                row.name,
                str(row.steps),
                ", ".join(f"{count} {name}" for name, count in row.calls.items()),
                f"{row.seconds:.2f}",
                f"{row.speedup:.2f}x",
                f"{1 / row.flops_ratio:.0%}",
                quality,
                f"{row.ssim:.4f}",
                f"{row.class_consistency:.1%}",
                f"{row.frechet:.2f}",
            )
        return table


@dataclass
class _Digits:
    """The digits example, whose types an installed omnifx cannot know."""

    model: Any
    sample: Callable[..., Tensor]
    classifier: Any
    real: Tensor
    evaluate: Callable[..., Any]


def run_demo(
    out: Path,
    *,
    model: ModelName = "dit",
    steps: int = 50,
    speedup: float = 2.0,
    samples: int = 32,
    repeats: int = 3,
    lowering: Literal["inductor", "eager"] = "inductor",
    command: Sequence[str] = (),
    progress: bool = True,
) -> Result:
    """Make the same samples uncached, through omnifx, and with fewer steps; measure and draw.

    Args:
        out: Folder for plan.png, grids.png, results.json, plan.json and profile.safetensors; made if it is not there.
        model: The digits model.
        steps: Denoising steps of a generation.
        speedup: FLOPs uncached over planned, asked of the policy.
        samples: Samples of one generation, a batch.
        repeats: Generations of each way, each of other seeds; ways take turns. Times are medians, quality is over all
            samples.
        lowering: "eager" runs everything without Inductor: quick to start, and no times worth reading.
        command: What to note in results.json as the command.
        progress: Whether to show progress bars.

    Raises: ConfigError for arguments out of range, outside a checkout, or if no plan reaches `speedup`.
    """
    began = time.perf_counter()
    _check(steps, samples, repeats)
    Options.parse({"speedup": speedup})
    digits = _load_digits(model)
    _make_folder(out)
    torch._dynamo.reset()
    options: Any = {"speedup": speedup, "profile_cache": False, "lowering": lowering}
    uncached: Any = torch.compile(digits.model) if lowering == "inductor" else digits.model
    cached: Any = torch.compile(digits.model, backend="omnicache", options=options)

    columns = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=not progress) as bar:

        def generate(ways_model: Any, num_steps: int, first_seed: int, task: TaskID) -> tuple[Tensor, float]:
            seeds = range(first_seed, first_seed + samples)
            labels = torch.tensor([seed % NUM_CLASSES for seed in seeds])
            start = time.perf_counter()
            images = digits.sample(
                ways_model, seeds=seeds, labels=labels, steps=num_steps, progress=lambda *_: bar.advance(task)
            )
            return images, time.perf_counter() - start

        task = bar.add_task("compiling uncached, with Inductor", total=steps)
        generate(uncached, steps, CALIBRATION_SEED, task)
        task = bar.add_task("compiling and measuring with omnifx", total=steps)
        _, measuring_seconds = generate(cached, steps, CALIBRATION_SEED, task)
        task = bar.add_task(
            "first planned generation", total=steps
        )  # ends the measured one: from here on there is a plan
        generate(cached, steps, CALIBRATION_SEED + samples, task)
        profile, plan = _followed(cached)

        fewer = max(1, round(steps / plan.speedup))
        ways = [("uncached", uncached, steps), ("omnifx", cached, steps), ("fewer steps", uncached, fewer)]
        done = len(stats(cached).generations)
        task = bar.add_task("generating the same seeds each way", total=repeats * sum(way[2] for way in ways))
        made: dict[str, list[tuple[Tensor, float]]] = {name: [] for name, _, _ in ways}
        for repeat in range(repeats):
            for name, ways_model, num_steps in ways:
                made[name].append(generate(ways_model, num_steps, repeat * samples, task))

    found = stats(cached)
    logs = found.generations[done:]
    calls = [Counter({"full": steps}), _calls(logs), Counter({"full": fewer})]
    flops = [1.0, len(logs) / sum(1 / log.speedup for log in logs), steps / fewer]
    images = {name: torch.cat([image for image, _ in runs]) for name, runs in made.items()}
    labels = torch.arange(repeats * samples) % NUM_CLASSES
    rows: list[Row] = []
    for (name, _, num_steps), counted, ratio in zip(ways, calls, flops, strict=True):
        seconds = [second for _, second in made[name]]
        row = Row(
            name=name,
            steps=num_steps,
            calls=dict(counted),
            seconds=median(seconds),
            all_seconds=seconds,
            flops_ratio=ratio,
        )
        row.speedup = (rows[0].seconds / row.seconds) if rows else 1.0
        _judge(row, images[name], images["uncached"], labels, digits)
        rows.append(row)

    files = [
        save_figure(plan_figure(plan, profile), out / "plan.png"),
        save_figure(_samples_picture(rows, images), out / "grids.png"),
        out / "results.json",
        out / "plan.json",
        out / "profile.safetensors",
    ]
    plan.save(out / "plan.json")
    profile.save(out / "profile.safetensors")
    result = Result(
        model=f"digits {model} ({plan.model})",
        rows=rows,
        num_samples=len(labels),
        plan=plan,
        files=files,
        seconds=time.perf_counter() - began,
    )
    record = {
        "command": list(command),
        "versions": {**versions(), "python": platform.python_version()},
        "device": f"CPU, {platform.machine()}, {torch.get_num_threads()} threads",
        "lowering": lowering,
        "model": model,
        "steps": steps,
        "speedup_asked": speedup,
        "speedup_planned": plan.speedup,
        "timeline": plan.timeline().splitlines()[-1],
        "plan_notes": list(plan.notes),
        "samples_per_generation": samples,
        "generations": repeats,
        "reported_seeds": [0, repeats * samples - 1],
        "measured_seeds": [CALIBRATION_SEED, CALIBRATION_SEED + samples - 1],
        "rows": [asdict(row) for row in rows],
        "unplanned_full_steps": dict(sum((Counter(log.reasons) for log in logs), Counter())),
        "recompilations": found.recompilations,
        "peak_cache_bytes": found.peak_cache_bytes,
        "compile_seconds": found.compile_seconds,
        "measuring_seconds": measuring_seconds,
        "seconds": result.seconds,
    }
    (out / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return result


def _check(steps: int, samples: int, repeats: int) -> None:
    for name, value, least in (("steps", steps, 2), ("samples", samples, 2), ("repeats", repeats, 1)):
        if value < least:
            raise ConfigError(f"demo: {name} must be >= {least}, got {value!r}.")


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"demo: the folder {out} cannot be made: {error.strerror}. Choose another --out.") from error


def _load_digits(model: ModelName) -> _Digits:
    for root in (Path.cwd(), Path(__file__).resolve().parent.parent):
        if (root / "examples" / "digits" / "__init__.py").exists() and str(root) not in sys.path:
            sys.path.insert(0, str(root))
    try:
        data, models, quality, sampling = (
            importlib.import_module(f"examples.digits.{name}") for name in ("data", "models", "quality", "sampling")
        )
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sklearn"):
            raise ConfigError(
                "demo: the digits data comes with scikit-learn, which is missing: pip install it."
            ) from error
        raise ConfigError(
            f"demo: the digits models are not here ({error}); they are part of the repository, not of the wheel. "
            "Run `omnifx demo` from a checkout of it."
        ) from error
    if model not in ("dit", "flow"):
        raise ConfigError(f"demo: model must be 'dit' or 'flow', got {model!r}.")
    return _Digits(
        model=models.load_dit() if model == "dit" else models.load_flow(),
        sample=sampling.sample_dit if model == "dit" else sampling.sample_flow,
        classifier=models.load_classifier(),
        real=data.load_digits()[1].images,
        evaluate=quality.evaluate,
    )


def _followed(cached: Any) -> tuple[Profile, Plan]:
    found = plans(cached)
    if not found:
        raise ConfigError(f"demo: no plan was made: {'; '.join(stats(cached).notes) or 'no reason was noted'}.")
    return found[0]


def _calls(logs: Sequence[Any]) -> Counter[str]:
    total: Counter[str] = Counter()
    for log in logs:
        total.update(log.variants)
    return Counter({name: round(count / len(logs)) for name, count in total.items()})


def _judge(row: Row, images: Tensor, reference: Tensor, labels: Tensor, digits: _Digits) -> None:
    quality = digits.evaluate(images, reference, labels, digits.classifier, digits.real)
    if math.isfinite(quality.psnr):
        row.psnr, row.psnr_p10 = quality.psnr, quality.psnr_p10
    row.ssim, row.class_consistency, row.frechet = quality.ssim, quality.consistency, quality.frechet


def _samples_picture(rows: Sequence[Row], images: dict[str, Tensor]) -> Any:
    reference, *others = [
        Samples(
            f"{row.name}\n{row.steps} steps, {row.seconds:.2f} s{'' if row.psnr is None else f', {row.psnr:.1f} dB'}",
            images[row.name],
        )
        for row in rows
    ]
    return samples_figure(reference, others)
