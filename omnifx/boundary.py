"""The boundary of a model whose graph is broken: where a step begins and ends is seen at the compiled module itself.

The graphs of a broken model see pieces of a step: one has the latents, another the text, most have neither. So the
clock reads what the caller gave the compiled module, and each graph in between asks for the step under way.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import (
    _debug_get_cache_entry_list,
    _FrameAction,
    _FrameExecStrategy,
    reset_code,
    set_code_exec_strategy,
)
from torch._dynamo import config
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.guards import DeletedGuardManagerWrapper
from torch._dynamo.utils import orig_code_map
from torch._guards import CompileContext
from torch.utils import _pytree as pytree

from omnifx.clock import Reader
from omnifx.errors import WholeError
from omnifx.flops import numel
from omnifx.graph import SMALL, Inputs
from omnifx.plan import SKIP
from omnifx.skipping import Skipper
from omnifx.weights import HABIT, WeightWatch, plain
from omnifx.whole import MAX_LOOKS, Wholes

if TYPE_CHECKING:
    from omnifx.conductor import Call, Conductor
    from omnifx.runner import Runner


CAPTURE = ("capture_scalar_outputs", "capture_dynamic_output_shape_ops")
"""Settings of Dynamo that keep some graphs whole which depend on values: `.item()`, boolean masks, `nonzero`."""


MOST_LEFT = 0.5
"""Share of a full step that a reuse step may still cost where captured sizes make a model one graph: values of unknown
size cannot be cached, but the parts of the model have none."""


MOST_WAITS = MAX_LOOKS + 2
"""Calls for which an instance waits until another one has found how to capture their class; it may need as many."""


class Underway(threading.local):
    """The step that each thread is in, for the graphs of a broken model to find."""

    call: Call | None = None
    conductor: Conductor | None = None
    skipper: Skipper | None = None
    latents: Tensor | None = None
    skipped: Any = None
    """What the step gives, if the plan skips it; None if it runs."""
    captures_sizes: bool = False
    keeps_whole: bool = False


class _Inside(threading.local):
    """The calls of compiled modules that each thread is in, as far as a boundary saw them begin; innermost last."""

    def __init__(self) -> None:
        self.boundaries: list[Boundary] = []


_INSIDE = _Inside()

_ANY = _FrameExecStrategy(_FrameAction.DEFAULT, _FrameAction.DEFAULT)
"""What Dynamo may do with a code before it knows any better: look for what it made of it, or make it."""


def innermost() -> Boundary | None:
    """The boundary of the compiled module that this thread is calling; None if the call passed no boundary."""
    return _INSIDE.boundaries[-1] if _INSIDE.boundaries else None


class _SharedPatch:
    """Dynamo's settings are those of the process: on while any thread is in a call that wants them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before: dict[str, Any] = {}

    def enter(self) -> None:
        with self._lock:
            if self._users == 0:
                self._before = {name: getattr(config, name) for name in CAPTURE}
                for name in CAPTURE:
                    setattr(config, name, True)
            self._users += 1

    def exit(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                for name, value in self._before.items():
                    setattr(config, name, value)


_SIZES = _SharedPatch()


class Boundary:
    """Reads the calls of one compiled module.

    Before the parts of a broken model are taken for granted, its second call is captured anew, with the settings
    `CAPTURE` on for this model's calls. Where that makes it one graph, most of which can be reused, it stays so; else
    the third call is captured as the first one was, in parts. Submodules that the breaks lie in are looked at in the
    first call, or the first few, and are operators to Dynamo from then on (see `omnifx.whole`).

    A further instance of the same class, compiled with equal options, begins with what an earlier one found. Where that
    is parts, Dynamo gives it the graphs of the first one, as far as their guards hold, and `serve` finds the runner of
    its own. What Dynamo compiled for another instance is never reset: only what it made for this one.

    Args:
        model: The module as it was before compilation.
        make_conductor: A conductor for the roles and the example inputs of a new kind of call.
        underway: Where the step is noted.
        start_over: Forgets all graphs, and tells the user why.
        tell: Tells the user.
        serve: The runner of this model for a graph that was captured for another instance; None if there is none.
        options: What the model was compiled with, as the user wrote it.
        others: The boundaries of all other models.
    """

    def __init__(
        self,
        model: nn.Module,
        make_conductor: Callable[[Inputs, Tensor | None], Conductor],
        underway: Underway,
        start_over: Callable[[str], None],
        tell: Callable[[str], None],
        serve: Callable[[Runner], Runner | None] = lambda runner: runner,
        options: dict[str, Any] | None = None,
        others: Callable[[], Sequence[Boundary]] = tuple,
    ) -> None:
        self._model = weakref.ref(model)  # which keeps its session alive, so that both go together
        self.serve = serve
        self.options = options
        self._classes = tuple((path, type(module)) for path, module in model.named_modules())
        self._others = others
        self._num_waits = 0
        self._made: dict[int, object] = {}  # what Dynamo made for this model, by identity: see `forget_entries`
        self.wholes = Wholes(model)
        self._start_over = start_over
        self._tell = tell
        self.make_conductor = make_conductor
        self.underway = underway
        self.watch = WeightWatch(())
        self._probes_tell = True  # until it is seen that something overwrites the weights between calls
        self._kinds: dict[object, tuple[Conductor, Reader, Skipper]] = {}
        self._unseen: tuple[Call, Conductor] | None = None  # a call whose end no hook reports
        self._codes: dict[int, CodeType] = {}  # what Dynamo saw of the model, by identity
        self.bypassed = False  # the model is one graph after all, and has a conductor that reads its inputs
        self.capturing = "to be tried again"
        self._captures_sizes_anyway = all(getattr(config, name) for name in CAPTURE)
        self._look_around()

    @property
    def model(self) -> nn.Module:
        """The module as it was before compilation, which is being called."""
        model = self._model()
        assert model is not None  # its caller holds it
        return model

    @property
    def settled(self) -> bool:
        """Whether it is known how to capture the model."""
        return self.bypassed or self.capturing == "plainly"

    @property
    def tries(self) -> bool:
        """Whether what Dynamo captures now only shows how to capture the model; the call runs as it is."""
        return not self.bypassed and self.capturing in ("to be tried again", "failed", "waiting")

    def install(self, owner: nn.Module) -> None:
        """See every later call of `owner`, the compiled module, outside of what Dynamo traces."""
        inner = owner.forward if isinstance(owner, OptimizedModule) else owner._compiled_call_impl
        assert inner is not None  # what made it a compiled module

        @functools.wraps(inner)
        def call(*args: Any, **kwargs: Any) -> Any:
            _INSIDE.boundaries.append(self)
            output = None
            try:
                self.enter(args, kwargs)
                output = self._run(inner, args, kwargs) if self.underway.skipped is None else self.underway.skipped
                return output
            finally:
                _INSIDE.boundaries.pop()
                self.leave(output)

        if isinstance(owner, OptimizedModule):
            owner.forward = call
        else:
            owner._compiled_call_impl = call

    def _run(self, inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of the compiled module; uncompiled if it fails for nothing but how it was captured."""
        attempt = self.capturing == "whole" and not self.bypassed  # Dynamo may know better before it fails
        try:
            return inner(*args, **kwargs)
        except WholeError as error:
            self._keep_nothing_whole(str(error))
            self.enter(args, kwargs, unseen=True)  # this call is the new conductor's first one
            if self.underway.conductor is not None:
                self.underway.conductor.missed_start = True
            return self.model._call_impl(*args, **kwargs)
        except Exception as error:  # if the model is at fault, the same comes again
            if not attempt or self.bypassed:
                raise
            self.capturing = "failed"
            self._end_capture()
            output = self.model._call_impl(*args, **kwargs)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            name, settings = type(self.model).__name__, " and ".join(CAPTURE)
            self._tell(f"{name} is captured in parts from now on: with {settings}, a call failed ({reason})")
            return output

    def _keep_nothing_whole(self, reason: str) -> None:
        """Capture the model in parts from the next call on."""
        self._end_capture()
        for code in self.wholes.codes():
            self._codes[id(code)] = code
        self.wholes.give_up()
        self.underway.call = self.underway.conductor = None
        self.bypassed = False
        self.capturing = "failed"
        self._kinds.clear()
        self._start_over(reason)

    def note_codes(self, code: CodeType) -> None:
        """Remember what Dynamo compiles, and what called that within the model, to capture it anew."""
        self._codes.update(codes_around(code))
        made = (CompileContext.current_compile_id(), *(frame.f_code for frame in _frames_around()))
        self._made.update((id(each), each) for each in made)

    def compiled_any_of(self, codes: Set[int]) -> bool:
        """Whether Dynamo compiled one of these codes, by identity, for this model."""
        return not codes.isdisjoint(self._codes)

    def _capture_anew(self) -> None:
        """Let Dynamo forget the model's code if another way to capture it is to be tried."""
        if self.settled and not all(other.settled for other in self._others()):
            self._unskip()
        if self.capturing in ("to be tried again", "waiting") and not self.bypassed:
            self._look_around()
        if self.capturing in ("to be tried again", "failed"):
            again = self.capturing == "to be tried again"
            if again and self.wholes.end_look():
                self.wholes.look()
            elif again and (self.wholes.found or not self._captures_sizes_anyway):
                self.capturing = "whole"
            else:
                self.capturing = "plainly"
            for code in (*self._codes.values(), *self.wholes.codes()):
                self._forget(code)
            self._made.clear()
        if self.capturing == "whole" and not self.underway.captures_sizes:
            self.underway.captures_sizes = True
            _SIZES.enter()
        if self.capturing != "to be tried again" and not self.underway.keeps_whole:
            self.underway.keeps_whole = True
            self.wholes.enter()

    def _look_around(self) -> None:
        """Begin with what another instance of this class, with modules of equal classes, found; or wait for one that is
        still trying."""
        alike = [o for o in self._others() if o._classes == self._classes and o.options == self.options]
        settled = sorted((other for other in alike if other.settled), key=lambda other: not other.bypassed)
        if settled:
            self._follow(settled[0])
            return
        trying = [other for other in alike if other.capturing != "waiting"]
        if not self._num_waits and self.capturing != "waiting":
            self.capturing = "waiting" if trying and not self._codes else self.capturing
            return
        self._num_waits += 1
        if self.capturing == "waiting" and (not trying or self._num_waits >= MOST_WAITS):
            self.capturing = "to be tried again"  # nobody calls the other one
            for other in trying:
                self._codes.update(other._codes)
                self._made.update(other._made)

    def _follow(self, other: Boundary) -> None:
        """Begin with what the boundary of another instance found."""
        began = bool(self._codes) or self.capturing == "waiting"
        self._codes.update(other._codes)
        self.wholes.adopt(other.wholes)
        if other.bypassed:
            self.capturing = "to be tried again"  # with its modules kept whole
            return
        # What was captured so far goes, and modules are not run aside before the next call.
        self.capturing = "failed" if began or self.wholes.replaces_any else "plainly"
        self._made |= other._made

    def _forget(self, code: CodeType) -> None:
        """Let Dynamo forget what it made of a code; where another model runs that, only what it made for this one."""
        users = [other for other in self._others() if other.settled and other.compiled_any_of({id(code)})]
        if not users:
            reset_code(code)
            return
        theirs = set().union(*(other._made for other in users))
        forget_entries(code, [each for key, each in self._made.items() if key not in theirs])
        set_code_exec_strategy(code, _ANY)

    def _unskip(self) -> None:
        """Let Dynamo run what it made for this model of codes in which another one, while it tries, met a break that
        skips all of the code, for all models."""
        for code in self._codes.values():
            entries = _debug_get_cache_entry_list(code)
            if any(id(entry.compile_id) in self._made or id(entry.code) in self._made for entry in entries):
                set_code_exec_strategy(code, _ANY)

    def _end_capture(self) -> None:
        if self.underway.keeps_whole:
            self.underway.keeps_whole = False
            self.wholes.leave()
        if self.underway.captures_sizes:
            self.underway.captures_sizes = False
            _SIZES.exit()

    def enter_unseen(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """A call has begun already, and its end will not be seen: it ends when the next one begins."""
        self.enter(args, kwargs, unseen=True)
        call, conductor = self.underway.call, self.underway.conductor
        if call is not None and conductor is not None:
            call.latents = call.latents.clone() if call.latents is not None else None  # the sampler may overwrite them
            self._unseen = (call, conductor)

    @torch.no_grad()
    def enter(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, unseen: bool = False) -> None:
        """A call begins."""
        self._forget_step()
        if not unseen:
            self._end_capture()  # of a call that failed
            self._capture_anew()
        if self._unseen is not None:
            (call, conductor), self._unseen = self._unseen, None
            with conductor.lock:
                conductor.end_step(call, None, captured=self.capturing != "waiting")
        if self.bypassed:
            return
        leaves, spec = pytree.tree_flatten(_in_order(self.model, args, kwargs))
        shapes = tuple((tuple(v.shape), v.dtype, v.device) if isinstance(v, Tensor) else type(v) for v in leaves)
        kind = (spec, shapes)
        if kind not in self._kinds:
            roles = roles_of(leaves)
            latents = leaves[roles.latents] if roles.latents is not None else None
            made = self.make_conductor(roles, latents)
            self._kinds[kind] = (made, Reader(roles), Skipper(self.model, made))
        conductor, reader, skipper = self._kinds[kind]
        if conductor.inactive:
            return
        with conductor.lock:
            reading = reader.read(leaves, self._probes())
            self.watch.compare(reading.probes)
            if self.watch.changes >= HABIT:
                self._probes_tell = False
            if not self._probes_tell:
                conductor.distrust_weights()
            where = reader.inputs.latents
            latents = leaves[where] if where is not None else None
            skipper.begin(self.model, latents)
            call = conductor.decide(reading, latents, weights=self.watch.version)
            if SKIP in call.row and (
                reason := "the call had begun already" if unseen else skipper.refusal(call, latents)
            ):
                conductor.refuse(call, reason)
        self.underway.call, self.underway.conductor = call, conductor
        self.underway.skipper, self.underway.latents = skipper, latents
        if SKIP in call.row and latents is not None:
            self.underway.skipped = skipper.skip(call, latents)
            conductor.after(call, label="skip", reason="", spent=0, whole=conductor.flops)

    def _probes(self) -> list[Tensor]:
        """Samples of the weights between calls; offloading may leave nothing there, or memory that holds no values."""
        return self.watch.samples(plain(list(self.model.parameters()))) if self._probes_tell else []

    @torch.no_grad()
    def leave(self, output: Any) -> None:
        """A call is over; `output` is what the caller gets, None if it failed."""
        self._end_capture()
        if self.capturing == "whole" and not self.bypassed:
            self.capturing = "failed"  # Dynamo found nothing to capture at all
        call, conductor, skipper = self.underway.call, self.underway.conductor, self.underway.skipper
        latents = self.underway.latents
        self._forget_step()
        if call is not None and conductor is not None and skipper is not None and output is not None:
            with conductor.lock:
                if SKIP not in call.row:
                    skipper.learn(output, latents)
                    skipper.keep(call, output, latents)
                conductor.end_step(call, _largest(output), captured=self.capturing != "waiting")

    def _forget_step(self) -> None:
        underway = self.underway
        underway.call = underway.conductor = underway.skipper = underway.latents = underway.skipped = None


def codes_around(code: CodeType) -> dict[int, CodeType]:
    """What Dynamo compiles now, and what called that within the compiled module, by identity."""
    codes = {id(code): code}
    for frame in _frames_around():
        caller = orig_code_map.get(frame.f_code, frame.f_code)  # what runs is what Dynamo made of it
        codes[id(caller)] = caller
    return codes


def _frames_around() -> Iterator[FrameType]:
    """The frames on the stack within the innermost call of a compiled module, without those of torch."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not isinstance(frame.f_locals.get("self"), OptimizedModule):
        if f"{os.sep}torch{os.sep}" not in frame.f_code.co_filename:
            yield frame
        frame = frame.f_back


def forget_entries(code: CodeType, made: Collection[object]) -> None:
    """Let Dynamo forget some of what it made of a code; `reset_code` forgets all, also what it made for other models.

    Args:
        code: The user's.
        made: Numbers of compilations, or the code that they gave. They are compared by identity: Dynamo begins to count
            anew when it is reset.
    """
    known = set(map(id, made))
    for entry in _debug_get_cache_entry_list(code):
        manager, is_known = entry.guard_manager, not known.isdisjoint((id(entry.compile_id), id(entry.code)))
        if is_known and not isinstance(manager, DeletedGuardManagerWrapper):
            deleted = DeletedGuardManagerWrapper("omnifx captures this model in another way")
            deleted.id_matched_objs = {"": weakref.ref(code)}  # no frame has that: it does not count as a recompilation
            if manager.extra_state is not None:
                manager.extra_state.invalidate(entry, deleted)


def compiled_call() -> tuple[nn.Module, nn.Module, tuple[Any, ...], dict[str, Any]] | None:
    """The innermost call of a compiled module on the stack: the module, what holds its compiled form, and arguments."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in ("_call_impl", "_wrapped_call_impl", "__call__"):
            local = frame.f_locals
            owner = local.get("self")
            if isinstance(owner, OptimizedModule) and "args" in local:
                return owner._orig_mod, owner, tuple(local["args"]), dict(local.get("kwargs", {}))
            named = frame.f_code.co_name == "_wrapped_call_impl"
            if named and isinstance(owner, nn.Module) and owner._compiled_call_impl is not None:  # compiled in place
                return owner, owner, tuple(local["args"]), dict(local.get("kwargs", {}))
        frame = frame.f_back  # type: ignore[assignment]
    return None


def roles_of(leaves: Sequence[Any]) -> Inputs:
    """Roles of a call's arguments: the latents are the first floating-point tensor with three axes, or else two."""
    floating = [
        (v.dim() < 3, i)
        for i, v in enumerate(leaves)
        if isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1
    ]
    latents = min(floating)[1] if floating else None
    small = tuple(
        i
        for i, v in enumerate(leaves)
        if i != latents
        and (
            (isinstance(v, Tensor) and numel(v) <= SMALL and sum(s > 1 for s in v.shape) <= 2 and v.dim() <= 2)
            or (isinstance(v, int | float) and not isinstance(v, bool))
        )
    )
    large = tuple(i for i, v in enumerate(leaves) if i != latents and i not in small and isinstance(v, Tensor))
    names = tuple(f"argument {i}" for i in range(len(leaves)))
    return Inputs(latents, small, large, static=(), names=names, plain_names=names)


def _in_order(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by name, in the order of the signature."""
    try:
        return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    except (TypeError, ValueError):
        return {"args": list(args), **kwargs}


def _largest(output: Any) -> Tensor | None:
    """The largest floating-point tensor of a model's output, whatever it is wrapped in."""
    values = list(output.values()) if isinstance(output, Mapping) else pytree.tree_leaves(output)
    found = [
        v for value in values for v in pytree.tree_leaves(value) if isinstance(v, Tensor) and v.is_floating_point()
    ]
    return max(found, key=lambda v: v.numel(), default=None)
