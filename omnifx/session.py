"""A session: everything omnifx keeps for one compiled model: its options, its programs, its caches and its log.

Sessions are found by the model's parameters, which Dynamo hands to a backend, so that `omnifx.stats(compiled)` and
`omnifx.generation(compiled)` need nothing but the compiled model.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import threading
import uuid
import warnings
import weakref
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import CodeType
from typing import Any

import diffusers
import platformdirs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import reset_code
from torch._subclasses.fake_tensor import unset_fake_temporarily

from omnifx.boundary import Boundary, Underway, compiled_call, innermost
from omnifx.breaks import GraphBreak, known_breaks
from omnifx.clock import Marked, Reading, mark, marked_for
from omnifx.conductor import Conductor
from omnifx.errors import ConfigError, OmnifxWarning, PlanError, ProfileError
from omnifx.fits import Fits, signals_profile
from omnifx.graph import Branch, Inputs, hint
from omnifx.hooks import hooks_of
from omnifx.options import Options
from omnifx.plan import Combination, Plan
from omnifx.prior import prior_path
from omnifx.probe_runner import ProbeRunner
from omnifx.profile import Profile
from omnifx.program import Program
from omnifx.recording import Recording
from omnifx.report import MatchReport
from omnifx.runlog import Log, Stats
from omnifx.runner import Runner
from omnifx.runtime import RuntimePolicy, is_runtime
from omnifx.store import CacheStore, default_budget
from omnifx.transfer import resampled
from omnifx.trunks import with_trunks
from omnifx.unmatched import nothing_found
from omnifx.weights import plain

_SESSIONS: weakref.WeakSet[Session] = weakref.WeakSet()
_LOCK = threading.RLock()


class Session:
    """One model compiled with one set of options."""

    def __init__(self, options: Options, raw_options: dict[str, Any] | None, model: nn.Module | None) -> None:
        self.options = options
        self.raw_options = raw_options
        self.policy = options.resolved_policy
        self.model_ref = weakref.ref(model) if model is not None else lambda: None
        self.model_name = type(model).__name__ if model is not None else "function"
        self.runners: list[Runner] = []
        self.log = Log()
        self.store: CacheStore | None = None
        self.record_only = options.record_only
        self.names: list[str] = []
        self.conductors: list[Conductor] = []  # one for each capture of the model, newest last
        self.boundary: Boundary | None = None
        self.underway = Underway()
        self._served: dict[Program, Runner] = {}  # for graphs that were captured for another instance
        _SESSIONS.add(self)

    # -- capture -------------------------------------------------------------------------------------------------------

    def knows(self, tensors: Sequence[Any]) -> bool:
        """Whether any of these parameters belongs to this session's model."""
        model = self.model_ref()
        if model is None:
            return False
        own = {id(p) for p in model.parameters()}
        return any(id(t) in own for t in tensors)

    def add_program(self, program: Program, weights_hash: str, *, broken: bool = False) -> Runner:
        """A runner for a newly captured graph; follows a known profile if there is one.

        Args:
            program: The graph.
            weights_hash: Of the graph's parameters.
            broken: Whether the graph is only a part of a step.
        """
        device = next((t.device for t in program.inputs if isinstance(t, Tensor)), torch.device("cpu"))
        self._make_store(device)
        if program.over_budget:
            self.tell(
                f"cache_budget leaves {len(program.over_budget)} of {len(program.analysis.cacheable)} branches "
                f"uncached, the first is {program.over_budget[0].name}"
            )
        if is_runtime(self.policy):
            return self._add_probe_runner(program, weights_hash, self._make_store(device), broken=broken)
        conductor, reason = None, ""
        if broken and (self.boundary is None or program.side_effects):
            reason = _effects_of(self.model_name, program, ()) if program.side_effects else self._break_reason()
        elif not broken:
            reason = self._inactive([program])
            conductor = self._conductor(
                program.analysis.inputs,
                program=program,
                frame_axis=program.frame_axis,
                latents=program.inputs[program.analysis.inputs.latents or 0],
                fingerprint=_hash(self.model_name, weights_hash, *program.names),
                inactive=reason,
            )
            conductor.missed_start = self.boundary is not None
        runner = Runner(
            program,
            policy=self.policy,
            log=self.log,
            conductor=conductor,
            underway=self.underway,
            inactive=reason,
            relay=functools.partial(_runner_for_call, weakref.ref(self), self.raw_options),
        )
        self.runners.append(runner)
        if reason and broken:
            self.tell(reason)
        return runner

    def serve(self, runner: Runner) -> Runner | None:
        """This session's runner for the graph of `runner`, which Dynamo runs for this session's model too.

        The graph is the same, and so are its variants; what differs is this model's: its plan, caches, noise and log.
        """
        if runner.underway is self.underway:
            return runner
        with _LOCK:
            if runner.program not in self._served:
                self._served[runner.program] = self.add_program(runner.program, "", broken=True)
            return self._served[runner.program]

    def _add_probe_runner(self, program: Program, weights_hash: str, store: CacheStore, *, broken: bool) -> Runner:
        """A runner for a policy that decides at run time; it needs no conductor, as there is no plan to follow."""
        policy = self.policy
        assert isinstance(policy, RuntimePolicy)  # the caller asked
        fingerprint = _hash(self.model_name, weights_hash, *program.names)
        profile = self._known_profile(fingerprint)
        measured = profile is not None and profile.meta.runtime_policy == policy.name
        reason = self._inactive([program])
        if broken:
            reason = (
                f"{self.model_name} was captured in parts, but policy {policy.name!r} decides in the middle of a step, "
                "which needs the step as one graph; nothing is reused. Mend the graph breaks (omnifx.explain lists "
                "them), or use a policy that plans ahead"
            )
        if measured and not policy.learns:
            raise ConfigError(
                f"omnicache: the profile was measured for {policy.name} to learn from, but its options say all that it "
                f"would learn: {policy.options}. Leave one of both away."
            )
        said = ""
        if not measured and not self.record_only:  # what was measured on this very model comes first
            policy, said = policy.for_model(self.model_name)
        steps = self.options.steps or (profile.num_steps if profile is not None and not measured else None)
        if said:
            self.log.note(said)
        if steps is None and policy.uses_steps and not measured:
            self.log.note(
                f"{policy.name}: the number of steps is not known, so {policy.uses_steps}; give it as the option "
                "'steps', or mark generations with omnifx.generation(model, steps=...)"
            )
        runner = ProbeRunner(
            program,
            policy=policy,
            store=store,
            log=self.log,
            steps=steps,
            mark=lambda: marked_for(self),
            tell=self.tell,
            make_profile=lambda streams: signals_profile(
                streams, program, policy, model=self.model_name, fingerprint=fingerprint, versions=versions()
            ),
            learned=lambda learned: self._keep_signals(learned, fingerprint),
            record_only=self.record_only,
            inactive=reason,
        )
        if reason:
            self.tell(reason)
        if runner.fits is not None and not self.record_only:
            with unset_fake_temporarily():  # a capture is under way, and would make the fits of fake tensors
                self._teach(runner.fits, fingerprint, profile if measured else None)
        self.runners.append(runner)
        return runner

    def _teach(self, fits: Fits, fingerprint: str, given: Profile | None) -> None:
        """Let a run-time policy learn from the given profile, or else from those that were kept of this model."""
        if given is not None:
            said = fits.add(given, whole=True)
            if said:
                self.log.note(f"{said}, of the given profile")
            else:
                self.tell(f"{self.policy.name}: the profile holds too little to learn from; a generation is measured")
            return
        ranks = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not self.options.profile_cache or ranks:  # ranks must decide alike, but may find different files
            return
        folder = profile_folder(fingerprint) / self.policy.name
        for path in sorted(folder.glob("*.safetensors"), key=lambda p: p.stat().st_mtime):
            try:
                profile = Profile.load(path)
                if (profile.meta.fingerprint, profile.meta.runtime_policy) != (fingerprint, self.policy.name):
                    raise ProfileError(f"{path} belongs to another model or policy.")
                if said := fits.add(profile):
                    self.log.note(f"{said}, of the profile {path.name} in the cache directory")
            except ProfileError as error:
                self.tell(f"a cached profile is not used: {error}")

    def _keep_signals(self, profile: Profile, fingerprint: str) -> None:
        """A run-time policy learned from a generation: keep its signals for other processes."""
        if self.options.profile_cache and not self.record_only:
            self._save_profile(profile_folder(fingerprint) / self.policy.name, profile)

    def _known_profile(self, fingerprint: str) -> Profile | None:
        """The profile that the options name."""
        with unset_fake_temporarily():
            given = self.options.profile
            if given is not None:
                profile = given if isinstance(given, Profile) else Profile.load(given)
                if profile.meta.fingerprint != fingerprint:
                    raise ProfileError(
                        f"the profile does not belong to this model: it was measured on {profile.meta.model}, or on "
                        "other weights. Calibrate this model with `omnifx calibrate`."
                    )
                if profile.meta.runtime_policy not in ("", self.policy.name):
                    raise ProfileError(
                        f"the profile was measured for policy {profile.meta.runtime_policy!r}, and the option 'policy' "
                        f"is {self.policy.name!r}. Calibrate for this one, or leave the profile away."
                    )
                return profile
        return None

    def end_marked(self, mark: Marked) -> None:
        """A marked generation is over."""
        for conductor in self.conductors:
            conductor.end_marked(mark)
        for runner in self.runners:
            if isinstance(runner, ProbeRunner):
                runner.end_marked(mark)

    def _make_store(self, device: torch.device) -> CacheStore:
        if self.store is None:
            self.store = CacheStore(self._budget(device))
        return self.store

    def _conductor(
        self,
        inputs: Inputs,
        *,
        program: Program | None,
        frame_axis: int | None,
        latents: Tensor,
        fingerprint: str,
        inactive: str = "",
    ) -> Conductor:
        """A conductor that follows the plans which are known already."""
        conductor = Conductor(
            inputs,
            program=program,
            frame_axis=frame_axis,
            latent_shape=tuple(map(hint, latents.shape)) if isinstance(latents, Tensor) else (),
            policy=self.policy,
            ask=self.options.ask,
            steps=self.options.steps,
            transfer=self.options.transfer,
            place=place_of(latents, self.options.lowering),
            store=self._make_store(latents.device if isinstance(latents, Tensor) else torch.device("cpu")),
            log=self.log,
            record_budget=int(self.options.record_budget),
            beginning=self._beginning,
            learned=self._learned,
            make_profile=self._profile,
            record_only=self.record_only,
            inactive=inactive,
            others=lambda: self.conductors,
            explain_nothing=self._inactive,
            fingerprint=fingerprint,
            mark=lambda: marked_for(self),
        )
        self.conductors.append(conductor)
        if not inactive:
            with unset_fake_temporarily():  # a capture is under way, and would read the file as fake tensors
                self._load_profiles(conductor)
                self._share_plans(conductor)
        return conductor

    def watch_boundary(self) -> None:
        """The model's graph is broken: see its calls from outside, the one under way and all later ones."""
        found = compiled_call()
        if found is None or self.boundary is not None or not self.policy.needs_profile:
            return
        model, owner, args, kwargs = found
        parameters = list(model.parameters())
        digest = weights_hash(parameters)
        if any(parameter.is_meta for parameter in parameters):  # offloaded: nothing here tells checkpoints apart
            digest = uuid.uuid4().hex

        def make_conductor(inputs: Inputs, latents: Tensor | None) -> Conductor:
            reason = (
                "" if latents is not None else f"{self.model_name} is called without anything that looks like latents"
            )
            return self._conductor(
                inputs,
                program=None,
                frame_axis=2 if latents is not None and latents.dim() == 5 else None,
                latents=latents if latents is not None else torch.zeros(()),
                fingerprint=_hash(self.model_name, digest, "broken"),
                inactive=reason,
            )

        self.boundary = Boundary(
            model,
            make_conductor,
            self.underway,
            self.start_over,
            self.tell,
            serve=self.serve,
            options=self.raw_options,
            others=self._other_boundaries,
        )
        self.boundary.install(owner)
        with unset_fake_temporarily():
            self.boundary.enter_unseen(args, kwargs)  # its hook is passed already

    def _other_boundaries(self) -> list[Boundary]:
        found = [session for session in list(_SESSIONS) if session is not self and session.model_ref() is not None]
        return [session.boundary for session in found if session.boundary is not None]

    def bypass_boundary(self) -> None:
        """The model is one graph after all, whose conductor reads the graph's inputs."""
        assert self.boundary is not None  # what is bypassed
        self.boundary.bypassed = True
        for conductor in [conductor for conductor in self.conductors if conductor.broken]:
            conductor.abandon()
            self.conductors.remove(conductor)

    def forget_programs(self) -> None:
        """The graphs captured so far will not be called again."""
        self.runners.clear()
        self._served.clear()
        self.conductors[:] = [conductor for conductor in self.conductors if conductor.broken]
        for conductor in self.conductors:
            conductor.forget_parts()

    def start_over(self, reason: str) -> None:
        """The model is to be captured anew, and to be measured again."""
        self.tell(f"{self.model_name} is captured in parts from now on: {reason}")
        for conductor in self.conductors:
            conductor.close()
        self.conductors.clear()
        self.runners.clear()
        self._served.clear()

    def _break_reason(self) -> str:
        breaks = known_breaks()
        where = f", the latest at {breaks[-1].place}: {breaks[-1].reason}" if breaks else ""
        return (
            f"{self.model_name} was captured in parts (graph breaks{where}), and it was not compiled as a module, so "
            "that its steps cannot be told apart; nothing is reused. Compile the model itself: torch.compile(model, "
            "backend='omnicache')"
        )

    def _share_plans(self, conductor: Conductor) -> None:
        """Let a graph that was captured again (for another size, say) follow what the session knows already."""
        for entry in [e for other in self.conductors if other is not conductor for e in reversed(other.entries)]:
            self._share(entry.profile, entry.plan, conductor)

    def _share(self, profile: Profile, plan: Plan, conductor: Conductor) -> None:
        if any(profile is known.profile for known in conductor.entries):
            return
        try:
            self._check_profile(profile, conductor)
            conductor.add_profile(profile, plan if conductor.can_follow(plan) else None)
        except (ProfileError, ConfigError):
            return

    def _beginning(self, conductor: Conductor, reading: Reading, mark: Marked | None) -> None:
        """A call begins something new in one capture: a generation that another capture records may be over."""
        for other in self.conductors:
            if other is not conductor and not other.inactive and other.lock.acquire(blocking=False):
                try:  # never waits: two captures may be called at once, each by a thread that holds its lock
                    other.finish_before(reading, mark, conductor.inputs)
                finally:
                    other.lock.release()

    def _learned(self, conductor: Conductor, profile: Profile) -> None:
        """A generation was measured: keep its profile for other processes, and for other captures of the model."""
        if self.record_only:
            return
        if self.options.profile_cache:
            self._save_profile(profile_folder(conductor.fingerprint), profile)
        plan = next((entry.plan for entry in conductor.entries if entry.profile is profile), None)
        if plan is None:  # the policy refused
            return
        for other in self.conductors:
            if other is not conductor and not other.inactive:
                self._share(profile, plan, other)

    def _budget(self, device: torch.device) -> int:
        budget = self.options.cache_budget
        return default_budget(device) if budget is None else int(budget)

    def budget_per_stream(self, device: torch.device) -> int:
        """Most bytes of one set of cuts: a stream holds as many sets as the policy predicts from."""
        return self._budget(device) // max(1, self.policy.terms)

    def _inactive(self, programs: Sequence[Program]) -> str:
        """Why nothing can be reused of these graphs; empty if something can."""
        if len(programs) == 1 and programs[0].side_effects:
            return _effects_of(self.model_name, programs[0], self.names)
        if len(programs) == 1 and programs[0].unsized:
            return (
                f"the size of {programs[0].unsized} in {self.model_name} depends on values, so that the bytes of its "
                "caches are not known before it runs; nothing is reused"
            )
        if not any(program.names for program in programs):
            graphs = [(program.gm, program.analysis) for program in programs]
            breaks = known_breaks() if len(programs) > 1 else ()
            return nothing_found(self.model_name, graphs, breaks, hooks=hooks_of(self.model_ref()))
        if len(programs) == 1 and programs[0].analysis.inputs.latents is None:
            return (
                f"{self.model_name} has no floating-point input that looks like latents, so steps cannot be told apart"
            )
        return ""

    def _profile(self, recording: Recording, conductor: Conductor) -> Profile:
        assert recording.recorder is not None  # it has steps
        profile = recording.profile(
            model=self.model_name,
            fingerprint=conductor.fingerprint,
            versions=versions(),
            flops=conductor.flops,
            reuse_flops=conductor.reuse_flops,
            branches=conductor.branch_metas(),
            blocks=conductor.parts[0].program.block_metas() if not conductor.broken else (),
            spans=conductor.parts[0].program.span_metas() if not conductor.broken else (),
            output_shape=recording.recorder.output_shape,
            measured=conductor.measured,
            place=conductor.place,
        )
        both = Combination(outputs=(1.0,), latents=(1.0,))
        profile = replace(profile, meta=profile.meta.model_copy(update={"in_parts": conductor.broken}))
        return replace(profile, path=None) if conductor.combination_problem(both) else profile

    # -- profiles ------------------------------------------------------------------------------------------------------

    def _load_profiles(self, conductor: Conductor) -> None:
        given = self.options.profile
        if given is not None:
            profile = given if isinstance(given, Profile) else Profile.load(given)
            self._check_profile(profile, conductor)
            plan = self.options.plan
            plan = Plan.load(plan) if isinstance(plan, str | Path) else plan
            if plan is not None:
                if plan.transferred_from and plan.timesteps != profile.meta.timesteps:
                    profile = resampled(profile, timesteps=plan.timesteps)
                _check_plan(plan, profile)
            conductor.add_profile(profile, plan)
            return
        if self.options.plan is not None:
            raise ConfigError(
                "omnicache: the option 'plan' needs 'profile', which tells the steps of a generation apart."
            )
        if not self.options.profile_cache or self.record_only or not self.policy.needs_profile:
            return
        for path in sorted(
            profile_folder(conductor.fingerprint).glob("*.safetensors"), key=lambda p: p.stat().st_mtime
        ):
            try:
                profile = Profile.load(path)
                self._check_profile(profile, conductor)
                conductor.add_profile(profile)
            except (ProfileError, ConfigError) as error:
                self.tell(f"a cached profile is not used: {error}")

    def _check_profile(self, profile: Profile, conductor: Conductor) -> None:
        meta = profile.meta
        if meta.fingerprint != conductor.fingerprint:
            names = [branch.name for branch in meta.branches]
            what = (
                f"it was measured on {meta.model}, this is {self.model_name}"
                if meta.model != self.model_name
                else "its branches are other ones"
                if not conductor.broken and names != list(conductor.names)
                else "its weights are other ones"
            )
            raise ProfileError(
                f"the profile does not belong to this model: {what}. Calibrate this model with `omnifx calibrate`."
            )
        if meta.unplannable:
            raise ProfileError(f"no plan can be made from the profile of {meta.model}: {meta.unplannable}")
        if conductor.broken and conductor.latent_shape[1:] != meta.latent_shape[1:]:
            raise ProfileError(
                f"the profile was measured on latents {list(meta.latent_shape)}, these are "
                f"{list(conductor.latent_shape)}; as the model's graph is broken, only the batch size may differ. "
                "Calibrate at this size."
            )
        if len(conductor.latent_shape) != len(meta.latent_shape):
            raise ProfileError(
                f"the profile was measured on latents {list(meta.latent_shape)}, these are "
                f"{list(conductor.latent_shape)}; only their sizes may differ. Calibrate on such latents."
            )
        timing = meta.timing
        found = (conductor.place, conductor.latent_shape)
        if self.options.target_ms is not None and timing and (timing.device, timing.latent_shape) != found:
            raise ConfigError(
                f"omnicache: target_ms needs the time of a step here (latents {list(conductor.latent_shape)} on "
                f"{conductor.place}), but the profile was measured at latents {list(timing.latent_shape)} on "
                f"{timing.device}. Calibrate here, or ask for a speedup."
            )
        conductor.timeline_of(profile)

    def _save_profile(self, folder: Path, profile: Profile) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            key = _hash(*map(repr, profile.meta.timesteps), repr(profile.meta.latent_shape[1:]))[:16]
            temporary = folder / f".{key}.{threading.get_ident()}.tmp"
            profile.save(temporary)
            path = folder / f"{key}.safetensors"
            if profile.prior is not None:
                prior_path(temporary).replace(prior_path(path))
            else:
                prior_path(path).unlink(missing_ok=True)
            temporary.replace(path)
        except OSError as error:
            self.tell(f"the profile could not be kept in {folder}: {error}; a new process will measure again")

    # -- results -------------------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """A snapshot of what ran."""
        variants = [variant for runner in self.runners for variant in runner.compiled]
        notes = [*self.log.notes, *(r.inactive for r in self.runners if r.inactive)]
        return Stats(
            model=self.model_name,
            generations=list(self.log.generations),
            graphs=len(self.runners),
            variants_compiled=[variant.label for variant in variants],
            recompilations=sum(runner.late_compilations for runner in self.runners),
            cache_bytes=self.store.held_bytes if self.store else 0,
            peak_cache_bytes=self.store.peak_bytes if self.store else 0,
            cache_budget=self.store.budget if self.store else 0,
            compile_seconds=sum(variant.compile_seconds for variant in variants),
            notes=list(dict.fromkeys(notes)),
        )

    def report(self) -> MatchReport:
        """What was found in the captured graphs; where the model is broken, in all parts of a step."""
        programs = [runner.program for runner in self.runners]
        broken = next((c for c in reversed(self.conductors) if c.broken and c.parts), None)
        entries = [(programs.index(part.program), "") for part in broken.parts] if broken is not None else None
        found = report_of(self.model_name, programs, self.names, entries=entries)
        return replace(found, kept_whole=self.boundary.wholes.paths()) if self.boundary is not None else found

    def finish(self) -> None:
        """Learn from recordings that no later generation ended."""
        for conductor in self.conductors:
            conductor.finish(None)
        for runner in self.runners:
            if isinstance(runner, ProbeRunner):
                runner.finish()

    @property
    def profiles(self) -> list[list[Profile]]:
        """What was measured, for each capture of the model."""
        kept = [conductor.profiles for conductor in self.conductors]
        return kept + [runner.profiles for runner in self.runners if isinstance(runner, ProbeRunner)]

    def tell(self, text: str) -> None:
        """Note a sentence for the user, and warn the first time."""
        if self.log.note(text):
            warnings.warn(f"omnifx: {text}", OmnifxWarning, stacklevel=2)


