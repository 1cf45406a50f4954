"""A session: everything omnifx keeps for one compiled model: its options, its programs, its caches and its log.

Sessions are found by the model's parameters, which Dynamo hands to a backend, so that `omnifx.stats(compiled)` and
`omnifx.generation(compiled)` need nothing but the compiled model.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import platformdirs
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from omnifx.clock import Marked, mark, marked_for
from omnifx.errors import ConfigError, OmnifxWarning, PlanError, ProfileError
from omnifx.options import Options
from omnifx.plan import Plan
from omnifx.profile import Profile
from omnifx.program import Program
from omnifx.recording import Recording
from omnifx.report import MatchReport
from omnifx.runlog import Log, Stats
from omnifx.runner import Runner
from omnifx.store import CacheStore, default_budget

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
        _SESSIONS.add(self)

    # -- capture -------------------------------------------------------------------------------------------------------

    def knows(self, tensors: Sequence[Any]) -> bool:
        """Whether any of these parameters belongs to this session's model."""
        model = self.model_ref()
        if model is None:
            return False
        own = {id(p) for p in model.parameters()}
        return any(id(t) in own for t in tensors)

    def add_program(self, program: Program, weights_hash: str) -> Runner:
        """A runner for a newly captured graph; follows a known profile if there is one."""
        device = next((t.device for t in program.inputs if isinstance(t, Tensor)), torch.device("cpu"))
        if self.store is None:
            self.store = CacheStore(self._budget(device))
        fingerprint = _hash(self.model_name, weights_hash, *program.names)
        runner = Runner(
            program,
            policy=self.policy,
            speedup=self.options.speedup,
            steps=self.options.steps,
            store=self.store,
            log=self.log,
            record_budget=int(self.options.record_budget),
            learned=self._save_profile if self.options.profile_cache and not self.record_only else None,
            make_profile=lambda recording: self._profile(recording, program, fingerprint),
            record_only=self.record_only,
            inactive=self._inactive(program),
            fingerprint=fingerprint,
            mark=lambda: marked_for(self),
        )
        if program.over_budget:
            self.tell(
                f"cache_budget leaves {len(program.over_budget)} of {len(program.analysis.cacheable)} branches "
                "uncached, "
                f"the first is {program.over_budget[0].name}"
            )
        if len(self.runners) >= 1 and not _same_graph(self.runners[0].program, program):
            reason = (
                f"{self.model_name} was captured as {len(self.runners) + 1} graphs (graph breaks); omnifx reuses "
                "across steps only "
                "where the whole step is one graph. Remove the breaks: TORCH_LOGS=graph_breaks shows where they are"
            )
            for other in (*self.runners, runner):
                other.inactive = other.inactive or reason
            self.tell(reason)
        self.runners.append(runner)
        if not runner.inactive:
            with unset_fake_temporarily():  # a capture is under way, and would read the file as fake tensors
                self._load_profiles(runner)
                self._share_plans(runner)
        return runner

    def _share_plans(self, runner: Runner) -> None:
        """Let a graph that was captured again (for another batch size, say) follow what the session knows already."""
        for entry in [entry for other in self.runners if other is not runner for entry in reversed(other.entries)]:
            try:
                self._check_profile(entry.profile, runner)
            except ProfileError:
                continue
            if all(entry.profile is not known.profile for known in runner.entries):
                runner.add_profile(entry.profile, entry.plan)

    def _budget(self, device: torch.device) -> int:
        budget = self.options.cache_budget
        return default_budget(device) if budget is None else int(budget)

    def budget_per_stream(self, device: torch.device) -> int:
        """Most bytes of cuts that one stream may hold: measuring noise keeps two sets for a moment."""
        return self._budget(device) // 2

    def _inactive(self, program: Program) -> str:
        if not program.names:
            why = "; ".join(dict.fromkeys(b.reason for b in program.analysis.branches if b.reason))
            return (
                f"no branch of {self.model_name} can be reused: {len(program.analysis.branches)} residual branches "
                "were found" + (f" ({why})" if why else f" among {len(program.gm.graph.nodes)} operators")
            )
        if program.analysis.inputs.latents is None:
            return (
                f"{self.model_name} has no floating-point input that looks like latents, so steps cannot be told apart"
            )
        return ""

    def _profile(self, recording: Recording, program: Program, fingerprint: str) -> Profile:
        latents = program.inputs[program.analysis.inputs.latents or 0]
        output = program.gm.graph.output_node().args[0][program.main_output or 0]  # type: ignore[index]
        branches = program.branch_metas()
        return recording.profile(
            model=self.model_name,
            fingerprint=fingerprint,
            versions=versions(),
            flops=program.analysis.flops,
            branches=branches,
            latent_shape=tuple(map(int, latents.shape)),
            output_shape=tuple(map(int, output.meta["val"].shape)),  # type: ignore[union-attr]
        )

    # -- profiles ------------------------------------------------------------------------------------------------------

    def _load_profiles(self, runner: Runner) -> None:
        given = self.options.profile
        if given is not None:
            profile = given if isinstance(given, Profile) else Profile.load(given)
            self._check_profile(profile, runner)
            plan = self.options.plan
            plan = Plan.load(plan) if isinstance(plan, str | Path) else plan
            if plan is not None:
                _check_plan(plan, profile)
            runner.add_profile(profile, plan)
            return
        if self.options.plan is not None:
            raise ConfigError(
                "omnicache: the option 'plan' needs 'profile', which tells the steps of a generation apart."
            )
        if not self.options.profile_cache or self.record_only or not runner.policy.needs_profile:
            return
        for path in sorted(profile_folder(runner.fingerprint).glob("*.safetensors"), key=lambda p: p.stat().st_mtime):
            try:
                profile = Profile.load(path)
                self._check_profile(profile, runner)
                runner.add_profile(profile)
            except (ProfileError, ConfigError) as error:
                self.tell(f"a cached profile is not used: {error}")

    def _check_profile(self, profile: Profile, runner: Runner) -> None:
        program, meta = runner.program, profile.meta
        if meta.fingerprint != runner.fingerprint:
            names = [branch.name for branch in meta.branches]
            what = (
                f"it was measured on {meta.model}, this is {self.model_name}"
                if meta.model != self.model_name
                else "its branches are other ones"
                if names != list(program.names)
                else "its weights are other ones"
            )
            raise ProfileError(
                f"the profile does not belong to this model: {what}. Calibrate this model with `omnifx calibrate`."
            )
        latents = program.inputs[program.analysis.inputs.latents or 0]
        if tuple(map(int, latents.shape))[1:] != meta.latent_shape[1:]:
            raise ProfileError(
                f"the profile was measured on latents {list(meta.latent_shape)}, these are "
                f"{list(map(int, latents.shape))}; "
                "only the batch size may differ. Calibrate at this size."
            )

    def _save_profile(self, runner: Runner, profile: Profile) -> None:
        folder = profile_folder(runner.fingerprint)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            key = _hash(*map(repr, profile.meta.timesteps), repr(profile.meta.latent_shape[1:]))[:16]
            temporary = folder / f".{key}.{threading.get_ident()}.tmp"
            profile.save(temporary)
            temporary.replace(folder / f"{key}.safetensors")
        except OSError as error:
            self.tell(f"the profile could not be kept in {folder}: {error}; a new process will measure again")

    # -- results -------------------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """A snapshot of what ran."""
        variants = [variant for runner in self.runners for variant in runner.program.variants.values()]
        notes = [*self.log.notes, *(r.inactive for r in self.runners if r.inactive)]
        return Stats(
            model=self.model_name,
            generations=list(self.log.generations),
            graphs=len(self.runners),
            variants_compiled=[variant.spec.label for variant in variants],
            recompilations=sum(runner.late_compilations for runner in self.runners),
            cache_bytes=self.store.held_bytes if self.store else 0,
            peak_cache_bytes=self.store.peak_bytes if self.store else 0,
            cache_budget=self.store.budget if self.store else 0,
            compile_seconds=sum(variant.compile_seconds for variant in variants),
            notes=list(dict.fromkeys(notes)),
        )

    def report(self) -> MatchReport:
        """What was found in the captured graphs."""
        return report_of(self.model_name, [runner.program for runner in self.runners], self.names)

    def finish(self) -> None:
        """Learn from recordings that no later generation ended."""
        for runner in self.runners:
            runner.finish(None)

    def tell(self, text: str) -> None:
        """Note a sentence for the user, and warn the first time."""
        if self.log.note(text):
            warnings.warn(f"omnifx: {text}", OmnifxWarning, stacklevel=2)


