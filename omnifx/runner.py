"""The runner: what happens when a captured graph is called. The conductor decides, the store hands over the caches, a
variant runs.

Nothing here is traced: Dynamo sees one opaque compiled function, and no graph counts steps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from omnifx.boundary import Underway
from omnifx.clock import Reader
from omnifx.conditions import Table, laid_out
from omnifx.conductor import Call, Conductor, Part
from omnifx.grid import low_pass
from omnifx.passes.pipeline import VariantSpec
from omnifx.plan import COMPUTE, PREDICT, REUSE, SKIP, Combination, Plan, Row, is_partial, reuses
from omnifx.policy import Policy
from omnifx.program import Program, Variant
from omnifx.runlog import Log, StepLog
from omnifx.sizes import Sizes
from omnifx.store import FullStep
from omnifx.streams import Stream, kept_by
from omnifx.tokens import Selection

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Relative difference up to which a reuse variant fed a step's own cuts counts as reproducing that step."""


class Traits(TypedDict):
    """What a plan says of a row, beside its actions."""

    spans: tuple[str, ...]
    terms: int
    stores: bool
    trend: Literal["", "scale", "shift"]
    selection: Selection | None


@dataclass
class Job:
    """One graph call: a part of a step, and what it holds while it runs, whatever is evicted meanwhile."""

    call: Call
    part: Part
    row: Row
    reason: str
    weights: tuple[int, int]
    """Versions of the model's and of this part's weights."""
    small: tuple[tuple[float, ...], ...]
    """Values of the graph's small inputs; empty in a broken model."""
    sizes: Sizes
    """The graph's symbolic sizes in this call."""
    cuts: dict[str, Tensor] = field(default_factory=dict)
    past: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """Older values of the cuts, newest first."""
    noise: dict[int, Tensor] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)
    """Scores and stamps of tokens, by label."""
    kept: tuple[str, ...] | None = None
    """Branches of this part whose cuts later steps may want; None: all."""
    spans: tuple[str, ...] = ()
    """Ranges of blocks whose actions end the row, if it reuses anything."""
    history: tuple[FullStep, ...] = ()
    """The last full steps, newest first, where the plan combines outputs."""
    replayed: bool = False
    """Whether the noise that this full step measured is that of the cuts which the plan counts on."""
    computed: int = 0
    """FLOPs beside those of the variant."""
    overhead_ms: float = 0.0
    """What reading the call and deciding took."""