def report_of(
    model: str,
    programs: Sequence[Program],
    names: Sequence[str],
    *,
    entries: Sequence[tuple[int, str]] | None = None,
    breaks: tuple[GraphBreak, ...] = (),
) -> MatchReport:
    """The report of one model's captured graphs.

    Args:
        model: Its class.
        programs: Its graphs.
        names: Plain names of the inputs of a model that is one graph.
        entries: For one call, the graphs that ran by number, each with the path of the module it ran for; None: each
            graph once, for the model itself.
        breaks: Where it fell apart.
    """
    ran = [(programs[i], path) for i, path in entries] if entries is not None else [(p, "") for p in programs]
    inputs: dict[str, str] = {}
    for program in programs if entries is None or len(programs) == 1 else ():  # parts of a model have other inputs
        roles = program.analysis.inputs
        label = {i: roles.plain_name(i) or (names[i] if i < len(names) else name) for i, name in enumerate(roles.names)}
        for i in (*([roles.latents] if roles.latents is not None else []), *roles.small, *roles.large):
            role = (
                "latents"
                if i == roles.latents or i in roles.further_latents
                else ("small, read at every call" if i in roles.small else "watched for change")
            )
            inputs[label[i]] = role
    notes = tuple(_effects_of(model, program, names) for program in programs if program.side_effects)
    return MatchReport(
        model=model,
        branches=_branches_of(ran),
        flops=sum(program.analysis.flops for program, _ in ran),
        reuse_flops=sum(program.analysis.reuse_flops for program, _ in ran),
        cache_bytes=sum(program.cache_bytes for program, _ in ran),
        graphs=len(programs),
        entries=len(ran),
        samples=_samples(programs[0]) if len(programs) == 1 else 0,
        inputs=inputs,
        breaks=breaks,
        notes=notes,
    )


