"""The conductor: decides what each call of a model does, and learns from generations that no plan covers.

A step is one call of the model. It usually is one graph; where Dynamo breaks the graph, a step runs several *parts*. A
part is a graph and how often it ran before in the same step (the blocks of a broken model may share a graph).
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from omnifx.asking import Ask, plan_for
from omnifx.changes import ChangeMeter, Changes
from omnifx.clock import Marked, Reading, Timeline, largest_move
from omnifx.errors import ConfigError, OmnifxWarning, ProfileError
from omnifx.plan import COMPUTE, Combination, Correction, Plan, Row, is_stored, reuses
from omnifx.policy import Policy
from omnifx.prior import Prior, PriorSums
from omnifx.profile import BranchMeta, Profile
from omnifx.recording import FEWEST_STEPS, Recorder, Recording
from omnifx.runlog import Log, StepLog
from omnifx.sizes import Sizes
from omnifx.spans import span_name
from omnifx.store import CacheStore
from omnifx.streams import Entry, Stream, Streams
from omnifx.transfer import resampled
from omnifx.weights import WeightWatch
from omnifx.whole import MAX_LOOKS

if TYPE_CHECKING:
    from omnifx.graph import Inputs
    from omnifx.program import Program


_Key = tuple[Marked | None, tuple[tuple[int, ...], ...]]
"""A mark, and the shapes of a call's inputs: what is recorded together."""


PATIENCE = MAX_LOOKS + 2
"""Steps of which nothing is captured until a model is given up: the first ones only try how to capture it."""


