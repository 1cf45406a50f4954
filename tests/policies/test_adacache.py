"""AdaCache with MoReg on tiny video models, against the formulas in plain tensor code: the same steps and samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import omnifx
from omnifx.policies.adacache import AdaCache
from tests.runtime import letters
from tests.toys import EAGER, Attention, Mlp, distance, generate, lively, noise

STEPS = 20
FRAMES = 5
DEPTH = 2
WIDTH = 32
BOOK = ((0.05, 5), (0.2, 4), (0.6, 3), (1.5, 2), (4.0, 1))


class VideoBlock(nn.Module):
    """Attention over space or time, then an MLP, each behind a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attn = Attention(WIDTH, 2)
        self.mlp = Mlp(WIDTH, 2 * WIDTH)
        self.ada = nn.Linear(WIDTH, 6 * WIDTH)

    def numbers(self, c: Tensor) -> Sequence[Tensor]:
        """Shift, scale and gate of the attention, then of the MLP; each [B, 1, width]."""
        return self.ada(F.silu(c))[:, None].chunk(6, dim=-1)


class Video(nn.Module):
    """Latents [B, 4, F, 8, 8], timestep [B], label [B] -> [B, 4, F, 8, 8]. Blocks take turns in space and in time.

    The trunk stays [B, F S, width] all the way (`flat`, as Open-Sora's), or is [B F, S, width] in space and
    [B S, F, width] in time (as Latte's).
    """

    def __init__(self, *, flat: bool, temporal: bool) -> None:
        super().__init__()
        self.flat = flat
        self.embed = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.place = nn.Parameter(torch.zeros(FRAMES, 1, WIDTH))
        self.time = Mlp(WIDTH, WIDTH)
        self.label = nn.Embedding(10, WIDTH)
        self.blocks = nn.ModuleList(VideoBlock() for _ in range(DEPTH))
        self.temporal_blocks = nn.ModuleList(VideoBlock() for _ in range(DEPTH if temporal else 0))
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.head = nn.Linear(WIDTH, 4 * 4)

    def begin(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The trunk [B, F, S, width] before the first block, and the condition [B, width]."""
        angles = t[:, None] * torch.exp(-torch.arange(WIDTH // 2) * 9.2 / (WIDTH // 2))
        c = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1)) + self.label(y)
        return self.embed(x).flatten(3).permute(0, 2, 3, 1) + self.place, c

    def end(self, h: Tensor, x: Tensor) -> Tensor:
        """The output of a trunk [B, F, S, width]."""
        batch, _, frames, height, width = x.shape
        out = self.head(self.norm(h)).reshape(batch, frames, height // 2, width // 2, 2, 2, 4)
        return out.permute(0, 6, 1, 2, 4, 3, 5).reshape(x.shape)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h, c = self.begin(x, t, y)
        batch, frames, places, _ = h.shape
        h = h.flatten(1, 2) if self.flat else h.flatten(0, 1)
        for i, block in enumerate(self.blocks):
            h = self._run(block, h, c, batch, frames, over_time=False)
            if not len(self.temporal_blocks):
                continue
            if not self.flat:
                h = h.unflatten(0, (batch, frames)).transpose(1, 2).flatten(0, 1)
            h = self._run(self.temporal_blocks[i], h, c, batch, frames, over_time=True)
            if not self.flat:
                h = h.unflatten(0, (batch, places)).transpose(1, 2).flatten(0, 1)
        return self.end(h.reshape(batch, frames, places, WIDTH), x)

    def _run(self, block: Any, h: Tensor, c: Tensor, batch: int, frames: int, *, over_time: bool) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            v.repeat_interleave(h.shape[0] // batch, dim=0) for v in block.numbers(c)
        )
        inner = block.norm(h) * (1 + scale1) + shift1
        if not self.flat:
            h = h + gate1 * block.attn(inner)
        elif over_time:
            rows = inner.unflatten(1, (frames, -1)).transpose(1, 2).flatten(0, 1)
            rows = block.attn(rows).unflatten(0, (batch, -1)).transpose(1, 2).flatten(1, 2)
            h = h + gate1 * rows
        else:
            rows = block.attn(inner.unflatten(1, (frames, -1)).flatten(0, 1))
            h = h + gate1 * rows.unflatten(0, (batch, -1)).flatten(1, 2)
        return h + gate2 * block.mlp(block.norm(h) * (1 + scale2) + shift2)


def video(*, flat: bool = True, temporal: bool = True) -> Video:
    """A lively one."""
    model = lively(Video(flat=flat, temporal=temporal), 0)
    assert isinstance(model, Video)
    return model


class EagerVideo:
    """AdaCache with MoReg from its formulas, on a trunk [B, F, S, width] whatever the model's own is.

    d = |p - p'|_1 / |p'|_1 / n, with p what the probed attention adds to the trunk, and p' that of the computed step
    before, n steps ago; m = (|p_{f+1} - p_f|_1 / (|p_{f+1}|_1 + |p_f|_1) / 0.385)^8 between a tenth and nine tenths of
    the steps, else 1; d is multiplied by m + |10 (m - m') / n|, and looked up in the codebook.
    """

    def __init__(self, model: Video, *, block: int, steps: int | None = STEPS, moreg: bool = True) -> None:
        self.model, self.block, self.steps, self.moreg = model, block, steps, moreg
        self.letters = ""
        self.motions: list[float] = []
        self.k, self.due, self.rate, self.before = -1, 0, 1, 1.0
        self.kept: dict[tuple[int, str], Tensor] = {}
        self.probed: Tensor | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.k += 1
        computes = self.k >= self.due
        self.letters += "F" if computes else "r"
        h, c = self.model.begin(x, t, y)
        timed = list(self.model.temporal_blocks)
        order = [v for i, b in enumerate(self.model.blocks) for v in ([(b, 0), (timed[i], 1)] if timed else [(b, 0)])]
        looked_at = [number for number, (_, over_time) in enumerate(order) if over_time or not timed][self.block]
        for number, (module, over_time) in enumerate(order):
            block: Any = module
            shift1, scale1, gate1, shift2, scale2, gate2 = (v[:, None] for v in block.numbers(c))
            if computes:
                inner = block.norm(h) * (1 + scale1) + shift1
                rows = inner.transpose(1, 2) if over_time else inner
                out = torch.stack([block.attn(sample) for sample in rows])
                self.kept[number, "attn"] = out.transpose(1, 2) if over_time else out
            added = gate1 * self.kept[number, "attn"]
            if computes and number == looked_at:
                self._decide(added)
            h = h + added
            if computes:
                self.kept[number, "mlp"] = block.mlp(block.norm(h) * (1 + scale2) + shift2)
            h = h + gate2 * self.kept[number, "mlp"]
        return self.model.end(h, x)

    def _decide(self, p: Tensor) -> None:
        rate = 1
        if self.probed is not None:
            old = self.probed
            d = ((p - old).abs().flatten(1).sum(1) / old.abs().flatten(1).sum(1)).max() / self.rate
            if self.moreg:
                after, first = p[:, 1:].flatten(1), p[:, :-1].flatten(1)
                m = (after - first).abs().sum(1) / (after.abs().sum(1) + first.abs().sum(1))
                acts = self.steps is None or int(0.1 * self.steps) <= self.k <= int(0.9 * self.steps)
                motion = float(m.max() / 0.385) ** 8 if acts else 1.0
                self.motions.append(motion)
                d = d * (motion + abs(10 * (motion - self.before) / self.rate))
                self.before = motion
            rate = next((n for bound, n in BOOK if float(d) < bound), BOOK[-1][1])
        self.probed, self.rate, self.due = p, rate, self.k + rate


@pytest.mark.parametrize(
    ("flat", "temporal"), [(True, True), (False, True), (False, False)], ids=["open-sora", "latte", "space-only"]
)
@pytest.mark.parametrize(("block", "batch"), [(0, 1), (1, 2)])
def test_with_moreg_the_steps_and_the_samples_are_those_of_the_reference(
    flat: bool, temporal: bool, block: int, batch: int
) -> None:
    model = video(flat=flat, temporal=temporal)
    policy = AdaCache(codebook=BOOK, moreg=True, block=block)
    fast = torch.compile(model, backend="omnicache", options={**EAGER, "policy": policy, "steps": STEPS})
    seen = ""

    for seed in (0, 1):
        latents = noise(batch, 4, FRAMES, 8, 8, seed=seed)
        reference = EagerVideo(model, block=block)
        expected = generate(reference, seed=seed, steps=STEPS, latents=latents)
        sample = generate(fast, seed=seed, steps=STEPS, latents=latents)

        log = omnifx.stats(fast).generations[-1]
        assert letters(log) == reference.letters
        shown = [step.signals["regularised"] for step in log.steps if "regularised" in step.signals]
        assert shown == pytest.approx(reference.motions[: len(shown)], rel=1e-3)
        assert distance(sample, expected) < 1e-5
        seen += reference.letters[2:]
    assert {"F", "r"} == set(seen)
    assert omnifx.stats(fast).graphs == 1


def test_moreg_changes_which_steps_compute() -> None:
    model, rows = video(), []
    for moreg in (True, False):
        reference = EagerVideo(model, block=0, moreg=moreg)
        expected = generate(reference, seed=0, steps=STEPS, latents=noise(1, 4, FRAMES, 8, 8, seed=0))
        policy = AdaCache(codebook=BOOK, moreg=moreg, block=0)
        fast = torch.compile(model, backend="omnicache", options={**EAGER, "policy": policy, "steps": STEPS})
        sample = generate(fast, seed=0, steps=STEPS, latents=noise(1, 4, FRAMES, 8, 8, seed=0))
        rows.append(letters(omnifx.stats(fast).generations[-1]))

        assert rows[-1] == reference.letters
        assert distance(sample, expected) < 1e-5
        torch._dynamo.reset()
    assert rows[0] != rows[1]  # else the motion would not be seen


def test_where_the_number_of_steps_is_not_known_moreg_acts_at_every_step() -> None:
    model = video()
    reference = EagerVideo(model, block=0, steps=None)
    latents = noise(1, 4, FRAMES, 8, 8, seed=0)
    fast = torch.compile(
        model, backend="omnicache", options={**EAGER, "policy": AdaCache(codebook=BOOK, moreg=True, block=0)}
    )

    sample = generate(fast, seed=0, steps=STEPS, latents=latents)

    expected = generate(reference, seed=0, steps=STEPS, latents=latents)
    assert letters(omnifx.stats(fast).generations[-1]) == reference.letters
    assert distance(sample, expected) < 1e-5