def _samples(program: Program) -> int:
    """The first side of the latents."""
    latents = program.analysis.inputs.latents
    return hint(program.inputs[latents].shape[0]) if latents is not None else 0


def _branches_of(ran: Sequence[tuple[Program, str]]) -> tuple[Branch, ...]:
    """The branches of all graphs that ran, named from the model's root on."""
    found: list[Branch] = []
    placed = {id(program): with_trunks(program.gm, program.analysis.branches) for program, _ in ran}
    taken: Counter[str] = Counter()
    for program, path in ran:
        for branch in placed[id(program)]:
            name = f"{path}.{branch.name}" if path else branch.name
            taken[name] += 1
            found.append(
                replace(
                    branch,
                    name=name if taken[name] == 1 else f"{name}.{taken[name]}",
                    module_path=f"{path}.{branch.module_path}".rstrip(".") if path else branch.module_path,
                )
            )
    return tuple(found)


def _effects_of(model: str, program: Program, names: Sequence[str]) -> str:
    """Why a model with side effects runs as it is; inputs go by the names that its author gave them."""
    words = program.side_effects.split(" ")
    plain = dict(zip(program.analysis.inputs.names, names, strict=False))
    said = " ".join(plain.get(word, word) for word in words)
    return f"{model} {said}; each step must run once and whole, so nothing is reused"


