"""Submodules that break the graph are kept whole, as one operator each, so that their branches are reused like any
other."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import omnifx
from omnifx.errors import OmnifxWarning
from omnifx.session import Session, find_session
from omnifx.whole import Wholes
from tests.test_breaks import BrokenDiT, Masked
from tests.toys import EAGER, Mlp, Pattern, Reference, ToyDiT, generate, letters_of, lively, noise, sampling

STEPS = 7
FULL, PLAN = "FFFFFFF", "FrrFrrF"


class Experts(nn.Module):
    """A shared expert, and for each token the one that a router chooses: how many each one gets, only values tell."""

    def __init__(self, width: int, num_experts: int = 3) -> None:
        super().__init__()
        self.shared = Mlp(width, width)
        self.router = nn.Linear(width, num_experts)
        self.experts = nn.ModuleList(Mlp(width, 2 * width) for _ in range(num_experts))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weight, chosen = self.router(flat).softmax(dim=-1).max(dim=-1)
        order, y, start = chosen.argsort(), torch.zeros_like(flat), 0
        for expert, count in zip(self.experts, chosen.bincount(minlength=len(self.experts)).tolist(), strict=True):
            tokens = order[start : start + count]
            y[tokens] = expert(flat[tokens]) * weight[tokens, None]
            start += count
        return self.shared(x) + scale * y.view(x.shape)


class Branching(Experts):
    """The same, and goes the way that values say, which no setting of Dynamo captures."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        weight, chosen = self.router(x).softmax(dim=-1).max(dim=-1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            if (chosen == i).any():
                y = y + expert(x) * (weight * (chosen == i))[..., None]
        return self.shared(x) + scale * y


class Routed(ToyDiT):
    """The toy with experts for MLPs."""

    def __init__(self, num_blocks: int = 2, experts: type[nn.Module] = Experts) -> None:
        super().__init__(num_blocks)
        for block in self.blocks:
            block.mlp = experts(self.width)


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    gc.collect()  # a model of an earlier test would tell how to capture this one
    return torch.compile(model, backend="omnicache", options={**EAGER, "policy": Pattern(pattern="Frr"), **options})


def session_of(fast: Any) -> Session:
    return find_session(fast)


def kept_by(fast: Any) -> Wholes:
    boundary = session_of(fast).boundary
    assert boundary is not None  # the graph is broken
    return boundary.wholes


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_experts_are_branches_of_one_graph_and_reuse_is_that_of_hooked_modules(lowering: str) -> None:
    model = lively(Routed())
    fast = compiled(model, lowering=lowering)

    images = [generate(fast, seed=seed, steps=STEPS) for seed in (0, 1, 2)]

    report = session_of(fast).report()
    assert report.graphs == 1
    assert [(branch.name, branch.kind, branch.cacheable) for branch in report.branches] == [
        ("blocks.0.attn", "self_attention", True),
        ("blocks.0.mlp", "mlp", True),
        ("blocks.1.attn", "self_attention", True),
        ("blocks.1.mlp", "mlp", True),
    ]
    logs = omnifx.stats(fast).generations
    assert letters_of(logs[-1]) == PLAN
    for seed, letters in ((0, FULL), (2, PLAN)):
        expected = generate(Reference(model, letters), seed=seed, steps=STEPS)
        assert torch.allclose(images[seed], expected, atol=1e-5)


def test_the_flops_are_those_of_the_experts() -> None:
    model = lively(Routed(1))
    fast = compiled(model)
    generate(fast, seed=0, steps=STEPS)

    (branch,) = [branch for branch in session_of(fast).report().branches if branch.kind == "mlp"]

    tokens, width, num_experts = 16, 32, 3
    shared, routed, router = 2 * width * width, 4 * width * width, width * num_experts
    assert branch.flops == 2 * tokens * (shared + routed + router)


def test_the_users_model_stays_as_it_was() -> None:
    model = lively(Routed())
    names, attributes = list(model.state_dict()), [sorted(module.__dict__) for module in list(model.modules())[1:]]
    before = generate(model, seed=0, steps=STEPS)
    fast = compiled(model)
    for seed in (0, 1):
        generate(fast, seed=seed, steps=STEPS)

    assert len(kept_by(fast).found) == 2
    assert list(model.state_dict()) == names
    assert [sorted(module.__dict__) for module in list(model.modules())[1:]] == attributes  # Dynamo marks the model
    assert torch.equal(generate(model, seed=0, steps=STEPS), before)


