"""Plans that reuse spans, predict the branches outside of them, correct outputs and merge halves of the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import omnifx
from omnifx.plan import COMPUTE, PREDICT, REUSE, Action, Correction, Plan
from omnifx.policy import Policy
from omnifx.predictors import resolve_predictor, with_predictor
from omnifx.profile import Profile
from omnifx.session import find_session
from tests.policies.following import Hooked
from tests.policies.stacks import block_profile
from tests.toys import EAGER, ToyDiT, distance, generate, letters_of, noise, timesteps, toy

SPAN = "span0-0"
DELTA_BYTES = 16 * 32 * 4  # one residual of [1, 16, 32]


@dataclass(frozen=True, kw_only=True)
class Together(Policy):
    """F computes, p predicts all, s reuses the first block as one and predicts the rest, S does so with a correction, P
    predicts with a correction, M computes and merges behind the step."""

    name = "together"

    letters: str = "FFsp"

    @property
    def terms(self) -> int:
        return resolve_predictor("newton:1").terms

    def plan(self, profile: Profile, *, speedup: float | None = None) -> Plan:
        letters = (self.letters * profile.num_steps)[: profile.num_steps]
        names = tuple(branch.name for branch in profile.meta.branches)
        actions: list[tuple[Action, Action]] = [
            (COMPUTE if letter in "FM" else REUSE, REUSE if letter in "sS" else COMPUTE) for letter in letters
        ]
        plan = Plan.from_rows(
            profile,
            [(branch,) * len(names) + (span,) for branch, span in actions],
            policy=self.name,
            corrections=[Correction(gamma=0.5) if letter in "SP" else None for letter in letters],
            spans=[SPAN],
            merges={k: names for k, letter in enumerate(letters) if letter == "M"},
        )
        return with_predictor(plan, profile, "newton:1")


@dataclass
class Eager:
    """The same in eager mode: branches on the line through their last two stored values, and the first block's last
    residual; `noise` is that of predicting everything at the last full step."""

    model: ToyDiT
    letters: str
    values: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)
    residual: Tensor | None = None
    noise: Tensor | None = None
    step: int = 0

    def __call__(self, *args: Any) -> Tensor:
        letter = self.letters[self.step]
        if letter in "FM" and self.corrects and len(next(iter(self.values.values()), [])) > 1:
            predicted = self._run("p", *args, keeps=False)
            output = self._run(letter, *args)
            self.noise = predicted - output
        else:
            output = self._run(letter.lower() if letter in "SP" else letter, *args)
            if letter in "SP":
                assert self.noise is not None
                self.noise = 0.5 * self.noise
                output = output - self.noise
        if letter == "M":
            self.values = {name: [(k, _mean(v)) for k, v in kept] for name, kept in self.values.items()}
        self.step += 1
        return output

    @property
    def corrects(self) -> bool:
        return bool(set(self.letters) & set("SP"))

    def _run(self, letter: str, *args: Any, keeps: bool = True) -> Tensor:
        def value(step: int, name: str, compute: Callable[[], Tensor]) -> Tensor:
            if letter == "s" and name.startswith("blocks.0"):
                return compute()  # of no effect: the block is replaced
            kept = self.values.setdefault(name, [])
            if letter in "FM":
                kept.insert(0, (self.step, compute()))
                return kept[0][1]
            (last, newest), (before, older) = kept[:2]
            return newest + (self.step - last) / (last - before) * (newest - older)

        def block(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if letter == "s":
                return inputs[0] + self.residual
            if keeps:
                self.residual = output - inputs[0]
            return output

        handle = self.model.blocks[0].register_forward_hook(block)
        try:
            return Hooked(self.model, value)(*args)
        finally:
            handle.remove()


def _mean(value: Tensor) -> Tensor:
    return value.unflatten(0, (2, -1)).mean(0).repeat(2, 1, 1)


def followed(letters: str, run: Callable[[Any], Tensor]) -> tuple[Any, Tensor]:
    fast = torch.compile(toy(), backend="omnicache", options={**EAGER, "policy": Together(letters=letters)})
    with omnifx.generation(fast):
        run(fast)
    return fast, run(fast)


@pytest.mark.parametrize("letters", ["FFspFsFp", "FFFSPFPS", "FFspsFFs"])
def test_a_plan_with_spans_and_predictions_gives_what_eager_hooks_give(letters: str) -> None:
    def run(model: Any) -> Tensor:
        return generate(model, seed=1, steps=len(letters))

    fast, image = followed(letters, run)
    log = omnifx.stats(fast).generations[-1]
    expected = run(Eager(toy(), letters))

    assert log.reasons == {}
    assert letters_of(log) == letters.lower().replace("f", "F").replace("s", "m")
    assert any(step.variant.startswith(f"reuse2-predict2+{SPAN}") for step in log.steps)
    assert distance(image, expected) < 1e-5
    assert distance(expected, generate(toy(), seed=1, steps=len(letters))) > 1e-4
    assert omnifx.stats(fast).recompilations == 0


def test_history_is_kept_of_branches_and_one_residual_of_a_span() -> None:
    fast, _ = followed("FFsp", lambda model: generate(model, seed=1, steps=8))
    session = find_session(fast)
    assert session.store is not None
    one, session.store.peak_bytes = session.runners[0].program.cache_bytes, 0

    generate(fast, seed=2, steps=8)

    log = omnifx.stats(fast).generations[-1]
    assert log.peak_cache_bytes == session.store.peak_bytes == 2 * one + DELTA_BYTES


def test_a_step_that_merges_what_is_predicted_merges_all_of_its_stored_values() -> None:
    letters = "FFMppFp"

    def run(model: Any) -> Tensor:
        x, y = noise(1, 4, 8, 8, seed=1).repeat(2, 1, 1, 1), torch.tensor([3, 9])
        for time in timesteps(len(letters)):
            with torch.no_grad():
                conditional, unconditional = model(x, torch.full((2,), time), y).chunk(2)
            velocity = unconditional + 2.0 * (conditional - unconditional)
            x = x - velocity.repeat(2, 1, 1, 1) / (4 * len(letters))
        return x

    fast, image = followed(letters, run)
    log = omnifx.stats(fast).generations[-1]
    expected = run(Eager(toy(), letters))

    assert log.reasons == {}
    assert distance(image, expected) < 1e-5
    assert distance(expected, run(Eager(toy(), letters.replace("M", "F")))) > 1e-4


def test_a_predictor_leaves_reused_spans_and_merges_as_they_are() -> None:
    profile = block_profile(4)
    rows = [(COMPUTE,) * 9, (COMPUTE,) * 9, (REUSE,) * 8 + (COMPUTE,), (REUSE,) * 9]
    plan = Plan.from_rows(profile, rows, policy="toy", spans=["span0-1"], merges={1: ("blocks.0.attn",)})

    predicted = with_predictor(plan, profile, "newton:1")

    assert predicted.rows[2] == (PREDICT,) * 8 + (COMPUTE,)
    assert predicted.rows[3] == (REUSE,) * 4 + (PREDICT,) * 4 + (REUSE,)
    assert predicted.steps[1].merges == ("blocks.0.attn",)
    assert predicted.kept == (*predicted.branches, "span0-1")
    assert predicted.reuse_flops == plan.reuse_flops


def test_a_span_is_not_predicted() -> None:
    plan = Plan.from_rows(block_profile(2), [(COMPUTE,) * 9, (REUSE,) * 9], policy="toy", spans=["span0-3"])
    data = plan.model_dump(mode="json")
    data["variants"][1][-1] = "predict"
    data["steps"][1]["weights"], data["terms"] = [1.0], 1
    with pytest.raises(ValueError, match=r"variants \[1\] predict a span; spans are computed or reused"):
        Plan.model_validate(data)
