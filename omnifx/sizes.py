"""Sizes: what the symbolic sizes of a captured graph are at one call.

A graph captured with dynamic shapes has inputs that are sizes of its other inputs. Fake values in it know their shapes
as expressions of those; turning one into a number would add a guard, and the graph would serve one size only. So the
numbers come from the arguments of each call.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv


@dataclass(frozen=True)
class Sizes:
    """The values of a graph's symbols at one call; two calls of the same sizes compare equal."""

    values: tuple[tuple[sympy.Symbol, int], ...] = ()
    _numbers: dict[sympy.Expr, int] = field(default_factory=dict, compare=False, repr=False)

    def number(self, size: int | torch.SymInt) -> int:
        """A size as a number."""
        if isinstance(size, int):
            return size
        expr = size.node.expr
        if expr not in self._numbers:
            self._numbers[expr] = int(expr.xreplace(dict(self.values)))
        return self._numbers[expr]

    def shape(self, fake: Tensor) -> tuple[int, ...]:
        """The shape of a fake value."""
        return tuple(map(self.number, fake.shape))

    def strides(self, fake: Tensor) -> tuple[int, ...]:
        """The strides of a fake value."""
        return tuple(map(self.number, fake.stride()))

    def num_bytes(self, fake: Tensor) -> int:
        """The bytes of a fake value."""
        return math.prod(self.shape(fake)) * fake.element_size()

    def allows(self, guards: Sequence[sympy.Basic]) -> bool:
        """Whether all guards hold; one that these sizes do not decide does not."""
        numbers = dict(self.values)
        return all(guard.xreplace(numbers) == sympy.true for guard in guards)


class SizeInputs:
    """The inputs of a graph that are symbols of its sizes.

    Args:
        placeholders: The graph's inputs, in order.
    """

    def __init__(self, placeholders: Sequence[fx.Node]) -> None:
        self.positions = symbols_of(placeholders)
        self._known: dict[tuple[int, ...], Sizes] = {}

    def at(self, args: Sequence[Any]) -> Sizes:
        """The sizes of a call with these arguments."""
        key = tuple([int(args[i]) for i in self.positions.values()])
        if key not in self._known:
            self._known[key] = Sizes(tuple(zip(self.positions, key, strict=True)))
        return self._known[key]

    def tell(self, fake: Tensor) -> bool:
        """Whether the shape and strides of a fake value are expressions of these inputs."""
        return all(free_symbols(size) <= set(self.positions) for size in (*fake.shape, *fake.stride()))


def shapes_of(inputs: Sequence[Any]) -> ShapeEnv | None:
    """What holds the guards on the sizes of these fake inputs; None if they are not fake."""
    mode = next((value.fake_mode for value in inputs if isinstance(value, FakeTensor)), None)
    return mode.shape_env if mode is not None else None


@contextlib.contextmanager
def late_guards(shapes: ShapeEnv | None) -> Iterator[list[sympy.Basic]]:
    """Collect the guards that are added inside after Dynamo made its own, which would be ignored; none before that.

    What is compiled inside is right only for sizes that fulfil them.
    """
    found: list[sympy.Basic] = []
    if shapes is None or not shapes.frozen:
        yield found
        return
    before = len(shapes.guards)
    shapes.frozen = False
    try:
        yield found
    finally:
        shapes.frozen = True
        found += [guard.expr for guard in shapes.guards[before:]]


def symbols_of(placeholders: Sequence[fx.Node]) -> dict[sympy.Symbol, int]:
    """The symbols that a graph takes as inputs, each with its position."""
    found: dict[sympy.Symbol, int] = {}
    for position, node in enumerate(placeholders):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and isinstance(value.node.expr, sympy.Symbol):
            found.setdefault(value.node.expr, position)
    return found


def free_symbols(size: object) -> set[sympy.Symbol]:
    """The symbols that a size is an expression of."""
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


__all__ = ["SizeInputs", "Sizes", "free_symbols", "late_guards", "shapes_of", "symbols_of"]
