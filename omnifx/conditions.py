"""Tables of what timesteps and labels alone decide: computed once for each of their values, read in later steps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnifx.backends.lowering import Runnable
from omnifx.weights import checksums

Small = tuple[tuple[float, ...], ...]
"""Values of the small inputs of a call."""

MOST_BYTES = 64 * 2**20
"""Bytes that one graph's table may hold; the entry longest unused goes first."""


@dataclass(frozen=True)
class Conditions:
    """The graph that `HoistConditions` split off a variant."""

    run: Runnable
    names: tuple[str, ...]
    """Node names of its outputs, in order."""
    weights: tuple[int, ...]
    """Positions of the parameters it reads."""
    flops: int


class Table:
    """Values of one `Conditions` graph by the small inputs that made them.

    They outlive a generation, so they stand on more than pointers and versions: when a generation begins, the weights'
    bits are summed up, and another sum empties the table.
    """

    def __init__(self, conditions: Conditions, *, budget: int = MOST_BYTES) -> None:
        self.conditions = conditions
        self.budget = budget
        self.held_bytes = 0
        self._rows: OrderedDict[Small, tuple[Tensor, ...]] = OrderedDict()
        self._version = -1
        self._sums: Tensor | None = None

    def check(self, args: Sequence[Any]) -> None:
        """Empty the table unless the weights are bit for bit those that made it; call when a generation begins."""
        sums = checksums([args[i] for i in self.conditions.weights])
        if self._sums is None or not torch.equal(sums, self._sums):
            self._sums = sums
            self.clear()

    def clear(self) -> None:
        """Forget every row."""
        self._rows.clear()
        self.held_bytes = 0

    def read(
        self,
        small: Small,
        args: Sequence[Any],
        *,
        version: int,
        strides: Callable[[str], tuple[int, ...]],
        copies: bool,
    ) -> tuple[dict[str, Tensor], bool]:
        """The values for a call by node name, and whether they had to be computed.

        Args:
            small: Values of the call's small inputs.
            args: The call's inputs.
            version: Of the weights; another one than last time empties the table.
            strides: Those that a value of this name is to have: the graph that reads it was compiled for them.
            copies: Whether what the graph returns is overwritten by its next run (CUDA graphs).
        """
        if version != self._version:
            self._version = version
            self.clear()
        found = self._rows.get(small)
        missed = found is None
        if found is None:
            made = self.conditions.run(list(args))
            found = tuple(
                laid_out(value, strides(name), copies=copies)
                for name, value in zip(self.conditions.names, made, strict=True)
            )
            self._rows[small] = found
            self.held_bytes += sum(map(_bytes, found))
            while self.held_bytes > self.budget and len(self._rows) > 1:
                _, old = self._rows.popitem(last=False)
                self.held_bytes -= sum(map(_bytes, old))
        else:
            self._rows.move_to_end(small)
        return dict(zip(self.conditions.names, found, strict=True)), missed


def laid_out(value: Tensor, strides: tuple[int, ...], *, copies: bool = False) -> Tensor:
    """The value with these strides; a copy if it has others, or if one is asked for."""
    if value.stride() == strides and not copies:
        return value
    return value.new_empty_strided(value.shape, strides).copy_(value)


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()
