"""What caching does to the compiled graph: omnifx, diffusers' cache hooks and cache-dit on the same tiny models.

    python -m benchmarks.graphs [--steps 50] [--lowering eager|inductor] [--out FILE]

Each row comes from a process of its own, with whole-model ``torch.compile`` and Dynamo's limits as they are by default
(cache-dit sets its own, as its documentation advises). The steps of three generations are counted: the first warms up
(omnifx measures it), the second is omnifx's first that follows a plan, the third is what a user then lives with. A
fourth runs under the profiler, which sees what was really computed, compiled or not: a peer that cached nothing cannot
look clean. All of it is repeated at 20 and at 50 steps, and with ``fullgraph=True``.

entries         how often one call of the model enters compiled code: most and last call of the third generation; at 0
                Dynamo has given up, and the model runs uncompiled
graph runs      compiled graphs run by one call, most of the third generation; to measure noise, omnifx
                runs its small reuse graph before a full one
new graphs      graphs compiled in the first, second and third generation
by steps        graphs compiled in generations of so many steps
breaks          Dynamo's count over all three generations
compute         FLOPs of matrix products, convolutions and attention of the fourth generation, over uncached ones

Few entries are not always good: MagCache's hooks are hidden from the compiler, and with them all that its blocks
compute. The settings of the peers make them both compute and reuse; they say nothing about quality. On random weights
the policy finds no use in its noise correction; "omnifx, corrected" turns it on, as for trained models. Bounds that the
project holds itself to are in `broken_bounds`; the exit status is 1 if one is broken.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

import omnifx
from benchmarks import models
from benchmarks.results import save, table
from omnifx.example_inputs import lively
from omnifx.plan import Correction, Plan, reuses
from omnifx.policies.omnicache import OmniCache
from omnifx.policy import Policy
from omnifx.profile import Profile
from omnifx.program import Program, Variant
from omnifx.runner import Runner

GENERATIONS = 3

COMPARED_STEPS = (20, 50)
"""Numbers of steps at which equally many graphs must be compiled."""


# -- models ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A tiny model and how to call it."""

    module: nn.Module
    inputs: Callable[[int], dict[str, Any]]
    """Keyword arguments of one call with latents of a seed; the sampler replaces latents and timestep."""
    time_scale: float = 1.0
    """What the model's timestep is, relative to one of 1000."""
    channels: int | None = None
    """Channels of the output that move the latents; None: all."""


def flux() -> Case:
    """FLUX-like: two blocks with separate streams for image and text, four with one stream."""
    from diffusers import FluxTransformer2DModel

    num_tokens, num_text_tokens, num_channels = 64, 16, 16
    module = FluxTransformer2DModel(
        in_channels=num_channels,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=48,
        pooled_projection_dim=40,
        axes_dims_rope=(8, 12, 12),
    )
    side = math.isqrt(num_tokens)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    constant = {
        "encoder_hidden_states": models.noise((1, num_text_tokens, 48), 7),
        "pooled_projections": models.noise((1, 40), 8),
        "timestep": torch.zeros(1),
        "img_ids": torch.stack([torch.zeros(num_tokens), rows.flatten(), columns.flatten()], dim=1),
        "txt_ids": torch.zeros(num_text_tokens, 3),
        "return_dict": False,
    }

    def inputs(seed: int) -> dict[str, Any]:
        return {"hidden_states": models.noise((1, num_tokens, num_channels), seed), **constant}

    return Case(lively(module), inputs, time_scale=1e-3)


def dit() -> Case:
    """DiT-like: four blocks of self-attention and MLP, adaLN-zero, class labels."""
    case = models.dit(depth=4, width=128, tokens=64)
    return Case(case.model, case.inputs, channels=case.channels)


CASES: dict[str, Callable[[], Case]] = {"flux": flux, "dit": dit}


# -- methods -----------------------------------------------------------------------------------------------------------


