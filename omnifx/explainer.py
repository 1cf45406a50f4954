"""Look at a model without compiling or running any of its variants: which branches it has, what they cost, what is
refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import config as inductor_config

from omnifx.backends.eager import EagerLowering
from omnifx.capture import capture, state_inputs
from omnifx.errors import MatchError
from omnifx.program import Program
from omnifx.report import MatchReport
from omnifx.session import report_of


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> MatchReport:
    """What omnifx finds in `model` when it is called with these arguments.

    The model is captured as ``torch.compile`` captures it and called once, operator by operator; on the meta device
    that costs nothing, whatever its size.

    Args:
        model: Any module, compiled or not.
        args, kwargs: One call's arguments.

    Returns: A report that prints as a table.
    Raises: MatchError if no branch can be reused; it says what was seen instead.
    """
    model = getattr(model, "_orig_mod", model)
    programs: list[Program] = []
    names: list[str] = []

    def inner(graph: fx.GraphModule, inputs: Sequence[Any], static: tuple[int, ...], arguments: dict[str, Any]) -> Any:
        programs.append(Program(graph, inputs, static, EagerLowering(), budget=2**62))
        return make_boxed_func(graph.forward)

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        names[:] = state_inputs(gm)[1]
        return capture(gm, example_inputs, inner)

    # Inductor's constant folding replaces whatever a graph returns on the meta device by an empty tensor: nothing would
    # be left.
    folds = not any(parameter.is_meta for parameter in model.parameters())
    patched = inductor_config.patch(joint_graph_constant_folding=folds)
    with torch.no_grad(), patched, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compile(model, backend=backend)(*args, **kwargs)
    report = report_of(type(model).__name__, programs, names)
    if not report.cacheable:
        seen = "; ".join(f"{b.name}: {b.reason}" for b in report.branches[:4])
        operators = sum(len(program.gm.graph.nodes) for program in programs)
        raise MatchError(
            f"explain: no branch of {report.model} can be reused. {len(programs)} graph(s) with {operators} "
            "operators were seen, and "
            f"{len(report.branches)} residual branches{': ' + seen if seen else ''}. Expected additions x + f(x) "
            "around attention and "
            "feed-forward layers, with x descending from the latents."
        )
    return report
