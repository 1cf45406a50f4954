"""What tests of policies share: a toy compiled with a policy, one generation that it measures, and one that it plans.

The reference of each policy is in its own test: eager hooks on the attention, cross-attention and MLP modules, whose
outputs are the cuts, and plain tensor code written from the method's formulas.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import omnifx
from omnifx.policy import Policy
from tests.toys import EAGER, distance, generate, letters_of, noise, toy

TEXT = 24


@dataclass
class Hooked:
    """The eager toy, whose branches ask `value(step, module, compute)` for what they give.

    `compute()` gives what the module computes now. `computed` lists what was asked for: (step, module).
    """

    model: nn.Module
    value: Callable[[int, str, Callable[[], Tensor]], Tensor]
    step: int = 0
    computed: list[tuple[int, str]] = field(default_factory=list)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                if name.endswith((".attn", ".cross", ".mlp")):
                    handle = module.register_forward_hook(self._hook(name))
                    stack.callback(handle.remove)
            output: Tensor = self.model(*args, **kwargs)
        self.step += 1
        return output

    def _hook(self, name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            def compute() -> Tensor:
                self.computed.append((self.step, name))
                return output

            return self.value(self.step, name, compute)

        return hook


def follow(policy: Policy, *, steps: int, seed: int = 1, **options: Any) -> tuple[Any, Tensor]:
    """A toy with cross-attention after a measured and a planned generation, and the image of the planned one."""
    model = toy(text=TEXT)
    fast = torch.compile(model, backend="omnicache", options={**EAGER, "policy": policy, **options})
    with omnifx.generation(fast):
        generate(fast, seed=100, steps=steps, text=noise(1, 5, TEXT, seed=9))
    return fast, generate(fast, seed=seed, steps=steps, text=noise(1, 5, TEXT, seed=9))


def assert_faithful(
    policy: Policy,
    value: Callable[[int, str, Callable[[], Tensor]], Tensor],
    *,
    steps: int,
    letters: str,
    **options: Any,
) -> None:
    """The planned generation computes what the reference computes, and gives its image within 1e-5."""
    fast, image = follow(policy, steps=steps, **options)
    reference = Hooked(toy(text=TEXT), value)
    expected = generate(reference, seed=1, steps=steps, text=noise(1, 5, TEXT, seed=9))
    log = omnifx.stats(fast).generations[-1]

    assert log.reasons == {}
    assert letters_of(log) == letters
    computed = defaultdict(set)
    for step, name in reference.computed:
        computed[step].add(name)
    assert {step for step, letter in enumerate(letters) if letter == "F"} == set(computed)
    assert all(len(names) == 6 for names in computed.values())
    assert distance(image, expected) < 1e-5
    assert distance(expected, generate(toy(text=TEXT), seed=1, steps=steps, text=noise(1, 5, TEXT, seed=9))) > 1e-4
