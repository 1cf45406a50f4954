"""Let the output be a combination of what the graph gives, the measured noise, older outputs, and moves of the latents.

Before:  x -> trunk -> head -> output(y)
After:   x -> trunk -> head -> w0 y + w1 q + sum_j w[2 + j] o_j + sum_j w[2 + m + j] (x - x_j) -> output(y')
         with inputs w [2 + 2 m] in float32, q, and the outputs o_j and latents x_j of m full steps, newest first;
         without y nothing needs the network any more, and `Eliminate` removes it
Numerics: approximate, as the plan decides. Sums are in float32 (float64 for such outputs), and cast back. A term whose
weight is 0 is left out, whatever its value: with w = (1, 0, ...) bitwise equal to the graph without this pass.

Where output and latents have different numbers of channels (a predicted variance; an image to condition on), the moves
of those that both have go to the first channels of the output.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from omnifx.errors import PassError
from omnifx.graph import (
    EXTRA_INPUTS,
    EXTRA_OUTPUTS,
    BitSets,
    Pass,
    analysis_of,
    float_outputs,
    hint,
    inline,
    insert_input,
    output_of,
)
from omnifx.passes.write_cuts import cuts_of, require_branches
from omnifx.plan import Combination


@dataclass(frozen=True)
class Combinable:
    """Whether a graph's output can be a combination, and of what."""

    output: int = 0
    """Position of the one output that changes from step to step."""
    reason: str = ""
    """Why nothing can be combined; empty if something can."""
    latents_reason: str = ""
    """Why moves of the latents cannot be added to the output; empty if they can."""
    channels: int = 0
    """The axis along which output and latents may differ."""


