"""Subtract the predicted cache-induced noise from a reuse step's output: y - F(gamma q).

Before:  ... -> head -> output(y)
After:   ... -> head -> sub(y, a q + b L q) -> output(y')      with inputs q, (a, b) and one projection L for each grid
axis
Numerics: approximate, as the plan decides; with a = b = 0 it is bitwise equal to the graph without this pass.

The filter F is a constant separable projection: L q applies, along each axis of the output's grid, the matrix that
keeps the lowest frequencies of an orthonormal cosine transform. (a, b) = (gamma, 0) subtracts everything, (0, gamma)
the low, (gamma, -gamma) the high frequencies: one graph serves every step, and lowers alike to Inductor, ONNX and
TensorRT (small matrix products only). Source of the correction: OmniCache, arXiv:2508.16212; the filter's form is ours.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from omnifx.errors import PassError
from omnifx.graph import EXTRA_INPUTS, Pass, inline, insert_input, nodes_by_name, output_of
from omnifx.grid import Grid
from omnifx.passes.measure_noise import noisy_outputs


@dataclass(frozen=True, kw_only=True)
class CorrectNoise(Pass):
    """Correct every output that the reused branches change; runs before `ReadCuts`, which takes those branches away."""

    branches: tuple[str, ...]  # the reused ones
    grids: tuple[tuple[int, Grid], ...]  # of each output position; the grid's axes carry the filter

    def requires(self, gm: fx.GraphModule) -> None:
        if any(label.startswith("cut:") for label in gm.meta.get(EXTRA_INPUTS, ())):
            raise PassError(f"{self.name}: the cuts were already replaced; run it before ReadCuts.")

    def call(self, gm: fx.GraphModule) -> bool:
        positions = noisy_outputs(gm, self.branches)
        grids = dict(self.grids)
        end = output_of(gm)
        values = list(end.args[0])  # type: ignore[arg-type]
        coefficients: fx.Node | None = None
        for position in positions:
            node = values[position]
            fake: Tensor = node.meta["val"]
            grid = grids[position]
            if coefficients is None:
                coefficients = insert_input(
                    gm, "noise_coefficients", label="coefficients", like=fake.new_empty(2, dtype=torch.float32)
                )
            noise = insert_input(gm, f"noise_{position}", label=f"noise:{position}", like=fake)
            bases = [
                insert_input(
                    gm,
                    f"low_pass_{position}_{axis}",
                    label=f"low_pass:{size}",
                    like=fake.new_empty(size, size, dtype=torch.float32),
                )
                for axis, size in enumerate(grid.sizes)
            ]
            values[position] = inline(gm, _corrector(grid), [node, noise, coefficients, *bases], before=end)
            values[position].meta = {**node.meta, "val": fake}
        end.args = (tuple(values),)
        return bool(positions)

    def ensures(self, gm: fx.GraphModule) -> None:
        nodes = nodes_by_name(gm)
        if "noise_coefficients" in nodes and not nodes["noise_coefficients"].users:
            raise PassError(f"{self.name}: the correction was inserted but nothing uses it.")


def _corrector(grid: Grid) -> Callable[..., Tensor]:
    def correct(output: Tensor, noise: Tensor, coefficients: Tensor, *low_pass: Tensor) -> Tensor:
        noise = noise.float()
        change = coefficients[0] * noise
        if low_pass:
            low = noise.unflatten(1, grid.shape[1:3]) if len(grid.shape) > noise.dim() else noise  # tokens of an image
            for axis, matrix in zip(grid.axes, low_pass, strict=True):
                moved = low.movedim(axis, -1)
                low = (moved.reshape(-1, moved.shape[-1]) @ matrix).reshape(moved.shape).movedim(-1, axis)
            change = change + coefficients[1] * low.reshape(noise.shape)
        return (output.float() - change).to(output.dtype)

    return correct
