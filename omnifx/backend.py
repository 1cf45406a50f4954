"""The Dynamo backend ``omnicache``: capture once, analyse, and hand every call to a runner."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.external_utils import wrap_inline
from torch._inductor.compile_fx import compile_fx_inner

from omnifx.backends.eager import EagerLowering
from omnifx.backends.inductor import InductorLowering
from omnifx.boundary import CAPTURE, MOST_LEFT, compiled_call, innermost
from omnifx.capture import capture, origins_of, root_module, state_inputs
from omnifx.errors import MatchError
from omnifx.program import Program
from omnifx.session import Session, keep_with, meet, session_for, weights_hash


def omnicache(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph so that later steps of a generation reuse what earlier ones computed.

    Called by ``torch.compile(model, backend="omnicache", options={...})``; see `omnifx.options.Options` for the
    options. `mode` is one of Inductor's modes.

    Raises: ConfigError for unknown options or values out of range, ProfileError for a foreign profile; Dynamo wraps
        them in BackendCompilerFailed.
    """
    model = _compiled_module()
    session = session_for(model, options, example_inputs)
    if model is not None:
        keep_with(model, session)
    broken = not _is_whole(model)
    if broken:
        session.watch_boundary()
        if session.boundary is not None:
            session.boundary.note_codes(_translator().f_code)
    if model is not None and not (broken and _serves_others(session)) and (argument := _model_argument(model)):
        _guard_identity(argument)
    if broken and session.boundary is not None and session.boundary.tries:
        return _as_it_is(gm, session)
    static, names = state_inputs(gm)
    session.names = [names[i] for i in origins_of(example_inputs)]
    # All of them where they are known: at another size a model may use another table of positions.
    known = [*model.parameters(), *model.buffers()] if model is not None and not broken else []
    digest = weights_hash(known or [example_inputs[i] for i in static])
    patches = {**(torch._inductor.list_mode_options(mode) if mode else {}), **session.options.inductor}

    def inner(graph: fx.GraphModule, inputs: Sequence[Any], static: tuple[int, ...], arguments: dict[str, Any]) -> Any:
        if not arguments.get("is_inference"):
            session.tell(
                "the model ran with gradients on, and was compiled without caching; call it under torch.no_grad()"
            )
            return compile_fx_inner(graph, inputs, **arguments)
        return _compile_program(session, graph, inputs, static, arguments, digest, broken)

    boundary = session.boundary
    if boundary is not None and boundary.capturing == "whole":
        boundary.note_codes(_translator().f_code)
        if not broken:
            try:
                compiled = capture(gm, example_inputs, inner, patches=patches)
                session.bypass_boundary()
                return compiled
            except Exception as error:  # noqa: BLE001 - whatever could not deal with such a graph
                settings = " and ".join(CAPTURE)
                session.tell(f"captured with {settings}, {session.model_name} is not compiled as one graph: {error}")
        if not boundary.bypassed:
            boundary.capturing = "failed"
            session.forget_programs()
            return _as_it_is(gm, session)  # the next call is captured as the first one was
    return capture(gm, example_inputs, inner, patches=patches)


def _compile_program(
    session: Session,
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    static: tuple[int, ...],
    arguments: dict[str, Any],
    digest: str,
    broken: bool,
) -> Any:
    """Analyse a captured graph and compile the variants that will be needed; returns the runner."""
    device = next((value.device for value in inputs if isinstance(value, Tensor)), torch.device("cpu"))
    eager = session.options.lowering == "eager"
    lowering = EagerLowering() if eager else InductorLowering(inputs, arguments)
    budget = session.budget_per_stream(device)
    program = Program(graph, inputs, static, lowering, budget=budget, hoists=not broken)
    attempt = session.boundary is not None and session.boundary.capturing == "whole" and not session.boundary.bypassed
    if attempt and not broken and program.analysis.left > MOST_LEFT:
        raise MatchError(f"a reuse step would cost {program.analysis.left:.1%} of a full one")
    runner = session.add_program(program, digest, broken=broken)
    for spec in runner.specs_ahead():
        program.variant(spec)
    return runner


def _as_it_is(gm: fx.GraphModule, session: Session) -> Callable[..., Any]:
    """Run a graph as it is, while it is found out how to capture the model; another instance that gets here is noted.

    What comes behind it may be a module with a break. Modules must stay as they are until Dynamo has checked its
    guards.
    """
    own, options = weakref.ref(session), session.raw_options

    def run(*args: Any) -> Any:
        if innermost() is None:
            meet(own, options)
        found = own()
        if found is not None and found.boundary is not None and found.boundary.capturing == "to be tried again":
            found.boundary.wholes.look()
        return gm(*args)

    return run


def _serves_others(session: Session) -> bool:
    """Whether a part of a model may run for other modules: its blocks share it, and so do other instances of its class.

    Not while it is found out how to capture this one, and not where nobody would look for another one's runner.
    """
    if session.boundary is None:
        return session.policy.needs_profile or compiled_call() is None
    return session.boundary.settled


def _guard_identity(argument: str) -> None:
    """Let Dynamo compile anew for another instance of the same class.

    Parameters are inputs, so Dynamo would run one instance's code for all; but profiles, plans and statistics belong to
    one.
    """
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import LocalSource

    install_guard(LocalSource(argument).make_guard(GuardBuilder.ID_MATCH))


def _is_whole(model: nn.Module | None) -> bool:
    """Whether Dynamo compiles the model's own `forward`, to its end: not a method or a block that `forward` calls, nor
    what lies behind a graph break."""
    translator = _translator()
    if translator is None:
        return True
    reason = getattr(translator.output, "compile_subgraph_reason", None)
    if bool(getattr(reason, "graph_break", False)):
        return False
    code = translator.f_code
    first = translator.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    if isinstance(first, nn.Module) and first is not model:
        return False  # hooks give all modules the same code
    return not code.co_name.startswith("torch_dynamo_resume_in_") and (model is None or code in _entry_codes(model))


def _entry_codes(model: nn.Module) -> set[Any]:
    """The code that a call of the model may begin with: its `forward` and what that is wrapped in."""
    codes = {nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__}
    codes.add(wrap_inline(lambda: None).__code__)  # how Dynamo enters modules of torch itself
    work: list[Any] = [model.forward, type(model).forward]
    while work:
        function = work.pop()
        function = getattr(function, "__func__", getattr(function, "func", function))  # a method, a partial
        if (code := getattr(function, "__code__", None)) is not None:
            codes.add(code)
        if (wrapped := getattr(function, "__wrapped__", None)) is not None:
            work.append(wrapped)
    return codes


def _model_argument(model: nn.Module) -> str:
    """The name of the model among the arguments of the code that Dynamo compiles; empty if it is none of them."""
    translator = _translator()
    if translator is None:
        return ""
    names = translator.f_code.co_varnames[: translator.f_code.co_argcount]
    return next((name for name in names if translator.f_locals.get(name) is model), "")


def _compiled_module() -> nn.Module | None:
    """The module that was compiled: the one whose compiled form is being called, or whose `forward` Dynamo compiles."""
    found = compiled_call()
    return found[0] if found is not None else root_module()


def _translator() -> Any:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return InstructionTranslator.current_tx()
