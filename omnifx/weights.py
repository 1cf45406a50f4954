"""Whether the weights are still those that computed a cache: pointers, versions, and samples of their values."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

NUM_PROBES = 64
"""Weights of which one element is read at every call, with the timestep."""

_VERSION = operator.attrgetter("_version")


class WeightWatch:
    """Counts up when any weight of a graph was replaced or written to.

    Args:
        positions: Where a call's arguments hold parameters and buffers.
        probes: Whether to pick elements for the clock to read.
    """

    def __init__(self, positions: Sequence[int], *, probes: bool = True) -> None:
        self.version = 0
        self._wants_probes = probes
        self.probes: list[Tensor] = []
        """Views of single elements, for the clock to read with everything else it reads."""
        self._pick = operator.itemgetter(*positions) if len(positions) > 1 else None
        self._positions = positions
        self._pointers: list[int] = []
        self._versions: list[int] = []
        self._probed: tuple[float, ...] = ()

    def look(self, args: Sequence[Any]) -> None:
        """Compare pointers and versions with those of the last call; no value is read."""
        weights = self._pick(args) if self._pick is not None else [args[i] for i in self._positions]
        pointers = list(map(Tensor.data_ptr, weights))
        try:
            versions = list(map(_VERSION, weights))
        except RuntimeError:  # tensors made under inference_mode count no versions
            versions = [-1 if weight.is_inference() else weight._version for weight in weights]
        if pointers != self._pointers:
            if self._wants_probes:
                self.choose(weights)
            self._pointers = pointers
            self._versions = versions
            self.version += 1
        elif versions != self._versions:
            self._versions = versions
            self.version += 1

    def choose(self, weights: Sequence[Tensor]) -> None:
        """Pick the probes among these weights."""
        self.probes = _scalars_of(weights)

    def compare(self, values: tuple[float, ...]) -> None:
        """Compare the probes' values: ``weight.data += delta`` changes neither pointers nor versions."""
        if values != self._probed:
            self._probed = values
            self.version += 1


def plain(values: Sequence[Any]) -> list[Any]:
    """The values with every tensor subclass (a quantised weight, say) replaced by the plain tensors inside, in the
    order in which AOTAutograd passes them to its graph."""
    found: list[Any] = []
    for value in values:
        if is_traceable_wrapper_subclass(value):
            inner, _ = value.__tensor_flatten__()
            found += plain([getattr(value, name) for name in inner])
        else:
            found.append(value)
    return found


def checksums(weights: Sequence[Tensor]) -> Tensor:
    """[len(weights)], int64, on the CPU: the sum of each weight's bits, read as whole numbers."""
    return torch.stack([_checksum(weight.detach()) for weight in weights]).cpu() if weights else torch.zeros(0).long()


def _checksum(weight: Tensor) -> Tensor:
    if not weight.is_contiguous():
        weight = weight.contiguous()
    flat = weight.reshape(-1).view(torch.uint8) if weight.numel() else weight.new_zeros(0, dtype=torch.uint8)
    whole = flat.numel() // 4 * 4
    return flat[:whole].view(torch.int32).sum(dtype=torch.int64) + flat[whole:].sum(dtype=torch.int64)


def _scalars_of(weights: Sequence[Tensor]) -> list[Tensor]:
    """Views of one element of each of up to NUM_PROBES weights of the commonest type and device, evenly spread."""
    kinds = Counter((w.dtype, w.device) for w in weights if w.dim() >= 2 and w.is_floating_point())
    if not kinds:
        return []
    kind = kinds.most_common(1)[0][0]
    usable = [w for w in weights if w.dim() >= 2 and (w.dtype, w.device) == kind and w.is_contiguous()]
    picked = usable[:: -(-len(usable) // NUM_PROBES) or 1]
    return [w.detach().view(-1)[w.numel() // 2] for w in picked if w.numel()]
