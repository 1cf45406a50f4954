"""What every lowering does: take one static graph and give back something that runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import fx

Runnable = Callable[[list[Any]], Sequence[Any]]
"""Takes a list of inputs, which it may clear, and returns the outputs in the graph's order."""


class Lowering(Protocol):
    """Lowers the variants of one captured graph; may be called at any time after the capture, from any thread."""

    name: str
    owns_outputs: bool
    """Whether outputs stay valid after the next call; False with CUDA graphs, whose memory pool is reused."""

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any], *, num_extra_inputs: int) -> Runnable:
        """Lower `gm`, whose last `num_extra_inputs` inputs were added by passes; `inputs` are fake values."""