def find_session(compiled: object) -> Session:
    """The session of a compiled model (or of the model it was compiled from).

    Raises: ConfigError if the model was not compiled with this backend, or has not run yet.
    """
    model = getattr(compiled, "_orig_mod", compiled)
    found = [session for session in _SESSIONS if session.model_ref() is model]
    if compiled is not model and len(found) > 1:
        options = options_of(compiled)
        found = [session for session in found if session.raw_options == options] or found
    if len(found) == 1:
        return found[0]
    what = type(model).__name__
    if found:
        raise ConfigError(
            f"{what} was compiled {len(found)} times with different options; pass the compiled model itself."
        )
    raise ConfigError(
        f"{what} has not run through omnifx yet. Compile it with torch.compile(model, backend='omnicache') "
        "and call it once."
    )


def options_of(compiled: object) -> dict[str, Any] | None:
    """The options that a compiled model was compiled with, as the user wrote them."""
    link = getattr(getattr(compiled, "dynamo_ctx", None), "callback", None)
    while (
        link is not None
    ):  # Dynamo wraps the backend several times; the innermost wrapper holds what torch.compile was given
        if hasattr(link, "compiler_fn") and hasattr(link, "kwargs"):
            options: dict[str, Any] | None = link.kwargs.get("options")
            return options
        link = getattr(link, "_torchdynamo_orig_backend", None)
    return None


