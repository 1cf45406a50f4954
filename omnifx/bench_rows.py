"""The measuring of `omnifx bench`: a target's uncached run, and a row for each way beside it.

Every way makes the samples that the uncached run makes, from the same noise. What is measured before, a profile or the
first generation of a policy that decides at run time, has seeds of its own. Times are medians over generations that
take turns with uncached ones; what compiles is not timed. Generations are not marked: they run as they do behind a
plain ``torch.compile(model, backend="omnicache")``.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from omnifx.bench_targets import Target, as_samples
from omnifx.bench_ways import CALIBRATION_SEED, Settings, Way
from omnifx.calibration import calibrate, make_plan
from omnifx.comparing import TRAIL_BYTES, Trail, bands, compare, drift, frechet, watched
from omnifx.errors import ConfigError, OmnifxError
from omnifx.plan import Plan
from omnifx.policy import Policy
from omnifx.profile import Profile
from omnifx.results import Row, Timeline, Value, name_of
from omnifx.runlog import GenerationLog, StepLog
from omnifx.runtime import is_runtime
from omnifx.session import stats

MIB = 2**20
FAILED = "failed with"
"""How the reason begins if a way neither ran nor was refused."""


@dataclass
class _Made:
    """What generations of the reported seeds gave."""

    samples: list[Tensor] = field(default_factory=list)
    """Of each generation."""
    trails: list[Trail] = field(default_factory=list)
    """Of the first generations."""
    seconds: list[float] = field(default_factory=list)
    """Of generations that took turns with uncached ones."""
    plain_seconds: list[float] = field(default_factory=list)
    """Of these."""
    memory: int = 0
    """Most bytes of the device in a generation."""

    @property
    def time(self) -> float:
        """Seconds of a generation over those of an uncached one."""
        return statistics.median(self.seconds) / statistics.median(self.plain_seconds)


class Bench:
    """The uncached run of a target, and what is measured against it.

    Args:
        target: What is measured.
        settings: How much.
        features: Samples [N, C, (T,) H, W] -> [N, D], for Frechet distances; None: none are measured.
        expect: Called with the name of what begins, and the number of generations that it takes.
        advance: Called after each generation.

    Raises: ConfigError if the uncached run itself is not usable.
    Memory: all uncached samples on the host, and at most `TRAIL_BYTES` of latents.
    """

    def __init__(
        self,
        target: Target,
        settings: Settings,
        *,
        features: Callable[[Tensor], object] | None = None,
        expect: Callable[[str, int], object] = lambda name, generations: None,
        advance: Callable[[], object] = lambda: None,
    ) -> None:
        self.target, self.settings, self.features = target, settings, features
        self.expect, self.advance = expect, advance
        self.device = next((p.device for p in target.model.parameters()), torch.device("cpu"))
        self.shape: list[int] = []
        self.lowest, self.highest = target.value_range or (-1.0, 1.0)
        self._profiles: dict[str, tuple[Profile, float]] = {}
        self._plans: dict[tuple[str, str], str] = {}
        torch._dynamo.reset()  # or its memory of other batch sizes makes the batch size symbolic
        compiled: Any = torch.compile(target.model)
        self.plain: Any = target.model if settings.lowering == "eager" else compiled
        expect("uncached", 1)
        with watched(self.plain) as trail:
            self._generate(self.plain, CALIBRATION_SEED)
        if not trail.calls:
            raise ConfigError("bench: generate never called the model it was given. Use its first argument.")
        self.calls, self.steps = trail.calls, len(trail.latents) or trail.calls
        self.calibration, self.sets = settings.seeds(self.batch)
        if features is not None and self._set_size < 2:
            raise ConfigError("bench: a Frechet distance needs at least 2 samples in each set. Ask for more --samples.")
        spare = len(self.sets) * len(self.sets[0]) - settings.repeats  # timed without being made for it
        room = TRAIL_BYTES // max(1, trail.num_bytes)
        self._num_followed = max(1, min(len(self.sets[0]), spare, room))
        expect("uncached", self._num_made)
        self.uncached = self._make(self.plain, turns=False)
        self.reference = torch.cat(self.uncached.samples)

    @property
    def batch(self) -> int:
        """Samples of a generation."""
        return self.shape[0]

    @property
    def seeds(self) -> dict[str, str]:
        """Which seeds were used for what, in words."""
        report = ", ".join(f"{seeds[0]}-{seeds[-1]}" for seeds in self.sets)
        each = f"{self.batch} samples each"
        return {
            "calibration": f"generations {self.calibration[0]}-{self.calibration[-1]}, {each}",
            "report": f"generations {report}, {each}",
        }

    def uncached_row(self) -> Row:
        """The run that all others are compared with."""
        found = {"seconds": [statistics.median(self.uncached.seconds)], **self._memory_of(self.uncached)}
        sets = self.reference.split(self._set_size)
        if self.features is not None and len(sets) > 1:  # how far apart seeds alone are
            pairs = sets if len(sets) > 2 else sets[:1]  # two sets are one pair, and have no spread
            found["frechet"] = [frechet(one, sets[i - 1], self.features) for i, one in enumerate(pairs)]
        return Row(
            method="uncached",
            family="uncached",
            setting="",
            compute=1.0,
            time=1.0,
            metrics=_values(found),
            timeline=Timeline(steps="F" * self.steps, notes=self.target.notes),
            samples="uncached",
        )

    def measure(self, way: Way) -> tuple[Row, Tensor]:
        """One row, and its samples.

        Raises: OmnifxError if omnifx or the policy refuses, and whatever a run may raise; `reason_of` tells why.
        """
        gc.collect()  # what the last way cached goes with what Dynamo compiled
        torch._dynamo.reset()
        return self._fewer(way) if way.policy is None else self._planned(way, way.policy)

    def _fewer(self, way: Way) -> tuple[Row, Tensor]:
        if not self.target.takes_steps:
            raise ConfigError(
                "bench: generate takes no argument 'steps', so it cannot be asked for fewer of them. Write it as "
                "generate(model, seed, steps=...)."
            )
        steps = way.fewer(self.target.steps or self.steps)
        self.expect(way.label, 1 + self._num_made + self.settings.repeats)
        with watched(self.plain, keep=False) as trail:
            self._generate(self.plain, CALIBRATION_SEED, steps)  # compiles anew
        compute = trail.calls / self.calls
        if compute >= 1.0:
            raise ConfigError(
                f"bench: asked for {steps} steps, the sampler called the model {trail.calls} times, and uncached "
                f"{self.calls} times. Do its arguments fix the steps?"
            )
        made = self._make(self.plain, steps)
        timeline = Timeline(steps="F" * (len(made.trails[0].latents) or trail.calls))
        return self._row(way, made, compute, timeline, {})

    def _planned(self, way: Way, policy: Policy) -> tuple[Row, Tensor]:
        options: dict[str, Any] = {
            **self.settings.options,
            "policy": policy,
            "lowering": self.settings.lowering,
            "profile_cache": False,
        }
        plan: Plan | None = None
        notes: list[str] = []
        if is_runtime(policy):
            options["steps"] = self.steps
        else:
            profile, seconds = self._profile(policy)
            plan = make_plan(profile, policy=policy, speedup=way.speedup)
            if (known := self._plans.get((way.method, _essence(plan)))) is not None:
                raise ConfigError(f"bench: the plan is that of {known}, which is measured.")
            options |= {"profile": profile, "plan": plan}
            notes = [f"calibrated on {self.settings.runs} generations, in {seconds:.1f} s", *plan.notes]
        compiled: Any = torch.compile(self.target.model, backend="omnicache", options=options)
        self.expect(way.label, 2 + self._num_made + self.settings.repeats)
        self._generate(self.plain, CALIBRATION_SEED, self._shortest)  # compiles anew, and so does the next
        self._generate(compiled, CALIBRATION_SEED)  # some policies learn from their first generation
        before = max((log.number for log in stats(compiled).generations), default=0)
        made = self._make(compiled)
        found = stats(compiled)
        logs = [log for log in found.generations if log.number > before]
        steps = [step for log in logs for step in log.steps]
        compute = sum(step.spent for step in steps) / sum(step.whole for step in steps)
        if compute >= 1.0 and way.speedup != 1.0:
            decided = [step.decision for step in steps[-1:] if step.decision]
            why = "; ".join([*_unplanned(logs), *found.notes, *decided]) or "no reason was noted"
            raise ConfigError(f"bench: nothing was reused: {why}.")
        if plan is not None:
            self._plans[way.method, _essence(plan)] = way.setting
        cost = {
            "cache": [max(log.peak_cache_bytes for log in logs) / MIB],
            "compile": [found.compile_seconds],
        }
        each = max(1, self.calls // self.steps)  # streams call one after the other
        return self._row(way, made, compute, _timeline(plan, steps[-self.calls :: each], logs, notes), cost)

    def _profile(self, policy: Policy) -> tuple[Profile, float]:
        """What a policy measures, once for all of its settings but those that change what is measured; its seconds."""
        key = f"{policy.name} {policy.measures} {policy.measured_lags} {policy.prior}"
        if key not in self._profiles:
            runs = self.settings.runs
            self.expect(f"calibration for {policy.name}", runs)
            start = time.perf_counter()
            profile = calibrate(
                self.target.model,
                lambda model, run: self._generate(model, self.calibration[run]),
                policy=policy,
                runs=runs,
                options={**self.settings.options, "lowering": self.settings.lowering},
                progress=False,
            )
            self._profiles[key] = profile, time.perf_counter() - start
            torch._dynamo.reset()
        return self._profiles[key]

    @property
    def _set_size(self) -> int:
        """Samples of a set."""
        return len(self.sets[0]) * self.batch

    @property
    def _shortest(self) -> int | None:
        """Steps of a generation that only compiles."""
        return min(2, self.target.steps or self.steps) if self.target.takes_steps else None

    @property
    def _num_made(self) -> int:
        """Generations of one way: the reported ones, and more if too few of them can be timed."""
        return max(sum(map(len, self.sets)), self._num_followed + self.settings.repeats)

    def _make(self, model: Any, steps: int | None = None, *, turns: bool = True) -> _Made:
        """All reported samples. The first generations are followed step by step; of the others, so many as there are
        repeats are timed, in turns with uncached ones."""
        seeds = [seed for each in self.sets for seed in each]
        made = _Made()
        for i in range(self._num_made):
            seed = seeds[i % len(seeds)]
            if i < self._num_followed:
                with watched(model) as trail:
                    samples, _ = self._generate(model, seed, steps)
                made.trails.append(trail)
            else:
                timed = i < self._num_followed + self.settings.repeats
                if timed and turns:
                    made.plain_seconds.append(self._generate(self.plain, seed)[1])
                samples, seconds = self._generate(model, seed, steps)
                made.seconds += [seconds] if timed else []
            made.memory = max(made.memory, self._peak_memory())
            if i < len(seeds):
                made.samples.append(samples)
        return made

    def _generate(self, model: Any, seed: int, steps: int | None = None) -> tuple[Tensor, float]:
        """Samples of one generation on the host, and its seconds."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        with torch.no_grad():
            value = self.target.generate(model, seed, self.target.steps if steps is None else steps)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        samples, images = as_samples(value)
        if not self.shape:
            self.shape = list(samples.shape)
            if images and self.target.value_range is None:
                self.lowest, self.highest = 0.0, 1.0
            self._check_range(samples)
        if list(samples.shape) != self.shape:
            raise ConfigError(
                f"bench: the generation of seed {seed} gave samples {list(samples.shape)}, the first one {self.shape}; "
                "all must have one shape."
            )
        self.advance()
        return samples, seconds

    def _check_range(self, samples: Tensor) -> None:
        slack = 0.5 * (self.highest - self.lowest)
        low, high = float(samples.min()), float(samples.max())
        if low < self.lowest - slack or high > self.highest + slack:
            raise ConfigError(
                f"bench: samples lie in {low:g} to {high:g}, not in {self.lowest:g} to {self.highest:g}. Say where: "
                "--range=LOWEST,HIGHEST."
            )

    def _peak_memory(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def _memory_of(self, made: _Made) -> dict[str, list[float]]:
        return {"memory": [made.memory / MIB]} if self.device.type == "cuda" else {}

    def _row(
        self, way: Way, made: _Made, compute: float, timeline: Timeline, cost: dict[str, list[float]]
    ) -> tuple[Row, Tensor]:
        """What the samples of a way are worth, and what they cost; with the samples."""
        samples, size = torch.cat(made.samples), self._set_size
        followed = self._num_followed * self.batch
        found = {"seconds": [statistics.median(made.seconds)], **cost, **self._memory_of(made)}
        for ours, theirs in zip(samples.split(size), self.reference.split(size), strict=True):
            figures = compare(ours, theirs, data_range=self.highest - self.lowest)
            if self.features is not None:
                figures["frechet"] = frechet(ours, theirs, self.features)
            for name, figure in figures.items():
                found.setdefault(name, []).append(figure)
        row = Row(
            method=way.method,
            family=way.family,
            setting=way.setting,
            compute=compute,
            time=made.time,
            metrics=_values(found),
            drift=drift(made.trails, self.uncached.trails, samples[:followed], self.reference[:followed]),
            bands=bands(samples[:size], self.reference[:size]),
            timeline=timeline,
            samples=name_of(way.label),
        )
        return row, samples


def reason_of(error: BaseException) -> str:
    """Why a way cannot be measured, however Dynamo wrapped it; what is no refusal begins with `FAILED`."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OmnifxError):
            return str(seen)
        seen = getattr(seen, "inner_exception", None) or seen.__cause__
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{FAILED} {type(error).__name__}: {lines[0]} OMNIFX_DEBUG=1 shows where."


def _values(found: dict[str, list[float]]) -> dict[str, Value]:
    """The figures that exist: equal samples have no PSNR."""
    values = {name: Value.of(figures) for name, figures in found.items()}
    return {name: value for name, value in values.items() if value is not None}


def _essence(plan: Plan) -> str:
    """What a plan does, without what it is called."""
    return repr((plan.variants, plan.steps, plan.spans, plan.history, plan.terms, plan.selection, plan.trend))


def _unplanned(logs: Sequence[GenerationLog]) -> list[str]:
    """Why steps ran in full that need not."""
    counts = sum((Counter(log.reasons) for log in logs), Counter[str]())
    return [f"{count} steps ran in full unplanned, in {len(logs)} generations: {why}" for why, count in counts.items()]


def _timeline(
    plan: Plan | None, steps: Sequence[StepLog], logs: Sequence[GenerationLog], notes: Sequence[str]
) -> Timeline:
    """What the steps of the last generation ran, in one of its streams."""
    letters = "".join("F" if step.variant.startswith("full") else "r" for step in steps)
    if plan is not None and len(plan.steps) == len(steps):
        planned = plan.timeline().splitlines()[-1]
        letters = "".join("F" if step.reason else letter for step, letter in zip(steps, planned, strict=True))
    return Timeline(
        steps=letters,
        timesteps=plan.timesteps if plan is not None else (),
        notes=(*notes, *_unplanned(logs)),
    )


__all__ = ["FAILED", "MIB", "Bench", "reason_of"]
