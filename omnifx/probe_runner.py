"""The runner of run-time policies: head, one read of the signal, decision, tail.

Nothing here is traced, and no graph is compiled after the first call: Dynamo sees one opaque function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from omnifx.boundary import Underway
from omnifx.clock import Marked, Reading
from omnifx.errors import ConfigError, PassError
from omnifx.fits import Fits
from omnifx.following import Followed, Following
from omnifx.passes.pipeline import VariantSpec
from omnifx.passes.split_probe import aged
from omnifx.probes import trunk_of
from omnifx.profile import Profile
from omnifx.program import Program
from omnifx.recording import FEWEST_STEPS
from omnifx.runlog import Log, StepLog
from omnifx.runner import TOLERANCE, Runner, memory_of, zeros_like
from omnifx.runtime import AnyRuntimePolicy, Decision, Step, agreed
from omnifx.sizes import Sizes
from omnifx.stages import Stage, Stages
from omnifx.store import CacheStore
from omnifx.weights import WeightWatch


class ProbeRunner(Runner):
    """Runs the calls of one program under a policy that decides at run time.

    Args:
        program: The captured graph.
        policy: Decides.
        store: Holds what streams keep.
        log: Where each step's signals and decision are noted.
        steps: Steps of a generation, if known to the caller or from a profile.
        mark: The mark of the present context.
        tell: Tells the user a sentence.
        make_profile: Makes a profile of streams that were measured.
        learned: Called with each profile that the policy learned from.
        record_only: Measure every generation in full, and learn from none.
        inactive: Why nothing can be reused here; empty if it can.

    Attributes:
        fits: What the policy learned so far; None if it learns nothing.
        profiles: Of the generations that were measured.
    """

    def __init__(
        self,
        program: Program,
        *,
        policy: AnyRuntimePolicy,
        store: CacheStore,
        log: Log,
        steps: int | None,
        mark: Callable[[], Marked | None],
        tell: Callable[[str], None],
        make_profile: Callable[[Sequence[Followed]], Profile],
        learned: Callable[[Profile], None],
        record_only: bool = False,
        inactive: str = "",
    ) -> None:
        super().__init__(program, policy=policy, log=log, conductor=None, underway=Underway(), inactive=inactive)
        self.decider = policy
        self.fits = Fits(policy) if policy.learns else None
        self.make_profile = make_profile
        self.learned = learned
        self.record_only = record_only
        self.profiles: list[Profile] = []
        self._ended: list[Followed] = []  # streams whose generation has further ones under way
        self.steps = steps
        self.store = store
        self.mark = mark
        self.tell = tell
        inputs = program.analysis.inputs
        moving = frozenset(i for i, position in enumerate(inputs.large) if position in inputs.further_latents)
        self.streams = Following(store, log, moving=moving)
        self.watch = WeightWatch(inputs.static, inputs.settings)
        self.stages: Stages | None = None
        self._device = next((v.device for v in program.inputs if isinstance(v, Tensor)), torch.device("cpu"))
        if not inactive:
            try:
                self.stages = Stages(
                    program, policy.probe(program.gm, trunk_of(program.gm, frame_axis=program.frame_axis))
                )
            except (PassError, ConfigError) as error:
                self._inactive = f"policy {policy.name!r} cannot work here, so nothing is reused: {error}"
                self.tell(self._inactive)

    @property
    def compiled(self) -> list[Any]:
        """What was compiled: variants of the whole graph, and stages."""
        return [*self.program.variants.values(), *(self.stages.compiled if self.stages is not None else ())]

    def specs_ahead(self) -> list[VariantSpec]:
        """The captured graph itself, if nothing is reused; the stages are compiled here and now."""
        if self.stages is None:
            return [self.program.plain]
        try:
            _ = self.stages.head, self.stages.full, self.stages.reuse
        except PassError as error:
            self.deactivate(f"policy {self.policy.name!r} cannot work here, so nothing is reused: {error}")
            self.tell(self._inactive)
            return [self.program.plain]
        return []

    def end_marked(self, mark: Marked) -> None:
        """A marked generation is over: free its caches."""
        with self._lock:
            self._learn([stream for stream in (*self._ended, *self.streams) if stream.mark is mark])
            self.streams.drop_marked(mark)

    def finish(self) -> None:
        """Learn from generations that no later one ended."""
        with self._lock:
            self._learn([*self._ended, *self.streams])

    # -- calls ---------------------------------------------------------------------------------------------------------

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        if self.inactive or self.stages is None:
            self._note_plain()
            return self.program.variant(self.program.plain).run(args)
        return self._step(args, self.stages)

    def _note_plain(self) -> None:
        with self._lock:
            log = self.log.generations[-1] if self.log.generations else self.log.begin()
            if len(log.steps) < 4096:
                flops = self.program.analysis.flops
                log.steps.append(StepLog(len(log.steps), 0, "full", self.inactive, flops, flops))

    def _step(self, args: list[Any], stages: Stages) -> Sequence[Any]:
        with self._lock:
            self.watch.look(args)
            reading = self.reader.read(args, self.watch.probes(args))
            self.watch.compare(reading.probes)
            weights = self.watch.version
            sizes = self.program.sizes.at(args)
            stream, must = self._stream(reading, stages, sizes)
            known = self._known(stream, stages)
        spent, made = 0, dict[str, Tensor]()
        late, stream.signal = stream.signal, None
        signal = late if stages.head is None else None
        if stages.head is not None:
            head = self._run_stage(stages, stages.head, args, known, sizes)
            made = self._strided(stages.head, head, sizes)
            signal = made.pop("signal")
            spent += stages.head.flops
        decision = self._decide(stream, signal, late, must)
        stage = stages.full if decision.computes else stages.reuse
        values = known | _fed(made)
        del known
        if decision.computes:
            self._release(stream, stages, values)
        else:
            values |= self._weights(stages, stream.computed, stream.step)
        outputs = self._parted(stage, [*values.values()], self._run_stage(stages, stage, args, values, sizes))
        given = outputs[: self.program.num_outputs]
        if decision.computes:
            left = self._strided(stage, outputs[self.program.num_outputs :], sizes)
            stream.signal = left.pop("signal", None)
            self._check(stages, args, made | left, given, sizes)
            made |= left
        args.clear()
        with self._lock:
            self._keep(stream, stages, made, weights if decision.computes else None)
            stream.state = decision.state
            self._note(stream, stage.label, decision, must, spent + stage.flops)
            if stream.step + 1 == self._total(stream):
                self._end(stream)
        return given

    def _end(self, stream: Followed) -> None:
        """A stream did its last step: free its caches, and learn from its generation once all of its streams did."""
        self.streams.drop(stream.key)
        if self.fits is not None:
            self._ended.append(stream)
            if all(other.log is not stream.log for other in self.streams):
                self._learn([ended for ended in self._ended if ended.log is stream.log])

    def _stream(self, reading: Reading, stages: Stages, sizes: Sizes) -> tuple[Followed, str]:
        """The stream that a call belongs to, and why its step has to compute everything (empty if it has not)."""
        mark = self.mark()
        stream, must = self.streams.proceed(reading, mark)
        if stream is not None and (total := self._total(stream)) is not None and stream.step >= total:
            self.streams.drop(stream.key)
            stream = None
        if stream is None:
            self._learn([other for other in (*self._ended, *self.streams) if other.mark is None])
            stream = self.streams.begin(reading, mark, self.decider.start(), num_bytes=stages.num_bytes(sizes))
            return stream, FIRST
        self.store.touch(stream.key)
        must = self._follow(stream, must)
        if stream.homeless:
            must = f"one stream's caches need {stages.num_bytes(sizes):,} bytes, more than cache_budget"
        elif not self.store.holds(stream.key):
            must = "its caches were evicted to keep cache_budget"
        elif not must and not stream.computed:
            must = "nothing is cached yet"
        elif not must and stream.weights != self.watch.version:
            must = "the weights changed since the caches were made"
        elif not all(sizes.allows(stage.guards) for stage in stages.compiled):
            must = "the stages were compiled for other sizes than these"
        if must:
            stream.state = self.decider.start()
        return stream, must

    def _follow(self, stream: Followed, must: str) -> str:
        """Let a stream follow what was learned at its timesteps; why its step has to compute everything."""
        if self.fits is None or self.record_only:
            return must
        if stream.step == 1:
            stream.fit = self.fits.at(stream.times, stream.last.shapes[-1])
            stream.total = stream.fit.total(stream.times) if stream.fit is not None else None
        elif stream.fit is not None and not stream.doubt and not stream.fit.holds(stream.times):
            stream.doubt = f"its timesteps leave those that {self.decider.name} was fitted at"
            self.fits.forget(stream.fit)  # so that the next such generation is measured whole
        return must or stream.doubt

    def _total(self, stream: Followed) -> int | None:
        """Steps of the stream's generation, if known."""
        mark = self.mark()
        given = mark.steps if mark is not None and mark.steps is not None else self.steps
        return stream.total if given is None else given

    def _known(self, stream: Followed, stages: Stages) -> dict[str, Tensor]:
        """What the stream kept, by label, with the last computed step's values for what an older one would have
        left."""
        found = dict(stream.cache.cuts)
        for label, (_, every) in stages.kept.items():
            for age in range(1, stages.probe.depth(label, every=every) if label in found else 1):
                found.setdefault(aged(label, age), found[label])
        return found

    def _run_stage(
        self, stages: Stages, stage: Stage, args: list[Any], values: Mapping[str, Tensor], sizes: Sizes
    ) -> Sequence[Any]:
        """Run a stage; what was never kept is zeros, whose signals nobody reads."""
        missing = {
            label: zeros_like(fake, sizes)
            for label, fake in zip(stage.extra_inputs, stage.extra_values, strict=True)
            if label not in values and not label.startswith("condition:")
        }
        return stage.run(stages.feed(stage, args, {**missing, **values}))

    def _weights(self, stages: Stages, stored: Sequence[int], step: int) -> dict[str, Tensor]:
        """The numbers that a skipped step's residuals are multiplied by, if there are any; without stored ones those
        that repeat the newest."""
        weights = stages.probe.weights
        if weights is None:
            return {}
        fake = stages.reuse.extra_values[stages.reuse.extra_inputs.index("predictor")]
        return {"predictor": self._predictor_tensor(tuple(weights(stored, step)) if stored else (), fake)}

    def _release(self, stream: Followed, stages: Stages, values: dict[str, Tensor]) -> None:
        """Before all is computed, free what that replaces: a stream never holds two sets of cuts or residuals."""
        oldest = stages.probe.window - 1
        for label in [aged(label, oldest) for label in stages.kept if label.startswith(("cut:", "delta:"))]:
            values.pop(label, None)
            stream.cache.cuts.pop(label, None)
        stream.computed = stream.computed[:oldest]  # until the new ones are there

    def _decide(self, stream: Followed, signal: Tensor | None, late: Tensor | None, must: str) -> Decision[Any]:
        """What a step does.

        Args:
            stream: Its stream.
            signal: [signals, B]: what the decision rests on; None if nothing was measured.
            late: [signals, B]: what the last computed step measured at its end for the policy to learn from.
            must: Why it has to compute; empty if it has not.
        """
        assert self.stages is not None  # else there are no stages to decide on
        decider = self.decider if stream.fit is None else stream.fit.policy
        probe, learns = self.stages.probe, decider.learns
        names = (*probe.signals, *(probe.finish_signals if learns and self.stages.head is not None else ()))
        if len(names) > len(probe.signals) and signal is not None:
            unknown = signal.new_full((len(probe.finish_signals), signal.shape[1]), math.inf)
            signal = torch.cat([signal, unknown if late is None else late])
        signals, forced = agreed(
            signal, count=len(names), must=bool(must), device=self._device, alone=not decider.ranks_agree
        )
        if forced and not must:
            must = "another rank has to compute"
        read = {} if must == FIRST else dict(zip(names, signals, strict=False))
        if learns:
            must = must or LEARNING
            if stream.measured:
                stream.measured[-1] |= {name: read[name] for name in probe.finish_signals if name in read}
            stream.measured.append({name: read[name] for name in probe.signals if name in read})
        step = Step(stream.step, self._total(stream), must)
        decision = decider.decide(stream.state, signals[: len(probe.signals)], step)
        assert decision.computes or not must, f"{decider.name} skips a step that has to be computed"
        return replace(decision, why=must or decision.why, shown={**read, **decision.shown})

    def _learn(self, streams: Sequence[Followed]) -> None:
        """Let the policy learn from the generation among these streams that was measured longest, unless it knows those
        timesteps."""
        if self.fits is None:
            return
        self._ended = [ended for ended in self._ended if ended not in streams]
        whole = [s for s in streams if s.fit is None and len(s.measured) == len(s.times) >= FEWEST_STEPS]
        whole = [s for s in whole if all(map(math.isfinite, s.moves))]
        best = max(whole, key=lambda stream: len(stream.measured), default=None)
        if best is None or self.fits.holds(best.times):
            return
        profile = self.make_profile([s for s in whole if s.log is best.log and len(s.times) == len(best.times)])
        if self.record_only:
            self.profiles.append(profile)
        elif said := self.fits.add(profile):
            self.profiles.append(profile)
            self.log.note(f"{said}, of a generation that ran in full")
            self.learned(profile)
        else:
            self.log.note(f"{self.decider.name}: it could learn nothing from a generation of {len(best.times)} steps")

    # -- what is kept --------------------------------------------------------------------------------------------------

    def _strided(self, stage: Stage, made: Sequence[Any], sizes: Sizes) -> dict[str, Tensor]:
        """A stage's extra outputs by label, in the strides that the other stages were compiled for."""
        found: dict[str, Tensor] = {}
        extra = made[len(made) - len(stage.extra_outputs) :]
        kept = self.stages.kept if self.stages is not None else {}
        for label, like, value in zip(stage.extra_outputs, stage.made, extra, strict=True):
            fake = kept[label][0] if label in kept else like
            if value.stride() != (strides := sizes.strides(fake)):
                value = value.new_empty_strided(value.shape, strides).copy_(value)
            elif not self.program.lowering.owns_outputs and not label.startswith("carry:"):
                value = value.clone()  # the memory of CUDA graphs is overwritten by their next replay
            found[label] = value
        return found

    def _parted(self, stage: Stage, held: Sequence[Tensor], outputs: Sequence[Any]) -> Sequence[Any]:
        """The outputs, none of which shares memory with what is kept: the caller may write to it."""
        count = self.program.num_outputs
        taken = set(map(memory_of, (*held, *outputs[count:])))
        return [v.clone() if isinstance(v, Tensor) and memory_of(v) in taken else v for v in outputs[:count]] + list(
            outputs[count:]
        )

    def _keep(self, stream: Followed, stages: Stages, made: Mapping[str, Tensor], weights: int | None) -> None:
        """Hand a step's values to its stream, unless its cache was evicted meanwhile; `weights` is None unless all was
        computed."""
        if not self.store.holds(stream.key):
            return
        cuts = stream.cache.cuts
        for label, (_, every) in stages.kept.items():
            if label not in made or (weights is None and not every):
                continue
            for age in range(stages.probe.depth(label, every=every) - 1, 0, -1):
                if aged(label, age - 1) in cuts and stream.weights == weights:
                    cuts[aged(label, age)] = cuts[aged(label, age - 1)]
                else:
                    cuts.pop(aged(label, age), None)
            cuts[label] = made[label]
        if weights is not None:
            older = stream.computed if stream.weights == weights else ()
            stream.computed = (stream.step, *older)[: stages.probe.window]
            stream.weights = weights
            stream.log.peak_cache_bytes = max(stream.log.peak_cache_bytes, self.store.held_bytes)

    def _check(
        self, stages: Stages, args: list[Any], made: Mapping[str, Tensor], given: Sequence[Any], sizes: Sizes
    ) -> None:
        """Check the reuse stage once for each size: fed a step's own values it must reproduce that step."""
        stage = stages.reuse
        if sizes in stage.checked or not sizes.allows(stage.guards):
            return
        stage.checked.add(sizes)
        ages = range(stages.probe.window)
        own = {aged(label, age): value for label, value in made.items() for age in ages} | _fed(made)
        own |= self._weights(stages, (), 0)
        again = self._run_stage(stages, stage, args, own, sizes)
        for i in self.program.noisy:
            true, got = given[i].float(), again[i].float()
            error = float((got - true).norm() / true.norm().clamp_min(1e-30))
            if not error <= TOLERANCE.get(given[i].dtype, 1e-2) and bool(torch.isfinite(true).all()):
                self.deactivate(
                    f"the stage {stage.label} fed a step's own values differs from that step by {error:.1e} of its "
                    "norm; nothing is reused. Please report this with what OMNIFX_DUMP=dir writes."
                )
                self.tell(self._inactive)

    def _note(self, stream: Followed, label: str, decision: Decision[Any], must: str, spent: int) -> None:
        reason = "" if must == FIRST else must
        stream.log.steps.append(
            StepLog(
                stream.step, stream.number, label, reason, spent, self.program.analysis.flops,
                signals=dict(decision.shown), decision=decision.why,
            )
        )  # fmt: skip


FIRST = "the first step"
LEARNING = "measured: the policy learns from this generation"


def _fed(made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a head made, as the tails read it: a ``probe:`` there is what was kept before."""
    found = {label: value for label, value in made.items() if label.startswith("carry:")}
    return found | {f"now:{label[6:]}": value for label, value in made.items() if label.startswith("probe:")}


__all__ = ["ProbeRunner"]
