"""Lower a variant with Inductor, in the setting in which `compile_fx` captured the graph.

All variants of a graph share the capture: one Dynamo and AOTAutograd trace, then `compile_fx_inner` for each variant.
Parameters are inputs, so nothing is copied and weight updates keep working.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx
from torch._dynamo.utils import detect_fake_mode
from torch._guards import TracingContext, tracing
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.virtualized import V

from omnifx.backends.lowering import Runnable


class InductorLowering:
    """Remembers what `compile_fx` passed to its inner compiler, so that variants can be compiled when they are
    needed."""

    name = "inductor"

    def __init__(self, inputs: Sequence[Any], arguments: dict[str, Any]) -> None:
        self._arguments = arguments
        self._fake_mode = detect_fake_mode(inputs)
        self._context = TracingContext.try_get()
        self._settings = config.save_config_portable() if hasattr(config, "save_config_portable") else {}
        cudagraphs = arguments.get("cudagraphs")
        self.owns_outputs = not bool(getattr(cudagraphs, "value", cudagraphs))

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any], *, num_extra_inputs: int) -> Runnable:
        placeholders = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
        values = [*inputs, *placeholders[len(placeholders) - num_extra_inputs :]] if num_extra_inputs else list(inputs)
        with contextlib.ExitStack() as stack:
            if TracingContext.try_get() is not self._context:
                stack.enter_context(tracing(self._context))
            if self._fake_mode is not None:
                stack.enter_context(V.set_fake_mode(self._fake_mode))
            if self._context is not None:
                stack.enter_context(
                    self._context.report_output_strides()
                )  # each compile reports into a list of its own
            stack.enter_context(config.patch(self._settings))
            stack.enter_context(torch.no_grad())
            compiled = compile_fx_inner(gm, values, **self._arguments)
        return cast("Runnable", compiled)
