"""The toy in plain tensor code, with old residuals of ranges of blocks, and profiles of models that have blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from omnifx.plan import REUSE, Plan
from omnifx.profile import BlockMeta, BranchMeta, Profile, SpanMeta
from omnifx.session import find_session
from tests.profiles import make_profile
from tests.toys import ToyDiT, timesteps

Range = tuple[int, int]


@dataclass
class Stacks:
    """The toy, step by step; `reused` tells which range of blocks a step does not compute (None: it computes all)."""

    model: ToyDiT
    reused: Callable[[int], Range | None]
    ranges: tuple[Range, ...]
    """The ranges whose residuals are kept at computed steps."""
    kept: dict[Range, Tensor] = field(default_factory=dict)
    residuals: list[dict[Range, Tensor]] = field(default_factory=list)
    step: int = -1

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.step += 1
        model, half = self.model, self.model.width // 2
        angles = t[:, None] * torch.exp(-torch.arange(half) * 9.2 / half)
        c = model.time(torch.cat([angles.cos(), angles.sin()], dim=-1)) + model.label(y)
        rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
        h = model.embed(x).flatten(2).transpose(1, 2) + model.positions(rows, columns)
        reused, number = self.reused(self.step), 0
        trunk = [h]
        while number < len(model.blocks):
            if reused is not None and number == reused[0]:
                h, number = h + self.kept[reused], reused[1] + 1
                trunk += [h] * (number - reused[0])
            else:
                h, number = model.blocks[number](h, c, None), number + 1
                trunk.append(h)
        if reused is None:
            self.kept = {(first, last): trunk[last + 1] - trunk[first] for first, last in self.ranges}
        self.residuals.append({(first, last): trunk[last + 1] - trunk[first] for first, last in self.ranges})
        patches = model.head(model.norm(h)).reshape(len(x), rows, columns, 2, 2, 4)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def block_profile(
    steps: int, blocks: int = 4, *, leaks: bool = False, changes: Tensor | None = None, measured: tuple[str, ...] = ()
) -> Profile:
    """A profile of a model of `blocks` blocks of 10 + 10 FLOPs, and 2 for what only a range of blocks saves beside.

    With `leaks`, no range that begins with block 0 can be reused but that of all blocks. `changes` is [S, lags + 1,
    columns] for the `measured` columns.
    """
    names = [(f"blocks.{i}.attn", f"blocks.{i}.mlp") for i in range(blocks)]
    kinds = ("self_attention", "mlp")
    bounds = dict.fromkeys([(0, i) for i in range(blocks)] + [(i, blocks - 1) for i in range(blocks)])
    spans = tuple(
        SpanMeta(
            first=first,
            last=last,
            flops=22 * (last - first + 1),
            cache_bytes=8,
            reason="its skips are used behind it" if leaks and first == 0 and last < blocks - 1 else "",
        )
        for first, last in bounds
    )
    profile = make_profile(steps)
    fields: dict[str, Any] = {
        "timesteps": tuple(timesteps(steps)),
        "flops": 22 * blocks + 4,
        "branches": tuple(
            BranchMeta(name=n, kind=k, flops=10, cache_bytes=8)
            for pair in names
            for n, k in zip(pair, kinds, strict=True)
        ),
        "blocks": tuple(BlockMeta(name=f"blocks.{i}", branches=names[i]) for i in range(blocks)),
        "spans": spans,
        "measured": measured,
        "num_lags": 0 if changes is None else changes.shape[-2] - 1,
    }
    return Profile(
        meta=profile.meta.model_copy(update=fields),
        grams=profile.grams,
        moves=profile.moves,
        changes=None if changes is None else changes[None, None].float(),
    )


def plan_of(fast: Any) -> Plan:
    """The newest plan of a compiled model."""
    (conductor,) = find_session(fast).conductors
    return conductor.entries[0].plan


def reused_by(plan: Plan) -> list[list[str]]:
    """For each step, the spans and the branches outside of them that it reuses."""
    found = []
    for row in plan.rows:
        names = [n for n, action in zip((*plan.branches, *plan.span_names), row, strict=True) if action == REUSE]
        inside = {b for span in plan.spans if span.name in names for b in span.branches}
        found.append([name for name in names if name not in inside])
    return found
