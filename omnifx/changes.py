"""How much the cuts of branches change from step to step, measured while a generation is recorded.

At a full step the cuts of the last steps are at hand, so comparing them costs one pass over them and nothing else. What
is kept of it is a few numbers for each branch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Changes(NamedTuple):
    """What one step measured; float32."""

    errors: Tensor
    """[lags, columns]: ``||new - old||_1 / ||new||_1`` of cuts that are 1, 2, ... steps old; 0 where there are none."""
    growth: Tensor
    """[columns]: the mean over tokens of ``||new||_2 / ||old||_2``, with cuts that are one step old; 1 without any."""


class ChangeMeter:
    """Compares the cuts of one stream's steps with those of the steps before.

    Args:
        num_lags: How many older sets of cuts it keeps, and compares with.
        columns: Names of the branches and spans to compare, each with the names of its cuts.

    Memory: `num_lags` sets of these cuts.
    """

    def __init__(self, num_lags: int, columns: Mapping[str, Sequence[str]]) -> None:
        self.num_lags = num_lags
        self.columns = dict(columns)
        self._older: deque[dict[str, Tensor]] = deque(maxlen=num_lags)

    @torch.no_grad()
    def measure(self, cuts: Mapping[str, Tensor]) -> Changes:
        """Compare a step's cuts, by name, and keep them for the next steps."""
        device = next(iter(cuts.values())).device
        errors = torch.zeros(self.num_lags, len(self.columns), device=device)
        growth = torch.ones(len(self.columns), device=device)
        for c, names in enumerate(self.columns.values()):
            new = [cuts[name].float() for name in names]
            size = _sum(value.abs().sum() for value in new)
            for lag, older in enumerate(reversed(self._older)):
                old = [older[name].float() for name in names]
                change = _sum((a - b).abs().sum() for a, b in zip(new, old, strict=True))
                errors[lag, c] = change / size.clamp_min(1e-30)
                if lag == 0:
                    ratios = [
                        (a.norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-30)).flatten()
                        for a, b in zip(new, old, strict=True)
                    ]
                    growth[c] = torch.cat(ratios).mean()
        self._older.append({name: cuts[name] for names in self.columns.values() for name in names})
        return Changes(errors, growth)


def _sum(values: Iterable[Tensor]) -> Tensor:
    """The sum of one or more tensors of one element."""
    return torch.stack(list(values)).sum()


__all__ = ["ChangeMeter", "Changes"]
