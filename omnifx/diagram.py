"""The picture of a model: its trunks as lines from input to output, its branches as boxes beside them.

Runs of equal blocks are drawn once, with their number; the other blocks are there to be unfolded. Everything here is
geometry: `page.html.j2` draws it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from omnifx.graph import Branch
from omnifx.report import MatchReport, bytes_text, tokens_text, unnumbered

WIDTH = 352
HEADER = 40  # height above the branches of a block: its name
ROW = 76
_BOX = 58  # height of a branch's box
_NEAREST = 30  # room between the latents' trunk and the boxes
_GAP = 26  # between trunks
_MOST_TRUNKS = 4
_LONGEST_PERIOD = 4  # blocks that take turns and still count as one run

LABELS = {
    "self_attention": "Self-attention",
    "cross_attention": "Cross-attention",
    "cross_attention+self_attention": "Self- and cross-attention",
    "joint_attention": "Joint attention",
    "mlp": "MLP",
    "conv": "Convolution",
    "parallel": "Parallel attention + MLP",
}


@dataclass(frozen=True)
class Block:
    """Branches of one numbered module of a model, such as `transformer_blocks.3`."""

    path: str
    branches: tuple[Branch, ...]

    @property
    def likeness(self) -> object:
        """Equal for blocks that differ in their number only."""
        return (
            re.sub(r"\d+", "*", self.path),
            tuple(
                (b.name[len(self.path) :], b.kind, b.flops, b.cache_bytes, b.cacheable, b.reason, b.trunks)
                for b in self.branches
            ),
        )


@dataclass(frozen=True)
class Run:
    """Equal blocks in a row; `period` blocks that take turns count as one."""

    blocks: tuple[Block, ...]
    period: int

    @property
    def count(self) -> int:
        """How often the first `period` blocks are repeated."""
        return len(self.blocks) // self.period


@dataclass(frozen=True)
class Box:
    """A branch where it is drawn."""

    branch: Branch
    label: str
    name: str
    share: float
    bar: float
    """Length of its bar in [0, 1]; the longest of the picture is 1."""
    times: int
    cache: str
    y: int
    trunks: tuple[int, ...]
    """Where on the x axis it leaves and rejoins."""


@dataclass(frozen=True)
class Piece:
    """One block, drawn: pieces stand below one another without a gap."""

    title: str
    times: int
    boxes: tuple[Box, ...]
    lines: tuple[int, ...]
    """Trunks that run through it, by x."""
    ending: tuple[int, ...]
    """Trunks that join the latents' above it, by x."""
    height: int


@dataclass(frozen=True)
class Group:
    """A run, drawn: while it is folded, its first block stands for all; unfolded, each is there."""

    shown: tuple[Piece, ...]
    folded: tuple[Piece, ...]
    """Every block; empty if there is only one."""


@dataclass(frozen=True)
class Picture:
    """All there is to draw."""

    groups: tuple[Group, ...]
    trunks: tuple[int, ...]
    """x of each trunk, the latents' first."""
    box_x: int
    box_width: int
    ending: tuple[int, ...]
    """Trunks that are left at the output."""
    largest: float
    """The share of FLOPs that the longest bar stands for, and while everything is unfolded."""
    largest_single: float


def blocks_of(branches: Sequence[Branch]) -> list[Block]:
    """Neighbouring branches of the same numbered module, together."""
    blocks: list[Block] = []
    for branch in branches:
        match = re.match(r"(?:.*?\.)?\d+(?=\.|$)", branch.name)
        path = match.group() if match else branch.name
        if blocks and match and blocks[-1].path == path:
            blocks[-1] = replace(blocks[-1], branches=(*blocks[-1].branches, branch))
        else:
            blocks.append(Block(path, (branch,)))
    return blocks


def runs_of(blocks: Sequence[Block]) -> list[Run]:
    """Fold equal blocks that follow one another, also where two to four kinds take turns."""
    kinds = [block.likeness for block in blocks]
    runs: list[Run] = []
    start = 0
    while start < len(blocks):
        best, period = 1, 1
        for length in range(1, _LONGEST_PERIOD + 1):
            unit, repeats = kinds[start : start + length], 1
            while kinds[start + repeats * length : start + (repeats + 1) * length] == unit:
                repeats += 1
            if repeats > 1 and repeats * length > best:
                best, period = repeats * length, length
        runs.append(Run(tuple(blocks[start : start + best]), period))
        start += best
    return runs


