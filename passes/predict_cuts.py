"""Replace the cuts of predicted branches by a combination of their stored values; what only fed them is dead.

Before:  trunk -> norm -> attention -> proj (the cut)                -> mul(gate) -> add(trunk)
After:   w[0] * cached_proj + w[1] * cached1_proj + ... (in float32) -> mul(gate) -> add(trunk)
         with inputs cached_proj (the newest value), cached1_proj, ..., and one w [terms] for all cuts
Numerics: approximate, as the plan decides; with w = (1, 0, ...) and finite values bitwise equal to `ReadCuts`, but for
the sign of a zero.

The predictors of TaylorSeer, GOC, MeanCache, Spectrum, FoCa and others are linear in what is stored, so that one graph
serves all of them, and every step: only the numbers in w differ. `omnifx.predictors` makes them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from omnifx.errors import PassError
from omnifx.graph import Pass, append_output, inline, insert_input, nodes_by_name
from omnifx.passes.write_cuts import cuts_of, require_branches


@dataclass(frozen=True, kw_only=True)
class PredictCuts(Pass):
    """Read ``cut:<node name>``, ``cut:<node name>@1``, ... and ``predictor``."""

    branches: tuple[str, ...]  # names, as MatchReport prints them
    terms: int  # stored values of each cut; >= 1
    stores: bool = False  # whether to return what was predicted, as `WriteCuts` returns what was computed

    def requires(self, gm: fx.GraphModule) -> None:
        require_branches(self, gm, self.branches)
        if self.terms < 1:
            raise PassError(f"{self.name}: terms must be >= 1 (stored values), got {self.terms}.")

    def call(self, gm: fx.GraphModule) -> bool:
        nodes = nodes_by_name(gm)
        weights: fx.Node | None = None
        for name in cuts_of(gm, self.branches):
            cut = nodes[name]
            fake: Tensor = cut.meta["val"]
            stored = [
                insert_input(
                    gm,
                    f"cached{age or ''}_{name}",
                    label=f"cut:{name}@{age}" if age else f"cut:{name}",
                    like=fake,
                )
                for age in range(self.terms)
            ]
            if weights is None:
                like = fake.new_empty(self.terms, dtype=torch.float32)
                weights = insert_input(gm, "predictor", label="predictor", like=like)
            predicted = inline(gm, combine, [weights, *stored], before=cut)
            predicted.meta = {**cut.meta, "val": predicted.meta["val"]}
            predicted._rename(predicted_name(name))
            cut.replace_all_uses_with(predicted)
            if self.stores:
                append_output(gm, predicted, label=f"cut:{name}")
        return bool(self.branches)

    def ensures(self, gm: fx.GraphModule) -> None:
        nodes = nodes_by_name(gm)
        if used := [name for name in cuts_of(gm, self.branches) if name in nodes and nodes[name].users]:
            raise PassError(f"{self.name}: the cuts {used} are still used after they were replaced.")


def predicted_name(cut: str) -> str:
    """The name of the node that stands for a predicted cut."""
    return f"predicted_{cut}"


def combine(weights: Tensor, *stored: Tensor) -> Tensor:
    """The sum of stored values, each times its weight, in at least float32."""
    newest = stored[0]
    precise = torch.float64 if newest.dtype == torch.float64 else torch.float32
    total = weights[0] * newest.to(precise)
    for i, older in enumerate(stored[1:], start=1):
        total = total + weights[i] * older.to(precise)
    return total.to(newest.dtype)
