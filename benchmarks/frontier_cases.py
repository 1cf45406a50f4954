"""What `benchmarks.frontier` compares: models with samplers, and every way to make them cheaper, with its settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from benchmarks import peers
from examples.digits.data import NUM_CLASSES, load_digits
from examples.digits.models import load_classifier, load_dit, load_flow
from examples.digits.quality import evaluate
from examples.digits.sampling import FLOW_SCHEDULE, NOISE_SCHEDULE, sample_dit, sample_flow
from omnifx.results import Family, Metric

METRICS = (
    Metric(name="psnr", unit="dB", better="higher", about="to the uncached samples of the same seeds: mean"),
    Metric(name="p10", unit="dB", better="higher", about="PSNR that one sample in ten falls below"),
    Metric(name="ssim", better="higher", about="to the uncached samples of the same seeds"),
    Metric(name="frechet", better="lower", guard=True, about="to held-out real digits, in a classifier's features"),
    Metric(name="class", better="higher", guard=True, about="share of samples that the classifier takes for theirs"),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A trained model, its sampler and what judges its samples.

    `sample(model, seeds=, labels=, steps=, **more)` makes samples; `solvers` are what it takes as `solver`, by name,
    for rows of fewer steps; `judge(samples, uncached, labels)` gives the metrics.
    """

    name: str
    title: str
    steps: int
    load: Callable[[], Any]
    sample: Callable[..., Tensor]
    sampler: str
    guided: bool
    """Whether a call's batch is [uncond; cond]."""
    solvers: Mapping[str, Any]
    judge: Callable[[Tensor, Tensor, Tensor], dict[str, float]]
    tensors: str = "BCHW"


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way at one setting."""

    method: str
    family: Family
    setting: str
    calls: int | None = None
    """Calls of the network, where the way fixes them."""
    solver: Any = None
    order: int = 0
    """Of the extrapolation of outputs, where that is the way."""
    peer: Callable[[], peers.Peer] | None = None
    policy: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    speedup: float | None = None


def _digits(samples: Tensor, uncached: Tensor, labels: Tensor) -> dict[str, float]:
    found = evaluate(samples, uncached, labels, load_classifier(), load_digits()[1].images)
    values = (found.psnr, found.psnr_p10, found.ssim, found.frechet, found.consistency)
    return dict(zip((metric.name for metric in METRICS), values, strict=True))


def _scheduler(make: Any, settings: Mapping[str, Any], steps: int) -> Any:
    scheduler = make(**settings)
    scheduler.set_timesteps(steps)
    return scheduler


def _solvers(first: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The sampler's own solver, which is of first order, and better ones."""
    found: dict[str, Any] = {f"{first}, 1st order": None}
    for order in (2, 3):
        found[f"DPM-Solver++, order {order}"] = partial(
            _scheduler, DPMSolverMultistepScheduler, {**settings, "solver_order": order}
        )
        found[f"UniPC, order {order}"] = partial(
            _scheduler, UniPCMultistepScheduler, {**settings, "solver_order": order}
        )
    return found


def _dit(steps: int, cfg: float = 1.0) -> Case:
    return Case(
        name=f"dit-{steps}" + (f"-cfg{cfg:g}" if cfg != 1.0 else ""),
        title=f"Digits DiT (noise), DDIM, {steps} steps, CFG {cfg:g}",
        steps=steps,
        load=load_dit,
        sample=partial(sample_dit, cfg=cfg),
        sampler=f"DDIM, eta 0, CFG {cfg:g}",
        guided=cfg != 1.0,
        solvers=_solvers("DDIM", NOISE_SCHEDULE),
        judge=_digits,
    )


def _flow(steps: int, cfg: float = 2.0) -> Case:
    return Case(
        name=f"flow-{steps}" + (f"-cfg{cfg:g}" if cfg != 2.0 else ""),
        title=f"Digits PixArt (flow), Euler, {steps} steps, CFG {cfg:g}",
        steps=steps,
        load=load_flow,
        sample=partial(sample_flow, cfg=cfg),
        sampler=f"Euler, CFG {cfg:g}" + (" in one call" if cfg != 1.0 else ""),
        guided=cfg != 1.0,
        solvers=_solvers("Euler", FLOW_SCHEDULE),
        judge=_digits,
    )


