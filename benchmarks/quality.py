"""Quality against the uncached run on the trained digits models: OmniCache, FORA, fewer steps, a better solver.

    python -m benchmarks.quality [--models dit flow] [--steps 50 20] [--speedups 2 2.5] [--samples 200]
                                 [--lowering inductor|eager] [--out FILE] [--smoke]

Every row has the seeds and labels of the uncached samples it is compared with; the calibration saw neither. PSNR orders
the rows that keep the solver; it is unfair to the 2nd-order solver, which goes to another image. Frechet distance (to
500 held-out digits; it spreads by about .4 over seeds) and class consistency are guards, not rankings.

FLOPs count what each step really ran, the replay that measures noise included. Seconds are CPU seconds of the process
on one thread, so that other users of the machine decide less: the least over the batches, which run in turn, uncached
over this row; the first batch compiles, and does not count.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

import omnifx
from benchmarks.results import save, table
from examples.digits.data import NUM_CLASSES, load_digits
from examples.digits.models import Classifier, load_classifier, load_dit, load_flow
from examples.digits.quality import evaluate
from examples.digits.sampling import sample_dit, sample_flow
from omnifx.errors import ConfigError
from omnifx.plan import COMPUTE, REUSE, Plan
from omnifx.policies.fora import Fora
from omnifx.policies.omnicache import OmniCache
from omnifx.policy import Policy, check_speedup, refuse_speedup, reuse_steps_needed
from omnifx.profile import Profile
from omnifx.session import find_session

BATCH = 50  # samples of one generation; fixed, so that nothing is compiled twice
CALIBRATION_RUNS = 3  # from 3 on, one is held back to judge the correction
CALIBRATION_BATCH = 8  # samples of one calibration run
FIRST_CALIBRATION_SEED = 1_000_000

Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Evenly(Policy):
    """Spread full steps evenly over the generation: what FORA does, for counts that no interval gives."""

    name: ClassVar[str] = "evenly"

    num_full_steps: int | None = None  # >= 1; None: as many as the speedup leaves

    def __post_init__(self) -> None:
        if self.num_full_steps is not None and self.num_full_steps < 1:
            raise ConfigError(f"num_full_steps must be >= 1 (step 0 is always full), got {self.num_full_steps!r}.")

    def plan(self, profile: Profile, *, speedup: float | None = None) -> Plan:
        steps, full = profile.num_steps, self.num_full_steps
        if full is None:
            wanted = check_speedup(speedup, default=2.0)
            full = steps - reuse_steps_needed(profile, wanted)
            if full < 1:
                most = Plan.uniform(profile, [COMPUTE] + [REUSE] * (steps - 1), policy=self.name).speedup
                raise refuse_speedup(self.name, wanted, most, f"one full step in {steps}")
        if full > steps:
            raise ConfigError(f"num_full_steps must be at most {steps} (the profile's steps), got {full}.")
        chosen = evenly_spread(steps, full)
        actions = [COMPUTE if step in chosen else REUSE for step in range(steps)]
        return Plan.uniform(profile, actions, policy=self.name, policy_options={"num_full_steps": full})


def evenly_spread(num_steps: int, num_full: int) -> frozenset[int]:
    """`num_full` of `num_steps` steps, step 0 among them: the nearest to equal gaps, so that no end is favoured."""
    return frozenset((2 * i * num_steps + num_full) // (2 * num_full) for i in range(num_full))


def same_reuses_as(plan: Plan, profile: Profile) -> tuple[str, Policy]:
    """FORA at the number of reuse steps of `plan`: with an interval, or spread evenly where no interval gives it."""
    steps, full = len(plan.steps), len(plan.steps) - plan.num_reuse_steps
    for interval in range(1, steps + 1):
        if -(-steps // interval) == full:
            return f"FORA, interval {interval}", Fora(interval=interval)
    return "FORA, spread evenly", Evenly(num_full_steps=full)


class Extrapolated:
    """Skips the whole model at all but `num_full` evenly spread steps, and extrapolates its last two outputs linearly
    in the timestep; with one output yet, repeats it. Called like the model; a generation is `num_steps` calls."""

    def __init__(self, model: Callable[..., Any], num_steps: int, num_full: int) -> None:
        self.model = model
        self.num_steps = num_steps
        self.full_steps = evenly_spread(num_steps, num_full)
        self.step = 0
        self.known: list[tuple[Tensor, Tensor]] = []  # (timestep, output) of the last two full steps

    def __call__(self, **inputs: Any) -> tuple[Tensor]:
        now = inputs["timestep"].float()[:, None, None, None]
        if self.step == 0:
            self.known = []
        if self.step in self.full_steps:
            self.known = [*self.known[-1:], (now, self.model(**inputs)[0])]
        self.step = (self.step + 1) % self.num_steps
        (before, old), (last, output) = self.known[0], self.known[-1]
        if len(self.known) == 1:
            return (output,)
        return (output + (now - last) / (last - before) * (output - old),)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A trained model and how it is sampled; without a `solver`, `sample` takes its 1st-order one."""

    load: Callable[[], Any]
    sample: Callable[..., Tensor]
    sampler: str  # in words