def session_for(model: nn.Module | None, raw_options: dict[str, Any] | None, tensors: Sequence[Any]) -> Session:
    """The session that a newly captured graph belongs to; makes one for a new model."""
    with _LOCK:
        for session in _SESSIONS:
            if session.raw_options == raw_options and (
                (model is not None and session.model_ref() is model)
                or (session.model_ref() is not None and session.knows(tensors))
            ):
                return session
        return Session(Options.parse(raw_options), raw_options, model)


def meet(own: weakref.ref[Session], raw_options: dict[str, Any] | None) -> Session | None:
    """The session of the model that is being called in this thread, though its boundary did not see the call begin: a
    further instance of a class, or one of another class that runs the same code. It gets a session and a boundary.

    Args:
        own: The session that the graph was captured for, which runs now.
        raw_options: Its options: Dynamo runs a graph for models only that were compiled with equal ones.

    Returns: None if no compiled module is being called.
    """
    found = compiled_call()
    if found is None:
        return None
    with _LOCK:
        session = session_for(found[0], raw_options, ())
        keep_with(found[0], session)
        if session is not own():
            session.watch_boundary()
    return session


def _runner_for_call(own: weakref.ref[Session], raw_options: dict[str, Any] | None, runner: Runner) -> Runner | None:
    """The runner for the model that this thread is calling, of the graph of `runner`; see `Session.serve`."""
    boundary = innermost()
    if boundary is not None:
        return boundary.serve(runner) if boundary.options == raw_options else None
    session = own()
    if session is not None and session.boundary is None:
        return runner  # a function was compiled, and nothing tells its steps apart
    found = meet(own, raw_options)
    return found.serve(runner) if found is not None else runner


