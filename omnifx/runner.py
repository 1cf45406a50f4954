"""The runner: what happens at a call. The clock finds the step, the plan names the variant, the store hands over the
caches.

Nothing here is traced: Dynamo sees one opaque compiled function, and no graph counts steps.
"""

from __future__ import annotations

import itertools
import operator
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from omnifx.clock import Marked, Reader, Reading, Timeline, largest_move
from omnifx.errors import ConfigError, OmnifxWarning
from omnifx.grid import low_pass
from omnifx.plan import REUSE, Correction, Plan, Row
from omnifx.policy import Policy
from omnifx.profile import Profile
from omnifx.program import Program, Variant
from omnifx.recording import Recorder, Recording
from omnifx.runlog import GenerationLog, Log, StepLog
from omnifx.store import CacheStore, StreamCache

_keys = itertools.count(1)

NUM_PROBES = 64
"""Weights of which one element is read at every call, with the timestep."""

_VERSION = operator.attrgetter("_version")

MOST_STREAMS = 64
"""Streams that may be under way at once; the oldest one is forgotten first."""

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Relative difference up to which a reuse variant fed a step's own cuts counts as reproducing that step."""


@dataclass
class Entry:
    """A profile and the plan made from it."""

    profile: Profile
    plan: Plan
    timeline: Timeline


@dataclass
class Stream:
    """One stream of one generation, while it runs."""

    key: int
    mark: Marked | None
    log: GenerationLog
    number: int
    cache: StreamCache
    last: Reading
    step: int = 0
    entries: list[Entry] = field(default_factory=list)  # plans that fit so far; empty while recording
    recording: Recording | None = None
    doubt: str = ""  # why nothing is reused for the rest of this generation
    scale: float = 1.0  # what the last known noise is multiplied by
    has_noise: bool = False
    on_plan: bool = True  # whether every planned reuse did reuse, so that gammas hold


@dataclass
class Call:
    """What was decided for a call."""

    stream: Stream
    row: Row
    correction: Correction | None
    measures: bool
    reason: str
    cuts: dict[str, Tensor] = field(default_factory=dict)  # held while the call runs, whatever is evicted meanwhile
    noise: dict[int, Tensor] = field(default_factory=dict)
    weights: int = 0


