"""Whether the weights are still those that computed a cache: pointers, versions, and samples of their values.

Weights that are brought from elsewhere for each call (offloading) have new pointers each time, and often hold the same
values. Where that is the habit, their bits are summed up at every call instead, which costs less than the move did.
"""

from __future__ import annotations

import operator
import random
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

NUM_PROBES = 64
"""Weights of which one element is read at every call, with the timestep."""

HABIT = 2
"""Calls in a row that find other weights than the call before, from which on the bits are summed up."""

FORGIVEN = 16
"""Calls in a row that find the same weights, from which on pointers and versions are trusted again."""

_VERSION = operator.attrgetter("_version")


class WeightWatch:
    """Counts up when any weight of a graph was replaced or written to.

    Args:
        positions: Where a call's arguments hold parameters and buffers.
        settings: Those of them that are plain numbers of a module's (a LoRA's scale), in a new tensor at each call.
    """

    def __init__(self, positions: Sequence[int], settings: Sequence[int] = ()) -> None:
        self.version = 0
        self.sums_always = False
        """Whether to sum up the bits at every call, whatever pointers and versions say."""
        self.changes = 0
        """Calls in a row whose probes had other values than the call before."""
        self._positions = [i for i in positions if i not in frozenset(settings)]
        self._settings = tuple(settings)
        self._pick = operator.itemgetter(*self._positions) if len(self._positions) > 1 else None
        self._objects: list[weakref.ref[Tensor]] = []
        self._pointers: list[int] = []
        self._versions: list[int] = []
        self._values: list[float] = []
        self._restless = self._calm = 0
        self._sums: Tensor | None = None
        self._probed: tuple[float, ...] | None = None
        self._chosen: list[int] = []
        self._views: list[list[Tensor]] = []
        self._chosen_of = -1

    def look(self, args: Sequence[Any]) -> None:
        """Compare identities, pointers and versions with those of the last call; values are read only by habit."""
        weights = self._weights(args)
        pointers = list(map(Tensor.data_ptr, weights))
        try:
            versions = list(map(_VERSION, weights))
        except RuntimeError:  # tensors made under inference_mode count no versions
            versions = [-1 if weight.is_inference() else weight._version for weight in weights]
        first = len(self._objects) != len(weights)
        same = not first and all(map(operator.is_, map(operator.call, self._objects), weights))
        if not same:
            self._objects = list(map(weakref.ref, weights))
        changed = not same or pointers != self._pointers or versions != self._versions
        self._pointers, self._versions = pointers, versions
        self._restless = self._restless + 1 if changed and not first else 0
        self._calm = 0 if changed else self._calm + 1
        if changed:
            self._views = []  # of weights that come and go no view is kept, so that offloading frees them
        if self._restless >= HABIT or self.sums_always or (self._sums is not None and self._calm < FORGIVEN):
            sums = checksums(weights)
            changed = self._sums is None or not torch.equal(sums, self._sums)
            self._sums = sums
        else:
            self._sums = None
        values = [float(args[i]) for i in self._settings]
        if changed or values != self._values:
            self._values = values
            self.version += 1

    def _weights(self, args: Sequence[Any]) -> Sequence[Tensor]:
        found: Sequence[Tensor] = self._pick(args) if self._pick is not None else [args[i] for i in self._positions]
        return found

    def probes(self, args: Sequence[Any]) -> list[Tensor]:
        """Samples of the weights among a call's arguments, which `look` saw last."""
        if self._calm and self._views:  # the same memory as at the last call
            return [torch.stack(views) for views in self._views]
        weights = self._weights(args)
        if self._calm:
            self._views = self._viewed(weights)
        return self.samples(weights)

    @torch.no_grad()
    def samples(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """One element of each of up to NUM_PROBES weights, by type and device."""
        return [torch.stack(views) for views in self._viewed(weights)]

    def _viewed(self, weights: Sequence[Tensor]) -> list[list[Tensor]]:
        if self._chosen_of != len(weights):
            self._chosen_of, self._chosen = len(weights), _choose(weights)
        kinds: dict[object, list[Tensor]] = {}
        for i in self._chosen:
            weight = weights[i]
            if not weight.is_meta and weight.dim() and weight.numel():
                kinds.setdefault((weight.dtype, weight.device), []).append(_element(weight))
        return list(kinds.values())

    def compare(self, values: tuple[float, ...]) -> None:
        """Compare the probes' values: ``weight.data += delta`` changes neither pointers nor versions."""
        self.changes = self.changes + 1 if self._probed is not None and values != self._probed else 0
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
    if not weights:
        return torch.zeros(0).long()
    sums = [_checksum(weight.detach()) for weight in weights]
    if len({each.device for each in sums}) > 1:
        sums = [each.cpu() for each in sums]
    return torch.stack(sums).cpu()


def _checksum(weight: Tensor) -> Tensor:
    if not weight.is_contiguous():
        weight = weight.contiguous()
    flat = weight.reshape(-1).view(torch.uint8) if weight.numel() else weight.new_zeros(0, dtype=torch.uint8)
    whole = flat.numel() // 4 * 4
    return flat[:whole].view(torch.int32).sum(dtype=torch.int64) + flat[whole:].sum(dtype=torch.int64)


def _choose(weights: Sequence[Tensor]) -> list[int]:
    """Up to NUM_PROBES matrices on the commonest device: at random, for the layers of a model repeat with a period."""
    devices = Counter(weight.device for weight in weights if not weight.is_meta)
    if not devices:
        return []
    device = devices.most_common(1)[0][0]
    usable = [
        i
        for i, w in enumerate(weights)
        if w.dim() >= 2 and w.numel() and w.device == device and not w.is_meta and not w.is_complex()
    ]
    return sorted(random.Random(0).sample(usable, NUM_PROBES)) if len(usable) > NUM_PROBES else usable


def _element(weight: Tensor) -> Tensor:
    """The first element of a weight's middle row (a LoRA's last columns may be padding)."""
    where = weight.storage_offset() + weight.shape[0] // 2 * weight.stride(0)
    bits = weight.view(torch.uint8) if weight.is_floating_point() and weight.element_size() == 1 else weight
    return bits.as_strided((), (), where)
