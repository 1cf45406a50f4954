"""Whole models against eager PyTorch: one generation that is measured, one that reuses, and what each step should be.

Any model whose latents and timestep are keyword arguments is a `Case`. `run` takes it through the backend once, clock
and plan included; the rest compares what came out with the eager model, and with the eager model whose attention and
MLP modules give their outputs of the first step.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import omnifx
from omnifx.backends.eager import EagerLowering
from omnifx.backends.lowering import Runnable
from omnifx.program import Program
from omnifx.runlog import GenerationLog, Stats
from omnifx.session import find_session
from tests.toys import Pattern, noise

STEPS = 4
"""Steps of a generation: the fewest from which anything is learnt."""

PATTERN = "Frrr"
"""The planned generation: all is computed at the first step, and all is reused at the others."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, its first call, and what is to be found in it."""

    model: nn.Module
    inputs: Mapping[str, Any]
    """Keyword arguments of the first call."""
    modules: tuple[str, ...]
    """Modules whose outputs a reuse step takes from the first one, in the order in which they run."""
    kinds: tuple[str, ...]
    """Kinds of the branches, in graph order."""
    latents: str = "x"
    time: str = "t"
    moving: tuple[str, ...] = ()
    """Inputs that change from step to step, beside the latents and the timestep."""

    def call(self, step: int, *, seed: int = 0) -> dict[str, Any]:
        """Fresh arguments of a step: latents drift by a quarter of their norm, timesteps fall."""
        inputs = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, dict(self.inputs))
        for at, name in enumerate((self.latents, *self.moving)):
            value = inputs[name]
            start = noise(*value.shape, seed=100 + seed + at)
            drift = noise(*value.shape, seed=200 + seed + at)
            moved = (start + 0.25 * step * drift).to(value.dtype)
            inputs[name] = torch.empty_like(value).copy_(moved)
        inputs[self.time] = (inputs[self.time] * (1.0 - step / STEPS)).to(inputs[self.time].dtype)
        return inputs


def select(model: nn.Module, *ends: str) -> tuple[str, ...]:
    """Names of the modules that end in one of these words."""
    return tuple(name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends)


def first_tensor(output: Any) -> Tensor:
    """The model's main output: a tensor, the first of a sequence, or the first field of a dataclass."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, list | tuple):
        return first_tensor(output[0])
    return first_tensor(next(iter(vars(output).values())))


@dataclass
class OldOutputs:
    """The eager model; with `reuse`, the hooked modules give the outputs of the last call that computed them.

    A module that runs several times in a call keeps one output for each time.
    """

    model: nn.Module
    modules: Sequence[str]
    kept: dict[tuple[str, int], Any] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any], *, reuse: bool) -> Tensor:
        times: Counter[str] = Counter()

        def hook_of(name: str) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, output: Any) -> Any:
                key = (name, times[name])
                times[name] += 1
                if not reuse:
                    self.kept[key] = _copied(output)
                return _copied(self.kept[key])

            return hook

        handles = [self.model.get_submodule(name).register_forward_hook(hook_of(name)) for name in self.modules]
        try:
            output = first_tensor(self.model(**inputs)).clone()
        finally:
            for handle in handles:
                handle.remove()
        assert set(times) == set(self.modules), "a hooked module did not run"
        return output


def _copied(output: Any) -> Any:
    return pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, output)


@dataclass
class Ran:
    """A case after one measured and one planned generation of `STEPS` steps through the backend."""

    case: Case
    program: Program
    stats: Stats
    measured: list[Tensor]
    """Main outputs of the first generation."""
    planned: list[Tensor]
    """Main outputs of the second."""
    arguments: list[Any]
    """The graph's own inputs at the last step that computed everything; empty with Inductor."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of the branches that may be reused, in graph order."""
        return tuple(branch.kind for branch in self.program.analysis.cacheable)

    @property
    def log(self) -> GenerationLog:
        """What the planned generation ran."""
        return self.stats.generations[-1]

    def computed(self, step: int, *, seed: int = 1) -> Tensor:
        """What the eager model computes at a step of the planned generation, or of the measured one (`seed` 0)."""
        with torch.no_grad():
            return first_tensor(self.case.model(**self.case.call(step, seed=seed))).clone()

    def reused(self, step: int) -> Tensor:
        """What the eager model computes there from its modules' outputs of step 0."""
        reference = OldOutputs(self.case.model, self.case.modules)
        reference(self.case.call(0, seed=1), reuse=False)
        return reference(self.case.call(step, seed=1), reuse=True)


class _Spy(EagerLowering):
    """Eager lowering that keeps the inputs of the last run of a graph without extra inputs."""

    def __init__(self, arguments: list[Any]) -> None:
        self.arguments = arguments

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any], *, num_extra_inputs: int) -> Runnable:
        run = super().__call__(gm, inputs, num_extra_inputs=num_extra_inputs)

        def spying(args: list[Any]) -> Sequence[Any]:
            if not num_extra_inputs:
                self.arguments[:] = args
            return run(args)

        return spying


def run(case: Case, *, lowering: str = "eager") -> Ran:
    """Take a case through the backend: a generation that is measured, and one with other latents that reuses.

    A recompilation is an error, and so is any warning of ours.
    """
    torch._dynamo.reset()
    arguments: list[Any] = []
    options = {"lowering": lowering, "profile_cache": False, "policy": Pattern(pattern=PATTERN)}
    fast = torch.compile(case.model, backend="omnicache", options=options, fullgraph=True)
    with (
        torch.no_grad(),
        torch._dynamo.config.patch(error_on_recompile=True),
        mock.patch("omnifx.backend.EagerLowering", return_value=_Spy(arguments)),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error", omnifx.OmnifxWarning)
        outputs = [
            [first_tensor(fast(**case.call(step, seed=seed))).clone() for step in range(STEPS)] for seed in (0, 1)
        ]
    (runner,) = find_session(fast).runners
    return Ran(case, runner.program, omnifx.stats(fast), *outputs, arguments)


def replay_cuts(program: Program, first: Sequence[Any], second: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Outputs of a full step on the graph's inputs `first`, and of a reuse step on `second` with the first one's cuts.

    With equal inputs both are to be the same.
    """
    full = program.variant(program.full(measures=False))
    reusing = program.variant(program.reusing(program.reuse_row, corrects=False))
    with torch.no_grad():
        made = list(full.run(list(first)))
        cuts = dict(zip(full.extra_outputs, made[program.num_outputs :], strict=True))
        again = list(reusing.run(reusing.feed(second, cuts)))
    return made[: program.num_outputs], again[: program.num_outputs]