class Uncached:
    """The plain model; the other methods say what they do differently."""

    package = ""

    def __init__(self) -> None:
        self.time = 0
        """Timestep of the call under way, which a pipeline would keep."""

    def attach(self, case: Case, steps: int) -> None:
        """Change the model, before it is compiled."""

    def begin(self, module: nn.Module) -> None:
        """What a pipeline does before a generation."""

    def around_call(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        """What a pipeline does around each call of the model."""
        return contextlib.nullcontext()


class Omnifx(Uncached):
    """This project: nothing to attach, its backend does it."""

    policy: str | Policy = "omnicache"


@dataclass(frozen=True, kw_only=True)
class _AlwaysCorrects(OmniCache):
    """The default policy, whose "auto" sees no use in correcting random weights, made to correct each reuse."""

    def plan(self, profile: Profile, *, speedup: float | None = None) -> Plan:
        plan = super().plan(profile, speedup=speedup)
        correction = Correction(gamma=0.5, filter="low")
        steps = tuple(
            step.model_copy(update={"correction": correction if reuses(row) else None})
            for step, row in zip(plan.steps, plan.rows, strict=True)
        )
        return plan.model_copy(update={"steps": steps})


CORRECTED = "omnifx, corrected"


class Corrected(Omnifx):
    """This project with its noise correction: before a full step, the reuse graph shows what the old caches would have
    given, and the difference is the noise. Dynamo enters once."""

    policy = _AlwaysCorrects()


class _Hooks(Uncached):
    """Those of diffusers, used as its pipelines use them; a DiT is no CacheMixin, so by the functions below that."""

    def begin(self, module: nn.Module) -> None:
        from diffusers.hooks import HookRegistry

        HookRegistry.check_if_exists_or_initialize(module).reset_stateful_hooks(recurse=True)

    def around_call(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        from diffusers.models.cache_utils import CacheMixin

        context: contextlib.AbstractContextManager[None] = CacheMixin.cache_context(module, "cond")  # type: ignore[arg-type]
        return context


class FirstBlockCache(_Hooks):
    """Reuses all later blocks while the first block's residual changes little."""

    def attach(self, case: Case, steps: int) -> None:
        from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

        apply_first_block_cache(case.module, FirstBlockCacheConfig(threshold=_between_steps(case, steps)))


class TaylorSeer(_Hooks):
    """Extrapolates module outputs; its default names find nothing in a DiT."""

    def attach(self, case: Case, steps: int) -> None:
        from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

        names = [r"transformer_blocks\.\d+\.(attn1|attn2|ff)"] if case.channels else None
        config = TaylorSeerCacheConfig(
            cache_interval=2, disable_cache_before_step=3, cache_identifiers=names, taylor_factors_dtype=torch.float32
        )
        apply_taylorseer_cache(case.module, config)


class PAB(_Hooks):
    """Reuses attention outputs in the middle of the trajectory."""

    def attach(self, case: Case, steps: int) -> None:
        from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: self.time
        )
        apply_pyramid_attention_broadcast(case.module, config)


class MagCache(_Hooks):
    """Reuses the residual of all blocks, as often as magnitudes measured in a calibration run allow."""

    def attach(self, case: Case, steps: int) -> None:
        from diffusers.hooks import HookRegistry, MagCacheConfig, apply_mag_cache

        apply_mag_cache(case.module, MagCacheConfig(calibrate=True, num_inference_steps=steps))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            for _ in generation(case, case.module, self, seed=99, steps=steps):
                pass
        found = re.search(r"\[[^\[\]]*\d[^\[\]]*\]", printed.getvalue().partition("=...):")[2])
        if found is None:
            raise RuntimeError("its calibration printed no ratios")
        for submodule in case.module.modules():
            if hasattr(submodule, "_diffusers_hook"):
                registry = HookRegistry.check_if_exists_or_initialize(submodule)
                for name in list(registry.hooks):
                    registry.remove_hook(name, recurse=False)
        config = MagCacheConfig(
            threshold=1.0, max_skip_steps=1, num_inference_steps=steps, mag_ratios=ast.literal_eval(found[0])
        )
        apply_mag_cache(case.module, config)
        HookRegistry.check_if_exists_or_initialize(case.module).invalidate_child_registries_cache()


class DBCache(Uncached):
    """cache-dit: reuses the residual of all but the first block while that block's residual changes little."""

    package = "cache_dit"

    def attach(self, case: Case, steps: int) -> None:
        import cache_dit
        from cache_dit.caching.patch_functors import DiTPatchFunctor

        cache_dit.set_compile_configs()
        module: Any = case.module
        adapter: Any = module
        if case.channels:
            adapter = cache_dit.BlockAdapter(
                pipe=None,
                transformer=module,
                blocks=module.transformer_blocks,
                forward_pattern=cache_dit.ForwardPattern.Pattern_3,
                patch_functor=DiTPatchFunctor(),
            )
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=2,
            max_continuous_cached_steps=1,
            residual_diff_threshold=1.0,
            num_inference_steps=steps,
        )
        cache_dit.enable_cache(adapter, cache_config=config)


