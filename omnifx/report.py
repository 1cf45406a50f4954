"""`MatchReport`: what omnifx found in a model, as data, as a table and as a page."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from omnifx.breaks import GraphBreak
from omnifx.errors import ConfigError
from omnifx.graph import Branch


@dataclass(frozen=True)
class MatchReport:
    """Branches of a model, what they cost, and what was refused. Printing it gives a table.

    Attributes:
        branches: In graph order; each has `.name`, `.kind`, `.module_path`, `.flops`, `.cache_bytes`, `.cacheable`,
        `.reason`, and `.tokens` if it may be computed for some tokens alone, else `.token_reason`.
        flops: FLOPs of one call that computes everything.
        reuse_flops: FLOPs of one call that reuses every cacheable branch.
        cache_bytes: Bytes of one stream's caches.
        graphs: Graphs that the model was captured as; more than 1 means graph breaks.
        inputs: The role of each input: latents, small, or watched for change.
        breaks: Where and why the model fell apart into several graphs.
        entries: How often one call enters a graph; equal modules of a broken model share theirs.
        samples: Samples in that call; 0 if unknown.
        kept_whole: Modules that would break the graph and are one operator each instead: paths, and their classes.
        avoided: Graph breaks that plain torch.compile has, and the model as omnifx captures it has not.
    """

    model: str
    branches: tuple[Branch, ...]
    flops: int
    reuse_flops: int
    cache_bytes: int
    graphs: int
    inputs: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    breaks: tuple[GraphBreak, ...] = ()
    entries: int = 1
    samples: int = 0
    kept_whole: dict[str, str] = field(default_factory=dict)
    avoided: tuple[GraphBreak, ...] = ()

    @property
    def cacheable(self) -> tuple[Branch, ...]:
        """The branches that may be reused."""
        return tuple(branch for branch in self.branches if branch.cacheable)

    @property
    def kept_places(self) -> list[tuple[str, str, int]]:
        """The modules that are kept whole: place, class and count; those that differ in numbers only are one place."""
        found = Counter((unnumbered(path), cls) for path, cls in self.kept_whole.items())
        return [(place, cls, count) for (place, cls), count in found.items()]

    def token_reasons(self, *, by: Literal["kind", "name"]) -> list[tuple[str, int, str]]:
        """Why branches that are cached cannot be computed token by token: their kind, or their name without numbers,
        how many they are, and the reason of the first; reasons that differ in the numbers of operators are one."""
        found: dict[tuple[str, str], list[str]] = {}
        for branch in self.cacheable:
            if reason := branch.token_reason:
                what = branch.kind if by == "kind" else unnumbered(branch.name)
                found.setdefault((what, re.sub(r"_\d+\b", "", reason)), []).append(reason)
        return [(what, len(reasons), reasons[0]) for (what, _), reasons in found.items()]

    def to_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return {
            "model": self.model,
            "graphs": self.graphs,
            "entries": self.entries,
            "samples": self.samples,
            "flops": self.flops,
            "reuse_flops": self.reuse_flops,
            "cache_bytes": self.cache_bytes,
            "inputs": self.inputs,
            "notes": list(self.notes),
            "breaks": [asdict(stop) for stop in self.breaks],
            "avoided": [asdict(stop) for stop in self.avoided],
            "kept_whole": self.kept_whole,
            "branches": [
                {
                    "name": b.name,
                    "kind": b.kind,
                    "dependence": b.dependence,
                    "module_path": b.module_path,
                    "flops": b.flops,
                    "cache_bytes": b.cache_bytes,
                    "cacheable": b.cacheable,
                    "reason": b.reason,
                    "tokens": b.tokens.number if b.tokens is not None else 0,
                    "token_reason": b.token_reason,
                }
                for b in self.branches
            ],
        }

    def to_html(self) -> str:
        """The report as a page that needs nothing else: no script, font or picture from elsewhere."""
        from omnifx.page import page_of  # only those who want a page load the templates

        return page_of(self)

    def save_html(self, path: str | Path) -> Path:
        """Write the page, and return its path. Raises ConfigError if it cannot be written."""
        target = Path(path)
        try:
            target.write_text(self.to_html(), encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"explain: the page {target} could not be written: {error.strerror}. Name a file in a folder that is "
                "there and yours."
            ) from error
        return target

    def __str__(self) -> str:
        width = max([len(b.name) for b in self.branches] + [6])
        lines = [
            f"{self.model}: {self.graphs} graph(s), {len(self.cacheable)} of {len(self.branches)} branches cacheable",
            f"{'branch':<{width}}  {'kind':<16} {'share':>6} {'MFLOP':>10} {'cache':>10} {'tokens':>7}",
        ]
        for b in self.branches:
            share = b.flops / self.flops if self.flops else 0.0
            size = bytes_text(b.cache_bytes) if b.cacheable else "-"
            numbers = f"{share:>6.1%} {b.flops / 1e6:>10,.2f} {size:>10} {tokens_text(b):>7}"
            lines.append(f"{b.name:<{width}}  {b.kind:<16} {numbers}")
            if b.reason:
                lines.append(f"{'':<{width}}  not cached: {b.reason}")
        left = self.reuse_flops / self.flops if self.flops else 1.0
        lines.append(
            f"a full step costs {self.flops / 1e9:,.3f} GFLOP; a reuse step {left:.2%} of it; "
            f"caches {bytes_text(self.cache_bytes)} per stream"
        )
        lines += [
            f"not token by token: {kind} ({count}): {reason}" for kind, count, reason in self.token_reasons(by="kind")
        ]
        lines += [f"input {name}: {role}" for name, role in self.inputs.items()]
        lines += [str(stop) for stop in self.breaks]
        lines += [f"kept whole, as one operator each: {place} ({n} {cls})" for place, cls, n in self.kept_places]
        lines += [f"avoided: {stop}" for stop in self.avoided]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def tokens_text(branch: Branch) -> str:
    """How many tokens of a sample a branch may be computed for one by one; "-" if it may not."""
    return f"{branch.tokens.number:,}" if branch.tokens is not None else "-"


def unnumbered(name: str) -> str:
    """A dotted name with a star for each number in it."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name)


def bytes_text(count: int) -> str:
    """A number of bytes in the largest unit that leaves at least 1."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