def forget_captures(codes: Collection[CodeType]) -> None:
    """Let Dynamo forget what it compiled of these codes, and the sessions of broken models that ran it."""
    forgotten = set(map(id, codes))
    for code in codes:
        reset_code(code)
    for session in list(_SESSIONS):
        boundary = session.boundary
        if boundary is not None and not boundary.bypassed and boundary.compiled_any_of(forgotten):
            session.forget_programs()


def stats(compiled: object) -> Stats:
    """What ran: variants of each step, reasons for unplanned full steps, graphs, recompilations, cache bytes.

    Raises: ConfigError if the model has not run through omnifx yet.
    """
    return find_session(compiled).stats()


def plans(compiled: object) -> list[tuple[Profile, Plan]]:
    """Profiles and plans that a compiled model follows, newest first; empty until its first generation was measured.

    Raises: ConfigError if the model has not run through omnifx yet.
    """
    return [(entry.profile, entry.plan) for c in find_session(compiled).conductors for entry in c.entries]


_KEPT: weakref.WeakKeyDictionary[nn.Module, list[Session]] = weakref.WeakKeyDictionary()


def keep_with(model: nn.Module, session: Session) -> None:
    """Let a session live as long as its model."""
    _KEPT.setdefault(model, [])
    if session not in _KEPT[model]:
        _KEPT[model].append(session)