METHODS: dict[str, Callable[[], Uncached]] = {
    "no cache": Uncached,
    "omnifx": Omnifx,
    CORRECTED: Corrected,
    "FirstBlockCache": FirstBlockCache,
    "TaylorSeer": TaylorSeer,
    "PAB": PAB,
    "MagCache": MagCache,
    "cache-dit DBCache": DBCache,
}


def _between_steps(case: Case, steps: int) -> float:
    """A threshold that lets FirstBlockCache both compute and reuse: the median change from step to step, and a half."""
    residuals: list[Tensor] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        residuals.append((output[1] if isinstance(output, tuple) else output) - before)

    blocks: Any = case.module.transformer_blocks
    handle = blocks[0].register_forward_hook(note, with_kwargs=True)
    for _ in generation(case, case.module, Uncached(), seed=99, steps=steps):
        pass
    handle.remove()
    changes = [float((b - a).abs().mean() / a.abs().mean()) for a, b in itertools.pairwise(residuals)]
    return 1.5 * sorted(changes)[len(changes) // 2]


# -- counting ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generation(
    case: Case, model: Callable[..., Any], method: Uncached, *, seed: int, steps: int
) -> Iterator[Callable[[], None]]:
    """The sampler: yields the next call of the model, to be made by whoever counts or measures it (or by the loop)."""
    inputs = case.inputs(seed)
    method.begin(case.module)
    for time in models.timesteps(steps):
        method.time = time
        inputs["timestep"] = torch.full_like(inputs["timestep"], time * case.time_scale)
        made: list[Tensor] = []

        def call() -> None:
            if not made:  # noqa: B023
                with torch.no_grad(), method.around_call(case.module):
                    made.append(model(**inputs)[0])  # noqa: B023

        yield call
        call()
        inputs["hidden_states"] = inputs["hidden_states"] - (1.0 / steps) * made[0][:, : case.channels]