CASES = {
    "dit": Case(load=load_dit, sample=partial(sample_dit, cfg=1.0), sampler="DDIM, cfg 1"),
    "flow": Case(load=load_flow, sample=partial(sample_flow, cfg=2.0), sampler="Euler, cfg 2 in one batch"),
}


@dataclass(kw_only=True)
class Method:
    """One row to be measured, and what was measured so far."""

    label: str
    asked: float  # the speedup whose group of rows this belongs to
    model: Any  # what is called at every step
    steps: int
    options: Figures = field(default_factory=dict)  # further arguments of the sampler
    num_full: int | None = None  # where no log counts the full steps; None: all are
    plan: Plan | None = None  # None: not through omnifx
    samples: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def warm_seconds(self) -> float | None:
        """Least CPU seconds of a generation; the first one does not count, for it compiled."""
        return min(self.seconds[1:], default=None)


def calibrate(case: Case, *, steps: int, lowering: str, taken: Sequence[int]) -> Profile:
    """A profile of `steps` steps from seeds that are not among `taken`."""
    first = FIRST_CALIBRATION_SEED
    seeds = range(first, first + CALIBRATION_RUNS * CALIBRATION_BATCH)
    if shared := set(seeds) & set(taken):
        raise ValueError(f"seeds {sorted(shared)} would be both calibrated on and reported; report others.")

    def generate(model: Any, run: int) -> Tensor:
        chosen = seeds[run * CALIBRATION_BATCH :][:CALIBRATION_BATCH]
        return case.sample(model, seeds=chosen, labels=labels_of(CALIBRATION_BATCH), steps=steps)

    options = {"lowering": lowering}
    return omnifx.calibrate(case.load(), generate, runs=CALIBRATION_RUNS, options=options, progress=False)


def labels_of(num: int) -> Tensor:
    """Every class equally often."""
    return torch.arange(num) % NUM_CLASSES


def methods_of(profile: Profile, *, speedup: float, lowering: str, plain: Any, model: Any) -> tuple[list[Method], Plan]:
    """The rows of one speedup, and the plan of OmniCache as shipped.

    Raises: ConfigError if OmniCache cannot reach the speedup.
    """
    steps = profile.num_steps
    policies: list[tuple[str, Policy]] = [
        ("OmniCache as shipped", OmniCache()),
        ("OmniCache, correction + filter", OmniCache(correction="on", filter="on")),
        ("OmniCache, correction, no filter", OmniCache(correction="on", filter="off")),
        ("OmniCache, no correction", OmniCache(correction="off")),
    ]
    plans = [omnifx.make_plan(profile, policy=policy, speedup=speedup) for _, policy in policies]
    shipped = plans[0]
    policies.append(same_reuses_as(shipped, profile))
    plans.append(policies[-1][1].plan(profile))
    methods = []
    for (label, policy), plan in zip(policies, plans, strict=True):
        options: Figures = {
            "policy": policy,
            "profile": profile,
            "plan": plan,
            "profile_cache": False,
            "lowering": lowering,
        }
        compiled = torch.compile(model, backend="omnicache", options=options)
        methods.append(Method(label=label, asked=speedup, model=compiled, steps=steps, plan=plan))
    full = steps - shipped.num_reuse_steps
    fewer = max(1, round(steps / shipped.speedup))
    return [
        *methods,
        Method(
            label="model skipped, extrapolated",
            asked=speedup,
            model=Extrapolated(plain, steps, full),
            steps=steps,
            num_full=full,
        ),
        Method(label="fewer steps, same solver", asked=speedup, model=plain, steps=fewer),
        Method(
            label="fewer steps, 2nd-order solver*",
            asked=speedup,
            model=plain,
            steps=fewer,
            options={"solver": "dpmsolver++"},
        ),
    ], shipped


