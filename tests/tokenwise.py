"""Token-wise caching without our code: eager models with hooks that give out old rows, from the papers' formulas.

`TokenReference` runs a model step by step. A full step ("F") keeps what modules make; a partial one ("P") lets
attentions give their old outputs, and other modules new rows for the tokens with the largest scores; "R" gives out old
outputs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import omnifx
from omnifx.plan import Plan, partial_tokens
from omnifx.policy import Policy
from omnifx.session import find_session
from tests.reuse import EAGER

Chosen = dict[tuple[int, str], list[list[int]]]
"""By step and branch: the tokens that each sample computed, ascending."""


@dataclass
class TokenReference:
    """An eager model whose modules compute some tokens only.

    `held` are the modules that give their old outputs between full steps, `partial` those that compute rows, each with
    the function that gives its tokens' raw scores. `counts` are steps since a token was computed.
    """

    model: nn.Module
    held: Sequence[str]
    partial: Mapping[str, Callable[[TokenReference], Tensor]]
    staleness: float
    bonus: float = 0.0
    window: int = 1
    shares_halves: bool = False
    chosen_by: Callable[[TokenReference, str, Tensor], None] = lambda reference, name, rows: None
    """Called with the rows that a module computed."""
    seen: dict[str, Tensor] = field(default_factory=dict)
    """Outputs of every linear layer in this step."""
    full: dict[str, Tensor] = field(default_factory=dict)
    """The same of the last full step."""
    chosen: Chosen = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.old: dict[str, Any] = {}
        self.counts: dict[str, Tensor] = {}
        self.number = -1
        self.kind, self.ks = "F", {}  # type: tuple[str, Mapping[str, int]]
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(self._see(name))
        for name in self.held:
            self.model.get_submodule(name).register_forward_hook(self._hold(name))
        for name in self.partial:
            self.model.get_submodule(name).register_forward_hook(self._mix(name))

    @torch.no_grad()
    def __call__(self, kind: str, ks: Mapping[str, int], **inputs: Any) -> Tensor:
        """One step: what it does, and how many tokens each partial module computes."""
        self.number += 1
        self.kind, self.ks, self.seen = kind, ks, {}
        output: Tensor = self.model(**inputs)[0].clone()
        return output

    def _see(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self.seen[name] = output
            if self.kind == "F":
                self.full[name] = output

        return hook

    def _hold(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if self.kind == "F":
                self.old[name] = output
            return self.old[name]

        return hook

    def _mix(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            batch, tokens = output.shape[:2]
            if self.kind == "F":
                self.old[name], self.counts[name] = output, torch.zeros(batch, tokens)
                self.chosen_by(self, name, torch.arange(tokens).expand(batch, -1))
            elif self.kind == "P":
                rows = self._choose(name, self.ks.get(name, 0))
                self.counts[name] += 1
                mixed = self.old[name].clone()
                for sample, chosen in enumerate(rows):
                    self.counts[name][sample, chosen] = 0
                    mixed[sample, chosen] = output[sample, chosen]
                if rows.shape[1]:
                    self.chosen[self.number, name] = [sorted(chosen.tolist()) for chosen in rows]
                    self.chosen_by(self, name, rows)
                self.old[name] = mixed
            return self.old[name]

        return hook

    def _choose(self, name: str, k: int) -> Tensor:
        raw = self.partial[name](self)
        score = raw / raw.pow(2).sum(1, keepdim=True).sqrt()
        score = score + self.staleness * self.counts[name]
        if self.bonus:
            side = int(score.shape[1] ** 0.5)
            for sample in score:
                image = sample.view(side, side)
                for row in range(0, side, self.window):
                    for column in range(0, side, self.window):
                        patch = image[row : row + self.window, column : column + self.window]
                        best = int(patch.argmax())
                        patch[best // self.window, best % self.window] *= 1 + self.bonus
        if self.shares_halves:
            half = score.shape[0] // 2
            score = torch.cat([(score[:half] + score[half:]) / 2] * 2)
        return score.argsort(dim=-1, descending=True)[:, :k]


def heads_of(value: Tensor, heads: int) -> Tensor:
    """[B, N, heads * width] -> [B, heads, N, width]."""
    return value.unflatten(-1, (heads, -1)).transpose(1, 2)


def attention_map(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Mean over the heads of the softmax, [B, N, M]."""
    q, k = heads_of(query, heads), heads_of(key, heads)
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1).mean(1)


@dataclass
class PlannedRun:
    """A generation that followed a plan."""

    outputs: list[Tensor]
    plan: Plan
    chosen: Chosen
    """By step and branch; without the last step, whose caches are gone when it returns."""
    variants: list[str]
    reasons: dict[str, int]
    peak_cache_bytes: int
    notes: list[str]


def run_planned(
    model: nn.Module,
    policy: Policy,
    inputs: Callable[[int, Tensor], dict[str, Any]],
    start: Tensor,
    steps: int,
    **options: Any,
) -> PlannedRun:
    """Measure one generation, and run a second one from `start` under the policy's plan."""
    fast = torch.compile(model, backend="omnicache", options={**EAGER, "policy": policy, **options}, fullgraph=True)
    for _ in drive(fast, inputs, 0.9 * start, steps):
        pass
    chosen: Chosen = {}
    outputs = []
    (runner,) = find_session(fast).runners
    for step, output in drive(fast, inputs, start, steps):
        outputs.append(output)
        assert runner.conductor is not None
        for stream in runner.conductor.streams:
            (plan,) = (entry.plan for entry in stream.entries)
            for branch, action in zip(plan.branches, plan.row_of(step), strict=True):
                if partial_tokens(action):
                    fresh = stream.cache.tokens[f"stamp:{branch}"] == stream.age
                    chosen[step, branch] = [row.nonzero().flatten().tolist() for row in fresh]
    stats = omnifx.stats(fast)
    (entry,) = runner.conductor.entries
    log = stats.generations[-1]
    return PlannedRun(outputs, entry.plan, chosen, log.variants, log.reasons, log.peak_cache_bytes, stats.notes)


def drive(model: Callable[..., Any], inputs: Callable[[int, Tensor], dict[str, Any]], start: Tensor, steps: int) -> Any:
    """The steps of one generation: (step, output), the latents following the output."""
    x = start
    for step in range(steps):
        with torch.no_grad():
            output = model(**inputs(step, x))[0].clone()
        yield step, output
        x = follow(x, output, steps)


def follow(x: Tensor, output: Tensor, steps: int) -> Tensor:
    """The sampler: an Euler-like step along the first channels of the output."""
    return x - output[:, : x.shape[1]] / (4 * steps)
