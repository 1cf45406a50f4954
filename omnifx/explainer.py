"""Look at a model without compiling or running any of its variants: which branches it has, what they cost, what is
refused."""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import config as inductor_config

from omnifx.backends.eager import EagerLowering
from omnifx.boundary import CAPTURE, MOST_LEFT, codes_around
from omnifx.breaks import GraphBreak, watch_breaks
from omnifx.capture import capture, origins_of, root_module, state_inputs
from omnifx.errors import MatchError
from omnifx.graph import SMALL, BitSets, clone, node_flops, numel, output_of
from omnifx.hollow import Hollowing, hollow_arguments, hollow_like, hollow_model
from omnifx.program import Program
from omnifx.report import MatchReport
from omnifx.session import forget_captures, report_of
from omnifx.unmatched import nothing_found
from omnifx.whole import Wholes


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> MatchReport:
    """What omnifx finds in `model` when it is called with these arguments.

    The model is captured as ``torch.compile(model, backend="omnicache")`` captures it. A real model is called, operator
    by operator: once, or a few times if its graph is broken. Of one on the meta device nothing is computed, whatever
    its size. Where such a model asks for values between its graphs, all of them are zero.

    Args:
        model: Any module, compiled or not.
        args, kwargs: One call's arguments.

    Returns: A report that prints as a table, and is written as a page by `MatchReport.save_html`.
    Raises: MatchError if no branch can be reused; it says what was seen instead.
    Memory: hardly any for a model on the meta device.
    """
    model = getattr(model, "_orig_mod", model)
    taken = _take(model, args, kwargs)
    if not any(program.names for program in taken.programs):
        graphs = [(program.gm, program.analysis) for program in taken.programs]
        raise MatchError(f"explain: {nothing_found(type(model).__name__, graphs, taken.breaks)}")
    report = report_of(
        type(model).__name__, taken.programs, taken.names, entries=taken.entries, breaks=tuple(taken.breaks)
    )
    return replace(
        report,
        notes=(*report.notes, *taken.notes),
        kept_whole=taken.wholes.paths() if taken.wholes is not None else {},
        avoided=taken.avoided,
    )


@dataclass
class _Taken:
    """What one call of a model was captured as."""

    programs: list[Program] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    entries: list[tuple[int, str]] = field(default_factory=list)
    """Which program ran, in order, and the path of the module it ran for."""
    breaks: list[GraphBreak] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    codes: dict[int, CodeType] = field(default_factory=dict)
    """What Dynamo compiled, by identity."""
    wholes: Wholes | None = None
    model: nn.Module | None = None
    """What was captured, where nobody else holds it: `wholes` refers to it weakly."""
    avoided: tuple[GraphBreak, ...] = ()

    @property
    def broken(self) -> bool:
        """Whether the call is more than one graph."""
        return bool(self.breaks) or len(self.programs) > 1


def _take(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Taken:
    """What is captured; of a model on the meta device in the shape of hollow tensors on the CPU, where attention is one
    operator, as it is when the model runs, and what asks for values finds some."""
    if not any(parameter.is_meta for parameter in model.parameters()):
        return _capture_as_run(model, args, kwargs, computes=True)
    hollow = hollow_model(model)
    taken = _capture_as_run(hollow, *hollow_arguments((args, kwargs)), computes=False)
    taken.model = hollow
    if taken.broken or taken.wholes is not None:
        said = "the model asks for values of its tensors, which the meta device has not: they were taken as zero"
        taken.notes = (*taken.notes, said)
    return taken


def _capture_as_run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, computes: bool) -> _Taken:
    """Capture a call as `omnifx.boundary` would have it: of a broken model keep modules whole, and capture sizes that
    depend on values where that makes it one graph."""
    in_parts, failure = _Taken(), None
    try:
        _capture_call(in_parts, model, args, kwargs, computes=computes)
    except Exception as error:
        if not in_parts.breaks:
            raise
        failure = error  # perhaps of what Dynamo makes of the pieces, which are not captured where it is kept whole
    if not in_parts.broken:
        return in_parts
    try:
        wholes = _looked_at(model, args, kwargs, computes=computes)
    except Exception as error:  # noqa: BLE001 - the model itself fails: Dynamo says more about it
        raise failure or error from None
    try:
        for settings in (dict.fromkeys(CAPTURE, True), {}):
            if not settings and not wholes.found:
                break  # that is how it was captured
            forget_captures((*in_parts.codes.values(), *wholes.codes()))
            taken = _Taken(wholes=wholes)
            try:
                wholes.enter()
                with dynamo_config.patch(dict(settings)) if settings else contextlib.nullcontext():
                    _capture_call(taken, model, args, kwargs, computes=computes)
            except Exception:
                if not settings:
                    raise
                continue  # so does a compiled model that cannot be captured with them
            finally:
                wholes.leave()
            if settings and (taken.broken or any(program.analysis.left > MOST_LEFT for program in taken.programs)):
                continue
            left = {stop.place for stop in taken.breaks}
            taken.avoided = tuple(stop for stop in in_parts.breaks if stop.place not in left)
            if settings:
                taken.notes = (f"captured with Dynamo's settings {' and '.join(settings)}, as when it runs",)
            return taken
        if failure is not None:
            raise failure
        return in_parts
    finally:
        forget_captures((*in_parts.codes.values(), *wholes.codes()))


