"""The runner: what happens when a captured graph is called. The conductor decides, the store hands over the caches, a
variant runs.

Nothing here is traced: Dynamo sees one opaque compiled function, and no graph counts steps.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from omnifx.boundary import Underway
from omnifx.clock import Reader
from omnifx.conditions import Table
from omnifx.conductor import Call, Conductor, Part
from omnifx.grid import low_pass
from omnifx.passes.pipeline import VariantSpec
from omnifx.plan import COMPUTE, Plan, Row, is_partial, reads_caches
from omnifx.policy import Policy
from omnifx.program import Program, Variant
from omnifx.runlog import Log, StepLog
from omnifx.sizes import Sizes
from omnifx.streams import Stream
from omnifx.tokens import Selection

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Relative difference up to which a reuse variant fed a step's own cuts counts as reproducing that step."""


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
    noise: dict[int, Tensor] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)
    """Scores and stamps of tokens, by label."""
    computed: int = 0
    """FLOPs beside those of the variant."""


class Runner:
    """Runs the calls of one program.

    Args:
        program: The captured graph.
        conductor: Decides; None for a part of a broken model, which does what the step under way says.
        underway: Where to find that step.
        inactive: Why nothing can be reused here; empty if it can.
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
    ) -> None:
        self.program = program
        self.policy = policy
        self.log = log
        self.conductor = conductor
        self.underway = underway
        self._inactive = inactive
        self.late_compilations = 0
        self.reader = Reader(program.analysis.inputs)
        self._tables: dict[VariantSpec, Table] = {}
        self._coefficients: dict[tuple[float, float], Tensor] = {}
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

    def specs_ahead(self) -> list[VariantSpec]:
        """Variants to compile before they are needed: those of the known plans, else those the policy may use."""
        program, conductor = self.program, self.conductor
        if self.inactive or not self.policy.needs_profile or not program.names:
            return [program.plain]
        full = program.full(measures=False, selection=self.policy.selection)
        if conductor is None:
            return [full, program.reusing(program.reuse_row, corrects=False)]
        if not conductor.entries or conductor.record_only:
            rows = [row for row in self.policy.rows(len(program.names)) if reads_caches(row)]
            return [full, *(program.reusing(row, corrects=self.policy.uses_noise) for row in rows)]
        specs: list[VariantSpec] = []
        for entry in conductor.entries:
            specs.append(program.full(measures=False, selection=entry.plan.selection))
            specs += self._specs_of(entry.plan, entry.plan.variants, corrects=entry.plan.reads_noise)
        return list(dict.fromkeys(specs))

    def _specs_of(self, plan: Plan, rows: Sequence[Row], *, corrects: bool) -> list[VariantSpec]:
        """The variants of those rows that read caches, as far as they are possible here."""
        program = self.program
        fitting = [row for row in rows if reads_caches(row) and len(row) == len(program.names)]
        possible = [row for row in fitting if not program.refusal_of(row, plan.tokens)]
        return [program.reusing(row, corrects=corrects, selection=plan.selection) for row in possible]

    def _selection(self, stream: Stream) -> Selection | None:
        """How a stream's plan chooses tokens; while it is recorded, how the policy will."""
        return stream.selection if stream.entries else self.policy.selection

    # -- calls ---------------------------------------------------------------------------------------------------------

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        if self.inactive or not self.policy.needs_profile:
            self._log_plain()
            return self.program.variant(self.program.plain).run(args)
        job = self._begin(args) if self.conductor is not None else self._join(args)
        if job is None:
            return self.program.variant(self.program.plain).run(args)
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
                num_bytes=self.program.cache_bytes_at(sizes) + self._token_bytes(),
            )
            return self._job(call, part, reading.small, sizes)

    def _token_bytes(self) -> int:
        """Bytes that a stream needs for partial branches, under any plan known or to come."""
        entries = self.conductor.entries if self.conductor is not None else ()
        selections = {self.policy.selection, *(entry.plan.selection for entry in entries)}
        return max(map(self.program.token_bytes, selections))

    def _join(self, args: list[Any]) -> Job | None:
        """A call of one of the graphs of the step under way."""
        call, conductor = self.underway.call, self.underway.conductor
        if call is None or conductor is None or conductor.inactive:
            return None
        with conductor.lock:
            sizes = self.program.sizes.at(args)
            part = conductor.part_of(call, self.program, num_bytes=self.program.cache_bytes_at(sizes))
            if part is None:
                return None
            part.watch.look(args)
            return self._job(call, part, (), sizes)

    def _job(self, call: Call, part: Part, small: tuple[tuple[float, ...], ...], sizes: Sizes) -> Job:
        """What to do of the step's row here; computes where a cache is not proven to be valid."""
        row, cache = part.row_in(call.row), call.stream.cache
        if len(row) != len(self.program.names):
            row = self.program.compute_row
        job = Job(call, part, row, call.reason, (call.weights, part.watch.version), small, sizes)
        if reads_caches(row) and (reason := self._refusal(job)):
            job.row, job.reason = self.program.compute_row, reason
            call.correction = None
            call.stream.on_plan = False
        keys = {cut: part.key(cut) for cut in self.program.cut_values} if part.prefix else None
        job.cuts = dict(cache.cuts) if keys is None else {c: cache.cuts[k] for c, k in keys.items() if k in cache.cuts}
        job.noise = dict(cache.noise)
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
        stream = job.call.stream
        tokens = stream.entries[0].plan.tokens if stream.entries else ()
        if reason := self.program.refusal_of(job.row, tokens):
            return reason
        spec = self.program.reusing(job.row, corrects=stream.reads_noise, selection=stream.selection)
        for cut in self.program.cuts_of(spec):
            if part.key(cut) not in cache.cuts:
                return f"nothing is cached yet for {cut}"
        if cache.weights.get(part.index) != job.weights:
            return "the weights changed since the caches were made"
        variant = self._compiled(spec)
        if missing := [
            label for label in variant.extra_inputs if label.startswith("score:") and label not in cache.tokens
        ]:
            return f"no tokens are scored yet by {missing[0].removeprefix('score:')}"
        if not job.sizes.allows(variant.guards):
            return f"the variant {variant.spec.label} was compiled for other sizes than these"
        return ""

    # -- running -------------------------------------------------------------------------------------------------------

    def _run(self, job: Job, args: list[Any]) -> Sequence[Any]:
        program, call, stream = self.program, job.call, job.call.stream
        computes = not reads_caches(job.row)
        if not computes:
            spec = program.reusing(job.row, corrects=stream.reads_noise, selection=stream.selection)
            variant = self._compiled(spec)
        else:
            variant = self._compiled(self._full_spec(job))
        if call.stream.step == 0:
            for table in self._tables.values():
                table.check(args)
        before = self._before(job, args) if computes else {}
        extra = self._extra_inputs(variant, job, args)
        outputs = variant.run([*args, *extra])
        outputs = self._apart(variant, job, outputs)
        self._store_outputs(variant, job, outputs[program.num_outputs :])
        noise = self._keep_noise(job, before, outputs)
        if computes and program.names:
            self._warm_up(job, args, outputs)
        args.clear()
        self._after(job, variant, outputs, noise)
        return outputs[: program.num_outputs]

    def _full_spec(self, job: Job) -> VariantSpec:
        """How to compute everything: with cuts, unless there is no room for them."""
        program = self.program
        if not program.names:
            return program.plain
        if job.call.stream.homeless and job.sizes.allows(self._compiled(program.plain).guards):
            return program.plain
        return program.full(measures=False, selection=self._selection(job.call.stream))

    def _before(self, job: Job, args: list[Any]) -> dict[int, Tensor]:
        """Before a full step: what reuse would have given, where the noise is wanted; then the old cuts are freed.

        So a stream never holds two sets of cuts, and the full graph does nothing but its own work.
        """
        program, stream = self.program, job.call.stream
        cached: dict[int, Tensor] = {}
        wanted = job.call.measures and not self._conductor.broken and not program.side_effects
        if wanted and program.noisy and all(cut in job.cuts for cut in program.cut_values):
            variant = self._any_reuse(stream.reads_noise)
            if job.sizes.allows(variant.guards):
                again = variant.run([*args, *self._uncorrected_inputs(variant, job, args)])
                copies = not program.lowering.owns_outputs
                cached = {i: again[i].clone() if copies else again[i] for i in program.noisy}
                job.computed += variant.flops
        job.cuts.clear()
        with self._lock:
            for cut in (*program.cut_values, *program.held_values):
                stream.cache.cuts.pop(job.part.key(cut), None)
        return cached

    def _any_reuse(self, corrects: bool) -> Variant:
        """The compiled variant that reuses everything; with a correction to switch off, if only that one exists."""
        program = self.program
        lean, correcting = (program.reusing(program.reuse_row, corrects=c) for c in (False, True))
        wanted, other = (correcting, lean) if corrects else (lean, correcting)
        return self._compiled(other if wanted not in program.variants and other in program.variants else wanted)

    def _compiled(self, spec: VariantSpec) -> Variant:
        if spec not in self.program.variants and self._conductor.following:
            self.late_compilations += 1
        return self.program.variant(spec)

    def _uncorrected_inputs(self, variant: Variant, job: Job, args: list[Any]) -> list[Tensor]:
        """The job's cuts and conditions, and zeros for all that a correction or the choice of tokens would read."""
        conditions = self._conditions(variant, job, args)
        values = []
        for label, fake in zip(variant.extra_inputs, variant.extra_values, strict=True):
            kind, _, name = label.partition(":")
            if kind == "cut":
                values.append(job.cuts[name])
            elif kind == "condition":
                values.append(conditions[name])
            else:
                values.append(_zeros_like(fake, job.sizes))
        return values

    def _extra_inputs(self, variant: Variant, job: Job, args: list[Any]) -> list[Tensor]:
        if not variant.extra_inputs:
            return []
        conditions = self._conditions(variant, job, args)
        values = []
        for label, fake in zip(variant.extra_inputs, variant.extra_values, strict=True):
            kind, _, name = label.partition(":")
            if kind == "cut":
                values.append(job.cuts[name])
            elif kind == "condition":
                values.append(conditions[name])
            elif kind == "noise":
                held = job.noise.get(int(name))
                values.append(_zeros_like(fake, job.sizes) if held is None else held)
            elif kind in ("score", "stamp"):
                held = job.tokens.get(label)
                values.append(_zeros_like(fake, job.sizes) if held is None else held)
            elif kind == "age":
                values.append(torch.tensor(float(job.call.stream.age), device=fake.device))
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
            values, missed = table.read(key, args, version=job.weights[0], copies=copies)
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
        taken = set(map(_memory, (*job.cuts.values(), *made)))
        variant.shares = any(isinstance(value, Tensor) and _memory(value) in taken for value in given)
        return [v.clone() if isinstance(v, Tensor) and _memory(v) in taken else v for v in given] + list(made)

    def _store_outputs(self, variant: Variant, job: Job, extra: Sequence[Any]) -> None:
        """Hand new cuts to the stream, unless its cache was evicted meanwhile."""
        stream, program, part = job.call.stream, self.program, job.part
        for label, value in zip(variant.extra_outputs, extra, strict=True):
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
            job.cuts[name] = value
        if not reads_caches(job.row):
            stream.scale = 1.0
            stream.has_noise = False
        self._count_tokens(job)
        if not variant.extra_outputs:
            return
        with self._lock:
            if self._conductor.store.holds(stream.key):
                stream.cache.cuts.update({part.key(name): value for name, value in job.cuts.items()})
                stream.cache.tokens = dict(job.tokens)
                if not reads_caches(job.row):
                    stream.cache.weights[part.index] = job.weights

    def _count_tokens(self, job: Job) -> None:
        """Let a partial step's tokens grow older, and note which branches were computed whole."""
        stream = job.call.stream
        if not reads_caches(job.row):
            stream.age = 0
            job.tokens = {label: value for label, value in job.tokens.items() if not label.startswith("stamp:")}
            return
        stream.age += is_partial(job.row)
        for branch, action in zip(self.program.branches, job.row, strict=True):
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
        stream.has_noise = True
        main = self.program.main_output
        return noise.get(main) if main is not None else None

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
                conductor.keep(call, outputs[main] if main is not None else None, noise)

    def _warm_up(self, job: Job, args: list[Any], outputs: Sequence[Any]) -> None:
        """Compile what the plan will need, and check each reuse variant once: fed this step's own cuts it must
        reproduce it."""
        program, stream = self.program, job.call.stream
        if stream.homeless:
            return
        for entry in stream.entries:
            rows = list(dict.fromkeys(map(job.part.row_in, entry.plan.variants)))
            for spec in self._specs_of(entry.plan, rows, corrects=stream.reads_noise):
                self._compiled(spec)
        if program.side_effects:
            return
        unchecked = [v for v in program.variants.values() if reads_caches(v.spec.row) and job.sizes not in v.checked]
        able = [v for v in unchecked if job.cuts.keys() >= set(program.cuts_of(v.spec))]
        for variant in [v for v in able if job.sizes.allows(v.guards)]:
            variant.checked.add(job.sizes)
            again = variant.run([*args, *self._uncorrected_inputs(variant, job, args)])
            for i in program.noisy:
                true, got = outputs[i].float(), again[i].float()
                error = float((got - true).norm() / true.norm().clamp_min(1e-30))
                if not error <= TOLERANCE.get(outputs[i].dtype, 1e-2) and bool(torch.isfinite(true).all()):
                    self.deactivate(
                        f"the variant {variant.spec.label} fed a step's own cuts differs from that step by {error:.1e} "
                        "of its norm; nothing is reused. Please report this with what OMNIFX_DUMP=dir writes."
                    )
                    self._conductor.tell(self._inactive)


def _memory(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _zeros_like(fake: Tensor, sizes: Sizes) -> Tensor:
    """Real zeros with the shape, strides, type and device of a fake value."""
    shape, strides = sizes.shape(fake), sizes.strides(fake)
    return torch.empty_strided(shape, strides, dtype=fake.dtype, device=fake.device).zero_()


__all__ = ["Runner"]
