"""What a reuse step should compute: the eager model with hooks that give out old outputs, and plans to compare with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from omnifx.plan import COMPUTE, REUSE, Action, Correction, Plan
from omnifx.policy import Policy
from omnifx.profile import Profile
from omnifx.runlog import GenerationLog

EAGER = {"lowering": "eager", "profile_cache": False, "policy": "omnicache"}
"""Options of most tests: no Inductor, nothing kept on disk, and a policy that reuses and corrects."""


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Normal noise of a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True, kw_only=True)
class Pattern(Policy):
    """Repeat a pattern of rows: F a full step, r a full reuse, a / m reuse of attention / MLP branches alone, c a
    corrected r."""

    name = "pattern"
    uses_noise = False

    pattern: str = "Frr"
    gamma: float = 0.5

    def plan(self, profile: Profile, *, speedup: float | None = None) -> Plan:
        letters = [self.pattern[k % len(self.pattern)] for k in range(profile.num_steps)]
        rows = [tuple(_action(letter, branch.kind) for branch in profile.meta.branches) for letter in letters]
        corrections = [Correction(gamma=self.gamma) if letter == "c" else None for letter in letters]
        return Plan.from_rows(profile, rows, policy=self.name, corrections=corrections)


def _action(letter: str, kind: str) -> Action:
    if letter == "F":
        return COMPUTE
    reused = {"a": "attention" in kind, "m": kind == "mlp"}.get(letter, True)
    return REUSE if reused else COMPUTE


@dataclass
class Reference:
    """A plain implementation of reuse with forward hooks: module outputs of earlier steps instead of the modules.

    Each stream (told by the label) has its own step count and its own outputs; a module called twice in a step (for
    image and text) has two. `letters` says what each step does, as in `Pattern`; it may be a mapping from label to
    letters.
    """

    model: nn.Module
    letters: str | Mapping[int, str]
    modules: tuple[str, ...] = ()
    """Names of the hooked modules; empty: the attention, cross-attention and MLP modules of the toy's blocks."""
    stream_of: Callable[..., Any] = field(default=lambda x, t, y, *rest: int(y.reshape(-1)[0]))

    def __post_init__(self) -> None:
        self.steps: dict[Any, int] = defaultdict(int)
        self.kept: dict[Any, dict[tuple[str, int], Any]] = defaultdict(dict)
        if not self.modules:
            ends = (".attn", ".cross", ".mlp")
            self.modules = tuple(name for name, _ in self.model.named_modules() if name.endswith(ends))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stream = self.stream_of(*args, **kwargs)
        letters = self.letters if isinstance(self.letters, str) else self.letters[stream]
        letter = letters[self.steps[stream]]
        self.steps[stream] += 1
        handles = []
        for name in self.modules:
            kind = "mlp" if name.endswith(".mlp") else "attention"
            hook = _hook(self.kept[stream], name, replay=_action(letter, kind) == REUSE)
            handles.append(self.model.get_submodule(name).register_forward_hook(hook))
        try:
            return self.model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()


def _hook(kept: dict[tuple[str, int], Any], name: str, *, replay: bool) -> Callable[..., Any]:
    """Keep the output of each call of a module within a step, or give out the kept one."""
    calls = 0

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        if replay:
            return kept[name, calls]
        kept[name, calls] = output
        return None

    return hook


def letters_of(log: GenerationLog, stream: int = 0) -> str:
    """What one stream of a generation ran, as a `Reference` takes it: F full, r reuse, p predict, s skip, m any
    mixture."""
    short = {"full": "F", "reuse": "r", "predict": "p", "skip": "s"}
    return "".join(short.get(s.variant.split("+")[0], "m") for s in log.steps if s.stream == stream)


def distance(a: Tensor, b: Tensor) -> float:
    """``||a - b|| / ||b||``."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