def picture_of(report: MatchReport) -> Picture:
    """Lay out a report."""
    runs = runs_of(blocks_of(report.branches))
    numbers = sorted({_trunk(t) for b in report.branches for t in b.trunks} | {0})
    left = 20 + _GAP * (len(numbers) - 1)
    x_of = {number: left - _GAP * i for i, number in enumerate(numbers)}
    last = dict.fromkeys(numbers, 0)
    for i, run in enumerate(runs):
        for block in run.blocks[: run.period]:
            for branch in block.branches:
                last.update((_trunk(t), i) for t in branch.trunks)
    last[0] = len(runs)
    total = report.flops or 1
    largest = max((run.count * b.flops for run in runs for blk in run.blocks for b in blk.branches), default=0) / total
    largest_single = max((branch.flops for branch in report.branches), default=0) / total
    layout = _Layout(x_of, total, largest, largest_single)
    groups = []
    for i, run in enumerate(runs):
        lines = tuple(x_of[n] for n in numbers if last[n] >= i)
        ending = tuple(x_of[n] for n in numbers if last[n] == i - 1)
        shown = tuple(layout.piece(run, at, lines, () if at else ending) for at in range(run.period))
        folded = tuple(layout.piece(run, at, lines, (), folded=False) for at in range(len(run.blocks)))
        groups.append(Group(shown, folded if run.count > 1 else ()))
    box_x = left + _NEAREST
    return Picture(
        groups=tuple(groups),
        trunks=tuple(x_of[n] for n in numbers),
        box_x=box_x,
        box_width=WIDTH - box_x - 2,
        ending=tuple(x_of[n] for n in numbers if n > 0 and last[n] == len(runs) - 1),
        largest=largest,
        largest_single=largest_single,
    )


def patterns_of(branches: Sequence[Branch]) -> list[tuple[str, int, Branch]]:
    """Branches that differ in their block's number only: their common name, how many, and the first of them."""
    counts: Counter[tuple[object, ...]] = Counter()
    first: dict[tuple[object, ...], Branch] = {}
    for b in branches:
        name = unnumbered(b.name)
        key = (name, b.kind, b.flops, b.cache_bytes, b.cacheable, b.reason, tokens_text(b))
        counts[key] += 1
        first.setdefault(key, b)
    return [(str(key[0]), count, first[key]) for key, count in counts.items()]


def label_of(kind: str) -> str:
    """A kind of branch as a person would write it."""
    return LABELS.get(kind, kind.replace("_", " ").capitalize())


def _trunk(number: int) -> int:
    return min(number, _MOST_TRUNKS - 1)


@dataclass(frozen=True)
class _Layout:
    """What all pieces of one picture share."""

    x_of: dict[int, int]
    total: int
    largest: float
    largest_single: float

    def piece(
        self, run: Run, at: int, lines: tuple[int, ...], ending: tuple[int, ...], *, folded: bool = True
    ) -> Piece:
        """One block of a run; folded, it stands for all blocks of its kind."""
        block, times = run.blocks[at], run.count if folded else 1
        title = block.path
        if times > 1:
            title += f"–{run.blocks[at - run.period].path.rpartition('.')[2]}"
        boxes = tuple(self._box(b, block, times, HEADER + ROW * row, folded) for row, b in enumerate(block.branches))
        return Piece(title, times, boxes, lines, ending, HEADER + ROW * len(boxes))

    def _box(self, branch: Branch, block: Block, times: int, y: int, folded: bool) -> Box:
        share = times * branch.flops / self.total
        longest = self.largest if folded else self.largest_single
        return Box(
            branch=branch,
            label=label_of(branch.kind),
            name=branch.name[len(block.path) :].lstrip("."),
            share=share,
            bar=share / longest if longest else 0.0,
            times=times,
            cache=bytes_text(branch.cache_bytes * times) if branch.cacheable else "",
            y=y,
            trunks=tuple(dict.fromkeys(self.x_of[_trunk(t)] for t in branch.trunks or (0,))),
        )