class Runner:
    """Runs the calls of one program.

    Args:
        program: The captured graph.
        policy: Makes a plan once a profile is there.
        speedup: What to ask of the policy.
        record_budget: Most bytes of a recording.
        learned: Called with a new profile and its plan, to save them.
        record_only: Only measure; never follow a plan.
    """

    def __init__(
        self,
        program: Program,
        *,
        policy: Policy,
        speedup: float | None,
        steps: int | None,
        store: CacheStore,
        log: Log,
        record_budget: int,
        learned: Callable[[Runner, Profile], None] | None = None,
        make_profile: Callable[[Recording], Profile],
        fingerprint: str,
        mark: Callable[[], Marked | None],
        record_only: bool = False,
        inactive: str = "",
    ) -> None:
        self.program = program
        self.policy = policy
        self.speedup = speedup
        self.steps = steps
        self.store = store
        self.log = log
        self.record_budget = record_budget
        self.learned = learned
        self.make_profile = make_profile
        self.record_only = record_only
        self._mark = mark
        self.inactive = inactive
        self.fingerprint = fingerprint
        self.entries: list[Entry] = []
        self.profiles: list[Profile] = []
        self.reader = Reader(program.analysis.inputs)
        self.following = False  # whether a generation has followed a plan yet
        self.late_compilations = 0
        self._streams: dict[int, Stream] = {}
        self._recorded: dict[Marked | None, tuple[Recording, list[Stream]]] = {}
        self._recorders: dict[tuple[int, ...], Recorder] = {}
        self._weights: tuple[list[int], list[int]] = ([], [])
        self._weights_version = 0
        self._probes: list[Tensor] = []
        self._probed: tuple[float, ...] = ()
        self._coefficients: dict[tuple[float, float], Tensor] = {}
        self._low_pass: dict[tuple[int, float], Tensor] = {}
        self._refused_plan = ""
        self._lock = threading.RLock()
        self._boxed_call = True  # what AOTAutograd calls the convention: one list of inputs, which may be cleared

    # -- plans ---------------------------------------------------------------------------------------------------------

    def add_profile(self, profile: Profile, plan: Plan | None = None) -> Plan | None:
        """Make a plan from a profile and follow it from the next generation on; newest first."""
        if self.steps is not None and profile.num_steps != self.steps:
            self.log.note(f"a profile of {profile.num_steps} steps is not used: steps={self.steps} was asked for")
            return None
        if plan is None:
            plan = self.policy.plan(profile, speedup=self.speedup)
        meta = profile.meta
        timeline = Timeline(
            timesteps=meta.timesteps,
            moves=tuple(profile.moves.max(0).values.tolist()),
            time_inputs=meta.time_inputs,
            varying_inputs=meta.varying_inputs,
        )
        self.entries = [e for e in self.entries if e.timeline.timesteps != timeline.timesteps]
        self.entries.insert(0, Entry(profile, plan, timeline))
        self.log.note(str(plan))
        return plan

    def specs_ahead(self) -> list[Any]:
        """Variants to compile before they are needed: those of the known plans, else those the policy may use."""
        program = self.program
        if self.inactive or not self.policy.needs_profile:
            return [program.plain]
        if not self.entries or self.record_only:
            noise = self.policy.uses_noise
            rows = [row for row in self.policy.rows(len(program.names)) if REUSE in row]
            return [program.full(measures=noise), *(program.reusing(row, corrects=noise) for row in rows)]
        specs = []
        for entry in self.entries:
            noise = entry.plan.reads_noise
            specs += [
                program.reusing(row, corrects=noise) if REUSE in row else program.full(measures=noise)
                for row in entry.plan.variants
            ]
        return list(dict.fromkeys(specs))

    # -- calls ---------------------------------------------------------------------------------------------------------

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        if self.inactive or not self.policy.needs_profile:
            self._log_plain()
            return self.program.variant(self.program.plain).run(args)
        with self._lock:
            self._note_weights(args)
            reading = self.reader.read(args, self._probes)
            self._compare_probes(reading)
            call = self._decide(reading)
            call.cuts, call.noise = dict(call.stream.cache.cuts), dict(call.stream.cache.noise)
            call.weights = self._weights_version
        return self._run(call, reading, args)

    def _log_plain(self) -> None:
        with self._lock:
            log = self.log.generations[-1] if self.log.generations else self.log.begin()
            if len(log.steps) < 4096:
                log.steps.append(StepLog(len(log.steps), 0, "full", self.inactive, 1.0))

    def _note_weights(self, args: list[Any]) -> None:
        """Count up when any parameter was replaced or written to."""
        weights = [args[i] for i in self.program.analysis.inputs.static]
        try:
            versions = list(map(_VERSION, weights))
        except RuntimeError:  # tensors made under inference_mode count no versions
            versions = [-1 if weight.is_inference() else weight._version for weight in weights]
        now = (list(map(Tensor.data_ptr, weights)), versions)
        if now != self._weights:
            if now[0] != self._weights[0]:
                self._probes = _scalars_of(weights)
            self._weights = now
            self._weights_version += 1

    def _compare_probes(self, reading: Reading) -> None:
        """Count up when sampled weights changed: ``weight.data += delta`` changes neither pointers nor versions."""
        if reading.probes != self._probed:
            self._probed = reading.probes
            self._weights_version += 1

    def _decide(self, reading: Reading) -> Call:
        mark = self._mark()
        stream, reason = self._continue(reading, mark)
        if stream is None and self.entries and not self.record_only:
            stream = self._start(reading, mark)
        if stream is None:
            return self._record(reading, mark, reason)
        self.store.touch(stream.key)
        if not reading.finite:
            stream.doubt = "the latents hold NaN or infinity"
        row, correction, planned_reason = self._planned(stream)
        reason = reason or planned_reason
        if REUSE in row and (refusal := self._refusal(stream, row) or reason):
            row, correction, reason = self.program.compute_row, None, refusal
            stream.on_plan = False
        elif REUSE not in row and not stream.doubt:
            reason = planned_reason
        measures = bool(stream.entries) and any(e.plan.reads_noise for e in stream.entries)
        return Call(stream, row, correction, measures, reason)

    def _continue(self, reading: Reading, mark: Marked | None) -> tuple[Stream | None, str]:
        """The stream whose next step this call is, with a reason if that is not proven."""
        fitting: list[tuple[float, Stream, list[Entry]]] = []
        unproven: list[tuple[float, Stream, list[Entry]]] = []
        for stream in self._streams.values():
            if stream.mark is not mark or not stream.entries:
                continue
            entries = [
                e
                for e in stream.entries
                if e.timeline.expects(stream.step + 1, reading) and e.timeline.same_stream(stream.last, reading)
            ]
            if not entries:
                continue
            move = reading.moved_from(stream.last)
            bound = max(largest_move(e.timeline.moves[stream.step + 1]) for e in entries)
            (fitting if mark is not None or move <= bound else unproven).append((move, stream, entries))
        if not fitting:
            if unproven and not any(e.timeline.expects(0, reading) for e in self.entries):
                move, stream, entries = min(unproven, key=lambda found: found[0])
                self._advance(stream, reading, entries)
                if reading.finite:
                    stream.doubt = (
                        f"the latents moved {move:.2f} of their norm since the last step, more than this generation "
                        "can; mark it with omnifx.generation(...) if it is one"
                    )
                return stream, stream.doubt
            return None, ""
        fitting.sort(key=lambda found: found[0])
        move, stream, entries = fitting[0]
        reason = ""
        if len(fitting) > 1 and not move * 4 < fitting[1][0]:
            reason = "two generations with equal inputs fit this call; mark them with omnifx.generation(...)"
            stream.doubt = reason
        self._advance(stream, reading, entries)
        return stream, reason

    @staticmethod
    def _advance(stream: Stream, reading: Reading, entries: list[Entry]) -> None:
        stream.step += 1
        stream.last = reading
        stream.entries = entries

    def _start(self, reading: Reading, mark: Marked | None) -> Stream | None:
        """A new stream at step 0 of some known plan."""
        entries = [e for e in self.entries if e.timeline.expects(0, reading)]
        if mark is not None and mark.steps is not None:
            entries = [e for e in entries if len(e.timeline.timesteps) == mark.steps]
        if not entries:
            return None
        self._finish(mark)
        self._leave_behind(reading, mark)
        stream = self._new_stream(reading, mark, self._siblings(reading, mark))
        stream.entries = entries
        return stream

    def _leave_behind(self, reading: Reading, mark: Marked | None) -> None:
        """Forget the streams that this call continues in another way than they expect: their next step is not its next.

        Timesteps of one step count are often among those of another, so such a stream could seem to fit again later.
        """
        for stream in list(self._streams.values()):
            if stream.mark is not mark or not stream.entries:
                continue
            for e in stream.entries:
                moves = e.timeline.moves
                near = mark is not None or reading.moved_from(stream.last) <= largest_move(
                    moves[min(stream.step + 1, len(moves) - 1)]
                )
                if (
                    near
                    and not e.timeline.expects(stream.step, reading)
                    and e.timeline.same_stream(stream.last, reading)
                ):
                    self._drop(stream.key)
                    break

    def _siblings(self, reading: Reading, mark: Marked | None) -> GenerationLog | None:
        """The generation that a first step belongs to as a further stream: equal latents, also at its first step."""
        for other in reversed(self._streams.values()):
            if other.mark is mark and other.step == 0 and other.entries and other.last.sample == reading.sample:
                same = any(e.timeline.same_stream(other.last, reading) for e in other.entries)
                return None if same else other.log
        return None

    def _new_stream(self, reading: Reading, mark: Marked | None, log: GenerationLog | None) -> Stream:
        for key in list(self._streams)[: -MOST_STREAMS or None]:
            self._drop(key)  # abandoned long ago
        key = next(_keys)
        cache = self.store.admit(key, 2 * self.program.cache_bytes)
        number = 0 if log is None else 1 + max(step.stream for step in log.steps)
        stream = Stream(key, mark, log or self.log.begin(), number, cache, reading)
        self._streams[key] = stream
        return stream

    def _planned(self, stream: Stream) -> tuple[Row, Correction | None, str]:
        """Row and correction of the step, if all plans that still fit agree."""
        found = {(e.plan.rows[stream.step], e.plan.steps[stream.step].correction) for e in stream.entries}
        if len(found) > 1:
            if any(REUSE in row for row, _ in found):
                return (
                    self.program.compute_row,
                    None,
                    "several calibrated step counts still fit, and their plans differ here",
                )
            return self.program.compute_row, None, ""
        row, correction = found.pop()
        return row, correction, ""

    def _refusal(self, stream: Stream, row: Row) -> str:
        """Why this stream may not reuse now; empty if it may."""
        if stream.doubt:
            return stream.doubt
        if not self.store.holds(stream.key):
            return "its caches were evicted to keep cache_budget"
        if stream.cache.weights != self._weights_version:
            return "the weights changed since the caches were made"
        program = self.program
        reads = program.reusing(row, corrects=False).reads
        missing = [cut for b in program.branches if b.name in reads for cut in b.cuts if cut not in stream.cache.cuts]
        return f"nothing is cached yet for {missing[0]}" if missing else ""

    # -- recording -----------------------------------------------------------------------------------------------------

    def _record(self, reading: Reading, mark: Marked | None, reason: str) -> Call:
        """A call that no plan covers: run it in full and measure it."""
        if mark in self._recorded and self._recorded[mark][0].starts_anew(reading):
            self._finish(mark)
            if self.entries and not self.record_only and (stream := self._start(reading, mark)) is not None:
                return Call(stream, self.program.compute_row, None, stream.entries[0].plan.reads_noise, "")
        if mark not in self._recorded:
            self._recorded[mark] = (Recording(self.program.analysis.inputs), [])
        self._leave_behind(reading, mark)
        recording, streams = self._recorded[mark]
        number = recording.stream_of(reading)
        if number == len(streams):
            stream = self._new_stream(reading, mark, streams[0].log if streams else None)
            stream.number = number
            streams.append(stream)
        stream = streams[number]
        stream.recording = recording
        stream.step = recording.num_steps - (1 if number else 0)
        stream.last = reading
        if not reason:
            reason = self._refused_plan or "measured: no plan for these steps yet"
        return Call(stream, self.program.compute_row, None, True, reason)

    def finish(self, mark: Marked | None = None) -> None:
        """End what is being recorded under a mark, and learn from it."""
        with self._lock:
            self._finish(mark)

    def end_marked(self, mark: Marked) -> None:
        """A marked generation is over: learn from its recording, free its caches."""
        with self._lock:
            self._finish(mark)
            for key in [k for k, s in self._streams.items() if s.mark is mark]:
                self._drop(key)

    def _finish(self, mark: Marked | None) -> None:
        found = self._recorded.pop(mark, None)
        if found is None:
            return
        recording, streams = found
        for stream in streams:
            self._drop(stream.key)
        if problem := recording.problem():
            self._tell(f"the first generation could not be used to plan: {problem}. Steps keep running in full.")
            return
        if self.steps is not None and recording.num_steps != self.steps:
            self._tell(f"a generation of {recording.num_steps} steps was not used: steps={self.steps} was asked for.")
            return
        profile = self.make_profile(recording)
        self.profiles.append(profile)
        if not self.record_only:
            try:
                self.add_profile(profile)
            except ConfigError as error:
                self._refused_plan = f"no plan: {error}"
                self._tell(self._refused_plan)
        if self.learned is not None:
            self.learned(self, profile)

    def _drop(self, key: int) -> None:
        self._streams.pop(key, None)
        self.store.release(key)

    def _tell(self, text: str) -> None:
        if self.log.note(text):
            warnings.warn(f"omnifx: {text}", OmnifxWarning, stacklevel=2)

    # -- running -------------------------------------------------------------------------------------------------------

    def _run(self, call: Call, reading: Reading, args: list[Any]) -> Sequence[Any]:
        program, stream = self.program, call.stream
        if REUSE in call.row:
            variant = self._compiled(program.reusing(call.row, corrects=self._corrects(stream, call.row)))
        else:
            spec = program.full(measures=call.measures)
            if spec not in program.variants and program.full(measures=not call.measures) in program.variants:
                spec = program.full(measures=not call.measures)  # noise is then measured by replaying, or not needed
            variant = self._compiled(spec)
        keep = self._kept_latents(call, args)
        extra = self._extra_inputs(variant, call)
        knows_old = all(cut in call.cuts for cut in program.cut_values)
        outputs = variant.run([*args, *extra])
        if REUSE in call.row:  # a model may return a cut itself, and its caller may write to what it gets
            outputs = [*_apart(outputs[: program.num_outputs], call.cuts.values()), *outputs[program.num_outputs :]]
        replayed = {}
        if REUSE not in call.row and call.measures and knows_old and not variant.spec.measures:
            replayed = self._replay(call, args, outputs)
        noise = self._store_outputs(variant, call, outputs, knows_old)
        if replayed:
            self._keep(stream, {}, replayed)
            stream.has_noise = True
            noise = replayed.get(program.main_output) if program.main_output is not None else None
        if REUSE not in call.row:
            self._warm_up(call, args, outputs)
        args.clear()
        self._after(call, variant, reading, keep, outputs, noise, program.analysis.reuse_flops if replayed else 0)
        return outputs[: program.num_outputs]

    def _replay(self, call: Call, args: list[Any], outputs: Sequence[Any]) -> dict[int, Tensor]:
        """Noise of a full step whose graph does not measure it: run the reuse variant on the old cuts, and subtract."""
        program = self.program
        lean = program.reusing(program.reuse_row, corrects=False)
        variant = self._compiled(
            lean if lean in program.variants else program.reusing(program.reuse_row, corrects=True)
        )
        again = variant.run([*args, *self._uncorrected_inputs(variant, call)])
        return {i: again[i] - outputs[i] for i in program.noisy}

    @staticmethod
    def _uncorrected_inputs(variant: Variant, call: Call) -> list[Tensor]:
        """The call's cuts, and zeros for all that a correction would read."""
        return [
            call.cuts[label.partition(":")[2]] if label.startswith("cut:") else _zeros_like(fake)
            for label, fake in zip(variant.extra_inputs, variant.extra_values, strict=True)
        ]

    def _corrects(self, stream: Stream, row: Row) -> bool:
        """Whether the variant of `row` is the one that can correct: if the plan asks, or if only that one is
        compiled."""
        program = self.program
        if any(e.plan.reads_noise for e in stream.entries):
            return True
        compiled = program.variants
        return program.reusing(row, corrects=False) not in compiled and program.reusing(row, corrects=True) in compiled

    def _compiled(self, spec: Any) -> Variant:
        if spec not in self.program.variants and self.following:
            self.late_compilations += 1
        return self.program.variant(spec)

    def _kept_latents(self, call: Call, args: list[Any]) -> Tensor | None:
        """The latents of a recorded call, noted before the sampler may overwrite them."""
        latents = self.program.analysis.inputs.latents
        if call.stream.recording is None or latents is None:
            return None
        tensor: Tensor = args[latents]
        return tensor.detach()

    def _extra_inputs(self, variant: Variant, call: Call) -> list[Tensor]:
        values = []
        for label, fake in zip(variant.extra_inputs, variant.extra_values, strict=True):
            kind, _, name = label.partition(":")
            if kind == "cut":
                held = call.cuts.get(name)
                values.append(_zeros_like(fake) if held is None else held)
            elif kind == "noise":
                held = call.noise.get(int(name))
                values.append(_zeros_like(fake) if held is None else held)
            elif kind == "coefficients":
                values.append(self._coefficient_tensor(call, fake.device))
            else:  # low_pass:size
                cutoff = call.correction.cutoff if call.correction is not None else 0.5
                values.append(self._low_pass_tensor(int(name), cutoff, fake.device))
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

    def _store_outputs(self, variant: Variant, call: Call, outputs: Sequence[Any], knows_old: bool) -> Tensor | None:
        """Hand new cuts and noise to the stream; returns the main output's noise if it is real."""
        stream, program = call.stream, self.program
        extra = _apart(outputs[program.num_outputs :], outputs[: program.num_outputs])
        fresh = REUSE not in call.row
        main: Tensor | None = None
        noise: dict[int, Tensor] = {}
        for label, value in zip(variant.extra_outputs, extra, strict=True):
            kind, _, name = label.partition(":")
            if kind == "cut":
                expected = program.cut_values[name]
                if value.stride() != expected.stride():
                    value = value.new_empty_strided(expected.shape, expected.stride()).copy_(value)
                elif not program.lowering.owns_outputs:
                    value = value.clone()  # the memory of CUDA graphs is overwritten by their next replay
                call.cuts[name] = value
            elif kind == "noise" and knows_old:
                noise[int(name)] = value if program.lowering.owns_outputs else value.clone()
                main = value if int(name) == program.main_output else main
        self._keep(stream, call.cuts, noise)
        if fresh:
            stream.cache.weights = call.weights
            stream.scale = 1.0
            stream.has_noise = bool(variant.spec.measures and knows_old)
        return main

    def _keep(self, stream: Stream, cuts: dict[str, Tensor], noise: dict[int, Tensor]) -> None:
        """Let the stream hold these values, unless its cache was evicted."""
        with self._lock:
            if self.store.holds(stream.key):
                stream.cache.cuts.update(cuts)
                stream.cache.noise.update(noise)

    def _after(
        self,
        call: Call,
        variant: Variant,
        reading: Reading,
        latents: Tensor | None,
        outputs: Sequence[Any],
        noise: Tensor | None,
        replayed_flops: int,
    ) -> None:
        stream, program = call.stream, self.program
        with self._lock:
            spent = (variant.flops + replayed_flops) / max(1, program.analysis.flops)
            stream.log.steps.append(StepLog(stream.step, stream.number, variant.spec.label, call.reason, spent))
            if REUSE not in call.row:
                stream.log.peak_cache_bytes = max(stream.log.peak_cache_bytes, self.store.held_bytes)
            if stream.entries:
                self.following = True
                if stream.step + 1 >= max(len(e.timeline.timesteps) for e in stream.entries):
                    self._drop(stream.key)  # the last step is done
            elif stream.recording is not None and latents is not None and program.main_output is not None:
                output = outputs[program.main_output]
                recorder = self._recorder_for(latents, output)
                stream.recording.add(reading, recorder, recorder.keep(latents, output, noise))

    def _warm_up(self, call: Call, args: list[Any], outputs: Sequence[Any]) -> None:
        """Compile what the plan will need, and check each reuse variant once: fed this step's own cuts it must
        reproduce it."""
        program, stream = self.program, call.stream
        for row in {row for e in stream.entries for row in e.plan.variants if REUSE in row}:
            self._compiled(program.reusing(row, corrects=self._corrects(stream, row)))
        for variant in [v for v in program.variants.values() if REUSE in v.spec.row and not v.checked]:
            variant.checked = True
            again = variant.run([*args, *self._uncorrected_inputs(variant, call)])
            for i in program.noisy:
                true, got = outputs[i].float(), again[i].float()
                error = float((got - true).norm() / true.norm().clamp_min(1e-30))
                if not error <= TOLERANCE.get(outputs[i].dtype, 1e-2) and bool(torch.isfinite(true).all()):
                    self.inactive = (
                        f"the variant {variant.spec.label} fed a step's own cuts differs from that step by {error:.1e} "
                        "of its norm; nothing is reused. Please report this with what OMNIFX_DUMP=dir writes."
                    )
                    self._tell(self.inactive)

    def _recorder_for(self, latents: Tensor, output: Tensor) -> Recorder:
        key = (*latents.shape, *output.shape)
        if key not in self._recorders:
            budget, axis = self.record_budget, self.program.frame_axis
            self._recorders[key] = Recorder(latents, output, budget=budget, frame_axis=axis)
        return self._recorders[key]


