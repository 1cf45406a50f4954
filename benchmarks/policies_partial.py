"""Whether steps that compute some tokens take the time that their FLOPs promise.

    python -m benchmarks.policies_partial [--models pixart dit] [--tokens 1024] [--depth 4] [--width 384]
        [--shares 0.1 0.25 0.5] [--scores kv-norm entropy attention none] [--repeats 9] [--threads 1] [--out FILE]

Variants of one captured model run alone, in turn, on the same inputs and caches: everything computed, with and without
scores, and everything reused but a share of the tokens of all branches that work token by token. Their choice, gathers
and scatters count in the time, but not in the FLOPs.

FLOPs share     of the partial variant, over the full one
time share      the same of the medians of the pairwise ratios
time over FLOPs their ratio; the project's bound is 1.10 from 1024 tokens on
full over plain seconds of a full step that also scores all tokens, over those of one that does not

The exit status is 1 if a partial variant takes over 1.10 of the time share that its FLOPs promise.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.models import CASES, Case
from benchmarks.results import save, table
from omnifx.plan import REUSE, partial
from omnifx.policies.toca import ToCa
from omnifx.program import Program, Variant
from omnifx.runner import Runner
from omnifx.session import find_session

BOUND = 1.10


def captured(case: Case, score: str, lowering: str) -> tuple[Program, list[Any]]:
    """The program of a model and the inputs of one call of its graph."""
    seen: list[Any] = []
    original = Runner.__call__

    def spying(runner: Runner, args: list[Any]) -> Sequence[Any]:
        seen[:] = args
        return original(runner, args)

    options = {"policy": ToCa(score=score), "lowering": lowering, "profile_cache": False}  # type: ignore[arg-type]
    compiled = torch.compile(case.model, backend="omnicache", options=options)
    with mock.patch.object(Runner, "__call__", spying), torch.no_grad():
        compiled(**case.inputs(0))
    (runner,) = find_session(compiled).runners
    return runner.program, seen


def fed(variant: Variant, args: list[Any], values: dict[str, Tensor]) -> list[Any]:
    """The inputs of a variant, conditions included, as its table would give them; ages and stamps are zeros."""
    known = dict(values)
    for label, fake in zip(variant.extra_inputs, variant.extra_values, strict=True):
        if label.partition(":")[0] in ("stamp", "age"):
            known[label] = torch.zeros(tuple(fake.shape), dtype=fake.dtype, device=fake.device)
    with torch.no_grad():
        return variant.feed(args, known)


def clock_of(call: Callable[[], object]) -> float:
    """Seconds of one call, device work included."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def run(variant: Variant, inputs: list[Any]) -> Sequence[Any]:
    """One run of a variant."""
    with torch.no_grad():
        return variant.run(list(inputs))


def measure(case: Case, *, score: str, shares: Sequence[float], repeats: int, lowering: str) -> list[dict[str, Any]]:
    """One row for each share of the tokens."""
    program, args = captured(case, score, lowering)
    selection = ToCa(score=score).selection  # type: ignore[arg-type]
    full = program.variant(program.full(measures=False, selection=selection))
    plain = program.variant(program.full(measures=False))
    made = run(full, args)[program.num_outputs :]
    values = {label: value.clone() for label, value in zip(full.extra_outputs, made, strict=True)}
    rows = []
    for share in shares:
        actions = [partial(max(1, int(share * b.tokens.number))) if b.tokens else REUSE for b in program.branches]
        few = program.variant(program.reusing(tuple(actions), corrects=False, selection=selection))
        timed = [(variant, fed(variant, args, values)) for variant in (full, plain, few)]
        for variant, inputs in timed:
            run(variant, inputs)
        times = [[clock_of(lambda v=v, i=i: run(v, i)) for v, i in timed] for _ in range(repeats)]  # type: ignore[misc]
        spent = statistics.median(t[2] / t[1] for t in times)
        promised = few.flops / plain.flops
        rows.append(
            {
                "model": case.name,
                "score": score,
                "tokens": max(b.tokens.number for b in program.branches if b.tokens),
                "share computed": share,
                "full ms": 1e3 * statistics.median(t[1] for t in times),
                "partial ms": 1e3 * statistics.median(t[2] for t in times),
                "FLOPs share": promised,
                "time share": spent,
                "time over FLOPs": spent / promised,
                "full over plain": statistics.median(t[0] / t[1] for t in times),
            }
        )
    return rows


def main() -> int:
    """Measure and print a table; the exit status says whether the bound holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["pixart", "dit"], choices=sorted(CASES))
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.1, 0.25, 0.5])
    parser.add_argument("--scores", nargs="+", default=["kv-norm", "entropy", "attention", "none"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lowering", default="inductor", choices=["inductor", "eager"])
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for name in args.models:
        for score in args.scores:
            torch._dynamo.reset()
            case = CASES[name](depth=args.depth, width=args.width, tokens=args.tokens)
            rows += measure(case, score=score, shares=args.shares, repeats=args.repeats, lowering=args.lowering)
            if args.out:
                save(args.out, rows)  # after each case: a run that is stopped keeps what it measured
    table(rows, "partial steps")
    return int(any(row["time over FLOPs"] > BOUND for row in rows))


if __name__ == "__main__":
    sys.exit(main())