def combinable(gm: fx.GraphModule, branches: tuple[str, ...]) -> Combinable:
    """What a captured graph's output can be combined of, with `branches` reused."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    inputs = analysis_of(gm).inputs
    if inputs.latents is None:
        return Combinable(reason="the model has no input that looks like latents")
    cuts = set(cuts_of(gm, branches))
    sources = [placeholders[i] for i in (inputs.latents, *inputs.further_latents)]
    sources += [node for node in gm.graph.nodes if node.name in cuts]
    sets = BitSets.of(gm.graph)
    below = 0
    for node in sources:
        below |= sets.descendants[sets.index[node]]
    outputs: Sequence[object] = output_of(gm).args[0]  # type: ignore[assignment]
    outputs = outputs[: len(outputs) - len(gm.meta.get(EXTRA_OUTPUTS, ()))]
    moving = [i for i, node in enumerate(outputs) if isinstance(node, fx.Node) and below >> sets.index[node] & 1]
    if len(moving) != 1 or moving[0] not in float_outputs(gm):
        count = len(moving)
        return Combinable(
            reason=f"{count} outputs of the model depend on its latents; it must be one, in floating point"
        )
    output: Tensor = outputs[moving[0]].meta["val"]  # type: ignore[attr-defined]
    latents: Tensor = placeholders[inputs.latents].meta["val"]
    shapes = [tuple(map(hint, value.shape)) for value in (output, latents)]
    if (channels := channels_of(*shapes)) is None:
        reason = f"its output {list(shapes[0])} and its latents {list(shapes[1])} differ in more than channels"
        return Combinable(moving[0], latents_reason=reason)
    return Combinable(moving[0], channels=channels)


def channels_of(output: Sequence[int], latents: Sequence[int]) -> int | None:
    """The axis along which an output and latents of these shapes may differ; None if they differ in more."""
    differing = [i for i, (a, b) in enumerate(zip(output, latents, strict=False)) if a != b]
    if len(output) != len(latents) or differing not in ([], [1], [2] if len(output) == 3 else [1]):
        return None
    return differing[0] if differing else 1


def combined(
    combination: Combination,
    outputs: Sequence[Tensor],
    latents: Tensor,
    past_latents: Sequence[Tensor | None],
    channels: int,
) -> Tensor:
    """What a skipped step gives, outside of any graph.

    Args:
        combination: Without the graph's output and noise; it reads at most as many full steps as are given.
        outputs: Of full steps, newest first.
        latents: Now.
        past_latents: Those of the same full steps.
        channels: See `channels_of`.
    """
    moved = [then for then in past_latents if then is not None]
    terms = tuple(2 + j for j in range(len(outputs)))
    moves = tuple(2 + len(outputs) + j for j in range(len(moved)))
    weights = outputs[0].new_tensor(combination.vector(len(outputs)), dtype=torch.float32)
    return _combiner(terms, moves, channels)(weights, *outputs, latents, *moved)


@dataclass(frozen=True, kw_only=True)
class CombineOutput(Pass):
    """Read ``combination`` (the weights), ``noise:<output position>``, ``past_output:<j>`` and ``past_latents:<j>``.

    Runs before `ReadCuts`: it asks which outputs the cuts change. Latents are not read where they cannot be added.
    """

    branches: tuple[str, ...]  # the reused or skipped ones
    history: int  # full steps that are read; >= 0
    noise: bool  # whether the noise is read
    reuse: bool  # whether the graph's own output is a term; otherwise nothing of the network stays

    def requires(self, gm: fx.GraphModule) -> None:
        require_branches(self, gm, self.branches)
        if any(label.startswith("cut:") for label in gm.meta.get(EXTRA_INPUTS, ())):
            raise PassError(f"{self.name}: the cuts were already replaced; run it before ReadCuts.")
        if self.history < 0 or not (self.reuse or self.history):
            raise PassError(
                f"{self.name}: history must be >= 0 (full steps), and >= 1 without the graph's own output, got "
                f"{self.history}."
            )
        if reason := combinable(gm, self.branches).reason:
            raise PassError(f"{self.name}: the output cannot be combined: {reason}.")

    def call(self, gm: fx.GraphModule) -> bool:
        found = combinable(gm, self.branches)
        end = output_of(gm)
        outputs = list(end.args[0])  # type: ignore[arg-type]
        old = outputs[found.output]
        fake: Tensor = old.meta["val"]
        weights = insert_input(
            gm,
            "combination",
            label="combination",
            like=fake.new_empty(2 + 2 * self.history, dtype=torch.float32),
        )
        terms = {0: old} if self.reuse else {}
        if self.noise:
            terms[1] = insert_input(gm, "combined_noise", label=f"noise:{found.output}", like=fake)
        for j in range(self.history):
            terms[2 + j] = insert_input(gm, f"past_output_{j}", label=f"past_output:{j}", like=fake)
        moves: dict[int, fx.Node] = {}
        latents: list[fx.Node] = []
        if self.history and not found.latents_reason:
            at = analysis_of(gm).inputs.latents
            latents = [[node for node in gm.graph.nodes if node.op == "placeholder"][at]]  # type: ignore[index]
            value: Tensor = latents[0].meta["val"]
            for j in range(self.history):
                like = value.new_empty(value.shape)
                moves[2 + self.history + j] = insert_input(
                    gm, f"past_latents_{j}", label=f"past_latents:{j}", like=like
                )
        combine = _combiner(tuple(terms), tuple(moves), found.channels)
        given = [weights, *terms.values(), *latents, *moves.values()]
        combined = inline(gm, combine, given, before=end)
        combined.meta = {**old.meta, "val": fake}
        outputs[found.output] = combined
        end.args = (tuple(outputs),)
        return True

    def ensures(self, gm: fx.GraphModule) -> None:
        unread = [node.name for node in gm.graph.nodes if node.name.startswith("past_") and not node.users]
        if unread:
            raise PassError(f"{self.name}: nothing uses the inputs {unread} that it added.")


def _combiner(terms: tuple[int, ...], moves: tuple[int, ...], channels: int) -> Callable[..., Tensor]:
    """The sum over values at the positions `terms` and moves of the latents at the positions `moves` of the weights."""

    def combine(weights: Tensor, *values: Tensor) -> Tensor:
        dtype = values[0].dtype
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        total = torch.zeros_like(values[0], dtype=precise)
        for i, value in zip(terms, values, strict=False):
            total = _plus(total, weights[i], value.to(precise), first=i == terms[0])
        if moves:
            now, *past = (value.to(precise) for value in values[len(terms) :])
            both, rest = _first_channels(total, now, channels)
            for i, then in zip(moves, past, strict=True):
                both = _plus(both, weights[i], _as_wide(now - then, both, channels), first=False)
            total = both if rest is None else torch.cat([both, rest], dim=channels)
        return total.to(dtype)

    return combine


def _plus(total: Tensor, weight: Tensor, value: Tensor, *, first: bool) -> Tensor:
    """``total + weight * value``, and `total` itself where the weight is 0: a value that is not finite has no say."""
    return torch.where(weight == 0, total, weight * value if first else total + weight * value)


def _first_channels(output: Tensor, latents: Tensor, axis: int) -> tuple[Tensor, Tensor | None]:
    """The output's channels that the latents have as well, and those that they lack."""
    have, common = output.shape[axis], latents.shape[axis]
    if hint(have) <= hint(common):
        return output, None
    return output.narrow(axis, 0, common), output.narrow(axis, common, have - common)


def _as_wide(latents: Tensor, output: Tensor, axis: int) -> Tensor:
    """The first channels of the latents, as many as the output has."""
    if hint(latents.shape[axis]) == hint(output.shape[axis]):
        return latents
    return latents.narrow(axis, 0, output.shape[axis])
