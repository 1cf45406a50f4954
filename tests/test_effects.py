"""Models that do more than compute their outputs, and callers that write to what they get: no step may go wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import omnifx
from tests.reference import PATTERN, STEPS, Case, OldOutputs
from tests.thirdparty.variants import Block, Model, dit_case
from tests.toys import EAGER, Pattern, distance


class WritesToLatents(Model):
    """Scales the caller's latents in place."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x.mul_(0.9), t)


class CountsItsCalls(Model):
    """Keeps a count in a buffer, on which its output depends."""

    def __init__(self, blocks: Any) -> None:
        super().__init__(blocks)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x, t) + self.calls


class DrawsNoise(Model):
    """Dithers its latents."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.randn_like(x), t)


class DropsOut(Block):
    """Attention with dropout left on."""

    def __init__(self) -> None:
        super().__init__()
        self.attn.forward = self._attend  # type: ignore[method-assign]

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.attn.qkv(x).chunk(3, dim=-1))
        return self.attn.proj(
            nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.5).transpose(1, 2).flatten(2)
        )


def fast_model(case: Case) -> Any:
    options = {**EAGER, "policy": Pattern(pattern=PATTERN)}
    return torch.compile(case.model, backend="omnicache", options=options, fullgraph=True)


@pytest.mark.parametrize("model", [WritesToLatents, CountsItsCalls])
@torch.no_grad()
def test_a_model_that_writes_to_what_it_is_given_or_keeps_runs_once_a_step(model: type[Model]) -> None:
    torch.manual_seed(0)
    case, twin = (dit_case(model(Block() for _ in range(2))) for _ in range(2))
    fast = fast_model(case)

    for seed in (0, 1):
        for step in range(STEPS):
            given, expected = case.call(step, seed=seed), twin.call(step, seed=seed)
            assert distance(fast(**given), twin.model(**expected)) < 1e-5
            assert torch.equal(given["x"], expected["x"])

    stats = omnifx.stats(fast)
    written = "x" if model is WritesToLatents else "self_buffers_calls"
    assert stats.notes == [
        f"{model.__name__} writes to its input or buffer {written}; each step must run once and whole, so nothing is "
        "reused"
    ]
    assert stats.generations[-1].variants == ["full"] * 2 * STEPS
    assert written in str(omnifx.explain(case.model, **case.call(0)))


@pytest.mark.parametrize(
    "model",
    [DrawsNoise(Block() for _ in range(2)), Model(DropsOut() for _ in range(2))],
    ids=["noise", "dropout"],
)
@torch.no_grad()
def test_a_model_that_draws_random_numbers_draws_them_once_a_step(model: Model) -> None:
    case = dit_case(model)
    fast = fast_model(case)
    plain = torch.compile(model, backend="omnicache", options={**EAGER, "policy": "full"})

    for step in range(STEPS):
        torch.manual_seed(step)
        made, after = fast(**case.call(step)), torch.get_rng_state()
        torch.manual_seed(step)
        assert torch.equal(made, plain(**case.call(step)))
        assert torch.equal(after, torch.get_rng_state())

    (note,) = omnifx.stats(fast).notes
    assert "draws random numbers" in note


class ReturnsACut(Model):
    """Also returns what its last MLP made, which is what a reuse step reads."""

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(t)
        for block in self.blocks:
            y = block.mlp(block.norm2(x))
            kept.append(y)
            x = x + c[:, None] * y
        x = self.final_layer(x, c).transpose(1, 2)
        return nn.functional.pixel_shuffle(x.unflatten(2, (4, 4)), 2), kept[0]


@torch.no_grad()
def test_a_caller_may_write_to_all_that_a_model_returns() -> None:
    made = dit_case(ReturnsACut(Block() for _ in range(2)), kinds=("mlp",) * 2, parts=("mlp",))
    fast = fast_model(made)
    reference = OldOutputs(made.model, made.modules)

    for seed in (0, 1):
        for step in range(STEPS):
            image, hidden = fast(**made.call(step, seed=seed))
            expected = reference(made.call(step, seed=seed), reuse=bool(seed and step))
            assert distance(image, expected) < 1e-5
            hidden.fill_(7.0)

    assert omnifx.stats(fast).generations[-1].variants == ["full+write", *["reuse"] * (STEPS - 1)]