class Runner:
    """Runs the calls of one program.

    Args:
        program: The captured graph.
        conductor: Decides; None for a part of a broken model, which does what the step under way says.
        underway: Where to find that step.
        inactive: Why nothing can be reused here; empty if it can.
        relay: Of a part, finds the runner for the model that is being called: Dynamo runs what it compiled for one
            instance of a class for all of them. None if nothing is known of that model.
    """

    def __init__(
        self,
        program: Program,
        *,
        policy: Policy,
        log: Log,
        conductor: Conductor | None,
        underway: Underway,
        inactive: str = "",
        relay: Callable[[Runner], Runner | None] = lambda runner: runner,
    ) -> None:
        self.program = program
        self.policy = policy
        self.log = log
        self.conductor = conductor
        self.underway = underway
        self._inactive = inactive
        self._relay = relay
        self._checked: set[tuple[VariantSpec, Sizes]] = set()  # what reproduced a full step from its own cuts
        self.late_compilations = 0
        self.reader = Reader(program.analysis.inputs)
        self._tables: dict[VariantSpec, Table] = {}
        self._coefficients: dict[tuple[float, float], Tensor] = {}
        self._predictors: dict[tuple[float, ...], Tensor] = {}
        self._prior: tuple[Any, Any] = (None, None)  # the one last read, and the same where the model runs
        self._low_pass: dict[tuple[int, float], Tensor] = {}
        self._lock = conductor.lock if conductor is not None else threading.RLock()
        self._boxed_call = True  # what AOTAutograd calls the convention: one list of inputs, which may be cleared

    @property
    def inactive(self) -> str:
        """Why nothing is reused; empty if something can be."""
        return self._inactive or (self.conductor.inactive if self.conductor is not None else "")

    def deactivate(self, reason: str) -> None:
        """Reuse nothing from now on."""
        self._inactive = reason
        if self.conductor is not None:
            self.conductor.inactive = reason

    @property
    def compiled(self) -> list[Any]:
        """What was compiled so far; each has a label and the seconds it took."""
        return list(self.program.variants.values())

    def specs_ahead(self) -> list[VariantSpec]:
        """Variants to compile before they are needed: those of the known plans, else those the policy may use."""
        program, conductor = self.program, self.conductor
        if self.inactive or not self.policy.needs_profile or not program.names:
            return [program.plain]
        policy, recorded = self.policy, conductor.recorded if conductor is not None else None
        full = program.full(measures=False, kept=recorded, selection=self._chosen(policy.selection))
        if conductor is None:
            return [full, self._replay_spec(None, corrects=False)]
        if not conductor.entries or conductor.record_only:
            rows = [row for row in policy.rows(len(program.names)) if reuses(row)]
            traits: Traits = {
                "spans": (),
                "terms": policy.terms,
                "stores": policy.stores,
                "trend": policy.trend,
                "selection": policy.selection,
            }
            combined = [row for row in rows if policy.history and set(row) <= {REUSE, SKIP}]
            single = [row for row in rows if row not in combined and SKIP not in row]
            return [
                full,
                *(program.reusing(row, corrects=policy.uses_noise, **traits) for row in single),
                *self._combining(combined, policy.history, noise=policy.uses_noise),
            ]
        kept = kept_by(conductor.entries)
        specs: list[VariantSpec] = []
        for plan in [entry.plan for entry in conductor.entries]:
            specs.append(program.full(measures=False, kept=kept, selection=plan.selection))
            specs += self._specs_of(plan, plan.readings, corrects=plan.corrects, kept=kept)
            specs += self._combining_specs(plan)
        return list(dict.fromkeys(specs))

    def _specs_of(
        self, plan: Plan, readings: Sequence[tuple[Row, bool]], *, corrects: bool, kept: tuple[str, ...] | None
    ) -> list[VariantSpec]:
        """The variants of those `Plan.readings` that are possible here."""
        program = self.program
        if any(map(program.span_problem, plan.span_names)):
            return []
        width = len(program.names) + len(plan.spans)
        possible = [
            (row, self._traits(plan, stores))
            for row, stores in readings
            if reuses(row) and len(row) == width and not program.refusal_of(row, plan.tokens)
        ]
        return [program.reusing(row, corrects=corrects, kept=kept, **traits) for row, traits in possible]

    def _combining_specs(self, plan: Plan) -> list[VariantSpec]:
        """The variants of a plan's combinations, and what measures the noise that they read."""
        specs = self._combining(plan.combined_rows, plan.history, noise=plan.combines_noise)
        if specs and plan.combines_noise and (plan.terms or self.program.reuse_row not in plan.combined_rows):
            specs.append(self._replay_spec(plan, corrects=plan.corrects))
        return specs

    def _combining(self, rows: Sequence[Row], history: int, *, noise: bool) -> list[VariantSpec]:
        """The variants of rows whose outputs are combined; none if that is not possible here."""
        program = self.program
        if not rows or self.conductor is None or program.combines.reason:
            return []
        fitting = [row for row in rows if len(row) == len(program.names)]
        return [program.reusing(row, corrects=False, combines=history, combines_noise=noise) for row in fitting]

    def _traits(self, plan: Plan, stores: bool) -> Traits:
        return {
            "spans": plan.span_names,
            "terms": plan.terms,
            "stores": stores,
            "trend": plan.trend,
            "selection": self._chosen(plan.selection),
        }

    def _selection(self, stream: Stream) -> Selection | None:
        """How a stream's plan chooses tokens; while it is recorded, how the policy will."""
        return self._chosen(stream.selection if stream.entries else self.policy.selection)

    def _chosen(self, selection: Selection | None) -> Selection | None:
        """A selection; None in a part of a broken model, where no tokens are computed alone."""
        return selection if self.conductor is not None else None

    # -- calls ---------------------------------------------------------------------------------------------------------

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        runner = self if self.conductor is not None else self._relay(self)
        if runner is None:
            return self.program.variant(self.program.plain).run(args)
        return runner.run(args)

    def run(self, args: list[Any]) -> Sequence[Any]:
        """A call of this runner's own model."""
        if self.inactive or not self.policy.needs_profile:
            self._log_plain()
            return self.program.variant(self.program.plain).run(args)
        started = time.perf_counter()
        job = self._begin(args) if self.conductor is not None else self._join(args)
        if job is None:
            return self.program.variant(self.program.plain).run(args)
        job.overhead_ms = 1e3 * (time.perf_counter() - started)
        return self._run(job, args)

    def _log_plain(self) -> None:
        with self._lock:
            if self.conductor is None:
                return
            log = self.log.generations[-1] if self.log.generations else self.log.begin()
            if len(log.steps) < 4096:
                flops = self.program.analysis.flops
                log.steps.append(StepLog(len(log.steps), 0, "full", self.inactive, flops, flops))

    def _begin(self, args: list[Any]) -> Job:
        """A call of the one graph of a step."""
        conductor = self.conductor
        assert conductor is not None
        part, latents = conductor.parts[0], self.program.analysis.inputs.latents
        with self._lock:
            part.watch.look(args)
            reading = self.reader.read(args, part.watch.probes(args))
            part.watch.compare(reading.probes)
            sizes = self.program.sizes.at(args)
            call = conductor.decide(
                reading,
                args[latents] if latents is not None else None,
                weights=part.watch.version,
                num_bytes=lambda kept, terms: (
                    self.program.cache_bytes_at(sizes, kept, terms) + self._token_bytes() + self._history_bytes(sizes)
                ),
            )
            return self._job(call, part, reading.small, sizes)

    def _token_bytes(self) -> int:
        """Bytes that a stream needs for partial branches, under any plan known or to come."""
        entries = self.conductor.entries if self.conductor is not None else ()
        selections = {self.policy.selection, *(entry.plan.selection for entry in entries)}
        return max(map(self.program.token_bytes, selections))

    def _history_bytes(self, sizes: Sizes) -> int:
        """Bytes that a stream needs for combinations, under any known plan."""
        plans = [entry.plan for entry in self.conductor.entries] if self.conductor is not None else []
        needs = {(plan.history, plan.combines_noise) for plan in plans}
        return max((self.program.history_bytes_at(sizes, history=h, noise=n) for h, n in needs), default=0)

    def _join(self, args: list[Any]) -> Job | None:
        """A call of one of the graphs of the step under way."""
        call, conductor = self.underway.call, self.underway.conductor
        if call is None or conductor is None or conductor.inactive:
            return None
        with conductor.lock:
            sizes = self.program.sizes.at(args)
            part = conductor.part_of(call, self.program, sizes=sizes)
            if part is None:
                return None
            part.watch.look(args)
            return self._job(call, part, (), sizes)

    def _job(self, call: Call, part: Part, small: tuple[tuple[float, ...], ...], sizes: Sizes) -> Job:
        """What to do of the step's row here; computes where a cache is not proven to be valid."""
        row, cache = part.row_in(call.row), call.stream.cache
        spans = call.spans if reuses(row) else ()
        if len(row) != len(self.program.names) + len(spans):
            row = self.program.compute_row
        job = Job(call, part, row, call.reason, (call.weights, part.watch.version), small, sizes)
        job.kept, job.spans = part.kept_here(call.stream.kept), spans
        job.noise, job.history = dict(cache.noise), cache.history  # before they are judged: they may be evicted
        if reuses(row) and (reason := self._refusal(job)):
            job.row, job.reason, job.spans = self.program.compute_row, reason, ()
            call.correction = None
            call.stream.on_plan = False
        keys = {cut: part.key(cut) for cut in self.program.cut_values} if part.prefix else None
        job.cuts = dict(cache.cuts) if keys is None else {c: cache.cuts[k] for c, k in keys.items() if k in cache.cuts}
        job.past = {c: cache.past[k] for c in job.cuts if (k := part.key(c)) in cache.past}
        job.tokens = dict(cache.tokens)
        return job

    @property
    def _conductor(self) -> Conductor:
        conductor = self.conductor or self.underway.conductor
        assert conductor is not None  # only called within a step
        return conductor

    def _refusal(self, job: Job) -> str:
        """Why this part may not reuse now; empty if it may."""
        cache, part = job.call.stream.cache, job.part
        plan = job.call.plan
        if reason := self.program.refusal_of(job.row, plan.tokens if plan is not None else ()):
            return reason
        spec = self._spec(job)
        for cut in self.program.cuts_of(spec):
            if part.key(cut) not in cache.cuts:
                return f"nothing is cached yet for {cut}"
        if self.program.cuts_of(spec) and cache.weights.get(part.index) != job.weights:
            return "the weights changed since the caches were made"
        if (combination := job.call.combination) and (reason := self._wrong_combination(job, combination)):
            return reason
        if spec.predicts and (reason := self._wrong_history(job, job.row) or self._wrong_prior(job, spec)):
            return reason
        variant = self._compiled(spec)
        if missing := [
            label for label in variant.extra_inputs if label.startswith("score:") and label not in cache.tokens
        ]:
            return f"no tokens are scored yet by {missing[0].removeprefix('score:')}"
        if not job.sizes.allows(variant.guards):
            return f"the variant {variant.spec.label} was compiled for other sizes than these"
        return ""

    def _wrong_history(self, job: Job, row: Row) -> str:
        """Why the stored values are not those that the planned weights are for; empty if they are."""
        call, cache = job.call, job.call.stream.cache
        count = len(call.predictor)
        actions = row[: len(self.program.names)]
        for branch, action, planned in zip(self.program.branches, actions, call.stored_before(job.part), strict=True):
            if action != PREDICT:
                continue
            for cut in branch.cuts:
                found = cache.steps.get(job.part.key(cut), ())
                if found[:count] != planned[:count]:
                    return (
                        f"{cut} is stored of steps {list(found)}, but the plan predicts from steps "
                        f"{list(planned[:count])}"
                    )
        return ""

    def _wrong_combination(self, job: Job, combination: Combination) -> str:
        """Why what is kept is not what the weights of the planned combination are for; empty if it is."""
        call, cache = job.call, job.call.stream.cache
        planned, found = call.full_before, job.history[: combination.depth]
        if any(full.weights != job.weights for full in found):
            return "the weights changed since the caches were made"
        steps = tuple(full.step for full in found)
        if steps != planned[: combination.depth]:
            return (
                f"outputs are kept of steps {list(steps)}, but the plan combines those of "
                f"{list(planned[: combination.depth])}"
            )
        if combination.noise and cache.noise_of != (planned[0], job.weights):
            return f"the plan combines the noise that step {planned[0]} measures, which is not known"
        return self._wrong_cuts(job) if combination.reuse else ""

    def _wrong_cuts(self, job: Job) -> str:
        """Why the newest stored cuts are not of the planned steps; empty if they are."""
        for branch, planned in zip(self.program.branches, job.call.stored_before(job.part), strict=True):
            for cut in branch.cuts:
                found = job.call.stream.cache.steps.get(job.part.key(cut), ())
                if found[:1] != planned[:1]:
                    return (
                        f"{cut} is stored of steps {list(found[:1])}, but the plan reuses that of {list(planned[:1])}"
                    )
        return ""

    def _wrong_prior(self, job: Job, spec: VariantSpec) -> str:
        """Why the profile has no trends for the cuts of this step; empty if it has, or none is followed."""
        prior = job.call.prior
        if not job.call.trend:
            return ""
        if prior is None:
            return "the plan follows the trends of a prior, but its profile has none"
        keys = self.program.cut_keys
        variant = self._compiled(spec)
        for label, fake in zip(variant.extra_inputs, variant.extra_values, strict=True):
            kind, _, name = label.partition(":")
            if kind != "trend":
                continue
            key, shape = keys[name], job.sizes.shape(fake)
            found = prior.shape(key) if key in prior.means else None
            if found != shape:
                return f"the prior of {key} has the shape {found}, but a sample's cut here is {shape}"
        return ""

    def _spec(self, job: Job) -> VariantSpec:
        """What the job runs, if it reuses, predicts or skips anything."""
        call, plan = job.call, job.call.plan
        if plan is not None and call.combination is not None:
            combines, noise = plan.history, plan.combines_noise
            return self.program.reusing(job.row, corrects=False, combines=combines, combines_noise=noise)
        traits: Traits = {"spans": (), "terms": 0, "stores": False, "trend": "", "selection": None}
        if plan is not None:
            traits = self._traits(plan, call.stores)
        traits["spans"] = job.spans
        return self.program.reusing(job.row, corrects=call.stream.corrects, kept=job.kept, **traits)

    # -- running -------------------------------------------------------------------------------------------------------

    def _run(self, job: Job, args: list[Any]) -> Sequence[Any]:
        program, call, stream = self.program, job.call, job.call.stream
        computes = not reuses(job.row)
        spec = self._full_spec(job) if computes else self._spec(job)
        variant = self._full_variant(spec, job) if computes else self._compiled(spec)
        if call.stream.step == 0:
            for table in self._tables.values():
                table.check(args)
        before = self._before(job, args) if computes else {}
        extra = self._extra_inputs(variant, job, args)
        timed = stream.recording is not None and self.conductor is not None  # not one of many parts of a step
        outputs = self._timed(variant, job, [*args, *extra]) if timed else variant.run([*args, *extra])
        outputs = self._apart(variant, job, outputs)
        labels = variant.extra_outputs if variant.spec == spec else ()
        self._store_outputs(labels, job, outputs[program.num_outputs :][: len(labels)])
        noise = self._keep_noise(job, before, outputs)
        self._keep_history(job, args, outputs)
        if computes and program.names:
            self._warm_up(job, args, outputs)
        if stream.meter is not None and not stream.homeless:
            call.changes = stream.meter.measure(job.cuts)
        if call.merges:
            self._merge(job)
        args.clear()
        self._after(job, variant, outputs, noise)
        return outputs[: program.num_outputs]

    def _timed(self, variant: Variant, job: Job, inputs: list[Any]) -> Sequence[Any]:
        """Run a recorded step's graph, and note how long it took."""
        device = next((value.device for value in inputs if isinstance(value, Tensor)), torch.device("cpu"))
        _wait_for(device)
        started = time.perf_counter()
        outputs = variant.run(inputs)
        _wait_for(device)
        job.call.times_ms = (1e3 * (time.perf_counter() - started), job.overhead_ms)
        return outputs

    def _full_spec(self, job: Job) -> VariantSpec:
        """How to compute everything: with the cuts that are kept, unless there is no room for them."""
        program = self.program
        if not program.names:
            return program.plain
        if job.call.stream.homeless and job.sizes.allows(self._compiled(program.plain).guards):
            return program.plain
        return program.full(measures=False, kept=job.kept, selection=self._selection(job.call.stream))

    def _full_variant(self, spec: VariantSpec, job: Job) -> Variant:
        """A full step's graph. Where no cut is kept, one that was compiled to record them serves as well: what it
        returns of them is dropped, and no second full graph is compiled."""
        program = self.program
        if spec == program.plain and spec not in program.variants:
            for other in program.variants.values():
                if not reuses(other.spec.row) and not other.extra_inputs and job.sizes.allows(other.guards):
                    return other
        return self._compiled(spec)

    def _before(self, job: Job, args: list[Any]) -> dict[int, Tensor]:
        """Before a full step: what reuse would have given, where the noise is wanted; then the old cuts are freed.

        So a stream never holds two sets of cuts, and the full graph does nothing but its own work.
        """
        program, stream = self.program, job.call.stream
        cached: dict[int, Tensor] = {}
        wanted = job.call.measures and not self._conductor.broken and not program.side_effects
        wanted = wanted and not job.call.leaves_alone
        if wanted and program.noisy and all(cut in job.cuts for b in program.branches for cut in b.cuts):
            variant = self._any_reuse(job.call.plan, stream.corrects)
            if job.sizes.allows(variant.guards):
                predictor = job.call.predictor
                if predictor and self._wrong_history(job, program.predict_row):
                    predictor = ()
                job.replayed = self._replays_as_planned(job, predictor)
                again = variant.run([*args, *self._uncorrected_inputs(variant, job, args, predictor)])
                copies = not program.lowering.owns_outputs
                cached = {i: again[i].clone() if copies else again[i] for i in program.noisy}
                job.computed += variant.flops
        job.cuts.clear()
        job.past.clear()
        with self._lock:
            for cut, terms in self._kept(job).items():
                stream.cache.make_room(job.part.key(cut), terms)
        return cached

    def _replays_as_planned(self, job: Job, predictor: tuple[float, ...]) -> bool:
        """Whether a full step replays the cuts that its plan counts on, with the weights that computed them."""
        call = job.call
        if call.plan is None or predictor != call.predictor or self._wrong_cuts(job):
            return False
        return call.stream.cache.weights.get(job.part.index) == job.weights

    def _kept(self, job: Job) -> dict[str, int]:
        """The cuts whose values of this step are stored, if it makes them, and how many values of each are kept."""
        stored = zip(self.program.branches, job.call.stored_in(job.part), strict=True)
        terms = max(1, job.call.stream.terms)
        held: dict[str, int] = dict.fromkeys(self.program.held_values, 1)
        found = held | {cut: terms for branch, kept in stored if kept for cut in branch.cuts}
        return found | {cut: 1 for span in self.program.spans_in(job.kept or ()) for cut in span.cuts}

    def _replay_spec(self, plan: Plan | None, *, corrects: bool) -> VariantSpec:
        """The variant that repeats the newest values of everything: where a plan predicts (or while there is none, the
        policy), the one that predicts all, which with weights (1, 0, ...) does the same."""
        program, source = self.program, plan if plan is not None else self.policy
        if not source.terms:
            return program.reusing(program.reuse_row, corrects=corrects)
        stores = source.stores if isinstance(source, Policy) else any(step.stores for step in source.steps)
        return program.reusing(
            program.predict_row, corrects=corrects, terms=source.terms, stores=stores, trend=source.trend
        )

    def _any_reuse(self, plan: Plan | None, corrects: bool) -> Variant:
        """The compiled variant that replays everything; with a correction or a combination to switch off, if only such
        a one exists."""
        program = self.program
        lean, correcting = (self._replay_spec(plan, corrects=c) for c in (False, True))
        wanted, *others = (correcting, lean) if corrects else (lean, correcting)
        if plan is not None and plan.combinations and not plan.terms:
            others += self._combining([program.reuse_row], plan.history, noise=plan.combines_noise)
        elif plan is None and self.policy.history and not self.policy.terms:
            others += self._combining([program.reuse_row], self.policy.history, noise=self.policy.uses_noise)
        known = [spec for spec in (wanted, *others) if spec in program.variants]
        return self._compiled(known[0] if known else wanted)

    def _compiled(self, spec: VariantSpec) -> Variant:
        if spec not in self.program.variants and self._conductor.following:
            self.late_compilations += 1
        return self.program.variant(spec)

    def _uncorrected_inputs(
        self,
        variant: Variant,
        job: Job,
        args: list[Any],
        predictor: tuple[float, ...] = (),
        *,
        output: Tensor | None = None,
    ) -> list[Tensor]:
        """The job's cuts and conditions, the weights of a prediction (or those that repeat the newest values), and
        zeros for all that a correction or the choice of tokens would read.

        Of a combination only the graph's own output counts, or in a skipped step the newest one, which is `output`.
        """
        conditions = self._conditions(variant, job, args)
        values = []
        for label, fake in zip(variant.extra_inputs, variant.extra_values, strict=True):
            kind, _, name = label.partition(":")
            if kind == "cut":
                values.append(_stored(job, name))
            elif kind == "condition":
                values.append(conditions[name])
            elif kind == "predictor":
                values.append(self._predictor_tensor(predictor, fake))
            elif kind == "combination":
                alone = Combination(outputs=(1.0,)) if variant.spec.skips else Combination(reuse=1.0)
                values.append(self._predictor_tensor(alone.vector(variant.spec.combines or 0), fake))
            elif label == "past_output:0" and output is not None:
                values.append(laid_out(output, job.sizes.strides(fake)))
            else:
                values.append(zeros_like(fake, job.sizes))
        return values

    def _extra_inputs(self, variant: Variant, job: Job, args: list[Any]) -> list[Tensor]:
        if not variant.extra_inputs:
            return []
        conditions = self._conditions(variant, job, args)
        values = []
        for label, fake in zip(variant.extra_inputs, variant.extra_values, strict=True):
            kind, _, name = label.partition(":")
            if kind == "cut":
                values.append(_stored(job, name))
            elif kind == "condition":
                values.append(conditions[name])
            elif kind == "noise":
                held = job.noise.get(int(name))
                values.append(zeros_like(fake, job.sizes) if held is None else held)
            elif kind in ("score", "stamp"):
                held = job.tokens.get(label)
                values.append(zeros_like(fake, job.sizes) if held is None else held)
            elif kind == "age":
                values.append(torch.tensor(float(job.call.stream.age), device=fake.device))
            elif kind == "predictor":
                values.append(self._predictor_tensor(job.call.predictor, fake))
            elif kind == "combination":
                combination = job.call.combination or Combination()
                values.append(self._predictor_tensor(combination.vector(variant.spec.combines or 0), fake))
            elif kind in ("past_output", "past_latents"):
                values.append(_remembered(job, kind, int(name), fake))
            elif kind == "trend":
                values.append(self._trend(job, name, fake))
            elif kind == "trend_scale":
                values.append(self._predictor_tensor((job.call.trend or 0.0,), fake))
            elif kind == "coefficients":
                values.append(self._coefficient_tensor(job.call, fake.device))
            else:  # low_pass:<size>
                correction = job.call.correction
                cutoff = correction.cutoff if correction is not None else 0.5
                size = job.sizes.number(fake.shape[0])
                values.append(self._low_pass_tensor(size, cutoff, fake.device))
        return values

    def _conditions(self, variant: Variant, job: Job, args: list[Any]) -> dict[str, Tensor]:
        """The values of the variant's hoisted conditions, from its table or computed now."""
        conditions = variant.conditions
        if conditions is None:
            return {}
        with self._lock:
            table = self._tables.get(variant.spec)
            if table is None:
                table = self._tables[variant.spec] = Table(conditions)
                table.check(args)
            copies = not self.program.lowering.owns_outputs
            key = (*job.small, *((float(number),) for _, number in job.sizes.values))
            values, missed = table.read(
                key,
                args,
                version=job.weights[0],
                strides=lambda name: variant.strides_of(name, job.sizes),
                copies=copies,
            )
        job.computed += conditions.flops * missed
        return values

    def _coefficient_tensor(self, call: Call, device: torch.device) -> Tensor:
        stream, correction = call.stream, call.correction
        pair = (0.0, 0.0)
        if correction is not None and stream.has_noise and stream.on_plan:
            stream.scale *= correction.gamma
            pair = {"all": (stream.scale, 0.0), "low": (0.0, stream.scale), "high": (stream.scale, -stream.scale)}[
                correction.filter
            ]
        if pair not in self._coefficients:
            self._coefficients[pair] = torch.tensor(pair, device=device)
        return self._coefficients[pair]

    def _predictor_tensor(self, weights: tuple[float, ...], fake: Tensor) -> Tensor:
        """The weights of all terms, newest first; none stand for those that repeat the newest value."""
        padded = (*(weights or (1.0,)), *(0.0,) * fake.shape[0])[: fake.shape[0]]
        if padded not in self._predictors:
            self._predictors[padded] = torch.tensor(padded, dtype=torch.float32, device=fake.device)
        return self._predictors[padded]

    def _trend(self, job: Job, cut: str, fake: Tensor) -> Tensor:
        """The trend of a cut at this step; zeros where none is followed."""
        prior = job.call.prior
        if prior is None or not job.call.trend:
            return zeros_like(fake, job.sizes)
        if prior is not self._prior[0]:
            self._prior = (prior, prior.to(fake.device))
        found: Tensor = self._prior[1].trend(self.program.cut_keys[cut], job.call.stream.step)
        return found.contiguous()

    def _low_pass_tensor(self, size: int, cutoff: float, device: torch.device) -> Tensor:
        key = (size, cutoff)
        if key not in self._low_pass:
            self._low_pass[key] = low_pass(size, cutoff).to(device)
        return self._low_pass[key]

    def _apart(self, variant: Variant, job: Job, outputs: Sequence[Any]) -> Sequence[Any]:
        """The outputs, none of which shares memory with a cut: a model may return one, and its caller write to it."""
        if variant.shares is False:
            return outputs
        given, made = outputs[: self.program.num_outputs], outputs[self.program.num_outputs :]
        taken = set(map(memory_of, (*job.cuts.values(), *made)))
        variant.shares = any(isinstance(value, Tensor) and memory_of(value) in taken for value in given)
        return [v.clone() if isinstance(v, Tensor) and memory_of(v) in taken else v for v in given] + list(made)

    def _store_outputs(self, labels: Sequence[str], job: Job, extra: Sequence[Any]) -> None:
        """Hand new cuts to the stream, unless its cache was evicted meanwhile."""
        stream, program, part = job.call.stream, self.program, job.part
        made: dict[str, Tensor] = {}
        for label, value in zip(labels, extra, strict=True):
            kind, _, name = label.partition(":")
            if kind in ("score", "stamp"):
                job.tokens[label] = value if program.lowering.owns_outputs else value.clone()
            if kind != "cut":
                continue
            fake = program.cut_values[name] if name in program.cut_values else program.held_values[name]
            strides = job.sizes.strides(fake)
            if value.stride() != strides:
                value = value.new_empty_strided(value.shape, strides).copy_(value)
            elif not program.lowering.owns_outputs:
                value = value.clone()  # the memory of CUDA graphs is overwritten by their next replay
            made[name] = value
        job.cuts.update(made)
        computes = not reuses(job.row)
        kept = {name: terms for name, terms in self._kept(job).items() if name in made}
        if computes:
            stream.scale = 1.0
            stream.has_noise = False
        self._count_tokens(job)
        if not kept and not job.tokens:
            return
        with self._lock:
            cache = stream.cache
            if self._conductor.store.holds(stream.key):
                cache.tokens = dict(job.tokens)
                if computes and cache.weights.get(part.index) != job.weights:
                    for name in (*program.cut_values, *program.held_values):
                        cache.forget(part.key(name))
                    cache.weights[part.index] = job.weights
                for name, terms in kept.items():
                    cache.push(part.key(name), made[name], step=stream.step, terms=terms)

    def _merge(self, job: Job) -> None:
        """Let the stored cuts of some branches be the mean of both halves of the batch."""
        cache, part, merged = job.call.stream.cache, job.part, set(job.part.kept_here(job.call.merges) or ())
        cuts = [cut for branch in self.program.branches if branch.name in merged for cut in branch.cuts]
        with self._lock:  # an evicted cache holds nothing
            for key in map(part.key, cuts):
                if key in cache.cuts:
                    cache.cuts[key] = _mean_of_halves(cache.cuts[key])
                if key in cache.past:
                    cache.past[key] = tuple(map(_mean_of_halves, cache.past[key]))

    def _count_tokens(self, job: Job) -> None:
        """Let a partial step's tokens grow older, and note which branches were computed whole."""
        stream = job.call.stream
        if not reuses(job.row):
            stream.age = 0
            job.tokens = {label: value for label, value in job.tokens.items() if not label.startswith("stamp:")}
            return
        stream.age += is_partial(job.row)
        for branch, action in zip(self.program.branches, job.row, strict=False):  # spans end the row
            if action == COMPUTE and branch.tokens is not None and stream.selection is not None:
                device = self.program.cut_values[branch.cuts[0]].device
                size = (branch.tokens.batch, branch.tokens.number)
                job.tokens[f"stamp:{branch.name}"] = torch.full(size, float(stream.age), device=device)

    def _keep_noise(self, job: Job, cached: dict[int, Tensor], outputs: Sequence[Any]) -> Tensor | None:
        """The noise of reusing the last cuts in this full step: what that gave, minus the truth."""
        if not cached:
            return None
        stream = job.call.stream
        noise = {i: value - outputs[i] for i, value in cached.items()}
        with self._lock:
            if self._conductor.store.holds(stream.key):
                stream.cache.noise.update(noise)
                stream.cache.noise_of = (stream.step, job.weights) if job.replayed else None
        stream.has_noise = True
        main = self.program.main_output
        return noise.get(main) if main is not None else None

    def _keep_history(self, job: Job, args: list[Any], outputs: Sequence[Any]) -> None:
        """Copy a planned full step's output and latents for combinations: callers may overwrite both."""
        call, stream, program = job.call, job.call.stream, self.program
        if not stream.history or reuses(job.row) or call.plan is None or call.leaves_alone or self.conductor is None:
            return
        found, at = program.combines, program.analysis.inputs.latents
        if found.reason or at is None:
            return
        strides = job.sizes.strides(program.history_values[0])
        output = laid_out(outputs[found.output].detach(), strides, copies=True)
        latents: Tensor = args[at].detach()
        moved = None if found.latents_reason else latents.clone(memory_format=torch.contiguous_format)
        with self._lock:
            if self._conductor.store.holds(stream.key):
                stream.cache.remember(FullStep(stream.step, job.weights, output, moved), most=stream.history)

    def _after(self, job: Job, variant: Variant, outputs: Sequence[Any], noise: Tensor | None) -> None:
        conductor, call, program = self._conductor, job.call, self.program
        conductor.after(
            call,
            label=variant.spec.label if program.names or not conductor.broken else "",
            reason=job.reason,
            spent=variant.flops + job.computed,
            whole=program.analysis.flops,
        )
        if call.stream.recording is not None and not conductor.broken:
            main = program.main_output
            with self._lock:
                if job.cuts and call.latents is not None:
                    batch = call.latents.shape[0]
                    conductor.keep_cuts(call, program, job.cuts, batch=batch, steps=conductor.steps or 50)
                conductor.keep(call, outputs[main] if main is not None else None, noise)

    def _warm_up(self, job: Job, args: list[Any], outputs: Sequence[Any]) -> None:
        """Compile what the plan will need, and check each reuse variant once: fed this step's own cuts it must
        reproduce it."""
        program, stream = self.program, job.call.stream
        if stream.homeless:
            return
        for plan in [entry.plan for entry in stream.entries]:
            readings = [(job.part.row_in(row), stores) for row, stores in plan.readings]
            specs = self._specs_of(plan, readings, corrects=stream.corrects, kept=job.kept)
            for spec in [*specs, *self._combining_specs(plan)]:
                self._compiled(spec)
        if program.side_effects:
            return
        unchecked = [
            v for v in program.variants.values() if reuses(v.spec.row) and (v.spec, job.sizes) not in self._checked
        ]
        for variant in [v for v in unchecked if job.sizes.allows(v.guards)]:
            if not all(cut in job.cuts for cut in program.cuts_of(variant.spec)):
                continue  # not kept in this generation
            self._checked.add((variant.spec, job.sizes))
            own = outputs[program.main_output] if program.main_output is not None else None
            again = variant.run([*args, *self._uncorrected_inputs(variant, job, args, output=own)])
            for i in program.noisy:
                true, got = outputs[i].float(), again[i].float()
                error = float((got - true).norm() / true.norm().clamp_min(1e-30))
                if not error <= TOLERANCE.get(outputs[i].dtype, 1e-2) and bool(torch.isfinite(true).all()):
                    self.deactivate(
                        f"the variant {variant.spec.label} fed a step's own cuts differs from that step by {error:.1e} "
                        "of its norm; nothing is reused. Please report this with what OMNIFX_DUMP=dir writes."
                    )
                    self._conductor.tell(self._inactive)


