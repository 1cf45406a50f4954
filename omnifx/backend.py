"""The Dynamo backend ``omnicache``: capture once, analyse, and hand every call to a runner.

Dynamo's graph goes through `compile_fx`, whose inner compiler is ours: it sees AOTAutograd's functional ATen graph with parameters
as inputs. Everything that follows happens there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._functorch import config as functorch_config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

from omnifx.backends.eager import EagerLowering
from omnifx.backends.inductor import InductorLowering
from omnifx.program import Program
from omnifx.session import Session, keep_with, session_for, weights_hash


def omnicache(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """Compile a Dynamo graph so that later steps of a generation reuse what earlier ones computed.

    Called by ``torch.compile(model, backend="omnicache", options={...})``; see `omnifx.options.Options` for the options, and
    `mode` for Inductor's modes.

    Raises: ConfigError for unknown options or values out of range, ProfileError for a foreign profile; Dynamo wraps them in
        BackendCompilerFailed.
    """
    model = _root_module()
    session = session_for(model, options, example_inputs)
    if model is not None:
        keep_with(model, session)
    static, session.names = state_inputs(gm)
    digest = weights_hash([example_inputs[i] for i in static])
    patches = dict(session.options.inductor)
    if mode:
        patches = {**torch._inductor.list_mode_options(mode), **patches}

    def inner(graph: fx.GraphModule, inputs: Sequence[Any], **arguments: Any) -> Any:
        if not arguments.get("is_inference"):
            session._tell(
                "the model ran with gradients enabled, so it was compiled without caching. Call it under torch.no_grad()."
            )
            return compile_fx_inner(graph, inputs, **arguments)
        return compile_program(session, graph, inputs, arguments, static, digest)

    with functorch_config.patch(enable_autograd_cache=False):  # a hit there would return plain Inductor code
        return compile_fx(gm, list(example_inputs), inner_compile=inner, config_patches=patches or None)  # type: ignore[arg-type,no-any-return]


def compile_program(
    session: Session, graph: fx.GraphModule, inputs: Sequence[Any], arguments: dict[str, Any], static: tuple[int, ...], digest: str
) -> Any:
    """Analyse a captured graph and compile the variants that will be needed; returns the runner."""
    fixed = set(arguments.get("static_input_idxs") or ())
    if len(inputs) == len(session.names):
        fixed |= set(static)
    device = next((value.device for value in inputs if isinstance(value, Tensor)), torch.device("cpu"))
    lowering = EagerLowering() if session.options.lowering == "eager" else InductorLowering(inputs, arguments)
    program = Program(graph, inputs, tuple(sorted(fixed)), lowering, budget=session.budget_per_stream(device))
    runner = session.add_program(program, digest)
    for spec in runner.specs_ahead():
        program.variant(spec)
    return runner


def _root_module() -> nn.Module | None:
    """The module whose `forward` Dynamo is compiling."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    translator = InstructionTranslator.current_tx()
    owner = translator.f_locals.get("self") if translator is not None else None
    return owner if isinstance(owner, nn.Module) else None


def state_inputs(gm: fx.GraphModule) -> tuple[tuple[int, ...], list[str]]:
    """Positions of a Dynamo graph's inputs that are parameters or buffers, and plain names of all inputs."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    static = tuple(i for i, node in enumerate(placeholders) if _is_state(node))
    return static, [node.name.removeprefix("l_").strip("_").removeprefix("kwargs_") for node in placeholders]


def _is_state(node: fx.Node) -> bool:
    """Whether a Dynamo placeholder is a parameter or buffer of a module, rather than an argument of the call."""
    source = str(getattr(node, "_dynamo_source", None) or node.meta.get("grapharg", ""))
    name = str(node.target)
    return "_parameters" in name or "_buffers" in name or "._parameters[" in source or "._buffers[" in source
