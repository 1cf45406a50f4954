"""Combined outputs: a policy that plans given combinations, and the same generation in plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from omnifx.plan import COMPUTE, REUSE, SKIP, Combination, Plan, Row
from omnifx.policy import Policy
from omnifx.profile import Profile
from tests.reference import OldOutputs, first_tensor
from tests.reuse import noise
from tests.zoo.entry import Tiny


@dataclass(frozen=True, kw_only=True)
class Combined(Policy):
    """Each step as its letter says: F full, r reuse, a reuse with a combination, s skipped. A generation of fewer steps
    has the first letters."""

    name = "combined"

    letters: str
    combinations: Mapping[int, Combination]
    """By step."""
    history: int = 2

    @property
    def uses_noise(self) -> bool:  # type: ignore[override]
        return any(known.noise for known in self.combinations.values())

    def rows(self, num_branches: int) -> tuple[Row, ...]:
        return tuple((action,) * num_branches for action in (COMPUTE, REUSE, SKIP))

    def plan(self, profile: Profile, *, speedup: float | None = None) -> Plan:
        actions = {"F": COMPUTE, "r": REUSE, "a": REUSE, "s": SKIP}
        letters = self.letters[: profile.num_steps]
        rows = [(actions[letter],) * len(profile.meta.branches) for letter in letters]
        combinations = [self.combinations.get(k) for k in range(len(rows))]
        return Plan.from_rows(profile, rows, policy=self.name, combinations=combinations, history=self.history)


@dataclass
class CombinedReference:
    """The eager model, whose steps do what their letters say, computed from plain tensors.

    S is a full step that the plan did not ask for: it keeps nothing for later steps.
    """

    tiny: Tiny
    letters: str
    combinations: Mapping[int, Combination]
    step: int = 0
    outputs: list[Tensor] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    noise: Tensor | None = None

    def __post_init__(self) -> None:
        self.old = OldOutputs(self.tiny.model, self.tiny.modules)

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Tensor:
        letter, known = self.letters[self.step], self.combinations.get(self.step)
        self.step += 1
        if letter == "S":
            return first_tensor(self.tiny.model(**inputs)).clone()
        x = inputs[self.tiny.latents[0]].clone()
        if letter == "F":
            replayed = self.old(inputs, reuse=True) if self.outputs else None
            true = self.old(inputs, reuse=False)
            self.noise = replayed - true if replayed is not None else None
            self.outputs.insert(0, true.clone())
            self.latents.insert(0, x)
            return true
        if known is None:
            return self.old(inputs, reuse=True)
        value = torch.zeros_like(self.outputs[0])
        if known.reuse:
            value += known.reuse * self.old(inputs, reuse=True)
        if known.noise:
            assert self.noise is not None
            value += known.noise * self.noise
        for weight, output in zip(known.outputs, self.outputs, strict=False):
            value += weight * output
        axis = 1 if x.dim() > 3 else x.dim() - 1
        moved = value.narrow(axis, 0, x.shape[axis])
        for weight, latents in zip(known.latents, self.latents, strict=False):
            moved += weight * (x - latents)
        return value


def sampling(
    model: Callable[..., Any],
    tiny: Tiny,
    *,
    steps: int,
    seed: int = 0,
    before: Callable[[int, dict[str, Any]], None] = lambda step, inputs: None,
) -> Iterator[Tensor]:
    """The outputs of one generation, step by step, whose sampler overwrites its latents and the output in place.

    `before` may change the other inputs, or anything else, before a step.
    """
    (name,), (time,) = tiny.latents, tiny.times
    x = noise(*tiny.inputs[name].shape, seed=seed)
    inputs = dict(tiny.inputs)
    for k in range(steps):
        before(k, inputs)
        inputs |= {name: x, time: tiny.inputs[time] * (1.0 - k / steps)}
        with torch.no_grad():
            output = first_tensor(model(**inputs))
        yield output.clone()
        x -= output[tuple(slice(0, size) for size in x.shape)] / (4 * steps)
        output.fill_(float("nan"))


def generate(model: Callable[..., Any], tiny: Tiny, **arguments: Any) -> Tensor:
    """[steps, ...]: the outputs of one whole generation."""
    return torch.stack(list(sampling(model, tiny, **arguments)))