def _scalars_of(weights: list[Tensor]) -> list[Tensor]:
    """Views of one element of each of up to NUM_PROBES weights of the commonest type and device, evenly spread."""
    kinds = Counter((w.dtype, w.device) for w in weights if w.dim() >= 2 and w.is_floating_point())
    if not kinds:
        return []
    kind = kinds.most_common(1)[0][0]
    usable = [w for w in weights if w.dim() >= 2 and (w.dtype, w.device) == kind and w.is_contiguous()]
    picked = usable[:: -(-len(usable) // NUM_PROBES) or 1]
    return [w.detach().view(-1)[w.numel() // 2] for w in picked if w.numel()]


def _apart(values: Sequence[Any], others: Iterable[Any]) -> list[Any]:
    """The values; those that share memory with any of `others` as copies."""
    taken = {other.untyped_storage().data_ptr() for other in others if isinstance(other, Tensor)}
    return [
        value.clone() if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in taken else value
        for value in values
    ]


def _zeros_like(fake: Tensor) -> Tensor:
    """Real zeros with the shape, strides, type and device of a fake value."""
    sizes, strides = tuple(map(int, fake.shape)), tuple(map(int, fake.stride()))
    return torch.empty_strided(sizes, strides, dtype=fake.dtype, device=fake.device).zero_()


__all__ = ["Entry", "Runner"]
