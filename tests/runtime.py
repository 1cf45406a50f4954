"""Run-time policies written down once more, on the toy, in plain tensor code without graphs: what each step should do.

Each reference is a sampler's model: called with (x, t, y), it keeps one state for each label (the streams of a
generation) and notes F for a step that computes and r for one that skips.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omnifx.runlog import GenerationLog
from tests.toys import ToyDiT


def relative(new: Tensor, old: Tensor) -> float:
    """The largest relative change of a sample."""
    axes = tuple(range(1, new.dim()))
    return float(((new - old).abs().mean(axes) / old.abs().mean(axes)).max())


class Eager:
    """The toy in pieces. Subclasses say in `step` what a call does with its stream's state."""

    def __init__(self, model: ToyDiT, steps: int | None = None) -> None:
        self.model = model
        self.steps = steps
        self.states: dict[int, dict[str, Any]] = defaultdict(lambda: {"k": -1})
        self.letters: dict[int, str] = defaultdict(str)
        self.values: dict[int, list[float]] = defaultdict(list)

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        stream = int(y[0])
        state = self.states[stream]
        state["k"] += 1
        state["last"] = self.steps is not None and state["k"] == self.steps - 1
        computed, output = self.step(state, x, t, y)
        self.letters[stream] += "F" if computed else "r"
        return output

    def step(self, state: dict[str, Any], x: Tensor, t: Tensor, y: Tensor) -> tuple[bool, Tensor]:
        raise NotImplementedError

    def begin(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The trunk before the first block, and the condition."""
        m = self.model
        angles = t[:, None].float() * torch.exp(-torch.arange(m.width // 2) * 9.2 / (m.width // 2))
        c = m.time(torch.cat([angles.cos(), angles.sin()], dim=-1)) + m.label(y)
        height, width = x.shape[-2:]
        return m.embed(x).flatten(2).transpose(1, 2) + m.positions(height // 2, width // 2), c

    def blocks(self, trunk: Tensor, c: Tensor, first: int, last: int | None = None) -> Tensor:
        for block in list(self.model.blocks)[first:last]:
            trunk = block(trunk, c, None)
        return trunk

    def modulated(self, trunk: Tensor, c: Tensor) -> Tensor:
        block: Any = self.model.blocks[0]
        shift, scale = block.ada(F.silu(c))[:, None].chunk(6, dim=-1)[:2]
        out: Tensor = block.norm1(trunk) * (1 + scale) + shift
        return out

    def end(self, trunk: Tensor, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        out = self.model.head(self.model.norm(trunk)).reshape(batch, height // 2, width // 2, 2, 2, 4)
        return out.permute(0, 5, 1, 3, 2, 4).reshape(batch, 4, height, width)


class EagerBlocks(Eager):
    """DBCache, and FirstBlockCache with front=1, back=0, no warm-up and no limit."""

    def __init__(
        self, model: ToyDiT, threshold: float, *, front: int = 1, back: int = 0, warmup: int = 1, most: int = 10**9,
        equal: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(model)
        self.threshold, self.front, self.back, self.warmup, self.most = threshold, front, back, warmup, most
        self.equal = equal  # whether a change equal to the threshold is skipped

    def step(self, state: dict[str, Any], x: Tensor, t: Tensor, y: Tensor) -> tuple[bool, Tensor]:
        start, c = self.begin(x, t, y)
        front = self.blocks(start, c, 0, self.front)
        back = len(self.model.blocks) - self.back
        skips = False
        if state["k"] >= self.warmup and state["row"] < self.most:
            moved = relative(front - start, state["residual"])
            self.values[int(y[0])].append(moved)
            skips = moved < self.threshold or (self.equal and moved == self.threshold)
        if skips:
            state["row"] += 1
            trunk = front + state["delta"]
        else:
            trunk = self.blocks(front, c, self.front, back)
            state |= {"residual": front - start, "delta": trunk - front, "row": 0}
        return not skips, self.end(self.blocks(trunk, c, back), x)


class EagerTaylor(EagerBlocks):
    """DBCache with its Taylor calibrator: at computed steps a_0 > a_1, D_0 is the residual of what is skipped and
    D_{i+1} = (D_i - D_i') / (a_0 - a_1), primes being the computed step before; at a skipped step k the residual is the
    sum of D_i (k - a_0)^i / i! up to an order."""

    def __init__(self, model: ToyDiT, threshold: float, *, order: int, **options: Any) -> None:
        super().__init__(model, threshold, **options)
        self.order = order

    def step(self, state: dict[str, Any], x: Tensor, t: Tensor, y: Tensor) -> tuple[bool, Tensor]:
        k = state["k"]
        if "series" in state:
            since = k - state["at"]
            terms = [d * since**i / math.factorial(i) for i, d in enumerate(state["series"])]
            state["delta"] = torch.stack(terms).sum(0)
        computed, output = super().step(state, x, t, y)
        if computed:
            series = [state["delta"]]
            for old in state.get("series", [])[: self.order]:
                series.append((series[-1] - old) / (k - state["at"]))
            state |= {"series": series, "at": k}
        return computed, output


class EagerTea(Eager):
    """TeaCache."""

    def __init__(self, model: ToyDiT, threshold: float, coefficients: Sequence[float], steps: int | None) -> None:
        super().__init__(model, steps)
        self.threshold, self.coefficients = threshold, coefficients

    def step(self, state: dict[str, Any], x: Tensor, t: Tensor, y: Tensor) -> tuple[bool, Tensor]:
        start, c = self.begin(x, t, y)
        modulated = self.modulated(start, c)
        computes = state["k"] == 0 or state["last"]
        if not computes:
            d = relative(modulated, state["modulated"])
            powers = range(len(self.coefficients) - 1, -1, -1)
            state["sum"] += sum(a * d**n for a, n in zip(self.coefficients, powers, strict=True))
            self.values[int(y[0])].append(state["sum"])
            computes = not state["sum"] < self.threshold
        state["modulated"] = modulated
        if computes:
            trunk = self.blocks(start, c, 0)
            state |= {"sum": 0.0, "residual": trunk - start}
        else:
            trunk = start + state["residual"]
        return computes, self.end(trunk, x)


class EagerEasy(Eager):
    """EasyCache, for one sample."""

    def __init__(self, model: ToyDiT, threshold: float, warmup: int, steps: int | None) -> None:
        super().__init__(model, steps)
        self.threshold, self.warmup = threshold, warmup

    def step(self, state: dict[str, Any], x: Tensor, t: Tensor, y: Tensor) -> tuple[bool, Tensor]:
        computes = state["k"] < self.warmup or state["last"]
        if computes:
            state["error"] = 0.0
        else:
            moved = (x - state["x"]).abs().mean()
            state["error"] += float(state["rate"] * moved / state["y"].abs().mean())
            self.values[int(y[0])].append(state["error"])
            if not state["error"] < self.threshold:
                computes, state["error"] = True, 0.0
        state["x"] = x.clone()
        if not computes:
            return False, x + state["cache"]
        out: Tensor = self.model(x, t, y)
        if "y" in state:
            state["rate"] = (out - state["y"]).abs().mean() / (x - state["at"]).abs().mean()
        state |= {"y": out, "at": x.clone(), "cache": out - x}
        return True, out


class EagerDi(Eager):
    """DiCache, for one sample."""

    def __init__(
        self, model: ToyDiT, threshold: float, *, depth: int, error: str, retention: float, steps: int
    ) -> None:
        super().__init__(model, steps)
        self.threshold, self.depth, self.error, self.retention = threshold, depth, error, retention

    def step(self, state: dict[str, Any], x: Tensor, t: Tensor, y: Tensor) -> tuple[bool, Tensor]:
        start, c = self.begin(x, t, y)
        probe = self.blocks(start, c, 0, self.depth)
        assert self.steps is not None
        computes = state["k"] <= int(self.retention * self.steps) or state["last"]
        if computes:
            state["sum"] = 0.0
        else:
            dy, dx = relative(probe, state["probe"]), relative(start, state["start"])
            state["sum"] += dy if self.error == "d_y" else abs(dy - dx)
            self.values[int(y[0])].append(state["sum"])
            if not state["sum"] < self.threshold:
                computes, state["sum"] = True, 0.0
        state |= {"probe": probe, "start": start}
        window = state.setdefault("window", [])
        if computes:
            trunk = self.blocks(probe, c, self.depth)
            window.append((trunk - start, probe - start))
        elif len(window) < 2:
            trunk = start + window[-1][0]
        else:
            (r2, p2), (r1, p1) = window[-2:]
            p = probe - start
            gamma = ((p - p2).abs().mean() / (p1 - p2).abs().mean()).clip(1, 1.5)
            trunk = start + r2 + gamma * (r1 - r2)
        return computes, self.end(trunk, x)


class EagerAda(Eager):
    """AdaCache: attention and MLP outputs of all blocks before their gates, for as many steps as the codebook says."""

    def __init__(self, model: ToyDiT, codebook: Sequence[tuple[float, int]], block: int) -> None:
        super().__init__(model)
        self.codebook, self.block = codebook, block

    def step(self, state: dict[str, Any], x: Tensor, t: Tensor, y: Tensor) -> tuple[bool, Tensor]:
        trunk, c = self.begin(x, t, y)
        computes = state["k"] >= state.get("next", 0)
        kept = state.setdefault("kept", {})
        for i, block in enumerate(self.model.blocks):
            module: Any = block
            shift1, scale1, gate1, shift2, scale2, gate2 = module.ada(F.silu(c))[:, None].chunk(6, dim=-1)
            if computes:
                kept[i, "attn"] = module.attn(module.norm1(trunk) * (1 + scale1) + shift1)
            added = gate1 * kept[i, "attn"]
            if computes and i == self.block:
                self._decide(state, added)
            trunk = trunk + added
            if computes:
                kept[i, "mlp"] = module.mlp(module.norm2(trunk) * (1 + scale2) + shift2)
            trunk = trunk + gate2 * kept[i, "mlp"]
        return computes, self.end(trunk, x)

    def _decide(self, state: dict[str, Any], added: Tensor) -> None:
        rate = 1
        if "added" in state:
            d = relative(added, state["added"]) / state["rate"]
            rate = next((n for bound, n in self.codebook if d < bound), self.codebook[-1][1])
        state |= {"added": added, "rate": rate, "next": state["k"] + rate}


def letters(log: GenerationLog, stream: int = 0) -> str:
    """What one stream of a generation did: F or r."""
    return "".join("F" if step.variant == "full" else "r" for step in log.steps if step.stream == stream)
