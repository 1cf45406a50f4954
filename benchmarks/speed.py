"""Measured time against plain ``torch.compile``: whole generations, one full step, and compilation.

    python -m benchmarks.speed [--models pixart dit] [--batches 2 1] [--policies auto omnicache] [--steps 50]
        [--repeats 7] [--threads 1] [--out FILE]

Generations are timed in turn (plain, omnifx, plain, ...) in one process, step by step. A generation's time is the sum
over its steps of each step's least time over the repeats: what other work on the machine adds is no property of either.
A full step is measured in generations of full steps only. Batch 2 is one image with classifier-free guidance, both
halves in one call; batch 1 is guidance-free. Compile times come from fresh processes with empty Inductor caches, as CPU
seconds of the process and its compilers: on a shared machine wall time says little. Bounds that the project holds
itself to: measured speedup at least 0.95 of the FLOPs ratio; a full step at most 1.03 of plain; compilation of all
variants at most 1.5 of plain.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, get_args

import torch

import omnifx
from benchmarks.models import CASES, Case, generate
from benchmarks.results import save, table
from omnifx.plan import SKIP
from omnifx.policies.auto import Auto, Kind
from omnifx.session import find_session


def step_times(run: Callable[[Callable[[], None]], object]) -> list[float]:
    """Seconds of each step of one generation, device work included; `run` calls what it is given after every step."""
    marks: list[float] = []

    def each() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    each()
    run(each)
    return [after - before for before, after in itertools.pairwise(marks)]


def in_turn(plain: Any, ours: Any, case: Case, *, steps: int, repeats: int) -> tuple[list[float], list[float]]:
    """The least seconds of each step, of both models, over generations that take turns."""
    times: tuple[list[list[float]], list[list[float]]] = ([], [])
    for seed in range(10, 10 + repeats):
        for model, found in zip((plain, ours), times, strict=True):
            found.append(step_times(lambda each: generate(model, case, seed=seed, steps=steps, each=each)))  # noqa: B023
    base, other = ([min(step) for step in zip(*found, strict=True)] for found in times)
    return base, other


_POLICIES = {f"auto-{network}": Auto(network=network) for network in get_args(Kind)}
"""What `--policies` takes beside the names of policies: what `auto` runs where it does not compute a step."""


def measure_generations(
    case: Case, *, policy: str, steps: int, repeats: int, speedups: tuple[float, ...]
) -> list[dict[str, Any]]:
    """Plain and omnifx generations in turn."""
    plain = torch.compile(case.model)
    generate(plain, case, seed=0, steps=2)
    rows = []
    for speedup in speedups:
        torch._dynamo.config.recompile_limit = 32  # one model, compiled several ways in this process
        options = {"policy": _POLICIES.get(policy, policy), "speedup": speedup, "profile_cache": False}
        compiled = torch.compile(case.model, backend="omnicache", options=options)
        for seed in (0, 1):  # measured, then the first that follows the plan
            generate(compiled, case, seed=seed, steps=steps)
        plan = omnifx.plans(compiled)[0][1]
        base, ours = in_turn(plain, compiled, case, steps=steps, repeats=repeats)
        log = omnifx.stats(compiled)
        measured = sum(base) / sum(ours)
        reuses = [not step.variant.startswith("full") for step in log.generations[-1].steps]
        rows.append(
            {
                "model": case.name,
                "batch": case.batch,
                "policy": policy,
                "asked": speedup,
                "steps": steps,
                "full/reuse": f"{steps - plan.num_reuse_steps}/{plan.num_reuse_steps}",
                "plain s": sum(base),
                "omnifx s": sum(ours),
                "plain ms a step": 1e3 * statistics.median(base),
                "full ms": 1e3 * statistics.median(t for t, reuse in zip(ours, reuses, strict=True) if not reuse),
                "reuse ms": 1e3 * statistics.median(t for t, reuse in zip(ours, reuses, strict=True) if reuse),
                "measured": measured,
                "FLOPs ratio": plan.speedup,
                "share reached": measured / plan.speedup,
                "recompilations": log.recompilations,
                "unplanned full": sum(sum(g.reasons.values()) for g in log.generations[1:]),
            }
        )
    return rows


def measure_full_step(case: Case, *, repeats: int, steps: int = 10) -> list[dict[str, Any]]:
    """Generations of full steps only, with the cuts written and with what a recording adds, in turn with plain ones."""
    plain = torch.compile(case.model)
    generate(plain, case, seed=0, steps=2)
    rows = []
    for label, policy, record in (
        ("full + cuts", "fora", False),
        ("full + cuts + noise + recording", "omnicache", True),
    ):
        options = {"policy": policy, "record_only": record, "profile_cache": False, "speedup": 1.0}
        compiled = torch.compile(case.model, backend="omnicache", options=options)
        generate(compiled, case, seed=0, steps=steps)
        base, ours = in_turn(plain, compiled, case, steps=steps, repeats=repeats)
        rows.append(
            {
                "model": case.name,
                "batch": case.batch,
                "step": label,
                "plain ms": 1e3 * sum(base) / steps,
                "omnifx ms": 1e3 * sum(ours) / steps,
                "ratio": sum(ours) / sum(base),
            }
        )
    return rows


def measure_compilation(name: str) -> list[dict[str, Any]]:
    """CPU seconds from the first call to its result, in fresh processes with empty caches; importing is not counted."""
    rows: list[dict[str, Any]] = []
    for mode in ("plain", "fora", "omnicache", "auto"):
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
            command = [sys.executable, "-m", "benchmarks.speed", "--compile-one", name, mode]
            result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        seconds = float(result.stdout.split()[-1])
        base = rows[0]["CPU s"] if rows else seconds
        rows.append({"model": name, "compiled as": mode, "CPU s": seconds, "ratio": seconds / base})
    return rows


def compile_one(name: str, mode: str) -> None:
    """Compile one model and print the CPU seconds that took."""
    torch.set_num_threads(1)
    case = CASES[name]()
    options = {"policy": mode, "profile_cache": False}
    compiled = (
        torch.compile(case.model)
        if mode == "plain"
        else torch.compile(case.model, backend="omnicache", options=options)
    )
    before = _cpu_seconds()
    with torch.no_grad():
        compiled(**case.inputs(0))
    if mode == "omnicache":  # both reuse variants: which one is run depends on what calibration finds
        for program in [runner.program for runner in find_session(compiled).runners]:
            for corrects in (False, True):
                program.variant(program.reusing(program.reuse_row, corrects=corrects))
    if mode == "auto":  # what records was compiled; likewise both kinds of steps that are not computed
        for program in [runner.program for runner in find_session(compiled).runners]:
            for row, noise in ((program.reuse_row, True), ((SKIP,) * len(program.names), False)):
                program.variant(program.reusing(row, corrects=False, combines=Auto().history, combines_noise=noise))
    torch._inductor.async_compile.shutdown_compile_workers()  # so that their time is counted
    print(_cpu_seconds() - before)


def _cpu_seconds() -> float:
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    """Run all three measurements and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["pixart", "dit"], choices=sorted(CASES))
    parser.add_argument("--batches", nargs="+", type=int, default=[2, 1])
    parser.add_argument("--policies", nargs="+", default=["auto", "omnicache"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--step-repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", nargs="+", default=["generations", "full", "compilation"])
    parser.add_argument("--out", default="")
    parser.add_argument("--compile-one", nargs=2, metavar=("MODEL", "MODE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile_one:
        compile_one(*args.compile_one)
        return
    torch.set_num_threads(args.threads)
    figures: dict[str, list[dict[str, Any]]] = {part: [] for part in args.parts}
    for name in args.models:
        for case in (CASES[name](batch=batch) for batch in args.batches):
            torch._dynamo.reset()  # else another batch makes every size after it dynamic
            if "generations" in figures:
                for policy in args.policies:
                    figures["generations"] += measure_generations(
                        case, policy=policy, steps=args.steps, repeats=args.repeats, speedups=(2.0, 2.5)
                    )
            if "full" in figures:
                figures["full"] += measure_full_step(case, repeats=args.step_repeats)
        if "compilation" in figures:
            figures["compilation"] += measure_compilation(name)
        if args.out:
            save(args.out, figures)  # after each model: a run that is stopped keeps what it measured
    for part, rows in figures.items():
        table(rows, part)


if __name__ == "__main__":
    main()
