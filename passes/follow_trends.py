"""Move the values that predicted branches read on by what a prior expects of them: the trend E of this step.

Before:  predicted_proj                              -> mul(gate) -> add(trunk)
After:   predicted_proj * (1 + s E)   (form "scale") -> mul(gate) -> add(trunk)
         or predicted_proj + s E      (form "shift"), with inputs E [rows of a sample, ...] for each cut, and one s [1]
Numerics: approximate, as the plan decides; with s = 0 and finite E bitwise equal to the graph without this pass.

What is stored of a prediction is the moved value. E stands for all samples of the batch, in float32.
Source: EOC, arXiv:2501.19243, form "scale" with s = 0.01; form "shift", whose s has no unit, is ours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from omnifx.errors import PassError
from omnifx.graph import Pass, analysis_of, hint, inline, insert_input, nodes_by_name
from omnifx.passes.predict_cuts import predicted_name
from omnifx.passes.write_cuts import cuts_of, require_branches

Form = Literal["scale", "shift"]


@dataclass(frozen=True, kw_only=True)
class FollowTrends(Pass):
    """Read ``trend:<node name>`` and ``trend_scale``; runs after `PredictCuts`."""

    branches: tuple[str, ...]  # the predicted ones
    form: Form

    def requires(self, gm: fx.GraphModule) -> None:
        require_branches(self, gm, self.branches)
        nodes = nodes_by_name(gm)
        if missing := [name for name in cuts_of(gm, self.branches) if predicted_name(name) not in nodes]:
            raise PassError(f"{self.name}: the cuts {missing} are not predicted; run PredictCuts first.")

    def call(self, gm: fx.GraphModule) -> bool:
        nodes = nodes_by_name(gm)
        latents = analysis_of(gm).inputs.latents
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        scale: fx.Node | None = None
        for name in cuts_of(gm, self.branches):
            predicted = nodes[predicted_name(name)]
            fake: Tensor = predicted.meta["val"]
            samples = placeholders[latents].meta["val"].shape[0] if latents is not None else 1
            rows = hint(fake.shape[0]) // hint(samples)
            if rows * hint(samples) != hint(fake.shape[0]):
                raise PassError(
                    f"{self.name}: the cut {name} has {hint(fake.shape[0])} rows for {hint(samples)} samples, so that "
                    "a prior of one sample does not fit it."
                )
            like = fake.new_empty((rows, *fake.shape[1:]), dtype=torch.float32)
            trend = insert_input(gm, f"trend_{name}", label=f"trend:{name}", like=like)
            if scale is None:
                like = fake.new_empty(1, dtype=torch.float32)
                scale = insert_input(gm, "trend_scale", label="trend_scale", like=like)
            users = list(predicted.users)
            moved = inline(gm, _mover(self.form), [predicted, trend, scale], before=predicted.next)
            moved.meta = {**predicted.meta, "val": moved.meta["val"]}
            for user in users:
                user.replace_input_with(predicted, moved)
        return bool(self.branches)

    def ensures(self, gm: fx.GraphModule) -> None:
        nodes = nodes_by_name(gm)
        if unread := [n for n in cuts_of(gm, self.branches) if f"trend_{n}" in nodes and not nodes[f"trend_{n}"].users]:
            raise PassError(f"{self.name}: nothing reads the trends of {unread}.")


def _mover(form: Form) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def move(value: Tensor, trend: Tensor, scale: Tensor) -> Tensor:
        precise = torch.float64 if value.dtype == torch.float64 else torch.float32
        samples: Tensor = value.to(precise).unflatten(0, (-1, trend.shape[0]))
        change = scale[0] * trend.to(precise)
        moved = samples * (1.0 + change) if form == "scale" else samples + change
        return moved.flatten(0, 1).to(value.dtype)

    return move