@dataclass
class Part:
    """One graph call of a step, in the order of the calls."""

    index: int
    program: Program
    start: int
    """Where its branches begin in the step's row."""
    prefix: str
    """What makes its names unique in the model: empty if it is the only part."""
    watch: WeightWatch
    sizes: Sizes
    """Of its first call."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its branches, unique in the model."""
        return tuple(self.prefix + name for name in self.program.names) if self.prefix else self.program.names

    def key(self, cut: str) -> str:
        """The name of a cut in a stream's cache."""
        return self.prefix + cut

    def kept_here(self, kept: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """The names in its program of those branches of a step that are kept; None: all."""
        if kept is None or not self.prefix:
            return kept
        return tuple(name.removeprefix(self.prefix) for name in kept if name.startswith(self.prefix))

    def num_bytes(self, kept: tuple[str, ...] | None = None, terms: int = 0) -> int:
        """Bytes of its cuts for one stream, at the sizes of its first call: see `Program.cache_bytes_at`."""
        return self.program.cache_bytes_at(self.sizes, self.kept_here(kept), terms)

    def row_in(self, row: Row) -> Row:
        """What a step's row says of this part, and of spans: only the one graph of a model has any."""
        return row if not self.prefix else row[self.start : self.start + len(self.program.names)]

    def steps_in(self, steps: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        """What a plan says of this part's branches, of steps for each branch."""
        return steps[self.start : self.start + len(self.program.names)]


@dataclass
class Call:
    """What was decided for a step of a stream."""

    stream: Stream
    row: Row
    correction: Correction | None
    reason: str
    reading: Reading
    log: StepLog
    weights: int
    """Version of the model's weights as the clock saw them."""
    entry: Entry | None = None
    """What the step was planned by, also if it runs in full instead; None while recording, or if plans differ."""
    latents: Tensor | None = None
    """The latents while the call is being recorded; the sampler may overwrite them afterwards."""
    logged: bool = False
    counts: Counter[int] = field(default_factory=Counter)
    """How often each program ran in this step."""
    changes: Changes | None = None
    """How the cuts had changed since the last steps, if that is recorded."""
    times_ms: tuple[float, float] | None = None
    """How long a recorded call's graph took, and what came before it."""

    @property
    def spans(self) -> tuple[str, ...]:
        """The spans whose actions end the row of a step that reuses anything."""
        return self.stream.entries[0].plan.span_names if self.stream.entries else ()

    @property
    def merges(self) -> tuple[str, ...]:
        """The branches whose cuts become the mean of both halves of the batch behind this step."""
        stream = self.stream
        found = {entry.plan.steps[stream.step].merges for entry in stream.entries if stream.halved}
        return found.pop() if len(found) == 1 else ()

    @property
    def measures(self) -> bool:
        """Whether the noise of reusing is wanted, for a recording or a correction."""
        return self.stream.recording is not None or self.stream.reads_noise

    @property
    def plan(self) -> Plan | None:
        """The plan of the step, if there is one."""
        return self.entry.plan if self.entry is not None else None

    @property
    def predictor(self) -> tuple[float, ...]:
        """The planned weights of the step's predictions, newest first; empty if it has none."""
        return self.plan.steps[self.stream.step].weights if self.plan is not None else ()

    @property
    def stores(self) -> bool:
        """Whether predicted values of this step are stored."""
        return self.plan is not None and self.plan.steps[self.stream.step].stores

    @property
    def trend(self) -> float:
        """What the trends of this step are multiplied by."""
        return self.plan.steps[self.stream.step].trend if self.plan is not None else 0.0

    @property
    def combination(self) -> Combination | None:
        """What the output of the step is, unless it runs in full instead; None: what its graph gives."""
        if self.plan is None or not reuses(self.row):
            return None
        return self.plan.steps[self.stream.step].combination

    @property
    def full_before(self) -> tuple[int, ...]:
        """The full steps that a planned combination reads, newest first."""
        return self.entry.full_before[self.stream.step] if self.entry is not None else ()

    @property
    def leaves_alone(self) -> bool:
        """Whether a full step that the plan did not ask for must leave what is stored as it is: the weights of
        combinations are for the values of planned steps."""
        return self.plan is not None and bool(self.plan.combinations) and reuses(self.plan.row_of(self.stream.step))

    @property
    def prior(self) -> Prior | None:
        """The prior of the profile that the step was planned from."""
        return self.entry.profile.prior if self.entry is not None else None

    def stored_in(self, part: Part) -> tuple[bool, ...]:
        """For each branch of a part, whether its values of this step are stored.

        Where a plan predicts or combines, exactly those that it counts on: a full step that it did not ask for leaves
        the others alone, or the planned weights would be those of other steps.
        """
        if self.plan is None or not (self.stream.terms or self.plan.combinations):
            return (True,) * len(part.program.names)
        if self.plan.branches[part.start : part.start + len(part.names)] != part.names:
            return (True,) * len(part.names)  # other graphs than those that were planned for: nothing is reused
        step = self.plan.steps[self.stream.step]
        row = part.row_in(self.plan.row_of(self.stream.step))
        return tuple(is_stored(step, action) for action in row[: len(part.names)])

    def stored_before(self, part: Part) -> tuple[tuple[int, ...], ...]:
        """For each branch of a part, the steps that its stored values come from, as planned; newest first."""
        assert self.entry is not None  # only asked of planned predictions
        return part.steps_in(self.entry.stored_before[self.stream.step])


class Conductor:
    """Decides for all calls of one captured model (at one shape, or with dynamic shapes).

    Args:
        inputs: Roles of what the clock reads: the inputs of the one graph, or the arguments of a broken model.
        program: The one graph of a step; None if the model is broken, and its parts are to be found.
        frame_axis: Which axis of the latents counts frames, if any.
        policy: Makes a plan once a profile is there.
        ask: What to ask of the policy.
        steps: The only number of steps to plan for, if not None.
        transfer: Whether a profile of another number of steps may be interpolated.
        place: Where the model runs, in words.
        record_budget: Most bytes of a recording.
        make_profile: A recording's profile.
        learned: Called with a new profile, to save it.
        beginning: Called before a call that no recording or stream has room for begins one, with the conductor, what
            was read and the mark: other captures may learn from it that a generation is over.
        mark: The mark of the present context.
        record_only: Only measure; never follow a plan.
        inactive: Why nothing can be reused; empty if it can.
        explain_nothing: Why nothing can be reused of the parts of a broken model.
        others: All conductors of the same model.
    """

    def __init__(
        self,
        inputs: Inputs,
        *,
        program: Program | None,
        frame_axis: int | None,
        latent_shape: tuple[int, ...],
        policy: Policy,
        ask: Ask,
        steps: int | None,
        transfer: bool = False,
        place: str = "",
        store: CacheStore,
        log: Log,
        record_budget: int,
        fingerprint: str,
        mark: Callable[[], Marked | None],
        make_profile: Callable[[Recording, Conductor], Profile],
        beginning: Callable[[Conductor, Reading, Marked | None], None] = lambda conductor, reading, mark: None,
        learned: Callable[[Conductor, Profile], None] | None = None,
        record_only: bool = False,
        inactive: str = "",
        others: Callable[[], Sequence[Conductor]] = tuple,
        explain_nothing: Callable[[Sequence[Program]], str] = lambda programs: "no branch can be reused",
    ) -> None:
        self.inputs = inputs
        self.latent_shape = latent_shape
        self.frame_axis = frame_axis
        self.broken = program is None
        self.policy = policy
        self.ask = ask
        self.steps = steps
        self.transfer = transfer
        self.place = place
        self.store = store
        self.log = log
        self.record_budget = record_budget
        self.fingerprint = fingerprint
        self.make_profile = make_profile
        self.beginning = beginning
        self.learned = learned
        self.record_only = record_only
        self.inactive = inactive
        self.explain_nothing = explain_nothing
        self.profiles: list[Profile] = []
        self.boundary_problem = ""  # why outputs cannot be combined at the boundary of a broken model
        self.full_step_bytes = 0  # of what is kept there of a full step
        self.distrusts_weights = False  # whether all parts sum up their weights' bits at every call
        self.following = False  # whether a generation has followed a plan yet
        self.parts: list[Part] = []
        self._by_call: dict[tuple[int, int], Part] = {}
        self.streams = Streams(store, log)
        self.lock = threading.RLock()
        self._mark = mark
        self._others = others
        self._recorded: dict[_Key, tuple[Recording, list[Stream]]] = {}
        self._recorders: dict[tuple[int, ...], Recorder] = {}
        self._refused_plan = ""
        self._covered: set[int | None] = set()  # numbers of steps that were marked, for which there is what can be
        self._unseen_output = False
        self._empty_steps = 0  # steps in a row of which nothing was captured
        self._sealed = False  # whether all parts of a step are known
        self.missed_start = False  # whether the generation under way began before the graph was captured
        if program is not None:
            self._add_part(program, 0, program.hinted_sizes)

    # -- parts ---------------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """The branches of all parts."""
        return tuple(name for part in self.parts for name in part.names)

    @property
    def flops(self) -> int:
        """FLOPs of a step that computes everything."""
        return sum(part.program.analysis.flops for part in self.parts)

    @property
    def reuse_flops(self) -> int:
        """FLOPs of a step that reuses everything."""
        return sum(part.program.reuse_flops for part in self.parts)

    @property
    def cache_bytes(self) -> int:
        """Bytes of one stream's cuts, at the sizes seen first."""
        return self._num_bytes()

    def _num_bytes(self, kept: tuple[str, ...] | None = None, terms: int = 0) -> int:
        history = max((entry.plan.history for entry in self.entries), default=0) if self.broken else 0
        return sum(part.num_bytes(kept, terms) for part in self.parts) + history * self.full_step_bytes

    def branch_metas(self) -> tuple[BranchMeta, ...]:
        """What a profile keeps of the branches."""
        whole = {"tokens": 0, "token_reason": "the model is captured in parts"} if self.broken else {}
        return tuple(
            meta.model_copy(update={"name": name, **whole})
            for part in self.parts
            for meta, name in zip(part.program.branch_metas(), part.names, strict=True)
        )

    def _add_part(self, program: Program, occurrence: int, sizes: Sizes) -> Part:
        index = len(self.parts)
        start = sum(len(p.program.names) for p in self.parts)
        watch = WeightWatch(program.analysis.inputs.static, program.analysis.inputs.settings)
        watch.sums_always = self.distrusts_weights
        part = Part(index, program, start, f"graph{index}." if self.broken else "", watch, sizes)
        self.parts.append(part)
        self._by_call[id(program), occurrence] = part
        return part

    def abandon(self) -> None:
        """Forget what was recorded: another conductor takes over."""
        with self.lock:
            for _, streams in self._recorded.values():
                for stream in streams:
                    self.streams.drop(stream.key)
                    self.log.forget(stream.log)
            self._recorded.clear()

    def close(self) -> None:
        """Nothing comes after: another conductor takes over, and learns anew."""
        with self.lock:
            self._recorded.clear()
            for stream in list(self.streams):
                self.streams.drop(stream.key)
                if not stream.log.steps:
                    self.log.forget(stream.log)

    def forget_parts(self) -> None:
        """The graphs of this model will be captured anew."""
        self.parts.clear()
        self._by_call.clear()
        self._sealed = False

    def part_of(self, call: Call, program: Program, *, sizes: Sizes) -> Part | None:
        """The part that a graph call of this step is; None if the first step did not have it.

        Args:
            call: The step.
            program: The graph.
            sizes: The graph's, in this call.
        """
        occurrence = call.counts[id(program)]
        call.counts[id(program)] += 1
        part = self._by_call.get((id(program), occurrence))
        if part is None and not self._sealed:
            part = self._add_part(program, occurrence, sizes)
            num_bytes = part.num_bytes(call.stream.kept, call.stream.terms)
            if num_bytes and not self.store.enlarge(call.stream.key, num_bytes):
                self.inactive = (
                    f"cache_budget has no room for the caches of all graphs of the model: {self.cache_bytes:,} bytes "
                    "at least. Raise cache_budget"
                )
                self.tell(self.inactive)
        return part

    def distrust_weights(self) -> None:
        """Samples of the weights tell nothing here: let every part sum up the bits of its own at every call."""
        self.distrusts_weights = True
        for part in self.parts:
            part.watch.sums_always = True

    # -- plans ---------------------------------------------------------------------------------------------------------

    @property
    def entries(self) -> list[Entry]:
        """The known plans, newest first."""
        return self.streams.entries

    def add_profile(self, profile: Profile, plan: Plan | None = None) -> Plan | None:
        """Make a plan from a profile and follow it from the next generation on."""
        if self.steps is not None and profile.num_steps != self.steps:
            if not self.transfer:
                self.log.note(f"a profile of {profile.num_steps} steps is not used: steps={self.steps} was asked for")
                return None
            if any(e.profile.num_steps == self.steps and not e.profile.meta.resampled_from for e in self.entries):
                return None  # that was measured
            profile = resampled(profile, steps=self.steps)
        if plan is None:
            plan = plan_for(self.policy, profile if self.filters else _unfiltered(profile), self.ask)
        self.streams.add_entry(Entry(profile, plan, self.timeline_of(profile)))
        self.log.note(str(plan))
        return plan

    def _cover(self, mark: Marked | None) -> None:
        """Have a plan for as many steps as a generation is marked with, if one may be interpolated."""
        steps = mark.steps if mark is not None else None
        if not self.transfer or self.record_only or steps in (None, *self._covered) or self.steps not in (None, steps):
            return
        profiles = [entry.profile for entry in self.entries]
        source = next((profile for profile in profiles if not profile.meta.resampled_from), None)
        if source is None:
            return
        self._covered.add(steps)
        if any(profile.num_steps == steps for profile in profiles):
            return
        try:
            self.add_profile(resampled(source, steps=steps))
        except ConfigError as error:
            self.tell(f"no plan could be interpolated for {steps} steps: {error}")

    @property
    def filters(self) -> bool:
        """Whether corrections can tell frequencies apart here."""
        return all(part.program.filters for part in self.parts)

    def can_follow(self, plan: Plan) -> bool:
        """Whether the plan's corrections and combinations are possible here."""
        if any(map(self.combination_problem, plan.combinations)):
            return False
        return self.filters or not any(map(_is_filtered, (step.correction for step in plan.steps)))

    def combination_problem(self, combination: Combination) -> str:
        """Why an output cannot be this combination here; empty if it can."""
        if self.broken:
            return self._boundary_problem(combination)
        found = self.parts[0].program.combines
        if found.reason:
            return f"outputs cannot be combined here: {found.reason}"
        if any(combination.latents) and found.latents_reason:
            return f"latents cannot be combined with outputs here: {found.latents_reason}"
        return ""

    def _boundary_problem(self, combination: Combination) -> str:
        """Why the boundary of a broken model cannot give this combination; empty if it can."""
        if combination.reuse or combination.noise:
            return "outputs of the reuse graph can be combined in a model that is one graph only"
        if self.distrusts_weights:
            return (
                "the model's weights are brought from elsewhere for each call, and only its graphs see which they are"
            )
        if effects := [part.program.side_effects for part in self.parts if part.program.side_effects]:
            return f"a graph of the model {effects[0]}; each step must run once and whole"
        return self.boundary_problem

    def refuse(self, call: Call, reason: str) -> None:
        """Compute a step that was to be reused."""
        call.row, call.correction, call.reason, call.log.reason = self._compute_row, None, reason, reason
        call.stream.on_plan = False

    def timeline_of(self, profile: Profile) -> Timeline:
        """When the steps of a measured generation come, in terms of this capture's inputs.

        Inputs go by their names: their positions may be others where sizes are inputs as well, and token positions, for
        one, are a small input of a small picture alone.

        Raises: ProfileError if this capture has no such timestep.
        """
        meta, inputs = profile.meta, self.inputs
        times, varying = meta.time_inputs, meta.varying_inputs
        if meta.time_names and len(meta.varying_names) == len(varying):
            changing = (*meta.time_names, *meta.varying_names)
            small, large = (list(map(inputs.plain_name, some)) for some in (inputs.small, inputs.large))
            if small.count(meta.time_names[0]) != 1:
                raise ProfileError(
                    f"the profile tells steps apart by the input {meta.time_names[0]!r}, but the small inputs here are "
                    f"{small}. Calibrate this model with `omnifx calibrate`."
                )
            times = tuple(small.index(name) for name in changing if name in small)
            varying = tuple(large.index(name) for name in changing if name in large)
        if max((*times, -1)) >= len(inputs.small) or max((*varying, -1)) >= len(inputs.large):
            raise ProfileError(
                f"the profile reads the small inputs {times} and the large inputs {varying}, but here are "
                f"{len(inputs.small)} and {len(inputs.large)}. Calibrate this model with `omnifx calibrate`."
            )
        moves = tuple(profile.moves.max(0).values.tolist())
        return Timeline(meta.timesteps, moves, time_inputs=times, varying_inputs=varying)

    # -- calls ---------------------------------------------------------------------------------------------------------

    def decide(
        self,
        reading: Reading,
        latents: Tensor | None,
        *,
        weights: int,
        num_bytes: Callable[[tuple[str, ...] | None, int], int] | None = None,
    ) -> Call:
        """What the step that begins now does.

        Args:
            reading: What the clock read.
            latents: As they are now.
            weights: Version of the model's weights.
            num_bytes: Tells the bytes of one stream's cuts at the sizes of this call, from the names of the branches
                that it keeps (None: all) and how many of their values plans predict from; by default, those of the
                parts known so far.
        """
        num_bytes = num_bytes or self._num_bytes
        mark = self._mark()
        stream, reason = self.streams.proceed(reading, mark)
        if stream is None and (mark, reading.shapes) not in self._recorded:
            self._cover(mark)
            self.finish_before(reading, mark, self.inputs)
            self.beginning(self, reading, mark)
        if stream is None and not self.record_only and (self.streams.starting(reading, mark)):
            self._finish((mark, reading.shapes))
            stream = self._begin(reading, mark, latents, num_bytes)
        if stream is None:
            return self._record(reading, mark, reason, latents, weights, num_bytes)
        self.store.touch(stream.key)
        if not reading.finite:
            stream.doubt = "the latents hold NaN or infinity"
        row, correction, entry, planned_reason = self._planned(stream)
        if reuses(row):
            if refusal := self._refusal(stream) or reason or planned_reason:
                row, correction, reason = self._compute_row, None, refusal
                stream.on_plan = False
        elif not stream.doubt:
            reason = planned_reason
        call = self._call(stream, row, correction, reason, reading, weights)
        call.entry = entry
        return call

    def _begin(
        self,
        reading: Reading,
        mark: Marked | None,
        latents: Tensor | None,
        num_bytes: Callable[[tuple[str, ...] | None, int], int],
    ) -> Stream | None:
        stream = self.streams.begin(reading, mark, num_bytes=num_bytes)
        if stream is not None and any(entry.plan.merges for entry in stream.entries):
            stream.halved = latents is not None and _has_equal_halves(latents)
        return stream

    @property
    def _compute_row(self) -> Row:
        return (COMPUTE,) * sum(len(part.program.names) for part in self.parts)

    def _call(
        self, stream: Stream, row: Row, correction: Correction | None, reason: str, reading: Reading, weights: int
    ) -> Call:
        log = StepLog(stream.step, stream.number, "", reason, 0, 0)
        return Call(stream, row, correction, reason, reading, log, weights)

    def _planned(self, stream: Stream) -> tuple[Row, Correction | None, Entry | None, str]:
        """Row and correction of the step, and the plan they are from, if all plans that still fit agree."""
        first = stream.entries[0]
        row, correction = first.plan.row_of(stream.step), first.plan.steps[stream.step].correction
        if _is_filtered(correction) and not self.filters:
            return self._compute_row, None, first, "the plan filters its corrections, but the output has no grid here"
        for entry in stream.entries[1:]:
            if _numbers(entry, stream.step) != _numbers(first, stream.step):
                differ = any(reuses(e.plan.row_of(stream.step)) for e in stream.entries)
                why = "several calibrated step counts still fit, and their plans differ here" if differ else ""
                return self._compute_row, None, None, why
        return row, correction, first, ""

    def _refusal(self, stream: Stream) -> str:
        """Why this stream may not reuse anything now; empty if it may."""
        if stream.doubt:
            return stream.doubt
        if not self.store.holds(stream.key):
            return "its caches were evicted to keep cache_budget"
        if any(entry.plan.branches != self.names for entry in stream.entries):
            return "the model's graphs are other ones than those that were calibrated"
        for name in {name for entry in stream.entries for name in entry.plan.span_names}:
            if self.broken:
                return "ranges of blocks can be reused in a model that is one graph only"
            if problem := self.parts[0].program.span_problem(name):
                return f"{name} cannot be reused here: {problem}"
        combination = stream.entries[0].plan.steps[stream.step].combination
        if combination is not None and (problem := self.combination_problem(combination)):
            return problem
        self._sealed = True
        return ""

    # -- recording -----------------------------------------------------------------------------------------------------

    def _record(
        self,
        reading: Reading,
        mark: Marked | None,
        reason: str,
        latents: Tensor | None,
        weights: int,
        num_bytes: Callable[[tuple[str, ...] | None, int], int],
    ) -> Call:
        """A step that no plan covers: run it in full and measure it."""
        key = (mark, reading.shapes)
        if key in self._recorded and self._recorded[key][0].starts_anew(reading):
            self._finish(key)
            if not self.record_only and self.streams.starting(reading, mark):
                stream = self._begin(reading, mark, latents, num_bytes)
                assert stream is not None  # some plan starts here
                call = self._call(stream, self._compute_row, None, "", reading, weights)
                *_, call.entry, _ = self._planned(stream)
                return call
        if key not in self._recorded:
            reason = reason or self._came_amid(reading, mark)
            self._recorded[key] = (Recording(self.inputs), [])
        self.streams.leave_behind(reading, mark)
        recording, streams = self._recorded[key]
        number = recording.stream_of(reading)
        if number == len(streams):
            log = streams[0].log if streams else None
            kept, lags = self.recorded, self.policy.measured_lags
            size, more = num_bytes(kept, 0), lags * num_bytes(self.measured, 0) if self.measured else 0
            fits = size + more <= self.store.budget
            stream = self.streams.open(reading, mark, log, num_bytes=size + more if fits else size)
            stream.kept = kept
            if more and fits:
                stream.meter = ChangeMeter(lags, self.parts[0].program.cuts_by_column(self.measured))
            stream.number = number
            streams.append(stream)
        stream = streams[number]
        stream.recording = recording
        stream.step = recording.num_steps - (1 if number else 0)
        stream.last = reading
        reason = stream.doubt or reason or self._refused_plan or "measured: no plan for these steps yet"
        call = self._call(stream, self._compute_row, None, reason, reading, weights)
        call.latents = latents.detach() if latents is not None else None
        return call

    def _came_amid(self, reading: Reading, mark: Marked | None) -> str:
        """Why a recording begins here, if a generation that another graph of the model has begun goes on with it."""
        for stream in [s for other in self._others() if other is not self for s in other.streams]:
            if stream.mark is not mark or len(stream.last.sample) != len(reading.sample):
                continue
            nears = [e.timeline.moves[min(stream.step + 1, len(e.timeline.moves) - 1)] for e in stream.entries]
            if any(0 < reading.moved_from(stream.last) <= largest_move(near) for near in nears):
                return (
                    "the model runs another graph than this generation began with: its adapters, weights or settings "
                    "were changed meanwhile"
                )
        return ""

    @property
    def measured(self) -> tuple[str, ...]:
        """The branches and spans whose changes a recording measures, as the policy asks; none in a broken model."""
        if self.broken or not self.parts or not self.policy.measures:
            return ()
        program = self.parts[0].program
        if self.policy.measures == "branches":
            return program.names
        stack = span_name(0, max(0, len(program.spans.blocks) - 1))
        return () if program.span_problem(stack) else (stack,)

    @property
    def recorded(self) -> tuple[str, ...] | None:
        """What the steps of a recording keep: all branches (None), and what is measured beside them."""
        more = tuple(name for name in self.measured if name not in self.names)
        return (*self.names, *more) if more else None

    def keep(self, call: Call, output: Tensor | None, noise: Tensor | None) -> None:
        """Add a recorded step: its latents, what the model gave, and the noise that reuse would have caused."""
        recording, latents = call.stream.recording, call.latents
        call.latents = None
        if recording is None or latents is None:
            return
        unseen = output is None
        output = latents if output is None else output
        recorder = self._recorder_for(latents, output)
        vectors = recorder.keep(latents, output, noise)
        if self._unseen_output and not unseen and recording.num_steps:
            recording.fill_first(vectors, recorder)
            self._unseen_output = False
        recording.add(call.reading, recorder, vectors, call.changes)
        if call.times_ms is not None:
            recording.times_ms.append(call.times_ms)
        self._unseen_output |= unseen

    def keep_cuts(self, call: Call, program: Program, cuts: Mapping[str, Tensor], *, batch: int, steps: int) -> None:
        """Add a recorded step's cuts to the prior, if the policy needs one.

        Args:
            call: The step.
            program: What made them.
            cuts: By node name.
            batch: Samples of the call.
            steps: What to tell the bytes of, before any is kept.
        """
        recording, spec = call.stream.recording, self.policy.prior
        if recording is None or spec is None:
            return
        keys = program.cut_keys
        known = {name: value for name, value in cuts.items() if name in keys}  # spans have no trends
        if recording.prior is None:
            recording.prior = PriorSums(spec, self.record_budget)
            a_step = sum(cut.numel() for cut in known.values()) // batch * spec.dtype.itemsize
            self.log.note(
                f"the prior of policy {self.policy.name} takes {a_step:,} bytes a step, {a_step * steps:,} for {steps} "
                f"steps; record_budget is {self.record_budget:,}"
            )
            if (least := a_step * (self.steps or FEWEST_STEPS)) > self.record_budget:
                recording.prior.give_up(
                    f"the prior takes {least:,} bytes for {self.steps or FEWEST_STEPS} steps, but record_budget is "
                    f"{self.record_budget:,}. Raise it, or keep the prior in less precision"
                )
        for name, value in known.items():
            recording.prior.add(call.stream.step, keys[name], value, batch=batch)

    def end_step(self, call: Call, output: Tensor | None, *, captured: bool = True) -> None:
        """A call of a broken model is over: all its parts have run, if it was `captured` at all."""
        self.keep(call, output, None)
        stream = call.stream
        call.log.variant = call.log.variant or "full"  # no part of it has branches
        if not call.logged:  # it ran before anything was captured
            call.logged = True
            stream.log.steps.append(call.log)
        if stream.is_last_step:
            self.streams.drop(stream.key)
        self._empty_steps = 0 if self.parts or not captured else self._empty_steps + 1
        if not self.names and not self.inactive and (self.parts or self._empty_steps >= PATIENCE):
            self.inactive = self.explain_nothing([part.program for part in self.parts])
            self.tell(self.inactive)

    def finish(self, mark: Marked | None = None) -> None:
        """End what is being recorded under a mark, and learn from it."""
        with self.lock:
            self._finish_all(mark)

    def finish_before(self, reading: Reading, mark: Marked | None, inputs: Inputs) -> None:
        """End what is being recorded under a mark, as far as a call of another shape shows that it is over.

        Args:
            reading: The call.
            mark: Its mark.
            inputs: Roles of its inputs, which may be those of another capture.
        """
        for key in [key for key in self._recorded if key[0] is mark]:
            if self._recorded[key][0].is_over(reading, inputs):
                self._finish(key)

    def end_marked(self, mark: Marked) -> None:
        """A marked generation is over: learn from its recording, free its caches."""
        with self.lock:
            self._finish_all(mark)
            self.streams.drop_marked(mark)

    def _finish_all(self, mark: Marked | None) -> None:
        for key in [key for key in self._recorded if key[0] is mark]:
            self._finish(key)

    def _finish(self, key: _Key) -> None:
        found = self._recorded.pop(key, None)
        if found is None:
            return
        recording, streams = found
        for stream in streams:
            self.streams.drop(stream.key)
        self._sealed = bool(self.parts)  # none yet if it was still being found out how to capture the model
        if self.missed_start:
            self.missed_start = False
            self.log.note("the first generation was not learned from: its first step ran before the model was captured")
            return
        if any(stream.homeless for stream in streams):
            return  # nothing was cached, so nothing is known of what reuse would cause
        if self.inactive:
            return
        if problem := recording.problem():
            self.tell(f"the first generation could not be used to plan: {problem}. Steps keep running in full.")
            return
        if self.steps is not None and recording.num_steps != self.steps:
            self.tell(f"a generation of {recording.num_steps} steps was not used: steps={self.steps} was asked for.")
            return
        if not self.names:
            return
        profile = self.make_profile(recording, self)
        if recording.prior is not None and recording.prior.problem:
            self.tell(f"{recording.prior.problem}.")
        self.profiles.append(profile)
        if not self.record_only:
            try:
                self.add_profile(profile)
            except ConfigError as error:
                self._refused_plan = f"no plan: {error}"
                self.tell(self._refused_plan)
        if self.learned is not None:
            self.learned(self, profile)

    def after(self, call: Call, *, label: str, reason: str, spent: int, whole: int) -> None:
        """A part of a step has run."""
        stream = call.stream
        with self.lock:
            if not call.logged:
                call.logged = True
                stream.log.steps.append(call.log)
            call.log.add(label, reason, spent, whole)
            if not reuses(call.row) or stream.terms:
                stream.log.peak_cache_bytes = max(stream.log.peak_cache_bytes, self.store.held_bytes)
            if stream.entries:
                self.following = True
                if stream.is_last_step and not self.broken:
                    self.streams.drop(stream.key)

    def tell(self, text: str) -> None:
        """Note a sentence for the user, and warn the first time."""
        if self.log.note(text):
            warnings.warn(f"omnifx: {text}", OmnifxWarning, stacklevel=2)

    def _recorder_for(self, latents: Tensor, output: Tensor) -> Recorder:
        key = (*latents.shape, *output.shape)
        if key not in self._recorders:
            self._recorders.clear()  # a large one holds indices of its size; a recording keeps its own
            budget, axis = self.record_budget, self.frame_axis
            self._recorders[key] = Recorder(latents, output, budget=budget, frame_axis=axis)
        return self._recorders[key]


def _numbers(entry: Entry, step: int) -> tuple[Any, ...]:
    """All that a plan says of a step, with the spans and tokens of its row, the prior whose trends it follows there,
    and the steps whose values it combines."""
    plan, planned = entry.plan, entry.plan.steps[step]
    prior = entry.profile.prior if planned.trend else None
    tokens = (plan.selection, plan.tokens) if reuses(plan.row_of(step)) else None
    combined = (entry.full_before[step], entry.stored_before[step]) if planned.combination is not None else None
    return plan.row_of(step), plan.spans, planned.model_copy(update={"variant": 0}), prior, tokens, combined


def _is_filtered(correction: Correction | None) -> bool:
    return correction is not None and correction.filter != "all"


def _has_equal_halves(latents: Tensor) -> bool:
    """Whether the first half of a batch has the same latents as the second: guidance with both halves in one batch."""
    size = latents.shape[0]
    return size % 2 == 0 and torch.equal(latents[: size // 2], latents[size // 2 :])


def _unfiltered(profile: Profile) -> Profile:
    """The profile for an output without a grid, where frequencies cannot be told apart."""
    return replace(profile, meta=profile.meta.model_copy(update={"filter_axes": ()}))


__all__ = ["Call", "Conductor", "Part"]