def report_of(model: str, programs: Sequence[Program], names: Sequence[str]) -> MatchReport:
    """The report of one model's captured graphs."""
    inputs: dict[str, str] = {}
    for program in programs:
        roles = program.analysis.inputs
        label = {i: names[i] if i < len(names) else name for i, name in enumerate(roles.names)}
        for i in (*([roles.latents] if roles.latents is not None else []), *roles.small, *roles.large):
            role = (
                "latents"
                if i == roles.latents or i in roles.further_latents
                else ("small, read at every call" if i in roles.small else "watched for change")
            )
            inputs[label[i]] = role
    notes = []
    if len(programs) > 1:
        notes.append(
            f"{len(programs)} graphs: reuse across steps needs the whole step in one graph; "
            "TORCH_LOGS=graph_breaks shows why"
        )
    return MatchReport(
        model=model,
        branches=tuple(branch for program in programs for branch in program.analysis.branches),
        flops=sum(program.analysis.flops for program in programs),
        reuse_flops=sum(program.analysis.reuse_flops for program in programs),
        cache_bytes=sum(program.cache_bytes for program in programs),
        graphs=len(programs),
        inputs=inputs,
        notes=tuple(notes),
    )


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


def stats(compiled: object) -> Stats:
    """What ran: variants of each step, reasons for unplanned full steps, graphs, recompilations, cache bytes.

    Raises: ConfigError if the model has not run through omnifx yet.
    """
    return find_session(compiled).stats()


def plans(compiled: object) -> list[tuple[Profile, Plan]]:
    """Profiles and plans that a compiled model follows, newest first; empty until its first generation was measured.

    Raises: ConfigError if the model has not run through omnifx yet.
    """
    return [(entry.profile, entry.plan) for runner in find_session(compiled).runners for entry in runner.entries]


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
            for runner in session.runners:
                runner.end_marked(entered)


def weights_hash(values: Sequence[Any]) -> str:
    """A fingerprint of parameters: shapes, types and up to 64 evenly spread elements of each, as stored."""
    digest = hashlib.sha256()
    for value in values:
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


def versions() -> dict[str, str]:
    """Versions of what a measurement depends on."""
    from omnifx import __version__

    return {"omnifx": __version__, "torch": str(torch.__version__), "diffusers": diffusers.__version__}


def profile_folder(fingerprint: str) -> Path:
    """Where measured profiles of one model are kept."""
    return Path(platformdirs.user_cache_dir("omnifx")) / "profiles" / fingerprint[:24]


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _same_graph(a: Program, b: Program) -> bool:
    """Whether two programs are one graph captured twice (for another shape, say), not two parts of a model."""
    return a.names == b.names and len(a.names) > 0


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