@contextlib.contextmanager
def generation(compiled: object, *, steps: int | None = None) -> Iterator[None]:
    """Mark the calls inside as one generation, where the caller knows better than the clock.

    Generations that are marked are told apart by their marks, whatever their inputs; marks nest, and belong to the
    thread or task that made them. At the end the generation's caches are freed.

    Args:
        compiled: A model compiled with ``backend="omnicache"``.
        steps: Number of steps, if known: only a plan of as many steps is followed.

    Raises: ConfigError if `steps` is not >= 1, or `compiled` is not such a model.
    """
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise ConfigError(f"generation: steps must be a number >= 1 or None, got {steps!r}.")
    model = getattr(compiled, "_orig_mod", compiled)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"generation: expected a compiled model, got {type(compiled).__name__}.")
    with _LOCK:
        session = next(
            (
                s
                for s in _SESSIONS
                if s.model_ref() is model and (compiled is model or s.raw_options == options_of(compiled))
            ),
            None,
        )
        if session is None:
            session = Session(Options.parse(options_of(compiled)), options_of(compiled), model)
            keep_with(model, session)
    entered: Marked | None = None
    try:
        with mark(session, steps) as entered:
            yield
    finally:
        if entered is not None:
            session.end_marked(entered)


def weights_hash(values: Sequence[Any]) -> str:
    """A fingerprint of parameters: shapes, types and up to 64 evenly spread elements of each, as stored."""
    digest = hashlib.sha256()
    for value in plain(values):
        if not isinstance(value, Tensor):
            continue
        digest.update(f"{tuple(value.shape)}{value.dtype}".encode())
        if value.device.type == "meta" or value.numel() == 0:
            continue
        flat = value.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // 64)][:64]
        digest.update(
            picked.to(torch.float64).cpu().numpy().tobytes()
            if not picked.is_complex()
            else repr(picked.tolist()).encode()
        )
    return digest.hexdigest()


