"""Return the residuals of spans beside the outputs, so that later steps can reuse whole ranges of blocks.

Before:  start -> blocks -> end -> ... -> output(y)
After:   the same, and sub(end, start) -> delta ; output(y, delta)
Numerics: bitwise equal for the outputs that were there. The difference is taken in float32 at least, and rounded to the
end's type.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from omnifx.errors import PassError
from omnifx.graph import EXTRA_OUTPUTS, Pass, append_output, inline, nodes_by_name, output_of
from omnifx.spans import Span


@dataclass(frozen=True, kw_only=True)
class WriteSpans(Pass):
    """Append one output for each end of each span, labelled ``cut:<span>:<end>``; runs before `ReadSpans`, so that
    a start or end that another span gives is the one that was read."""

    spans: tuple[Span, ...]

    def requires(self, gm: fx.GraphModule) -> None:
        require_spans(self, gm, self.spans)

    def call(self, gm: fx.GraphModule) -> bool:
        nodes = nodes_by_name(gm)
        for span in self.spans:
            for cut, start, end in zip(span.cuts, span.starts, span.ends, strict=True):
                delta = inline(gm, _difference, [nodes[end], nodes[start]], before=output_of(gm))
                append_output(gm, delta, label=f"cut:{cut}")
        return bool(self.spans)

    def ensures(self, gm: fx.GraphModule) -> None:
        labels = set(gm.meta.get(EXTRA_OUTPUTS, ()))
        if missing := [cut for span in self.spans for cut in span.cuts if f"cut:{cut}" not in labels]:
            raise PassError(f"{self.name}: the deltas {missing} are not among the outputs.")


def require_spans(step: Pass, gm: fx.GraphModule, spans: tuple[Span, ...]) -> None:
    """Raise PassError unless all spans can be reused, and the graph has their starts and ends."""
    nodes = nodes_by_name(gm)
    for span in spans:
        if span.reason or not span.ends:
            raise PassError(f"{step.name}: {span.name} cannot be reused: {span.reason or 'it has no ends'}.")
        if missing := [name for name in (*span.starts, *span.ends) if name not in nodes]:
            raise PassError(f"{step.name}: the graph lacks {missing} of {span.name}; find the spans of this graph.")


def _difference(end: Tensor, start: Tensor) -> Tensor:
    wide = torch.promote_types(end.dtype, torch.float32)
    return (end.to(wide) - start.to(wide)).to(end.dtype)
