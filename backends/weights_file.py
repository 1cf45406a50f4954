"""One file of tensors that all graphs of a bundle share: each content once, at a page's start.

Graphs of one model hold mostly the same weights, under names that differ where a converter made them anew. So tensors
are told apart by their bytes alone. 4096 bytes are a page: such a tensor is mapped into memory, not read.
"""

from __future__ import annotations

import hashlib
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
from torch import Tensor

PAGE = 4096
SMALL_ALIGNMENT = 64
"""Of tensors that fit into a page: nobody maps them."""


@dataclass
class WeightsFile:
    """Writes the file; a context manager.

    Memory: one tensor at a time.
    """

    path: Path
    size: int = 0
    _places: dict[tuple[str, int], int] = field(default_factory=dict)
    _file: BinaryIO | None = None

    def __enter__(self) -> Self:
        self._file = self.path.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, data: memoryview) -> int:
        """The offset of these bytes in the file; they are written unless they are there."""
        assert self._file is not None  # only used as a context manager
        key = (hashlib.sha256(data).hexdigest(), data.nbytes)
        if key not in self._places:
            alignment = PAGE if data.nbytes >= PAGE else SMALL_ALIGNMENT
            padding = -self.size % alignment
            self._file.write(b"\0" * padding)
            self._file.write(data)
            self._places[key] = self.size + padding
            self.size += padding + data.nbytes
        return self._places[key]


def bytes_of(value: Tensor) -> memoryview:
    """The bytes of a tensor, contiguous; not copied if it is so on the host."""
    flat = value.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


@dataclass(frozen=True)
class StoredTensor:
    """Where a contiguous tensor lies in the file."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def map_tensors(path: Path, places: Mapping[str, StoredTensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors of the file; those at the same place are the same tensor.

    Memory: on the host none but the file's own pages, which all processes share; on other devices one copy.
    """
    if not places:
        return {}
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    known: dict[StoredTensor, Tensor] = {}
    for place in places.values():
        if place not in known:
            count = math.prod(place.shape)
            flat = (
                torch.frombuffer(pages, dtype=place.dtype, count=count, offset=place.offset)
                if count
                else torch.empty(0, dtype=place.dtype)
            )
            known[place] = flat.reshape(place.shape).to(device)
    return {name: known[place] for name, place in places.items()}


__all__ = ["PAGE", "StoredTensor", "WeightsFile", "bytes_of", "map_tensors"]
