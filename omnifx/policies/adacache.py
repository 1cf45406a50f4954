"""After each computed step, choose how many steps to reuse all of its attention and MLP outputs: few where much moves.

``d = ||p' - p|| / ||p'|| / n`` with p what an attention in the middle of the model adds to the trunk, p' that of the
computed step before (n steps ago), in the 1-norm. A codebook turns d into the number of steps to the next computed one:
the first entry whose bound is above d. MoReg multiplies d by ``m + |10 (m - m') / n|``, where m is the relative change
from frame to frame, ``||p_{f+1} - p_f|| / (||p_{f+1}|| + ||p_f||)``, over 0.385, to the eighth power, and m' that of
the computed step before; only between a tenth and nine tenths of the steps.
Source: AdaCache, arXiv:2411.02397 (AdaCache-DiT/AdaCache): block 13 of 28, temporal attention, codebooks for 30 and 100
steps.
Ours: what is reused are cuts, before the gates, which are computed anew; the block is the one before the middle, its
temporal attention if it has one, else its self-attention; the largest d and m over a batch's samples decide; where the
number of steps is not known MoReg acts at every step.
Cost: nothing of the model is computed for the signal; all cuts and one further trunk are kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from omnifx.errors import ConfigError, PassError
from omnifx.graph import hint
from omnifx.policy import register
from omnifx.probes import Keep, Measured, Probe, Trunk, Values, change
from omnifx.runtime import Decision, RuntimePolicy, Step, check_count, check_number

CODEBOOKS: dict[str, tuple[tuple[float, int], ...]] = {
    "fast": ((0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.40, 2), (1.0, 1)),
    "slow": ((0.08, 3), (0.16, 2), (1.0, 1)),
    "100-steps": ((0.03, 12), (0.05, 10), (0.07, 8), (0.09, 6), (0.11, 4), (1.0, 3)),
}
"""Published: bounds of d, and steps to the next computed one. "fast" and "slow" are for 30 steps."""

MOTION = 0.385
POWER = 8
GRADIENT = 10.0


def frames_first(value: Tensor, latents: Tensor, axis: int, *, temporal: bool) -> Tensor:
    """[B, F, n], float32: what an attention adds to the trunk, by sample and frame.

    It is [B, F * places, width], [B * F, places, width], or, of a temporal attention, [B * places, F, width].
    """
    batch, frames = latents.shape[0], latents.shape[axis]
    if temporal and hint(value.shape[0]) != hint(batch):
        return value.float().reshape(batch, -1, frames, value.shape[-1]).transpose(1, 2).flatten(2)
    return value.float().reshape(batch, frames, -1)


def motion(value: Tensor, latents: Tensor, axis: int, *, temporal: bool) -> Tensor:
    """[B]: how much differs from frame to frame, over the sizes of both."""
    frames = frames_first(value, latents, axis, temporal=temporal)
    after, before = frames[:, 1:], frames[:, :-1]
    moved = (after - before).abs().sum((1, 2))
    return moved / (after.abs().sum((1, 2)) + before.abs().sum((1, 2)))


@dataclass(frozen=True)
class AdaState:
    """How many steps are still to be reused, how many lay between the last computed ones, the last m, and how many
    steps of the stream were computed."""

    left: int = 0
    rate: int = 1
    motion: float = 1.0
    computed: int = 0


@register
@dataclass(frozen=True, kw_only=True)
class AdaCache(RuntimePolicy[AdaState]):
    """Reuse all branches for a number of steps that the last computed ones tell."""

    name: ClassVar[str] = "adacache"
    uses_steps: ClassVar[str] = "MoReg, if it is on, acts at every step"

    codebook: str | tuple[tuple[float, int], ...] = "fast"  # bounds of d, ascending, and steps to the next computed one
    moreg: bool = False  # whether motion between frames regularises d; for video only
    block: int | None = None  # whose attention is looked at; None: the one before the middle
    active: tuple[float, float] = (0.1, 0.9)  # shares of the steps between which MoReg acts

    def __post_init__(self) -> None:
        if isinstance(self.codebook, str) and self.codebook not in CODEBOOKS:
            raise ConfigError(
                f"{self.name}: codebook must be one of {list(CODEBOOKS)} or pairs, got {self.codebook!r}."
            )
        book = self.book
        for bound, rate in book:
            check_number(self.name, "codebook's bounds", bound, 0.0)
            check_count(self.name, "codebook's steps", rate, 1)
        if not book or [bound for bound, _ in book] != sorted(bound for bound, _ in book):
            raise ConfigError(f"{self.name}: codebook's bounds must ascend, got {self.codebook!r}.")
        if self.block is not None:
            check_count(self.name, "block", self.block, 0)

    @property
    def book(self) -> tuple[tuple[float, int], ...]:
        """The codebook as pairs."""
        return CODEBOOKS[self.codebook] if isinstance(self.codebook, str) else self.codebook

    def probe(self, gm: fx.GraphModule, trunk: Trunk) -> Probe:
        if not trunk.attentions:
            raise PassError(f"{self.name} looks at what a self-attention adds to the latents' trunk; there is none.")
        temporal = [(path, node) for path, node in trunk.attentions if "temp" in path]
        choice = temporal or list(trunk.attentions)
        at = max(0, len(choice) // 2 - 1) if self.block is None else self.block
        if at >= len(choice):
            raise PassError(f"{self.name}: block={at}, but there are only {len(choice)} attentions to look at.")
        node, axis = choice[at][1], trunk.frame_axis
        if self.moreg and axis is None:
            raise PassError(f"{self.name}: moreg=True needs video latents, [B, C, F, H, W] or [B, F, C, H, W].")

        def look(values: Values, old: Values) -> Measured:
            added, latents = values["added"], values["latents"]
            signals = {"change": change(added, old["added"], latents)}
            if self.moreg and axis is not None:
                signals["motion"] = motion(added, latents, axis, temporal=bool(temporal))
            return signals, {"added": added}

        signals = ("change", "motion") if self.moreg else ("change",)
        return Probe(
            signals=signals,
            finish_signals=signals,
            ends=(("added", node),),
            finish=look,
            finish_keeps=(Keep("added", like=node),),
        )

    def start(self) -> AdaState:
        return AdaState()

    def decide(self, state: AdaState, signals: Sequence[float], step: Step) -> Decision[AdaState]:
        shown: dict[str, float] = {}
        if signals and state.computed >= 2:
            state, shown = self._judge(state, signals, step)
        elif signals:
            state = AdaState(0, 1, state.motion, state.computed)
        shown["left"] = float(state.left)
        computed = AdaState(0, state.rate, state.motion, state.computed + 1)
        if step.must:
            return Decision(True, computed, step.must, shown)
        if state.left > 0:
            left = AdaState(state.left - 1, state.rate, state.motion, state.computed)
            return Decision(False, left, f"{state.left} steps left to reuse", shown)
        return Decision(True, computed, "no steps left to reuse", shown)

    def _judge(self, state: AdaState, signals: Sequence[float], step: Step) -> tuple[AdaState, dict[str, float]]:
        """What the last computed step says of those after it."""
        distance = signals[0] / state.rate
        moving, shown = 1.0, {}
        if self.moreg:
            low, high = (int(share * (step.total or 0)) for share in self.active)
            if step.total is None or low <= step.index - 1 <= high:
                moving = (signals[1] / MOTION) ** POWER
            distance *= moving + abs(GRADIENT * (moving - state.motion) / state.rate)
            shown["regularised"] = moving
        known = math.isfinite(distance)
        rate = next((rate for bound, rate in self.book if distance < bound), self.book[-1][1]) if known else 1
        shown["distance"], shown["rate"] = distance if known else math.inf, float(rate)
        return AdaState(rate - 1, rate, moving, state.computed), shown
