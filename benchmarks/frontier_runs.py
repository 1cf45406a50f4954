"""How `benchmarks.frontier` runs one way on one case: made ready, run on seeds, FLOPs counted, samples judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import omnifx
from benchmarks.frontier_cases import Case, Way, labels_of
from benchmarks.quality import evenly_spread
from omnifx.plan import Plan
from omnifx.policy import policies
from omnifx.profile import Profile

CALIBRATION_RUNS, CALIBRATION_BATCH = 3, 8
REFINED = (2.0, 2.5, 1 / 0.3, 4.0)
"""Speedups at which calibrations try plans out, on their own seeds, where the policy has variants."""
TUNING_SAMPLES = 20


@dataclass(frozen=True)
class Seeds:
    """Which seeds are for what; none has two uses."""

    sets: tuple[range, ...]
    tuning: range = range(2_000_000, 2_000_000 + TUNING_SAMPLES)
    calibration: range = range(1_000_000, 1_000_000 + CALIBRATION_RUNS * CALIBRATION_BATCH)

    def __post_init__(self) -> None:
        taken: set[int] = set()
        for seeds in (*self.sets, self.tuning, self.calibration):
            if shared := taken.intersection(seeds):
                raise ValueError(f"seeds {min(shared)} to {max(shared)} would have two uses.")
            taken.update(seeds)

    @classmethod
    def of(cls, sets: int, samples: int) -> Seeds:
        """So many reported sets of so many samples."""
        return cls(tuple(range(i * samples, (i + 1) * samples) for i in range(sets)))

    @property
    def words(self) -> dict[str, str]:
        """For readers."""
        report = f"{len(self.sets)} sets of {len(self.sets[0])}: 0 to {self.sets[-1][-1]}"
        uses = {"tuning of rivals": self.tuning, "calibration": self.calibration}
        return {"report": report, **{use: f"{seeds[0]} to {seeds[-1]}" for use, seeds in uses.items()}}


class Extrapolated:
    """Skips the network at all but `calls` evenly spread steps, and extrapolates its last outputs in the timestep with
    the polynomial of their last `order` + 1."""

    def __init__(self, model: Callable[..., Any], steps: int, calls: int, order: int) -> None:
        self.model, self.steps, self.order = model, steps, order
        self.computed = evenly_spread(steps, calls)
        self.step = 0
        self.known: list[tuple[float, Tensor]] = []

    def __call__(self, **inputs: Any) -> tuple[Tensor]:
        now = float(inputs["timestep"].flatten()[0])
        if self.step == 0:
            self.known = []
        if self.step in self.computed:
            self.known = [(now, self.model(**inputs)[0]), *self.known[: self.order]]
        self.step = (self.step + 1) % self.steps
        total = torch.zeros_like(self.known[0][1])
        for i, (time, output) in enumerate(self.known):
            others = [other for j, (other, _) in enumerate(self.known) if j != i]
            total += math.prod((now - other) / (time - other) for other in others) * output
        return (total,)


class Watched:
    """A model, and the latents that each of its calls got."""

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model
        self.latents: list[Tensor] = []

    def __call__(self, **inputs: Any) -> Any:
        self.latents.append(inputs["hidden_states"].clone())
        return self.model(**inputs)


@dataclass
class Run:
    """A way made ready: what is called, with which arguments of the sampler, and what it cost."""

    model: Any
    steps: int
    more: dict[str, Any] = field(default_factory=dict)
    compute: float | None = None
    """Where it is known beforehand; else it is counted, or read from the plan's log."""
    plan: Plan | None = None