def labels_of(num: int) -> Tensor:
    """Every class equally often."""
    return torch.arange(num) % NUM_CLASSES


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        _dit(50),
        _flow(50),
        _dit(20),
        _flow(20),
        _dit(20, cfg=1.5),
        _flow(20, cfg=1.0),
        _flow(20, cfg=4.0),
    )
}


def rivals(case: Case, shares: Sequence[float]) -> Iterator[Way]:
    """Everything but the default of omnifx; of each method all settings that are tried on the tuning seeds."""
    calls = dict.fromkeys(max(1, round(case.steps * share)) for share in sorted(shares, reverse=True))
    for label, solver in case.solvers.items():
        for number in calls:
            yield Way(
                method=f"fewer steps: {label}",
                family="solver",
                setting=f"{number} steps",
                calls=number,
                solver=solver,
            )
    for order, name in (
        (0, "repeated"),
        (1, "extrapolated linearly"),
        (2, "extrapolated quadratically"),
        (3, "extrapolated cubically"),
    ):
        for number in calls:
            method = f"output {name}"
            yield Way(method=method, family="solver", setting=f"{number} calls", calls=number, order=order)
    yield from _peer_ways(case)
    yield from _policy_ways(shares)


def ours(shares: Sequence[float]) -> Iterator[Way]:
    """What omnifx does by default; nothing is tuned."""
    for share in shares:
        speedup = 1.0 / share
        yield Way(method="omnifx", family="ours", setting=f"speedup={speedup:.3g}", policy="auto", speedup=speedup)


def _peer_ways(case: Case) -> Iterator[Way]:
    grids: dict[type[peers.Peer], list[dict[str, Any]]] = {
        peers.TaylorSeer: [
            {"interval": n, "order": order, "before": before}
            for n, before in ((2, 2), (2, 3), (3, 2), (3, 3), (4, 3), (5, 3), (6, 3))
            for order in (1, 2)
        ],
        peers.FirstBlockCache: [{"threshold": t} for t in (0.05, 0.1, 0.15, 0.2, 0.3, 0.45, 0.7)],
        peers.MagCache: [
            {"threshold": t, "max_skip": n, "retention": r}
            for t, n in ((0.06, 3), (1.0, 1), (1.0, 2), (1.0, 3), (3.0, 4))
            for r in (0.1, 0.2)
        ],
        peers.PAB: [{"spatial": n, "cross": c} for n, c in ((2, 3), (4, 8))],
        peers.FasterCache: [
            {"attention": n, "unconditional": u, "guided": case.guided, "tensors": case.tensors}
            for n in (2, 4)
            for u in ((2, 5) if case.guided else (2,))
        ],
        peers.DBCache: [
            {"threshold": t, "continuous": n, "warmup": w, "order": order}  # at 1000 it always reuses: best here
            for order in (0, 1, 2)
            for n in (1, 2, 3, 4)
            for t, w in ((1e3, 4), (1e3, 2))
        ],
    }
    for cls, grid in grids.items():
        for options in grid:
            shown = ", ".join(f"{key}={value}" for key, value in options.items() if key not in ("guided", "tensors"))
            method = cls.name
            if cls is peers.DBCache:
                method += " DBCache + TaylorSeer" if options["order"] else " DBCache"
            yield Way(method=method, family="peer", setting=shown, peer=partial(cls, **options))


def _policy_ways(shares: Sequence[float]) -> Iterator[Way]:
    grid: dict[str, list[dict[str, Any]]] = {
        "fora": [{"interval": n} for n in (2, 3, 4)],
        "taylorseer": [{"interval": n, "predictor": f"taylor:{order}"} for order in (1, 2) for n in (2, 3, 4)],
        "goc": [{"interval": n, "eta": 0.8} for n in (2, 3, 4)],
        "omnicache": [{"speedup": 1.0 / share} for share in shares],
        "lemica": [{"speedup": 1.0 / share} for share in shares],
    }
    for name, settings in grid.items():
        for chosen in settings:
            shown = ", ".join(
                f"{key}={value:.3g}" if key == "speedup" else f"{key}={value}" for key, value in chosen.items()
            )
            options = dict(chosen)
            speedup = options.pop("speedup", None)
            method = f"policy {name}"
            yield Way(method=method, family="policy", setting=shown, policy=name, options=options, speedup=speedup)
