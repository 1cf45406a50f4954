"""Run a variant operator by operator, without a compiler: for debugging, and to tell our passes' errors from a
compiler's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from omnifx.backends.lowering import Runnable


class EagerLowering:
    """The graph module itself."""

    name = "eager"
    owns_outputs = True

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any], *, num_extra_inputs: int) -> Runnable:
        forward = gm.forward

        def run(args: list[Any]) -> Sequence[Any]:
            values = list(args)
            args.clear()
            outputs: Sequence[Any] = forward(*values)
            return outputs

        return run
