"""Every policy on the trained digits models, over a range of settings: fidelity, quality, time and memory over compute.

    python -m benchmarks.policies [--models dit flow] [--policies NAME ...] [--steps 50] [--samples 100]
        [--lowering inductor|eager] [--out FILE [--resume]] [--smoke]

Every row has the seeds and labels of the uncached samples it is compared with. What a policy measures before (a
profile, or the first generation that a run-time policy fits something to) comes from other seeds. No setting is chosen
by what is reported: all are shown.

compute     FLOPs of what ran over those of the uncached generation, in the mean over batches; probes and the replays
            that measure noise are included
time        CPU seconds of the process on one thread, least of the batches, over those of an uncached generation before
            the method's first row; models this small also pay for what is no FLOP: for speed see `benchmarks.speed`
PSNR, p10   dB to the uncached samples: mean over samples, and the sample that one in ten is worse than
SSIM        to the uncached samples
Frechet     distance to 500 held-out digits in a classifier's features; spreads by about .4 over seeds
class       share of samples that the classifier takes for their label
cache KiB   most that was kept, for each sample of the batch

Run-time policies decide for a whole batch of 50, by its largest signal. The 2nd-order solver goes to another image: its
PSNR is no verdict.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import omnifx
from benchmarks.quality import BATCH, CASES, FIRST_CALIBRATION_SEED, Case, Extrapolated, Figures, labels_of
from benchmarks.results import save, table
from examples.digits.data import load_digits
from examples.digits.models import load_classifier
from examples.digits.quality import evaluate
from omnifx.errors import ConfigError
from omnifx.plan import Plan
from omnifx.policy import Policy, policies
from omnifx.profile import Profile
from omnifx.runtime import is_runtime

CALIBRATION_RUNS = 3
RELEASE = {"dit": "dit", "flow": "pixart"}  # whose constants the token-wise policies take
BASELINES = ("fewer steps", "fewer steps, 2nd order", "extrapolated output")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row: a policy with options, or a baseline at a number of calls of the model."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    speedup: float | None = None
    calls: int | None = None

    @property
    def label(self) -> str:
        """The options, as a user would write them."""
        shown = {**self.options, **({"speedup": self.speedup} if self.speedup is not None else {})}
        if self.calls is not None:
            shown["calls"] = self.calls
        return ", ".join(f"{name}={_short(value)}" for name, value in shown.items()) or "defaults"

    @property
    def policy(self) -> Policy | None:
        """The policy; None for a baseline."""
        return policies()[self.method](**self.options) if self.calls is None else None


def _finite(decibels: float) -> float | None:
    """None for equal images: JSON knows no infinity."""
    return decibels if math.isfinite(decibels) else None


def _short(value: object) -> str:
    """An option's value; of long ranges only the ends."""
    if isinstance(value, tuple) and len(value) > 4:
        return f"({value[0]}, {value[1]}, ..., {value[-1]})"
    return str(value)


