"""Skip the whole model while the output's change, predicted from the latents' change, stays small.

With x the latents and y the output of a step: at computed steps ``k = mean|y - y'| / mean|x - x'|``, primes being the
last computed step before. At each step the predicted relative change of the output,
``k * mean|x_t - x_{t-1}| / mean|y_last|``, is added up; while the sum is below `threshold` the step is skipped, and its
output is ``x_t + (y - x)`` of the last computed step. The sum starts anew at each computed step. The first `warmup`
steps and, if it is known, the last one compute.
Source: EasyCache, arXiv:2507.02860 (H-EmbodVis/EasyCache): threshold 0.05 and 10 steps on Wan, 0.025 and 5 on
HunyuanVideo.
Ours: where latents and output differ in channels, x is cut or filled up with zeros (a learned variance is reused as it
is); k and sizes are those of each sample, and the largest prediction decides.
Cost: nothing of the model at a skipped step; five tensors of the latents' size are kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, fx

from omnifx.errors import PassError
from omnifx.policy import register
from omnifx.probes import Keep, Measured, Pair, Probe, Trunk, Values, size_of
from omnifx.runtime import Decision, RuntimePolicy, Step, check_count, check_number


def like_output(x: Tensor, channels: int) -> Tensor:
    """The latents with the output's channels: cut, or filled up with zeros."""
    missing = channels - x.shape[1]
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing)) if missing > 0 else x[:, :channels]


def minus_latents(y: Tensor, x: Tensor) -> Tensor:
    """What the model made of its latents, as a residual."""
    return y - like_output(x, y.shape[1])


def plus_residual(x: Tensor, residuals: Sequence[Tensor], marks: Sequence[Tensor]) -> Tensor:
    """An output from the latents and an earlier residual."""
    return like_output(x, residuals[0].shape[1]) + residuals[0]


def predicted_change(values: Values, old: Values) -> Measured:
    """The relative change of the output that this step's latents let expect."""
    x = values["latents"]
    moved = size_of(x.float() - old["x"].float(), x)
    return {"predicted": old["k"] * moved / old["size"]}, {"x": x}


def learn_rate(values: Values, old: Values) -> Measured:
    """At a computed step: the rate k, the output's size, and what the next ones are told from."""
    x, y = values["latents"], values["output"]
    k = size_of(y.float() - old["y"].float(), x) / size_of(x.float() - old["x_computed"].float(), x)
    return {}, {"y": y, "x_computed": x, "k": k, "size": size_of(y, x)}


@dataclass(frozen=True)
class EasyState:
    """The sum of predicted changes, and how many steps of the stream were computed (k is known from the second on)."""

    total: float = 0.0
    computed: int = 0


@register
@dataclass(frozen=True, kw_only=True)
class EasyCache(RuntimePolicy[EasyState]):
    """Skip the model while the predicted change of its output adds up to little."""

    name: ClassVar[str] = "easycache"
    uses_steps: ClassVar[str] = "the last step is not known to be the last, and may be skipped"

    threshold: float = 0.05  # sum of predicted relative changes from which a step computes
    warmup: int = 10  # first steps, all computed

    def __post_init__(self) -> None:
        check_number(self.name, "threshold", self.threshold, 0.0)
        check_count(self.name, "warmup", self.warmup, 2)

    def probe(self, gm: fx.GraphModule, trunk: Trunk) -> Probe:
        if not trunk.output or trunk.other_outputs:
            found = f"{trunk.other_outputs} more outputs" if trunk.output else "no output of the latents' size"
            raise PassError(
                f"{self.name} replaces the whole model, whose one output has the latents' size; found {found}."
            )
        return Probe(
            signals=("predicted",),
            reads=(("latents", trunk.latents),),
            measure=predicted_change,
            keeps=(Keep("x", like=trunk.latents, every=True),),
            span=(Pair(trunk.latents, trunk.output),),
            residual=minus_latents,
            restore=plus_residual,
            ends=(("output", trunk.output),),
            finish=learn_rate,
            finish_keeps=(
                Keep("y", like=trunk.output),
                Keep("x_computed", like=trunk.latents),
                Keep("k"),
                Keep("size"),
            ),
        )

    def start(self) -> EasyState:
        return EasyState()

    def decide(self, state: EasyState, signals: Sequence[float], step: Step) -> Decision[EasyState]:
        computed = EasyState(0.0, state.computed + 1)
        if why := step.must or self._early_or_last(state, step):
            return Decision(True, computed, why)
        total = state.total + signals[0]
        shown = {"accumulated": total}
        if total < self.threshold:
            return Decision(False, EasyState(total, state.computed), f"{total:.4f} < {self.threshold:g}", shown)
        return Decision(True, computed, f"{total:.4f} >= {self.threshold:g}", shown)

    def _early_or_last(self, state: EasyState, step: Step) -> str:
        if step.index < self.warmup:
            return f"step {step.index} of {self.warmup} to warm up"
        if state.computed < 2:
            return "the rate of change is not known yet"
        return "the last step" if step.is_last else ""