def measure(
    case: Case,
    methods: Sequence[Method],
    plain: Any,
    *,
    steps: int,
    samples: int,
    batch: int,
    tick: Callable[[str], None],
) -> Method:
    """Fill every method with samples and seconds, batch by batch and in turn; returns the uncached run."""
    uncached = Method(label="uncached", asked=1.0, model=plain, steps=steps)
    groups = [[m for m in methods if m.asked == asked] for asked in dict.fromkeys(m.asked for m in methods)]
    for first in range(0, samples, batch):
        seeds, labels = range(first, first + batch), labels_of(samples)[first : first + batch]
        for number, group in enumerate(groups):
            tick("uncached")
            images, seconds = timed(case, uncached, seeds, labels)
            uncached.seconds.append(seconds)
            if number == 0:  # again before every group for its seconds only
                uncached.samples.append(images)
            for method in group:
                tick(method.label)
                images, seconds = timed(case, method, seeds, labels)
                method.samples.append(images)
                method.seconds.append(seconds)
    return uncached


def timed(case: Case, method: Method, seeds: Sequence[int], labels: Tensor) -> tuple[Tensor, float]:
    """Samples, and the CPU seconds they took."""
    start = time.process_time()
    images = case.sample(method.model, seeds=seeds, labels=labels, steps=method.steps, **method.options)
    return images, time.process_time() - start


def row_of(method: Method, uncached: Method, labels: Tensor, classifier: Classifier, real: Tensor) -> Figures:
    """One line of the table. Raises RuntimeError if a step ran otherwise than planned."""
    full, reuse, ratio = calls_of(method, uncached)
    quality = evaluate(torch.cat(method.samples), torch.cat(uncached.samples), labels, classifier, real)
    base, ours = uncached.warm_seconds, method.warm_seconds
    same = method is uncached
    return {
        "speedup": method.asked,
        "method": method.label,
        "steps": method.steps,
        "full/reuse": f"{full}/{reuse}",
        "FLOPs ratio": ratio,
        "time ratio": base / ours if base and ours else None,
        "PSNR dB": None if same else quality.psnr,
        "p10 dB": None if same else quality.psnr_p10,
        "SSIM": quality.ssim,
        "Frechet": quality.frechet,
        "class": quality.consistency,
    }


def calls_of(method: Method, uncached: Method) -> tuple[int, int, float]:
    """Full and reuse calls of one generation, and FLOPs uncached over FLOPs spent, as they ran."""
    if method.plan is None:
        full = method.steps if method.num_full is None else method.num_full
        return full, method.steps - full, uncached.steps / full
    log = omnifx.stats(method.model)
    program = find_session(method.model).runners[0].program
    flops = {variant.spec.label: variant.flops for variant in program.variants.values()}
    for generation in log.generations:
        full = sum(name.startswith("full") for name in generation.variants)
        planned = len(method.plan.steps) - method.plan.num_reuse_steps
        if generation.reasons or full != planned or len(generation.steps) != method.steps:
            raise RuntimeError(
                f"{method.label}: generation {generation.number} ran {full} of {len(generation.steps)} steps in full, "
                f"planned were {planned} of {method.steps}; {generation.reasons}."
            )
    spent = sum(flops[name] for name in log.generations[-1].variants)
    return full, method.steps - full, uncached.steps * program.analysis.flops / spent