class Bench:
    """One case: makes ways ready, runs them, and judges their samples.

    Args:
        case: What is sampled.
        seeds: Which seeds are for what.
        computes: What was counted before: (method, setting) -> share of compute.
    """

    def __init__(self, case: Case, seeds: Seeds, computes: Mapping[tuple[str, str], float]) -> None:
        self.case, self.seeds = case, seeds
        self.plain = case.load()
        self._profiles: dict[str, Profile] = {}
        self._uncached: dict[range, Tensor] = {}
        self._ratios: dict[str, Sequence[float]] = {}
        self.computes = computes
        self._flops = self._flops_of(self.plain, seeds.tuning, {}, case.steps)[1]

    def ready(self, way: Way) -> Run:
        """Attach, compile, or only say how to sample. Raises NotHere or ConfigError if the way cannot be gone here."""
        steps = self.case.steps
        if way.peer is not None:
            peer = way.peer()
            if hasattr(peer, "ratios"):
                peer.ratios = self._ratios.get(peer.name, ())
            model = peer.attach(self.case.load(), steps, lambda given: self._sample(given, self.seeds.calibration[:8]))
            if hasattr(peer, "ratios"):
                self._ratios[peer.name] = peer.ratios
            return Run(model, steps, compute=self.computes.get((way.method, way.setting)) if peer.static else None)
        if way.policy:
            return self._compiled(way)
        calls = way.calls
        assert calls is not None  # all others
        if way.method.startswith("output"):
            return Run(Extrapolated(self.plain, steps, calls, way.order), steps, compute=calls / steps)
        more = {} if way.solver is None else {"solver": way.solver}
        return Run(self.plain, calls, more, compute=calls / steps)

    def run(self, ready: Run, seeds: range) -> tuple[Tensor, float]:
        """Samples of some seeds, and the share of compute they took."""
        if ready.compute is None and ready.plan is None:
            samples, flops = self._flops_of(ready.model, seeds, ready.more, ready.steps)
            return samples, flops / self._flops / (len(seeds) / len(self.seeds.tuning))
        samples = self._sample(ready.model, seeds, steps=ready.steps, **ready.more)
        if ready.compute is not None:
            return samples, ready.compute
        log = omnifx.stats(ready.model).generations[-1]
        if log.reasons:
            raise RuntimeError(f"unplanned full steps: {log.reasons}")
        return samples, sum(step.spent for step in log.steps) / sum(step.whole for step in log.steps)

    def uncached(self, seeds: range) -> Tensor:
        """The samples that all are compared with."""
        if seeds not in self._uncached:
            self._uncached[seeds] = self._sample(self.plain, seeds)
        return self._uncached[seeds]

    def judge(self, samples: Tensor, seeds: range) -> dict[str, float]:
        """The metrics of some samples."""
        return self.case.judge(samples, self.uncached(seeds), labels_of(len(seeds)))

    def drift(self, ready: Run, seeds: range) -> tuple[float, ...]:
        """How far the latents behind each step are from the uncached ones; empty for another solver or step count."""
        if ready.more or ready.steps != self.case.steps:
            return ()
        found = []
        for model in (self.plain, ready.model):
            watched = Watched(model)
            end = self._sample(watched, seeds)
            found.append([*watched.latents[1:], end])
        return tuple(float((b - a).norm() / a.norm()) for a, b in zip(*found, strict=True))

    def _compiled(self, way: Way) -> Run:
        policy = policies()[way.policy](**way.options)
        key = f"{policy.measures} {policy.measured_lags} {policy.prior}"
        if key not in self._profiles:
            torch._dynamo.reset()
            self._profiles[key] = self._calibrate(way.policy)
        profile = self._profiles[key]
        plan = omnifx.make_plan(profile, policy=policy, speedup=way.speedup)
        options = {"policy": policy, "profile": profile, "plan": plan, "profile_cache": False, "lowering": "eager"}
        torch._dynamo.reset()
        compiled = torch.compile(self.case.load(), backend="omnicache", options=options)
        return Run(compiled, self.case.steps, plan=plan)

    def _calibrate(self, policy: str) -> Profile:
        def generate(model: Any, run: int) -> Tensor:
            return self._sample(model, self.seeds.calibration[run * CALIBRATION_BATCH :][:CALIBRATION_BATCH])

        options = {"lowering": "eager"}
        return omnifx.calibrate(
            self.case.load(),
            generate,
            policy=policy,
            runs=CALIBRATION_RUNS,
            refine=CALIBRATION_RUNS if policies()[policy]().most_variants else 0,
            speedups=REFINED,
            options=options,
            progress=False,
        )

    def _sample(self, model: Any, seeds: Sequence[int], **more: Any) -> Tensor:
        given = {"seeds": seeds, "labels": labels_of(len(seeds)), "steps": self.case.steps, **more}
        return self.case.sample(model, **given)

    def _flops_of(self, model: Any, seeds: range, more: Mapping[str, Any], steps: int) -> tuple[Tensor, float]:
        attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
        with FlopCounterMode(display=False, custom_mapping=attention) as counter:
            samples = self._sample(model, seeds, steps=steps, **more)
        return samples, float(counter.get_total_flops())


def _attention_flops(query: Any, key: Any, value: Any, *_rest: Any, **_more: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # torch counts those of CUDA only
