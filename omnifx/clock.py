"""The clock: which step of which generation and which stream a call is, told from its inputs alone.

A reuse needs proof. A call is taken for the next step of a stream only if its invariant inputs are that stream's (the
same tensor, unchanged, or equal content), its timestep is the one the plan expects next, and its latents lie where one
step from the stream's last latents would put them (unless the caller marked the generation). Two streams that both fit
are told apart by their latents, and if that leaves a doubt the step runs in full. Nothing here is visible to Dynamo.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnifx.graph import Inputs

NUM_SAMPLES = 256
"""Elements of the latents that the clock reads at every call."""

_CPU = torch.device("cpu")

_MARKED: contextvars.ContextVar[Marked | None] = contextvars.ContextVar("omnifx_generation", default=None)
_numbers = itertools.count(1)


@dataclass(frozen=True, eq=False)
class Marked:
    """A generation that the caller marked with ``with omnifx.generation(...)``."""

    number: int
    steps: int | None
    owner: object  # the session it marks
    outer: Marked | None  # the marks around it, of other sessions or of the same one


@contextlib.contextmanager
def mark(owner: object, steps: int | None) -> Iterator[Marked]:
    """Mark the calls of this context (thread, task) as one generation of `owner`'s."""
    token = Marked(next(_numbers), steps, owner, _MARKED.get())
    reset = _MARKED.set(token)
    try:
        yield token
    finally:
        _MARKED.reset(reset)


def marked_for(owner: object) -> Marked | None:
    """The innermost mark of this context that belongs to `owner`."""
    found = _MARKED.get()
    while found is not None and found.owner is not owner:
        found = found.outer
    return found


@dataclass(frozen=True)
class Watched:
    """A large input as it was at a call: the tensor itself, and what tells whether it changed since."""

    tensor: Any
    version: int | None

    @classmethod
    def of(cls, value: Any) -> Watched:
        """Take note of a value now."""
        if isinstance(value, Tensor) and value.is_inference():
            value = value.clone()  # such tensors count no versions: only their content can tell
        return cls(value, _version(value))

    def same(self, other: Watched) -> bool:
        """Whether both are the same memory, unchanged, or equal in content."""
        a, b = self.tensor, other.tensor
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return type(a) is type(b) and bool(a == b)
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        same_memory = a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.device == b.device
        if same_memory:
            return self.version == other.version
        if self.version != _version(a):  # the note's own tensor was overwritten: its old content is gone
            return False
        return torch.equal(a, b)


def _version(value: Any) -> int | None:
    if not isinstance(value, Tensor) or value.is_inference():
        return None
    return value._version


@dataclass(frozen=True)
class Reading:
    """What the clock read of one call."""

    small: tuple[tuple[float, ...], ...]
    """Values of each small input, in the order of `Inputs.small`."""
    large: tuple[Watched, ...]
    """Each large input, in the order of `Inputs.large`."""
    sample: tuple[float, ...]
    """NUM_SAMPLES elements of the latents at fixed places."""
    finite: bool
    """Whether the latents hold neither NaN nor infinity."""
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of all inputs that are not parameters."""
    probes: tuple[float, ...] = ()
    """Sampled elements of the weights."""

    def moved_from(self, other: Reading) -> float:
        """``||x - x'|| / ||x'||`` over the sampled elements."""
        if len(self.sample) != len(other.sample):  # latents of another size
            return math.inf
        norm = math.sqrt(sum(map(operator.mul, other.sample, other.sample)))
        return math.dist(self.sample, other.sample) / norm if norm else math.inf


class Reader:
    """Reads calls of one graph: one transfer from the device, however many inputs there are."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self._places: dict[tuple[int, torch.device], Tensor] = {}

    def read(self, args: Sequence[Any], probes: Sequence[Tensor] = ()) -> Reading:
        """Read the inputs of a call, and with them the values of some vectors (samples of the weights)."""
        where = self.inputs.latents
        latents = args[where].detach() if where is not None else None
        small = [args[i] for i in self.inputs.small]
        parts = [_flat(value) for value in small if isinstance(value, Tensor)]
        count = len(parts)
        if latents is not None:
            flat = latents.reshape(-1)
            parts += [flat[self._places_of(flat.numel(), flat.device)], flat.sum(dtype=torch.float32)[None]]
        behind = len(parts)
        parts += probes
        values = _values_of(parts)
        read = iter(values[:count])
        sample: tuple[float, ...] = ()
        finite = True
        if latents is not None:
            sample, (total,) = values[count : count + 2]
            finite = math.isfinite(total)
        return Reading(
            small=tuple(next(read) if isinstance(v, Tensor) else (float(v),) for v in small),
            large=tuple([Watched.of(args[i]) for i in self.inputs.large]),
            sample=sample,
            finite=finite,
            probes=tuple(itertools.chain.from_iterable(values[behind:])),
            shapes=tuple(
                [
                    tuple(args[i].shape) if isinstance(args[i], Tensor) else (int(args[i]),)
                    for i in (*self.inputs.small, *self.inputs.large, *([where] if where is not None else []))
                ]
            ),
        )

    def small(self, args: Sequence[Any]) -> tuple[tuple[float, ...], ...]:
        """The values of the small inputs alone."""
        small = [args[i] for i in self.inputs.small]
        read = iter(_values_of([_flat(value) for value in small if isinstance(value, Tensor)]))
        return tuple(next(read) if isinstance(v, Tensor) else (float(v),) for v in small)

    def _places_of(self, size: int, device: torch.device) -> Tensor:
        key = (size, device)
        if key not in self._places:
            generator = torch.Generator().manual_seed(0)
            count = min(NUM_SAMPLES, size)
            places = torch.randint(size, (count,), generator=generator) if size > count else torch.arange(size)
            self._places[key] = places.to(device)
        return self._places[key]