def test_changed_weights_of_experts_are_noticed() -> None:
    model = lively(Routed())
    fast = compiled(model)
    for seed in (0, 1):
        generate(fast, seed=seed, steps=STEPS)

    def change(k: int, x: Tensor) -> Tensor:
        if k == 4:
            with torch.no_grad():
                model.blocks[1].mlp.experts[0].down.weight.mul_(1.5)  # type: ignore[union-attr,index]
        return x

    *_, _ = sampling(fast, seed=2, steps=STEPS, before=change)

    assert any("weights changed" in reason for reason in omnifx.stats(fast).generations[-1].reasons)


def test_a_module_that_returns_another_shape_is_captured_in_parts() -> None:
    class Doubled(Branching):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return torch.cat([super().forward(x, scale)] * 2, dim=-1)

    class Halved(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.doubled = Doubled(width)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.doubled(x)[..., : x.shape[-1]]

    model = lively(Routed(2, Halved))
    fast = compiled(model)

    images = [generate(fast, seed=seed, steps=STEPS) for seed in (0, 1)]

    assert not kept_by(fast).found
    assert kept_by(fast).refused[Doubled] == "its output has not the shape and type of an input"
    assert kept_by(fast).refused[Halved] == "a residual connection runs through it"
    assert omnifx.stats(fast).graphs > 1
    assert torch.allclose(images[0], generate(model, seed=0, steps=STEPS), atol=2e-5)


class Fickle(Branching):
    """Gives one token less once it is told to."""

    short = False

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = super().forward(x, scale)
        return y[:, :1] if self.short else y


def test_a_module_whose_output_changes_its_shape_later_is_captured_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively(Routed(2, Fickle))
    fast = compiled(model)
    for seed in (0, 1):
        generate(fast, seed=seed, steps=STEPS)
    assert len(kept_by(fast).found) == 2
    monkeypatch.setattr(Fickle, "short", True)

    with pytest.warns(OmnifxWarning, match=r"Fickle was kept whole since its output looked like .*\[1, 16, 32\]"):
        images = [generate(fast, seed=seed, steps=STEPS) for seed in (2, 3)]

    assert not kept_by(fast).found
    assert omnifx.stats(fast).graphs > 1
    assert torch.allclose(images[0], generate(model, seed=2, steps=STEPS), atol=2e-5)


class Faltering(Experts):
    """Gives one token less once it is told to; Dynamo breaks at its `tolist`."""

    short = False

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = super().forward(x, scale)
        return y[:, :1] if self.short else y


@pytest.mark.parametrize("experts", [Fickle, Faltering])
def test_what_can_be_reused_in_parts_is_reused_after_the_next_generation(
    experts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lively(Routed(2, experts))
    fast = compiled(model)
    attentions = ("blocks.0.attn", "blocks.1.attn")
    for seed in (0, 1):
        generate(fast, seed=seed, steps=STEPS)
    monkeypatch.setattr(experts, "short", True)

    with pytest.warns(OmnifxWarning, match="captured in parts from now on"):
        images = [generate(fast, seed=seed, steps=STEPS) for seed in (2, 3, 4)]

    logs = omnifx.stats(fast).generations
    assert letters_of(logs[-1]) == PLAN
    for image, seed, letters in zip(images, (2, 3, 4), (FULL, letters_of(logs[-2]), PLAN), strict=True):
        expected = generate(Reference(model, letters, attentions), seed=seed, steps=STEPS)
        assert torch.allclose(image, expected, atol=2e-5), seed
    x, t, y = noise(3, 4, 8, 8), torch.full((3,), 500.0), torch.arange(3)
    with torch.no_grad():
        assert torch.allclose(fast(x, t, y), model(x, t, y), atol=2e-5)


class Counting(Branching):
    """Keeps what it was given."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.last = x
        return super().forward(x, scale)


class Noisy(Branching):
    """Draws random numbers."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x, scale) * (1 + 0 * torch.rand(()))


class Attending(Branching):
    """Lets tokens see each other."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward((x @ x.transpose(1, 2)).softmax(dim=-1) @ x, scale)


@pytest.mark.parametrize(
    ("experts", "reason"),
    [
        (Counting, "it writes to what it was given, or to itself"),
        (Noisy, "it draws random numbers"),
        (Attending, "it holds an attention"),
    ],
)
def test_what_is_more_than_one_branch_or_has_side_effects_is_refused(experts: type[Experts], reason: str) -> None:
    fast = compiled(lively(Routed(1, experts)))
    with torch.no_grad():
        for _ in range(3):
            fast(noise(1, 4, 8, 8), torch.full((1,), 500.0), torch.tensor([3]))

    assert not kept_by(fast).found
    assert kept_by(fast).refused[experts] == reason


class Restless(Experts):
    """Cannot be kept whole, and slices by sizes that Dynamo takes for an error once it captures them."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.last = x
        return super().forward(x, scale)


def test_a_call_that_fails_for_captured_sizes_runs_as_it_is() -> None:
    model = lively(Routed(1, Restless))
    fast = compiled(model)
    given = noise(1, 4, 8, 8), torch.full((1,), 500.0), torch.tensor([3])

    with torch.no_grad():
        expected = model(*given)
        fast(*given)  # looks at the experts
        fast(*given)  # looks at the block around them
        with pytest.warns(
            OmnifxWarning, match="Routed is captured in parts from now on: with capture_scalar_outputs .* a call failed"
        ):
            image = fast(*given)

    assert torch.allclose(image, expected, atol=2e-5)


def test_numbers_and_names_reach_the_module() -> None:
    class Scaled(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.inner = Experts(width)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, scale=0.25)

    model = lively(Routed(2, Scaled))
    fast = compiled(model)

    image = generate(fast, seed=0, steps=STEPS)

    assert len(kept_by(fast).found) == 2
    assert {type(module) for module in kept_by(fast).found} == {Experts}
    assert torch.allclose(image, generate(model, seed=0, steps=STEPS), atol=1e-5)


def test_another_batch_size_is_captured_too() -> None:
    model = lively(Routed())
    fast = compiled(model)
    generate(fast, seed=0, steps=STEPS)
    x, t, y = noise(3, 4, 8, 8), torch.full((3,), 500.0), torch.arange(3)

    with torch.no_grad():
        image = fast(x, t, y)

        assert torch.allclose(image, model(x, t, y), atol=1e-5)
    assert len(kept_by(fast).found) == 2


# -- explain -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_is_explained_as_it_is_captured_when_it_runs(device: str) -> None:
    model = lively(Routed())
    fast = compiled(model)
    generate(fast, seed=0, steps=STEPS)
    ran = session_of(fast).report()
    torch._dynamo.reset()
    given = [value.to(device) for value in (noise(1, 4, 8, 8), torch.full((1,), 500.0), torch.tensor([3]))]

    found = omnifx.explain(Routed().to(device), *given)

    assert found.branches == ran.branches
    assert (found.graphs, found.flops, found.reuse_flops) == (1, ran.flops, ran.reuse_flops)
    assert found.kept_whole == ran.kept_whole == {"blocks.0.mlp": "Experts", "blocks.1.mlp": "Experts"}
    assert not found.breaks
    (stop,) = found.avoided
    assert "tolist" in stop.source
    assert "kept whole, as one operator each: blocks.*.mlp (2 Experts)" in str(found)
    page = found.to_html().replace("<wbr>", "")
    assert "<code>blocks.*.mlp</code>" in page
    assert stop.place in page


def test_a_model_is_explained_whose_pieces_cannot_be_captured() -> None:
    """AOTAutograd of torch 2.13 makes guards that fail of an expert's number of tokens if that is 0 in one block."""
    model = lively(Routed())
    with torch.no_grad():
        model.blocks[1].mlp.router.bias[1] = -1e9  # type: ignore[union-attr,index]

    found = omnifx.explain(model, noise(1, 4, 8, 8), torch.full((1,), 500.0), torch.tensor([3]))

    assert (found.graphs, len(found.kept_whole)) == (1, 2)
    assert found.avoided


def test_sizes_are_captured_where_that_makes_a_model_one_graph() -> None:
    text = noise(1, 5, 16, seed=7)

    found = omnifx.explain(
        lively(Masked(2, text=16)), noise(1, 4, 8, 8), torch.full((1,), 500.0), torch.tensor([3]), text
    )

    assert found.graphs == 1
    assert [stop.source for stop in found.avoided] == ["kept = torch.nonzero(text[0, :, 0] > -1e9).shape[0]"]
    assert "capture_dynamic_output_shape_ops" in str(found)


def test_a_model_that_is_explained_while_it_runs_is_reused_again_afterwards() -> None:
    model = lively(BrokenDiT((0, 1)))
    fast = compiled(model)
    for seed in (0, 1):
        generate(fast, seed=seed, steps=STEPS)

    found = omnifx.explain(model, noise(1, 4, 8, 8), torch.full((1,), 500.0), torch.tensor([3]))
    images = [generate(fast, seed=seed, steps=STEPS) for seed in (2, 3)]

    assert found.graphs > 1
    assert letters_of(omnifx.stats(fast).generations[-1]) == PLAN
    expected = generate(Reference(model, PLAN), seed=3, steps=STEPS)
    assert torch.allclose(images[1], expected, atol=2e-5)


def test_the_users_model_stays_as_it_was_when_it_is_explained() -> None:
    model = lively(Routed())
    attributes = [sorted(module.__dict__) for module in list(model.modules())[1:]]

    omnifx.explain(model, noise(1, 4, 8, 8), torch.full((1,), 500.0), torch.tensor([3]))

    assert [sorted(module.__dict__) for module in list(model.modules())[1:]] == attributes
