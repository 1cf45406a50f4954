"""T-GATE: which attentions each step computes, the mean at the gate, and what a whole generation then gives."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import omnifx
from omnifx.errors import ConfigError
from omnifx.plan import COMPUTE, REUSE, Plan
from omnifx.policies.t_gate import TGate
from omnifx.policy import SLACK, resolve
from tests.policies.stacks import block_profile, plan_of
from tests.policies.test_pab import toy_profile
from tests.toys import EAGER, distance, noise, timesteps, toy

STEPS = 12
TEXT = 24
GATE, INTERVAL, WARM_UP = 6, 3, 2
NAMES = tuple(f"blocks.{i}.{part}" for i in range(2) for part in ("attn", "cross"))


class Gated:
    """The release's rules on eager modules; both halves of the batch get the mean of their cross-attentions."""

    def __init__(self, model: nn.Module, *, merges: bool = True) -> None:
        self.model, self.merges, self.step = model, merges, -1
        self.kept: dict[str, Tensor] = {}
        self.reused: list[tuple[int, str]] = []

    def reuses(self, name: str) -> bool:
        if name.endswith("cross"):
            return self.step > GATE
        return WARM_UP <= self.step < GATE and (self.step - WARM_UP) % INTERVAL != 0

    def __call__(self, *args: Any) -> Any:
        self.step += 1

        def hook(name: str) -> Callable[..., Any]:
            def run(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
                if self.reuses(name):
                    self.reused.append((self.step, name))
                    return self.kept[name]
                self.kept[name] = output
                if self.step == GATE and name.endswith("cross") and self.merges:
                    first, second = output.chunk(2)
                    self.kept[name] = torch.cat([(first + second) / 2] * 2)
                return output

            return run

        handles = [self.model.get_submodule(name).register_forward_hook(hook(name)) for name in NAMES]
        try:
            return self.model(*args)
        finally:
            for handle in handles:
                handle.remove()


def guided(model: Callable[..., Any], *, seed: int, same: bool = True) -> Iterator[Tensor]:
    """A generation whose unconditional and conditional halves share a batch; `same`: and their latents."""
    x, text = noise(1, 4, 8, 8, seed=seed), noise(2, 5, TEXT, seed=7)
    other = x if same else noise(1, 4, 8, 8, seed=seed + 50)
    for time in timesteps(STEPS):
        with torch.no_grad():
            v = model(torch.cat([x, other]), torch.full((2,), time), torch.tensor([0, 3]), text)
        base, conditional = v.chunk(2)
        step = (base + 2.0 * (conditional - base)) / (4 * STEPS)
        x, other = x - step, (x if same else other) - step
        yield torch.cat([x, other])


@pytest.mark.parametrize("same", [True, False], ids=["guidance in one batch", "two samples"])
def test_a_generation_is_the_eager_reference(same: bool) -> None:
    model = toy(2, text=TEXT)
    policy = TGate(gate_step=GATE, sp_interval=INTERVAL, warm_up=WARM_UP)
    fast = torch.compile(model, backend="omnicache", options={**EAGER, "policy": policy})
    with omnifx.generation(fast):
        list(guided(fast, seed=0, same=same))
    reference = Gated(model, merges=same)

    with omnifx.generation(fast):
        images = list(guided(fast, seed=1, same=same))

    for image, expected in zip(images, guided(reference, seed=1, same=same), strict=True):
        assert distance(image, expected) < 1e-5
    plan = plan_of(fast)
    planned = [
        (step, name)
        for step, row in enumerate(plan.rows)
        for name, action in zip(plan.branches, row, strict=True)
        if action == REUSE
    ]
    assert sorted(planned) == sorted(reference.reused)
    assert omnifx.stats(fast).generations[-1].reasons == {}
    assert {step: s.merges for step, s in enumerate(plan.steps) if s.merges} == {
        GATE: ("blocks.0.cross", "blocks.1.cross")
    }


def test_the_mean_matters() -> None:
    model = toy(2, text=TEXT)
    *_, merged = guided(Gated(model), seed=1)
    *_, apart = guided(Gated(model, merges=False), seed=1)
    assert distance(merged, apart) > 1e-4


@given(
    steps=st.integers(1, 50),
    gate=st.none() | st.integers(1, 60),
    interval=st.integers(1, 8),
    first=st.integers(1, 6),
)
@settings(max_examples=80, deadline=None)
def test_cross_attention_is_frozen_behind_the_gate_and_self_attention_is_not(
    steps: int, gate: int | None, interval: int, first: int
) -> None:
    plan = TGate(gate_step=gate, sp_interval=interval, warm_up=first).plan(toy_profile(steps))

    gate = plan.policy_options["gate_step"]
    attention, cross, mlp = ([row[column] for row in plan.rows] for column in range(3))
    assert cross == [REUSE if k > gate else COMPUTE for k in range(steps)]
    assert set(mlp) == {COMPUTE}
    assert set(attention[:first]) == {COMPUTE} if first <= gate else True
    assert set(attention[gate:]) <= {COMPUTE}
    computed = [k for k, action in enumerate(attention) if action == COMPUTE]
    assert all(b - a <= interval for a, b in itertools.pairwise(computed))
    assert [k for k, step in enumerate(plan.steps) if step.merges] == ([gate] if gate < steps else [])
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


@given(steps=st.integers(4, 50), speedup=st.floats(1.0, 3.0))
@settings(max_examples=40, deadline=None)
def test_the_latest_gate_that_reaches_a_speedup_is_taken_or_it_is_refused(steps: int, speedup: float) -> None:
    profile = toy_profile(steps)
    every = {gate: TGate(gate_step=gate).plan(profile).speedup for gate in range(2, steps)}
    enough = [gate for gate, reached in every.items() if reached >= speedup / (1 + SLACK * speedup / steps) - 1e-9]
    if not enough:
        with pytest.raises(ConfigError, match=r"t-gate: speedup must be in \[1, .*2 steps of warm-up"):
            TGate().plan(profile, speedup=speedup)
        return
    assert TGate().plan(profile, speedup=speedup).policy_options["gate_step"] == max(enough)


def test_without_cross_attention_nothing_is_frozen() -> None:
    plan = TGate().plan(block_profile(10))
    assert not plan.merges
    assert plan.notes == ("The model has no cross-attention, so there is nothing to freeze at a gate.",)


@pytest.mark.parametrize("options", [{"gate_step": 0}, {"sp_interval": 0}, {"fi_interval": True}, {"warm_up": 0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))} must be a whole number >= 1"):
        TGate(**options)


def test_it_is_known_by_its_name() -> None:
    assert resolve("t-gate") == TGate()
