"""The Dynamo backend ``omnicache``: capture once, analyse, and hand every call to a runner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx_inner

from omnifx.backends.eager import EagerLowering
from omnifx.backends.inductor import InductorLowering
from omnifx.capture import capture, root_module, state_inputs
from omnifx.program import Program
from omnifx.session import Session, keep_with, session_for, weights_hash


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
    model = root_module()
    session = session_for(model, options, example_inputs)
    if model is not None:
        keep_with(model, session)
        _guard_identity()
    static, session.names = state_inputs(gm)
    digest = weights_hash([example_inputs[i] for i in static])
    patches = {**(torch._inductor.list_mode_options(mode) if mode else {}), **session.options.inductor}

    def inner(graph: fx.GraphModule, inputs: Sequence[Any], static: tuple[int, ...], arguments: dict[str, Any]) -> Any:
        if not arguments.get("is_inference"):
            session.tell(
                "the model ran with gradients on, and was compiled without caching; call it under torch.no_grad()"
            )
            return compile_fx_inner(graph, inputs, **arguments)
        return _compile_program(session, graph, inputs, static, arguments, digest)

    return capture(gm, example_inputs, inner, patches=patches)


def _compile_program(
    session: Session,
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    static: tuple[int, ...],
    arguments: dict[str, Any],
    digest: str,
) -> Any:
    """Analyse a captured graph and compile the variants that will be needed; returns the runner."""
    device = next((value.device for value in inputs if isinstance(value, Tensor)), torch.device("cpu"))
    eager = session.options.lowering == "eager"
    lowering = EagerLowering() if eager else InductorLowering(inputs, arguments)
    program = Program(graph, inputs, static, lowering, budget=session.budget_per_stream(device))
    runner = session.add_program(program, digest)
    for spec in runner.specs_ahead():
        program.variant(spec)
    return runner


def _guard_identity() -> None:
    """Let Dynamo compile anew for another instance of the same class.

    Parameters are inputs, so Dynamo would run one instance's code for all; but profiles, plans and statistics belong to
    one.
    """
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import LocalSource

    install_guard(LocalSource("self").make_guard(GuardBuilder.ID_MATCH))