def measure_case(
    name: str,
    *,
    steps: int,
    speedups: Sequence[float],
    samples: int,
    batch: int,
    lowering: str,
    bars: Progress,
) -> Figures:
    """The table of one model at one number of steps, with what the calibrations decided."""
    case = CASES[name]
    bar = bars.add_task(f"{name}, {steps} steps: calibration", total=None)
    torch._dynamo.reset()  # or its memory of other batch sizes makes the batch size symbolic
    profile = calibrate(case, steps=steps, lowering=lowering, taken=range(samples))
    torch._dynamo.reset()
    model = case.load()
    plain = model if lowering == "eager" else torch.compile(model)
    methods: list[Method] = []
    decisions: list[Figures] = []
    for speedup in speedups:
        arguments: Figures = {"lowering": lowering, "plain": plain, "model": model}
        try:
            group, plan = methods_of(profile, speedup=speedup, **arguments)
        except ConfigError as error:
            decisions.append({"speedup": speedup, "refused": str(error), "notes": []})
            continue
        methods += group
        decisions.append({"speedup": speedup, "timeline": plan.timeline().splitlines()[1], "notes": list(plan.notes)})
    if not methods:
        raise ConfigError(f"quality: {name}, {steps} steps: {decisions[-1]['refused']}")
    groups = len({method.asked for method in methods})
    bars.update(bar, total=(len(methods) + groups) * samples // batch)
    done = -1

    def tick(label: str) -> None:
        nonlocal done
        done += 1
        bars.update(bar, completed=done, description=f"{name}, {steps} steps: {label}")

    uncached = measure(case, methods, plain, steps=steps, samples=samples, batch=batch, tick=tick)
    classifier, real, labels = load_classifier(), load_digits()[1].images, labels_of(samples)
    rows = [row_of(method, uncached, labels, classifier, real) for method in [uncached, *methods]]
    bars.remove_task(bar)
    return {
        "model": name,
        "sampler": case.sampler,
        "steps": steps,
        "samples": samples,
        "batch": batch,
        "lowering": lowering,
        "uncached CPU s": uncached.warm_seconds,
        "calibration": {"runs": CALIBRATION_RUNS, "samples per run": CALIBRATION_BATCH, "decisions": decisions},
        "rows": rows,
        "policy_options": OmniCache().options,
    }


def show(figures: Figures, console: Console) -> None:
    """Print what the calibrations decided, and the table."""
    title = f"{figures['model']} ({figures['sampler']}), {figures['steps']} steps, {figures['samples']} samples"
    console.print(f"\n[bold]{title}[/bold]: what the calibration decided", highlight=False, soft_wrap=True)
    for decision in figures["calibration"]["decisions"]:
        lines = [decision["refused"]] if "refused" in decision else [decision["timeline"], *decision["notes"]]
        for line in (f"speedup {decision['speedup']:g}:", *(f"  {line}" for line in lines)):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    table([{key: "-" if value is None else value for key, value in row.items()} for row in figures["rows"]], title)
    console.print("* goes to another, equally good image: its PSNR is no verdict", highlight=False)


def main(arguments: list[str] | None = None) -> list[Figures]:
    """Measure all tables, print them, and write them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CASES), help="default: both; with --smoke: dit")
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 20])
    parser.add_argument("--speedups", type=float, nargs="+", default=[2.0, 2.5])
    parser.add_argument("--samples", type=int, default=200, help=f"at most {BATCH}, or a multiple of it")
    parser.add_argument("--lowering", choices=["inductor", "eager"], default="inductor")
    parser.add_argument("--out", default="", help="a JSON file to write")
    parser.add_argument("--smoke", action="store_true", help="8 samples, 10 steps, 2x, eager: seconds")
    args = parser.parse_args(arguments)
    if args.smoke:
        args.steps, args.speedups, args.samples, args.lowering = [10], [2.0], 8, "eager"
    models = args.models or (["dit"] if args.smoke else list(CASES))
    batch = min(BATCH, args.samples)
    if args.samples < 2 or args.samples % batch:
        parser.error(f"--samples must be in 2..{BATCH} or a multiple of {BATCH}, got {args.samples}")
    torch.set_num_threads(1)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    figures = []
    with Progress(*columns, transient=True) as bars, torch._dynamo.config.patch(recompile_limit=64):
        for name in models:
            for steps in args.steps:
                measured = measure_case(
                    name,
                    steps=steps,
                    speedups=args.speedups,
                    samples=args.samples,
                    batch=batch,
                    lowering=args.lowering,
                    bars=bars,
                )
                figures.append(measured)
                show(measured, bars.console)
                if args.out:
                    save(args.out, figures)  # after every table: what is measured is not lost
    return figures


if __name__ == "__main__":
    main()
