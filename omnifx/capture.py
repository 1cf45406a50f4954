"""Capture: from Dynamo's graph to AOTAutograd's functional ATen graph, with parameters as inputs.

Dynamo's graph goes through `compile_fx` with an inner compiler of ours, so that decompositions, mutated inputs and
aliased outputs stay the business of those who do them for Inductor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

from torch import fx, nn
from torch._functorch import config as functorch_config
from torch._inductor.compile_fx import compile_fx


class InnerCompiler(Protocol):
    """Receives the ATen graph, fake inputs, the positions of parameters and buffers, and what `compile_fx` passes
    on."""

    def __call__(
        self, graph: fx.GraphModule, inputs: Sequence[Any], static: tuple[int, ...], arguments: dict[str, Any]
    ) -> Any:
        """Return a callable that takes one list of inputs."""


def capture(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    inner: InnerCompiler,
    *,
    patches: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Run `compile_fx` on a Dynamo graph with `inner` as its last stage; `patches` are options of Inductor."""
    state, names = state_inputs(gm)

    def with_static(graph: fx.GraphModule, inputs: Sequence[Any], **arguments: Any) -> Any:
        static = set(arguments.get("static_input_idxs") or ())
        if len(inputs) == len(names):  # AOTAutograd kept the inputs as they were, so Dynamo's word on them holds
            static |= set(state)
        return inner(graph, inputs, tuple(sorted(static)), arguments)

    with functorch_config.patch(enable_autograd_cache=False):  # a hit there would return plain Inductor code
        compiled: object = compile_fx(
            gm,
            list(example_inputs),
            inner_compile=cast("Any", with_static),
            config_patches=patches or None,
        )
    return cast("Callable[..., Any]", compiled)


def state_inputs(gm: fx.GraphModule) -> tuple[tuple[int, ...], list[str]]:
    """Positions of a Dynamo graph's inputs that are parameters or buffers, and plain names of all inputs."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    static = tuple(i for i, node in enumerate(placeholders) if _is_state(node))
    return static, [node.name.removeprefix("l_").strip("_").removeprefix("kwargs_") for node in placeholders]


def _is_state(node: fx.Node) -> bool:
    """Whether a Dynamo placeholder is a parameter or buffer of a module, rather than an argument of the call."""
    source = str(getattr(node, "_dynamo_source", None) or node.meta.get("grapharg", ""))
    name = str(node.target)
    return any(mark in name or mark in source for mark in ("_parameters", "_buffers"))


def root_module() -> nn.Module | None:
    """The module whose `forward` Dynamo is compiling."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    translator = InstructionTranslator.current_tx()
    if translator is None or not translator.f_code.co_argcount:
        return None
    first = translator.f_locals.get(translator.f_code.co_varnames[0])  # mostly called self
    return first if isinstance(first, nn.Module) else None