def settings_of(model: str, steps: int) -> list[Setting]:
    """All rows of one model."""
    intervals = (2, 3, 4)
    asked = (1.5, 2.0, 2.5, 3.0)
    own = {"release": RELEASE[model]}
    grid: dict[str, list[dict[str, Any]]] = {
        "fora": [{"interval": n} for n in (*intervals, 5)],
        "omnicache": [{"speedup": s} for s in (1.5, 2.0, 2.5, 2.8)],
        "auto": [{"speedup": s} for s in (*asked, 4.0)] + [{"network": "reuse", "speedup": s} for s in (*asked, 4.0)],
        "goc": [{"interval": n, "eta": eta} for eta in (1.2, 0.8) for n in intervals],
        "eoc": [{"interval": n} for n in (2, 3)]
        + [{"interval": n, "form": "shift", "strength": 0.5} for n in intervals],
        "taylorseer": [{"interval": n, "predictor": f"taylor:{order}"} for order in (1, 2) for n in intervals],
        "toca": [own]
        + [{**own, "interval": n, "adaptive": False} for n in intervals]
        + [{**own, "interval": n, "adaptive": False, "ratio": 0.4} for n in (3, 4)]
        + [{**own, "interval": n, "adaptive": False, "ratio": 0.4, "score": "attention"} for n in (3, 4)],
        "duca": [{**own, "interval": n} for n in intervals],
        "delta-dit": [{"interval": n} for n in intervals],
        "t-gate": [{"gate_step": max(1, steps * share // 100)} for share in (60, 40, 20)],
        "pab": [{}]
        + [
            {"spatial_range": n, "cross_range": 3 * n, "window": (0.0, 1000.0), "mlp_skip": n - 1,
             "mlp_times": tuple(range(100, 1000, every)), "mlp_blocks": tuple(range(12))}
            for n, every in ((2, 40), (3, 60))
        ],
        "smoothcache": [{"alpha": a} for a in (0.05, 0.1, 0.2, 0.35)],
        "magcache": [{}] + [{"speedup": s} for s in asked],
        "lemica": [{"speedup": s} for s in asked],
        "teacache": [{"threshold": t} for t in (0.05, 0.1, 0.2, 0.4)],
        "adacache": [{"codebook": c} for c in ("slow", "fast")]
        + [{"codebook": ((bound, 4), (2 * bound, 3), (4 * bound, 2), (1e9, 1))} for bound in (0.02, 0.1)],
        "first-block-cache": [{"threshold": t} for t in (0.05, 0.1, 0.2, 0.3)],
        "dbcache": [{"threshold": t} for t in (0.12, 0.24, 0.48)],
        "easycache": [{"threshold": t} for t in (0.05, 0.1, 0.2, 0.4)],
        "dicache": [{"threshold": t} for t in (0.2, 0.4, 0.8)],
    }  # fmt: skip
    rows = []
    for method, options in grid.items():
        for chosen in options:
            chosen = dict(chosen)
            rows.append(Setting(method=method, speedup=chosen.pop("speedup", None), options=chosen))
    for baseline in BASELINES:
        calls = dict.fromkeys(round(steps / ratio) for ratio in (*asked, 4.0))
        rows += [Setting(method=baseline, calls=number) for number in calls]
    return rows


def calibrate(case: Case, policy: Policy, *, steps: int, batch: int, lowering: str, taken: Sequence[int]) -> Profile:
    """A profile for `policy`, from seeds that are not among `taken`."""
    seeds = range(FIRST_CALIBRATION_SEED, FIRST_CALIBRATION_SEED + CALIBRATION_RUNS * batch)
    if shared := set(seeds) & set(taken):
        raise ValueError(f"seeds {sorted(shared)} would be both calibrated on and reported; report others.")

    def generate(model: Any, run: int) -> Tensor:
        return case.sample(model, seeds=seeds[run * batch :][:batch], labels=labels_of(batch), steps=steps)

    options = {"lowering": lowering}
    return omnifx.calibrate(
        case.load(), generate, policy=policy, runs=CALIBRATION_RUNS, options=options, progress=False
    )


class Bench:
    """One model at one number of steps: its uncached samples, its profiles, and what is measured against them."""

    def __init__(self, name: str, *, steps: int, samples: int, lowering: str) -> None:
        self.name, self.steps, self.samples, self.lowering = name, steps, samples, lowering
        self.case, self.batch = CASES[name], min(BATCH, samples)
        self.classifier, self.real, self.labels = load_classifier(), load_digits()[1].images, labels_of(samples)
        self._profiles: dict[str, Profile] = {}
        self._timed_for = ""  # the method that the uncached generation was last timed for
        self.plain = self._uncached()
        self.uncached, self.seconds = self._sample(self.plain)

    def _uncached(self) -> Any:
        torch._dynamo.reset()  # or its memory of other batch sizes makes the batch size symbolic
        model = self.case.load()
        plain = model if self.lowering == "eager" else torch.compile(model)
        self._warm_up(plain)
        return plain

    def _warm_up(self, model: Any, **more: Any) -> None:
        """One generation from calibration seeds."""
        seeds = range(FIRST_CALIBRATION_SEED, FIRST_CALIBRATION_SEED + self.batch)
        self.case.sample(model, seeds=seeds, labels=labels_of(self.batch), **{"steps": self.steps, **more})

    def _sample(self, model: Any, **more: Any) -> tuple[Tensor, float]:
        """All samples, and the least CPU seconds of a batch. The first may compile; a single batch is sampled twice."""
        found, seconds = [], []
        firsts = list(range(0, self.samples, self.batch))
        for first in firsts if len(firsts) > 1 else 2 * firsts:
            labels = self.labels[first : first + self.batch]
            before = time.process_time()
            images = self.case.sample(
                model, seeds=range(first, first + self.batch), labels=labels, **{"steps": self.steps, **more}
            )
            seconds.append(time.process_time() - before)
            found.append(images)
        return torch.cat(found[: len(firsts)]), min(seconds)

    def profile(self, policy: Policy) -> Profile:
        """What the policy measures, once for all of its settings but those that change what is measured."""
        key = f"{policy.name} {policy.measures} {policy.measured_lags} {policy.prior}"
        if key not in self._profiles:
            torch._dynamo.reset()
            self._profiles[key] = calibrate(
                self.case,
                policy,
                steps=self.steps,
                batch=self.batch,
                lowering=self.lowering,
                taken=range(self.samples),
            )
        return self._profiles[key]

    def _time_uncached(self) -> None:
        """Time an uncached generation anew: how fast the machine is changes within the hour."""
        self._warm_up(self.plain, steps=2)  # what another model was compiled for is reset
        start = time.process_time()
        self._warm_up(self.plain)
        self.seconds = time.process_time() - start

    def measure(self, setting: Setting) -> Figures:
        """One row. Raises ConfigError if the policy refuses this model or setting."""
        if setting.method != self._timed_for:
            self._timed_for = setting.method
            self._time_uncached()
        policy = setting.policy
        if policy is None:
            return self._baseline(setting)
        options: dict[str, Any] = {"policy": policy, "lowering": self.lowering, "profile_cache": False}
        plan: Plan | None = None
        if is_runtime(policy):
            options["steps"] = self.steps
        else:
            options["profile"] = self.profile(policy)
            plan = omnifx.make_plan(options["profile"], policy=policy, speedup=setting.speedup)
            options["plan"] = plan
        torch._dynamo.reset()
        compiled = torch.compile(self.case.load(), backend="omnicache", options=options)
        if is_runtime(policy):
            self._warm_up(compiled)  # some learn from their first generation
        images, seconds = self._sample(compiled)
        logs = omnifx.stats(compiled).generations[int(is_runtime(policy)) :]
        steps = [step for log in logs for step in log.steps]
        if plan is not None and any(log.reasons for log in logs):
            raise RuntimeError(f"{setting.method}, {setting.label}: unplanned full steps, {logs[-1].reasons}.")
        full = sum(step.variant.startswith("full") for step in steps) / len(logs)
        return self._row(
            setting,
            images,
            seconds,
            full=full,
            compute=sum(step.spent for step in steps) / sum(step.whole for step in steps),
            kib=max(log.peak_cache_bytes for log in logs) / self.batch / 1024,
            variants=len({step.variant for step in steps}),
        )

    def _baseline(self, setting: Setting) -> Figures:
        calls = setting.calls
        assert calls is not None  # a baseline's
        if setting.method == "extrapolated output":
            model, more = Extrapolated(self.plain, self.steps, calls), {}
        else:
            model, more = self.plain, {"steps": calls}
            if setting.method.endswith("2nd order"):
                more["solver"] = "dpmsolver++"  # type: ignore[assignment]
        images, seconds = self._sample(model, **more)
        return self._row(setting, images, seconds, full=calls, compute=calls / self.steps, kib=0.0, variants=1)

    def _row(
        self,
        setting: Setting,
        images: Tensor,
        seconds: float,
        *,
        full: float,
        compute: float,
        kib: float,
        variants: int,
    ) -> Figures:
        quality = evaluate(images, self.uncached, self.labels, self.classifier, self.real)
        return {
            "method": setting.method,
            "setting": setting.label,
            "full steps": full,
            "compute": compute,
            "time": seconds / self.seconds,
            "PSNR dB": _finite(quality.psnr),
            "p10 dB": _finite(quality.psnr_p10),
            "SSIM": quality.ssim,
            "Frechet": quality.frechet,
            "class": quality.consistency,
            "cache KiB": kib,
            "variants": variants,
        }

    def uncached_row(self) -> Figures:
        """The guards of the uncached samples themselves."""
        quality = evaluate(self.uncached, self.uncached, self.labels, self.classifier, self.real)
        return {"Frechet": quality.frechet, "class": quality.consistency, "CPU s": self.seconds}


def measure_model(
    name: str,
    *,
    methods: Sequence[str],
    steps: int,
    samples: int,
    lowering: str,
    keep: Callable[[Figures], object] = lambda found: None,
    known: Sequence[Figures] = (),
) -> Figures:
    """All rows of one model, and what was refused with its reason; `keep` gets what is known after every row, and rows
    that are `known` are not measured again."""
    bench = Bench(name, steps=steps, samples=samples, lowering=lowering)
    found: Figures = {
        "model": name,
        "sampler": bench.case.sampler,
        "steps": steps,
        "samples": samples,
        "batch": bench.batch,
        "lowering": lowering,
        "uncached": bench.uncached_row(),
        "rows": [],
        "refused": [],
    }
    for setting in settings_of(name, steps):
        if methods and setting.method not in methods:
            continue
        old = [row for row in known if (row["method"], row["setting"]) == (setting.method, setting.label)]
        try:
            row = old[0] if old else bench.measure(setting)
        except ConfigError as error:
            found["refused"].append({"method": setting.method, "setting": setting.label, "reason": str(error)})
            print(f"{setting.method}, {setting.label}: refused: {error}", flush=True)
            continue
        found["rows"].append(row)
        keep(found)
        print(
            f"{name} {row['method']}, {row['setting']}: compute {row['compute']:.3f}, time {row['time']:.3f}, "
            f"{'no difference' if row['PSNR dB'] is None else format(row['PSNR dB'], '.2f') + ' dB'}",
            flush=True,
        )
    return found


def rows_of(path: str, *, name: str, steps: int, samples: int, lowering: str) -> list[Figures]:
    """The rows of a model in a file that an earlier run left, if it was measured under the same conditions."""
    if not path or not Path(path).exists():
        return []
    wanted = (name, steps, samples, lowering)
    figures = json.loads(Path(path).read_text(encoding="utf-8"))["figures"]
    same = [f for f in figures if (f["model"], f["steps"], f["samples"], f["lowering"]) == wanted]
    return [row for found in same for row in found["rows"]]


def main(arguments: list[str] | None = None) -> list[Figures]:
    """Measure all tables, print them, and write them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--policies", nargs="+", default=[], help="default: all, and the baselines")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=100, help=f"at most {BATCH}, or a multiple of it")
    parser.add_argument("--lowering", choices=["inductor", "eager"], default="inductor")
    parser.add_argument("--out", default="", help="a JSON file to write")
    parser.add_argument("--resume", action="store_true", help="take the rows that FILE has, under the same conditions")
    parser.add_argument("--smoke", action="store_true", help="8 samples, 8 steps, three policies, eager: seconds")
    args = parser.parse_args(arguments)
    if args.smoke:
        args.models, args.steps, args.samples, args.lowering = ["flow"], 8, 8, "eager"
        args.policies = ["fora", "t-gate", "first-block-cache", "fewer steps"]
    if known := set(args.policies) - {s.method for s in settings_of("dit", args.steps)}:
        parser.error(f"no settings are known for {sorted(known)}")
    if args.samples < 2 or args.samples % min(BATCH, args.samples):
        parser.error(f"--samples must be in 2..{BATCH} or a multiple of {BATCH}, got {args.samples}")
    torch.set_num_threads(1)
    figures: list[Figures] = []

    def keep(found: Figures) -> None:
        if args.out:
            save(args.out, [*figures, found], quiet=True)  # after every row: what is measured is not lost

    with torch._dynamo.config.patch(recompile_limit=64):
        for name in args.models:
            given = {"steps": args.steps, "samples": args.samples, "lowering": args.lowering}
            known = rows_of(args.out, name=name, **given) if args.resume else []
            figures.append(measure_model(name, methods=args.policies, keep=keep, known=known, **given))
    if args.out:
        save(args.out, figures)
    for found in figures:
        table(
            found["rows"], f"{found['model']} ({found['sampler']}), {found['steps']} steps, {found['samples']} samples"
        )
    return figures


if __name__ == "__main__":
    main()
