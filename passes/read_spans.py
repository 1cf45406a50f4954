"""Reuse whole ranges of blocks: a span's end is its start plus the residual of an earlier step.

Before:  start -> blocks (norms, attentions, MLPs, gates) -> end -> ...
After:   start, delta (an input) -> add -> ...     and what only the blocks needed is dead, and `Eliminate` removes it
Numerics: fed this step's own delta, close: start + (end - start) rounds twice, so each element is off by at most
eps * (|start| + 2 |end|), with eps of float32 or of the end's type if that is narrower; otherwise approximate, as the
plan decides.
Source: deltas of ranges of blocks: Delta-DiT, arXiv:2406.01125; of the whole stack: TeaCache, arXiv:2411.19108.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from omnifx.errors import PassError
from omnifx.graph import Pass, inline, insert_input, nodes_by_name
from omnifx.passes.write_spans import require_spans
from omnifx.spans import Span


@dataclass(frozen=True, kw_only=True)
class ReadSpans(Pass):
    """Replace each end by its start plus an input labelled ``cut:<span>:<end>``."""

    spans: tuple[Span, ...]

    def requires(self, gm: fx.GraphModule) -> None:
        require_spans(self, gm, self.spans)

    def call(self, gm: fx.GraphModule) -> bool:
        nodes = nodes_by_name(gm)
        for span in sorted(self.spans, key=lambda span: span.last, reverse=True):  # a start may be another's end
            for cut, start, end in zip(span.cuts, span.starts, span.ends, strict=True):
                old = nodes[end]
                name = f"cached_{span.name}_{end}".replace("-", "_")
                delta = insert_input(gm, name, label=f"cut:{cut}", like=old.meta["val"])
                new = inline(gm, _sum(old.meta["val"].dtype), [nodes[start], delta], before=old.next)
                old.replace_all_uses_with(new)
        return bool(self.spans)

    def ensures(self, gm: fx.GraphModule) -> None:
        nodes = nodes_by_name(gm)
        if used := [end for span in self.spans for end in span.ends if end in nodes and nodes[end].users]:
            raise PassError(f"{self.name}: the ends {used} are still used after they were replaced.")


def _sum(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    wide = torch.promote_types(dtype, torch.float32)

    def add(start: Tensor, delta: Tensor) -> Tensor:
        return (start.to(wide) + delta.to(wide)).to(dtype)

    return add
