"""Tell beside an attention how important each of its tokens is, for later steps that compute some tokens only.

Before:  q, k, v -> attention -> proj (the cut) -> ...
After:   the same, and v -> norm -> sum over the heads -> a further output ``score:<attention>`` [B, tokens]; and the
         attentions that parallel branches join are further outputs ``cut:<node>``
Numerics: bitwise equal for the outputs that were there. Scores are float32.
Cost: the norms read keys or values once. "attention" makes the map that fused attention avoids: see
`omnifx.tokens.importance`. Source: ToCa, arXiv:2410.05317; DuCa, arXiv:2412.18911.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, fx

from omnifx.graph import (
    Branch,
    Pass,
    TokenSource,
    append_output,
    argument_of,
    branches_of,
    inline,
    nodes_by_name,
    output_of,
)
from omnifx.passes.write_cuts import require_branches
from omnifx.tokens import NEEDS_QUERIES, Selection, importance


@dataclass(frozen=True, kw_only=True)
class ScoreTokens(Pass):
    """Append the scores of all attentions that the graph still computes, and what parallel branches hold of them."""

    branches: tuple[str, ...]  # those whose tokens are chosen in other steps
    selection: Selection

    def requires(self, gm: fx.GraphModule) -> None:
        require_branches(self, gm, self.branches)

    def call(self, gm: fx.GraphModule) -> bool:
        nodes = nodes_by_name(gm)
        held = {name: None for branch in self._partial(gm) for name in branch.tokens.held}  # type: ignore[union-attr]
        for name in held:
            if name in nodes:
                append_output(gm, nodes[name], label=f"cut:{name}")
        sources = {source.node: None for b in self._partial(gm) if (source := source_of(b, self.selection)) is not None}
        for name in sources:
            if name in nodes:
                score = inline(
                    gm, scorer(self.selection, nodes[name]), attention_inputs(nodes[name]), before=output_of(gm)
                )
                append_output(gm, score, label=f"score:{name}")
        return any(name in nodes for name in (*held, *sources))

    def _partial(self, gm: fx.GraphModule) -> list[Branch]:
        return [branch for name, branch in branches_of(gm).items() if name in self.branches and branch.tokens]


def source_of(branch: Branch, selection: Selection) -> TokenSource | None:
    """The attention that scores a branch's tokens; None if there is none, or none is wanted."""
    if branch.tokens is None or selection.score == "none":
        return None
    return branch.tokens.queries if selection.score in NEEDS_QUERIES else branch.tokens.keys


def attention_inputs(node: fx.Node) -> list[fx.Node]:
    """Queries, keys, values and the mask, if there is one, of a fused attention."""
    operands = [*node.args[:3], argument_of(node, "attn_mask") or argument_of(node, "attn_bias")]
    return [operand for operand in operands if isinstance(operand, fx.Node)]


def scorer(selection: Selection, node: fx.Node) -> Callable[..., Tensor]:
    """The function from an attention's inputs to its tokens' importance."""
    scale = argument_of(node, "scale")

    def score(query: Tensor, key: Tensor, value: Tensor, *mask: Tensor) -> Tensor:
        found = importance(selection, query, key, value, mask[0] if mask else None, scale)
        assert found is not None  # a selection without a score has no sources
        return found

    return score


__all__ = ["ScoreTokens", "attention_inputs", "scorer", "source_of"]