@dataclass
class Count:
    """What happened so far."""

    graphs: int = 0
    entries: int = 0
    graph_runs: int = 0
    limits: list[str] = field(default_factory=list)

    def backend(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """A Dynamo backend that counts what it compiles, and how often that is run."""

        def compiler(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            self.graphs += 1
            compiled = inner(gm, example_inputs)

            def run(*args: Any) -> Any:
                self.entries += 1
                self.graph_runs += 1
                return compiled(*args)

            return run

        return compiler

    @contextlib.contextmanager
    def inside_omnifx(self) -> Iterator[None]:
        """Count omnifx's variants as graphs, calls of its runners as entries, runs of its variants as graph runs."""
        call, variant_of = Runner.__call__, Program.variant
        seen: dict[int, Variant] = {}

        def counted_call(runner: Runner, args: list[Any]) -> Sequence[Any]:
            self.entries += 1
            return call(runner, args)

        def counted_variant(program: Program, spec: Any) -> Variant:
            variant = variant_of(program, spec)
            if id(variant) not in seen:
                seen[id(variant)] = variant
                self.graphs += 1
                run = variant.run

                def counted_run(args: list[Any]) -> Sequence[Any]:
                    self.graph_runs += 1
                    return run(args)

                variant.run = counted_run
            return variant

        with (
            mock.patch.object(Runner, "__call__", counted_call),
            mock.patch.object(Program, "variant", counted_variant),
        ):
            yield

    @contextlib.contextmanager
    def watching_limits(self) -> Iterator[None]:
        """Note when Dynamo gives a function up, which it only logs."""
        handler = logging.Handler(logging.WARNING)
        handler.emit = self._note  # type: ignore[method-assign]
        logger = logging.getLogger("torch._dynamo.convert_frame")
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)

    def _note(self, record: logging.LogRecord) -> None:
        found = re.search(r"hit config\.(\w+)", record.getMessage())
        if found:
            self.limits.append(found[1])


@dataclass
class Trial:
    """Generations of one freshly built and compiled model."""

    case: Case
    method: Uncached
    compiled: Any
    count: Count
    steps: int
    new_graphs: list[int] = field(default_factory=list)
    """By generation."""
    entries: list[list[int]] = field(default_factory=list)
    """By generation and call."""
    graph_runs: list[list[int]] = field(default_factory=list)
    breaks: int = 0

    def generate(self) -> None:
        """One more generation, counted."""
        count, graphs = self.count, self.count.graphs
        entries: list[int] = []
        runs: list[int] = []
        seed = len(self.entries)
        for call in generation(self.case, self.compiled, self.method, seed=seed, steps=self.steps):
            before = count.entries, count.graph_runs
            call()
            entries.append(count.entries - before[0])
            runs.append(count.graph_runs - before[1])
        self.new_graphs.append(count.graphs - graphs)
        self.entries.append(entries)
        self.graph_runs.append(runs)
        self.breaks = sum(counters["graph_break"].values())

    def profile(self) -> list[int]:
        """FLOPs of each call of one more generation."""
        return [_flops(call) for call in generation(self.case, self.compiled, self.method, seed=77, steps=self.steps)]


@contextlib.contextmanager
def trial(
    make_case: Callable[[], Case],
    make_method: Callable[[], Uncached],
    *,
    steps: int,
    lowering: str,
    fullgraph: bool = False,
) -> Iterator[Trial]:
    """Build, attach and compile; nothing of an earlier trial is left in Dynamo."""
    torch._dynamo.reset()
    counters.clear()
    count, case, method = Count(), make_case(), make_method()
    method.attach(case, steps)
    with contextlib.ExitStack() as stack:
        stack.enter_context(count.watching_limits())
        compiled: Any
        if isinstance(method, Omnifx):
            stack.enter_context(count.inside_omnifx())
            options = {"policy": method.policy, "lowering": lowering, "profile_cache": False}
            compiled = torch.compile(case.module, backend="omnicache", options=options, fullgraph=fullgraph)
        else:
            backend = count.backend(torch._dynamo.lookup_backend(lowering))
            compiled = torch.compile(case.module, backend=backend, fullgraph=fullgraph)
        yield Trial(case, method, compiled, count, steps)


def _flops(call: Callable[[], None]) -> int:
    """FLOPs that a call really runs, compiled or not: a dispatch mode would change what Dynamo compiles."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as found:
        call()
    total = 0
    for event in found.events() or []:
        name = event.name.removeprefix("aten::")
        if name in ("mm", "addmm", "bmm", "baddbmm", "conv2d"):
            total += event.flops or 0
        elif name.startswith("_scaled_dot_product_") and "math" not in name:  # math runs bmm, counted above
            query, key = event.input_shapes[:2]
            total += 4 * math.prod(query) * key[-2]
    return total


# -- rows --------------------------------------------------------------------------------------------------------------


def empty_row(model: str, method: str, problem: str = "") -> dict[str, Any]:
    """A row without figures, for what could not be measured."""
    return {
        "model": model,
        "method": method,
        "problem": problem,
        "graphs": None,
        "new_graphs": [],
        "entries_max": None,
        "entries_last": None,
        "graph_runs_max": None,
        "breaks": None,
        "recompilations": None,
        "fullgraph": None,
        "graphs_by_steps": {},
        "limits": [],
        "unlimited_graphs_by_steps": {},
        "compute": None,
        "steps_saved": None,
        "notes": [],
    }


def measure(
    model: str, method: str, *, steps: int, lowering: str = "eager", compared: Sequence[int] = COMPARED_STEPS
) -> dict[str, Any]:
    """One row; whatever fails is in its "problem"."""
    row = empty_row(model, method)
    make_case, make_method = CASES[model], METHODS[method]
    package = make_method().package
    if package and importlib.util.find_spec(package) is None:
        return {**row, "problem": f"skipped: {package} is not installed (pip install 'omnifx[peers]')"}
    try:
        case = make_case()
        full = next(_flops(call) for call in generation(case, case.module, Uncached(), seed=77, steps=2))
        with trial(make_case, make_method, steps=steps, lowering=lowering) as found:
            for _ in range(GENERATIONS):
                found.generate()
            row.update(
                graphs=sum(found.new_graphs),
                new_graphs=found.new_graphs,
                entries_max=max(found.entries[-1]),
                entries_last=found.entries[-1][-1],
                entries=found.entries[-1],
                graph_runs_max=max(found.graph_runs[-1]),
                breaks=found.breaks,
                recompilations=found.new_graphs[-1],
                limits=sorted(set(found.count.limits)),
            )
            spent = found.profile()
            row.update(compute=sum(spent) / (full * steps), steps_saved=sum(flops < 0.99 * full for flops in spent))
            if isinstance(found.method, Omnifx):
                stats = omnifx.stats(found.compiled)
                row.update(notes=stats.notes, captures=stats.graphs)
                row["recompilations"] += stats.recompilations
        row["fullgraph"] = _fullgraph(make_case, make_method, steps=steps, lowering=lowering)
        for number in compared:
            if number != steps:
                with trial(make_case, make_method, steps=number, lowering=lowering) as found:
                    for _ in range(GENERATIONS):
                        found.generate()
                    row["graphs_by_steps"][number] = sum(found.new_graphs)
            else:
                row["graphs_by_steps"][number] = row["graphs"]
            if row["limits"]:  # they hide how many it would be
                row["unlimited_graphs_by_steps"][number] = _unlimited(make_case, make_method, number, lowering)
    except Exception as error:  # noqa: BLE001 - a peer may fail in any way, and its row says how
        row["problem"] = _sentence(error)
    for key in ("graphs_by_steps", "unlimited_graphs_by_steps"):
        row[key] = {str(number): graphs for number, graphs in row[key].items()}  # as they come back from JSON
    return row


def _unlimited(make_case: Callable[[], Case], make_method: Callable[[], Uncached], steps: int, lowering: str) -> int:
    """Graphs that one generation compiles if Dynamo never gives up."""
    with (
        torch._dynamo.config.patch(recompile_limit=4096, accumulated_recompile_limit=8192),
        trial(make_case, make_method, steps=steps, lowering=lowering) as found,
    ):
        found.generate()
    return sum(found.new_graphs)


def _fullgraph(make_case: Callable[[], Case], make_method: Callable[[], Uncached], *, steps: int, lowering: str) -> str:
    """ "yes", or why ``fullgraph=True`` fails."""
    with trial(make_case, make_method, steps=steps, lowering=lowering, fullgraph=True) as found:
        try:
            for _ in range(GENERATIONS):
                found.generate()
        except Exception as error:  # noqa: BLE001 - any failure is the finding
            step = 1 + found.count.entries  # each call before this one entered the one graph once
            return f"no, step {step}: {_sentence(error)}"
    return "yes"


def _sentence(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def broken_bounds(row: dict[str, Any], uncached_breaks: int = 0) -> list[str]:
    """Which of the project's own bounds an omnifx row breaks; empty if none."""
    if row["problem"]:
        return [f"it failed: {row['problem']}"]
    counts = set(row["graphs_by_steps"].values())
    most_runs = 2 if row["method"] == CORRECTED else 1  # a full step that measures noise replays the reuse graph
    broken = {
        f"a call enters compiled code {row['entries_max']} times, not once": row["entries_max"] != 1,
        f"a call runs {row['graph_runs_max']} compiled graphs, not {most_runs}": row["graph_runs_max"] != most_runs,
        f"{row['breaks']} graph breaks, uncached {uncached_breaks}": row["breaks"] > uncached_breaks,
        f"fullgraph=True: {row['fullgraph']}": row["fullgraph"] != "yes",
        f"{row['recompilations']} recompilations once variants exist": row["recompilations"] != 0,
        f"the number of variants depends on the steps: {row['graphs_by_steps']}": len(counts) != 1,
        "nothing was reused": not row["steps_saved"] or not row["compute"] < 1.0,
    }
    return [text for text, is_broken in broken.items() if is_broken]


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row as printed."""
    if row["graphs"] is None:
        return dict.fromkeys(COLUMNS, "-") | {
            "model": row["model"],
            "method": row["method"],
            "remarks": row["problem"],
        }
    remarks = [row["problem"], *(f"gave up: hit {limit}" for limit in row["limits"])]
    if without := row["unlimited_graphs_by_steps"]:
        remarks.append(f"graphs without it, by steps: {_by_steps(without)}")
    if not row["steps_saved"]:
        remarks += ["caches nothing"] if row["method"] != "no cache" else []
    if row["fullgraph"] not in (None, "yes"):
        remarks.append("fullgraph fails at " + row["fullgraph"].removeprefix("no, ").partition(":")[0])
    return {
        "model": row["model"],
        "method": row["method"],
        "new graphs": "+".join(map(str, row["new_graphs"])),
        "entries": f"{row['entries_max']}, {row['entries_last']}",
        "graph runs": row["graph_runs_max"],
        "breaks": row["breaks"],
        "recompiled": row["recompilations"],
        "fullgraph": "-" if row["fullgraph"] is None else row["fullgraph"].partition(",")[0],
        "by steps": _by_steps(row["graphs_by_steps"]),
        "compute": "-" if row["compute"] is None else f"{row['compute']:.3f}",
        "saved": "-" if row["steps_saved"] is None else row["steps_saved"],
        "remarks": "; ".join(filter(None, remarks)),
    }


def _by_steps(graphs: dict[str, int]) -> str:
    return ", ".join(f"{steps}: {count}" for steps, count in graphs.items())


COLUMNS = (
    "model",
    "method",
    "new graphs",
    "entries",
    "graph runs",
    "breaks",
    "recompiled",
    "fullgraph",
    "by steps",
    "compute",
    "saved",
    "remarks",
)


def measure_alone(model: str, method: str, *, steps: int, lowering: str, seconds: float = 900.0) -> dict[str, Any]:
    """One row, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        command = [sys.executable, "-m", "benchmarks.graphs", "--one", model, method, str(path)]
        command += ["--steps", str(steps), "--lowering", lowering]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
        except subprocess.TimeoutExpired:
            return empty_row(model, method, f"not done after {seconds:.0f} s")
        if result.returncode or not path.exists():
            last = (result.stderr.strip().splitlines() or ["no output"])[-1]
            return empty_row(model, method, f"its process ended with {result.returncode}: {last}")
        row: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return row


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all rows, print them, and fail if omnifx breaks one of its own bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--lowering", default="eager", choices=["eager", "inductor"])
    parser.add_argument("--out", default="")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "METHOD", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        torch.set_num_threads(1)
        row = measure(args.one[0], args.one[1], steps=args.steps, lowering=args.lowering)
        Path(args.one[2]).write_text(json.dumps(row), encoding="utf-8")
        return
    rows = []
    for model in args.models:
        for method in args.methods:
            print(f"{model}, {method} ...", file=sys.stderr, flush=True)
            rows.append(measure_alone(model, method, steps=args.steps, lowering=args.lowering))
    table([shown(row) for row in rows], f"compiled graphs, {args.steps} steps, {args.lowering}")
    uncached = {row["model"]: row["breaks"] or 0 for row in rows if row["method"] == "no cache"}
    broken = [
        f"{row['model']}, {row['method']}: {text}"
        for row in rows
        if isinstance(METHODS[row["method"]](), Omnifx)
        for text in broken_bounds(row, uncached.get(row["model"], 0))
    ]
    if args.out:
        versions = {name: _version(name) for name in ("cache-dit",)}
        save(args.out, {"versions": versions, "rows": rows, "broken_bounds": broken})
    if broken:
        raise SystemExit("\n".join(["omnifx breaks its own bounds:", *broken]))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