def _flat(value: Tensor) -> Tensor:
    """The elements of a small input as one axis of real numbers."""
    value = value.detach()
    return (torch.view_as_real(value.resolve_conj()) if value.is_complex() else value).reshape(-1)


def _values_of(parts: Sequence[Tensor]) -> list[tuple[float, ...]]:
    """The values of several vectors: one transfer from a device, none on the CPU."""
    devices = {part.device for part in parts}
    if len(devices) == 1 and devices != {_CPU}:
        together: Tensor = torch.cat([part.to(torch.float64) for part in parts]).cpu()
        parts = together.split([part.numel() for part in parts])
    return [tuple(map(float, part.tolist())) for part in parts]


def close(a: float, b: float) -> bool:
    """Whether two timesteps are the same, up to rounding."""
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)


def shown(timesteps: Sequence[float]) -> str:
    """The first few of them, for a message."""
    first = ", ".join(f"{value:g}" for value in timesteps[:4])
    return f"[{first}, ...]" if len(timesteps) > 4 else f"[{first}]"


def largest_move(expected: float) -> float:
    """The largest relative move of the latents that is taken for one step where calibration saw `expected`.

    Three times what was seen, but under 0.7 where that tells anything: two unrelated latents lie about 1.4 apart.
    """
    return max(1.5 * expected, min(3.0 * expected, 0.7)) + 1e-3


@dataclass
class Timeline:
    """Values of the time-like inputs at each step of a known generation, and how far its latents move."""

    timesteps: tuple[float, ...]
    moves: tuple[float, ...]
    time_inputs: tuple[int, ...]  # positions within `Inputs.small`
    varying_inputs: tuple[int, ...]  # positions within `Inputs.large`
    latent_shape: tuple[int, ...] = ()

    def time_of(self, reading: Reading) -> float | None:
        """The timestep of a call; None if the graph has no time-like input."""
        if not self.time_inputs:
            return None
        values = reading.small[self.time_inputs[0]]
        return sum(values) / len(values)

    def expects(self, step: int, reading: Reading) -> bool:
        """Whether a call's timestep is that of `step`."""
        if not 0 <= step < len(self.timesteps):
            return False
        time = self.time_of(reading)
        return time is None or close(time, self.timesteps[step])

    def same_stream(self, a: Reading, b: Reading) -> bool:
        """Whether all inputs that do not change from step to step agree."""
        return (
            a.shapes == b.shapes
            and all(a.small[i] == b.small[i] for i in range(len(a.small)) if i not in self.time_inputs)
            and all(a.large[i].same(b.large[i]) for i in range(len(a.large)) if i not in self.varying_inputs)
        )


__all__ = [
    "NUM_SAMPLES",
    "Marked",
    "Reader",
    "Reading",
    "Timeline",
    "Watched",
    "close",
    "largest_move",
    "mark",
    "marked_for",
    "shown",
]