def fingerprint_of(model: nn.Module, branches: Sequence[str]) -> str:
    """What profiles and plans of a model are known by: its class, its weights (sampled), its branches."""
    values = [*model.parameters(), *model.buffers()]
    return _hash(type(model).__name__, weights_hash(values), *branches)


def versions() -> dict[str, str]:
    """Versions of what a measurement depends on."""
    from omnifx import __version__

    return {"omnifx": __version__, "torch": str(torch.__version__), "diffusers": diffusers.__version__}


def place_of(value: Any, lowering: str) -> str:
    """Where and how graphs on this tensor run, in words: what their times depend on."""
    device = value.device if isinstance(value, Tensor) else torch.device("cpu")
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {lowering}"
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{device.type}{threads}, {lowering}"


def profile_folder(fingerprint: str) -> Path:
    """Where measured profiles of one model are kept."""
    return Path(platformdirs.user_cache_dir("omnifx")) / "profiles" / fingerprint[:24]


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _check_plan(plan: Plan, profile: Profile) -> None:
    names = tuple(branch.name for branch in profile.meta.branches)
    if (
        plan.fingerprint != profile.meta.fingerprint
        or plan.branches != names
        or plan.timesteps != profile.meta.timesteps
    ):
        raise PlanError(
            "the plan was not made from this profile (model, branches or timesteps differ). Make it with `omnifx plan`."
        )


@atexit.register
def _finish_all() -> None:
    for session in list(_SESSIONS):
        with contextlib.suppress(Exception):  # the interpreter is going down; nobody can be told any more
            session.finish()