def _wait_for(device: torch.device) -> None:
    """Until the device has done what it was given, so that the clock on the wall tells how long that took."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


def _stored(job: Job, name: str) -> Tensor:
    """The stored value that ``cut:<name>`` or ``cut:<name>@<age>`` stands for; the newest one where there are fewer,
    which then has no weight."""
    cut, _, age = name.partition("@")
    past = job.past.get(cut, ())
    return past[int(age) - 1] if age and int(age) <= len(past) else job.cuts[cut]


def _remembered(job: Job, kind: str, age: int, fake: Tensor) -> Tensor:
    """What ``past_output:<age>`` or ``past_latents:<age>`` stands for; zeros where fewer full steps are kept, for those
    have no weight."""
    if age >= len(job.history):
        return zeros_like(fake, job.sizes)
    full = job.history[age]
    value = full.output if kind == "past_output" else full.latents
    assert value is not None  # a graph reads latents only where they are kept
    return value


def _mean_of_halves(value: Tensor) -> Tensor:
    """Both halves along the first axis replaced by their mean, laid out as before; an odd number of rows is left as it
    is."""
    if value.shape[0] % 2:
        return value
    mean = value.unflatten(0, (2, -1)).mean(0)
    return torch.empty_like(value).copy_(torch.cat([mean, mean]))


def memory_of(value: Tensor) -> int:
    """Which memory a tensor lies in."""
    return value.untyped_storage().data_ptr()


def zeros_like(fake: Tensor, sizes: Sizes) -> Tensor:
    """Real zeros with the shape, strides, type and device of a fake value."""
    shape, strides = sizes.shape(fake), sizes.strides(fake)
    return torch.empty_strided(shape, strides, dtype=fake.dtype, device=fake.device).zero_()


__all__ = ["TOLERANCE", "Runner", "memory_of", "zeros_like"]