def _looked_at(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, computes: bool) -> Wholes:
    """The modules to keep whole, from a few uncompiled calls."""
    wholes, again = Wholes(model), True
    while again:
        wholes.look()
        try:
            with torch.no_grad():
                _ = model(*args, **kwargs) if computes else _hollowly(model, *args, **kwargs)
        finally:
            again = wholes.end_look()
    return wholes


def _capture_call(
    taken: _Taken, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, computes: bool
) -> None:
    own_path = {id(module): path for path, module in model.named_modules()}
    full_name = {id(parameter): name for name, parameter in model.named_parameters()}

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        state, names = state_inputs(gm)
        taken.codes.update(codes_around(InstructionTranslator.current_tx().f_code))
        taken.names[:] = [names[i] for i in origins_of(example_inputs)]
        first = len(taken.programs)
        path = own_path.get(id(root_module()), "")
        known = {i: full_name[id(example_inputs[i])] for i in state if id(example_inputs[i]) in full_name}

        def inner(
            graph: fx.GraphModule, inputs: Sequence[Any], static: tuple[int, ...], arguments: dict[str, Any]
        ) -> Any:
            taken.programs.append(Program(graph, inputs, static, EagerLowering(), budget=2**62))
            return make_boxed_func(graph.forward if computes else _blank(graph))

        run = capture(gm, example_inputs, inner)
        made = range(first, len(taken.programs))

        def entered(*call: Any) -> Any:
            here = _path_now(path, known, {i: full_name.get(id(call[i]), "") for i in known})
            taken.entries.extend((program, here) for program in made)
            return run(*call)

        return entered

    # Inductor's constant folding would compute with hollow tensors: nothing of the graph would be left.
    with (
        torch.no_grad(),
        inductor_config.patch(joint_graph_constant_folding=computes),
        warnings.catch_warnings(),
        _fewer_collections(),
        _quiet_dynamo(),
        watch_breaks() as breaks,
    ):
        taken.breaks = breaks  # filled at the end
        warnings.simplefilter("ignore")
        torch.compile(model, backend=backend, dynamic=None if computes else False)(*args, **kwargs)


def _blank(graph: fx.GraphModule) -> Callable[..., Any]:
    """A function with the graph's outputs, of which only sizes and the like are computed: the rest is zero.

    Where a shape is known only by computing, the graph itself, without what is large.
    """
    outputs: list[Any] = list(output_of(graph).args[0])  # type: ignore[arg-type]
    values = [node.meta["val"] if isinstance(node, fx.Node) else node for node in outputs]
    if any(isinstance(size, torch.SymInt) for v in values for size in (v.shape if isinstance(v, Tensor) else (v,))):
        return lambda *inputs: _hollowly(graph.forward, *inputs)
    sets = BitSets.of(graph.graph)
    large = sum(1 << i for i, node in enumerate(sets.nodes) if node_flops(node) or numel(node.meta.get("val")) > SMALL)
    easy = [
        i
        for i, node in enumerate(outputs)
        if isinstance(node, fx.Node) and not sets.ancestors[sets.index[node]] & large
    ]
    sizes = clone(graph)
    found = output_of(sizes)
    found.args = (tuple(found.args[0][i] for i in easy),)  # type: ignore[index]
    found.meta.clear()
    sizes.graph.eliminate_dead_code()
    sizes.recompile()

    def blank(*inputs: Any) -> list[Any]:
        computed = dict(zip(easy, sizes.forward(*inputs), strict=True))
        blanks = [hollow_like(value) if isinstance(value, Tensor) else value for value in values]
        return [computed.get(i, value) for i, value in enumerate(blanks)]

    return blank


def _hollowly(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call in which nothing large is computed."""
    with Hollowing():  # type: ignore[no-untyped-call]
        return run(*args, **kwargs)


def _path_now(path: str, known: dict[int, str], now: dict[int, str]) -> str:
    """The path of the module that a graph runs for: the same code serves equal modules, told apart by parameters."""
    for i, name in known.items():
        inside = name[len(path) :] if path else f".{name}"
        if name.startswith(path) and now[i].endswith(inside):
            return now[i].removesuffix(inside)
    return path


@contextlib.contextmanager
def _fewer_collections() -> Iterator[None]:
    """Hold off Python's cyclic collector, a quarter of the time that a capture of many operators takes."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _quiet_dynamo() -> Iterator[None]:
    """Dynamo warns of breaks that the report lists anyway; TORCH_LOGS still shows what it is asked for."""
    logger = logging.getLogger("torch._dynamo")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
