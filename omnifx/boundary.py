"""The boundary of a model whose graph is broken: where a step begins and ends is seen at the compiled module itself.

The graphs of a broken model see pieces of a step: one has the latents, another the text, most have neither. So the
clock reads what the caller gave the compiled module, and each graph in between asks for the step under way.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils import _pytree as pytree

from omnifx.clock import Reader
from omnifx.flops import numel
from omnifx.graph import SMALL, Inputs
from omnifx.weights import HABIT, WeightWatch, plain

if TYPE_CHECKING:
    from omnifx.conductor import Call, Conductor


class Underway(threading.local):
    """The step that each thread is in, for the graphs of a broken model to find."""

    call: Call | None = None
    conductor: Conductor | None = None


class Boundary:
    """Reads the calls of one compiled module.

    Args:
        model: The module as it was before compilation.
        make_conductor: A conductor for the roles and the example inputs of a new kind of call.
        underway: Where the step is noted.
    """

    def __init__(
        self, model: nn.Module, make_conductor: Callable[[Inputs, Tensor | None], Conductor], underway: Underway
    ) -> None:
        self.model = model
        self.make_conductor = make_conductor
        self.underway = underway
        self.watch = WeightWatch(())
        self._probes_tell = True  # until it is seen that something overwrites the weights between calls
        self._kinds: dict[object, tuple[Conductor, Reader]] = {}
        self._unseen: tuple[Call, Conductor] | None = None  # a call whose end no hook reports

    def install(self, owner: nn.Module) -> None:
        """See every later call of `owner`, the compiled module: hooks outside of what Dynamo traces."""
        if isinstance(owner, OptimizedModule):
            owner.register_forward_pre_hook(self._before, with_kwargs=True)
            owner.register_forward_hook(self._behind, always_call=True)
        else:
            inner = owner._compiled_call_impl
            assert inner is not None  # what made it a compiled module

            def call(*args: Any, **kwargs: Any) -> Any:
                self.enter(args, kwargs)
                output = None
                try:
                    output = inner(*args, **kwargs)
                    return output
                finally:
                    self.leave(output)

            owner._compiled_call_impl = call

    def _before(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.enter(args, kwargs)

    def _behind(self, owner: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.leave(output)

    def enter_unseen(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """A call has begun already, and its end will not be seen: it ends when the next one begins."""
        self.enter(args, kwargs)
        call, conductor = self.underway.call, self.underway.conductor
        if call is not None and conductor is not None:
            call.latents = call.latents.clone() if call.latents is not None else None  # the sampler may overwrite them
            self._unseen = (call, conductor)

    @torch.no_grad()
    def enter(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """A call begins."""
        self.underway.call = self.underway.conductor = None
        if self._unseen is not None:
            (call, conductor), self._unseen = self._unseen, None
            with conductor.lock:
                conductor.end_step(call, None)
        leaves, spec = pytree.tree_flatten(_in_order(self.model, args, kwargs))
        shapes = tuple((tuple(v.shape), v.dtype, v.device) if isinstance(v, Tensor) else type(v) for v in leaves)
        kind = (spec, shapes)
        if kind not in self._kinds:
            roles = roles_of(leaves)
            latents = leaves[roles.latents] if roles.latents is not None else None
            self._kinds[kind] = (self.make_conductor(roles, latents), Reader(roles))
        conductor, reader = self._kinds[kind]
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
            call = conductor.decide(reading, leaves[where] if where is not None else None, weights=self.watch.version)
        self.underway.call, self.underway.conductor = call, conductor

    def _probes(self) -> list[Tensor]:
        """Samples of the weights between calls; offloading may leave nothing there, or memory that holds no values."""
        return self.watch.samples(plain(list(self.model.parameters()))) if self._probes_tell else []

    @torch.no_grad()
    def leave(self, output: Any) -> None:
        """A call is over; `output` is what the caller gets, None if it failed."""
        call, conductor = self.underway.call, self.underway.conductor
        self.underway.call = self.underway.conductor = None
        if call is not None and conductor is not None and output is not None:
            with conductor.lock:
                conductor.end_step(call, _largest(output))


def compiled_call() -> tuple[nn.Module, nn.Module, tuple[Any, ...], dict[str, Any]] | None:
    """The innermost call of a compiled module on the stack: the module, what holds its compiled form, and arguments."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in ("_call_impl", "_wrapped_call_impl", "__call__"):
            local = frame.f_locals
            owner = local.get("self")
            if isinstance(owner, OptimizedModule) and "args" in local:
                return owner._orig_mod, owner, tuple(local["args"]), dict(local.get("kwargs", {}))
            in_place = isinstance(owner, nn.Module) and owner._compiled_call_impl is not None
            if in_place and frame.f_code.co_name == "_wrapped_call_impl":
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
    return Inputs(latents, small, large, static=(), names=tuple(f"argument {i}" for i in range(len(leaves))))


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
