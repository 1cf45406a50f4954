"""Models whose graph is broken: each part of a step reuses its own caches, and the steps stay those of one plan."""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import omnifx
from omnifx.errors import OmnifxWarning
from omnifx.program import Program
from omnifx.session import find_session
from tests.toys import EAGER, Block, Pattern, Reference, ToyDiT, generate, letters_of, lively, noise, sampling

STEPS = 7
FULL, PLAN = "FFFFFFF", "FrrFrrF"


class BrokenDiT(ToyDiT):
    """The toy with a graph break after each block of `after`, and before the blocks if -1 is in it."""

    def __init__(self, after: tuple[int, ...] = (0,), *, num_blocks: int = 3, text: int = 0) -> None:
        super().__init__(num_blocks, text=text)
        self.after = after

    def forward(self, x: Tensor, t: Tensor, y: Tensor, text: Tensor | None = None) -> Tensor:
        batch, _, height, width = x.shape
        angles = t[:, None].float() * torch.exp(-torch.arange(self.width // 2) * 9.2 / (self.width // 2))
        c = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1)) + self.label(y)
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        if -1 in self.after:
            torch._dynamo.graph_break()
        for i, block in enumerate(self.blocks):
            x = block(x, c, text)
            if i in self.after:
                torch._dynamo.graph_break()
        x = self.head(self.norm(x)).reshape(batch, height // 2, width // 2, 2, 2, 4)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, 4, height, width)


class BrokenBlock(Block):
    """A block with a break in its middle, as data-dependent routing causes: every block is split in two graphs."""

    def forward(self, x: Tensor, c: Tensor, text: Tensor | None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(nn.functional.silu(c))[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        torch._dynamo.graph_break()
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class BrokenInside(ToyDiT):
    """Every block is broken in the middle."""

    def __init__(self) -> None:
        super().__init__(2)
        self.blocks = nn.ModuleList(BrokenBlock(self.width, 2, 0) for _ in range(2))


def compiled(model: nn.Module, pattern: str = "Frr", **options: Any) -> Any:
    torch._dynamo.reset()
    gc.collect()  # a model of an earlier test would tell how to capture this one
    return torch.compile(model, backend="omnicache", options={**EAGER, "policy": Pattern(pattern=pattern), **options})


MODELS = {
    "one break": lambda: lively(BrokenDiT((0,))),
    "break before the blocks": lambda: lively(BrokenDiT((-1,))),
    "break after each block": lambda: lively(BrokenDiT((0, 1, 2))),
    "text is first seen after a break": lambda: lively(BrokenDiT((-1, 0), text=16)),
    "breaks inside the blocks": lambda: lively(BrokenInside()),
}


def text_of(model: nn.Module, seed: int = 7) -> dict[str, Any]:
    return {"text": noise(1, 5, 16, seed=seed)} if model.blocks[0].cross is not None else {}  # type: ignore[union-attr,index]


@pytest.mark.parametrize("name", MODELS)
def test_every_part_reuses_and_the_image_is_that_of_hooked_modules(name: str) -> None:
    model = MODELS[name]()
    fast = compiled(model)

    images = [generate(fast, seed=seed, steps=STEPS, **text_of(model)) for seed in (0, 1, 2)]

    logs = omnifx.stats(fast).generations
    assert [letters_of(log) for log in logs] == [FULL, PLAN, PLAN]
    for seed, (image, letters) in enumerate(zip(images, (FULL, PLAN, PLAN), strict=True)):
        expected = generate(Reference(model, letters), seed=seed, steps=STEPS, **text_of(model))
        assert torch.allclose(image, expected, atol=2e-5), (name, seed)
    assert logs[1].speedup > 1.5
    assert omnifx.stats(fast).graphs > 1
    assert omnifx.stats(fast).cache_bytes == 0  # all generations are over


def test_the_plan_names_the_branches_of_all_graphs() -> None:
    model = lively(BrokenDiT((0, 1)))
    fast = compiled(model)
    for seed in (0, 1):
        generate(fast, seed=seed, steps=STEPS)

    profile, plan = omnifx.plans(fast)[0]

    assert len(plan.branches) == 6
    assert len(set(plan.branches)) == 6
    assert profile.meta.flops == sum(part.program.analysis.flops for part in find_session(fast).conductors[0].parts)


def test_generations_interleave_step_by_step() -> None:
    model = lively(BrokenDiT((0, 1)))
    fast = compiled(model)
    generate(fast, seed=0, steps=STEPS)
    jobs: list[Iterator[Tensor]] = [sampling(fast, seed=seed, steps=STEPS) for seed in (1, 2)]

    images = [None, None]
    for _ in range(STEPS):
        for i, job in enumerate(jobs):
            images[i] = next(job)  # type: ignore[call-overload]

    for i, seed in enumerate((1, 2)):
        letters = letters_of(omnifx.stats(fast).generations[1 + i])
        expected = generate(Reference(model, letters), seed=seed, steps=STEPS)
        assert torch.allclose(images[i], expected, atol=2e-5)  # type: ignore[arg-type]
    assert letters_of(omnifx.stats(fast).generations[1]) == PLAN


def test_threads_do_not_mix_their_steps() -> None:
    model = lively(BrokenDiT((0, 1)))
    fast = compiled(model)
    generate(fast, seed=0, steps=STEPS)
    generate(fast, seed=0, steps=STEPS)
    images: dict[int, Tensor] = {}

    def work(seed: int) -> None:
        images[seed] = generate(fast, seed=seed, steps=STEPS)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for seed, image in images.items():
        assert torch.allclose(image, generate(Reference(model, PLAN), seed=seed, steps=STEPS), atol=2e-5)


def test_a_text_that_changes_where_only_a_later_graph_sees_it_is_noticed() -> None:
    """The graph with the latents cannot know; the clock reads what the caller gave."""
    model = lively(BrokenDiT((-1, 0), text=16))
    fast = compiled(model)
    text = noise(1, 5, 16, seed=7)
    for seed in (0, 1):
        generate(fast, seed=seed, steps=STEPS, text=text)

    def rewrite(k: int, x: Tensor) -> Tensor:
        if k == 4:  # a reuse step
            text.mul_(-1.0)
        return x

    *_, image = sampling(fast, seed=2, steps=STEPS, text=text, before=rewrite)

    ran = "".join(map(letters_of, omnifx.stats(fast).generations[2:]))
    assert ran == "Frr" + "FFFF"
    text.mul_(-1.0)
    *_, expected = sampling(Reference(model, ran), seed=2, steps=STEPS, text=text, before=rewrite)
    assert torch.allclose(image, expected, atol=2e-5)


def test_changed_weights_of_a_later_graph_are_noticed() -> None:
    model = lively(BrokenDiT((0, 1)))
    fast = compiled(model)
    for seed in (0, 1):
        generate(fast, seed=seed, steps=STEPS)

    def change(k: int, x: Tensor) -> Tensor:
        if k == 4:
            with torch.no_grad():
                model.blocks[2].mlp.down.weight.mul_(1.5)  # type: ignore[union-attr]
        return x

    *_, _ = sampling(fast, seed=2, steps=STEPS, before=change)

    assert any("weights changed" in reason for reason in omnifx.stats(fast).generations[-1].reasons)


def test_a_profile_of_a_broken_model_is_found_by_a_new_session(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fast = compiled(lively(BrokenDiT((0, 1))), profile_cache=True)
    for seed in (0, 1):
        generate(fast, seed=seed, steps=STEPS)

    del fast
    model = lively(BrokenDiT((0, 1)))
    again = compiled(model, profile_cache=True)
    image = generate(again, seed=2, steps=STEPS)

    ran = letters_of(omnifx.stats(again).generations[0])
    assert ran == "FFF" + PLAN[3:]  # the third step captures the parts
    assert torch.allclose(image, generate(Reference(model, ran), seed=2, steps=STEPS), atol=2e-5)


def test_a_profile_of_other_graphs_is_not_followed(tmp_path: Any) -> None:
    profile = omnifx.calibrate(
        lively(BrokenDiT((0, 1))),
        lambda model, seed: generate(model, seed=seed, steps=STEPS),
        options={"lowering": "eager"},
        progress=False,
    )
    model = lively(BrokenDiT((-1,)))
    fast = compiled(model, profile=profile)

    image = generate(fast, seed=0, steps=STEPS)

    log = omnifx.stats(fast).generations[-1]
    assert letters_of(log) == FULL
    assert "graphs are other ones" in str(log.reasons)
    assert torch.allclose(image, generate(model, seed=0, steps=STEPS), atol=1e-5)


def test_a_broken_model_without_branches_says_so() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            x = self.a(x) * (t / 1000).reshape(-1, 1, 1, 1)
            torch._dynamo.graph_break()
            return self.b(x)

    model = lively(Plain())
    fast = compiled(model)

    with pytest.warns(OmnifxWarning, match="no branch of Plain can be reused"):
        images = [generate(fast, seed=seed, steps=STEPS) for seed in (0, 1)]

    for seed, image in enumerate(images):
        assert torch.allclose(image, generate(model, seed=seed, steps=STEPS), atol=1e-5)


def test_the_caches_of_all_parts_stay_under_the_budget() -> None:
    cut = 4 * 16 * 32
    model = lively(BrokenDiT((0, 1)))
    fast = compiled(model, cache_budget=6 * cut)

    images = [generate(fast, seed=seed, steps=STEPS) for seed in (0, 1)]

    stats = omnifx.stats(fast)
    assert letters_of(stats.generations[1]) == PLAN
    assert stats.peak_cache_bytes <= 6 * cut
    assert torch.allclose(images[1], generate(Reference(model, PLAN), seed=1, steps=STEPS), atol=2e-5)


def test_a_budget_that_holds_only_some_parts_reuses_nothing_and_says_why() -> None:
    cut = 4 * 16 * 32
    model = lively(BrokenDiT((0, 1)))
    fast = compiled(model, cache_budget=3 * cut)

    images = [generate(fast, seed=seed, steps=STEPS) for seed in (0, 1)]

    assert "cache_budget" in str(omnifx.stats(fast))
    for seed, image in enumerate(images):
        assert torch.allclose(image, generate(model, seed=seed, steps=STEPS), atol=2e-5)


class Masked(ToyDiT):
    """Scales the text by how many tokens it has: whole if Dynamo may capture what depends on values."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, text: Tensor | None = None) -> Tensor:
        assert text is not None
        kept = torch.nonzero(text[0, :, 0] > -1e9).shape[0]
        return super().forward(x, t, y, text * (kept / 8))


def test_a_break_that_capturing_sizes_avoids_is_avoided() -> None:
    model = lively(Masked(2, text=16))
    fast = compiled(model)
    text = noise(1, 5, 16, seed=7)

    images = [generate(fast, seed=seed, steps=STEPS, text=text) for seed in (0, 1, 2)]

    stats = omnifx.stats(fast)
    assert stats.graphs == 1
    assert [letters_of(log) for log in stats.generations[-2:]] == [FULL, PLAN]
    assert torch.allclose(images[2], generate(Reference(model, PLAN), seed=2, steps=STEPS, text=text), atol=2e-5)
    assert torch.allclose(images[0], generate(model, seed=0, steps=STEPS, text=text), atol=2e-5)
    assert not torch._dynamo.config.capture_dynamic_output_shape_ops  # only within the model's calls


def test_a_model_that_cannot_be_compiled_whole_is_cached_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively(Masked(2, text=16))
    fast = compiled(model)
    text = noise(1, 5, 16, seed=7)
    made = Program.__init__

    def fails_on_unknown_sizes(self: Program, gm: Any, *args: Any, **kwargs: Any) -> None:
        if torch._dynamo.config.capture_dynamic_output_shape_ops:
            raise RuntimeError("no size is known")
        made(self, gm, *args, **kwargs)

    monkeypatch.setattr(Program, "__init__", fails_on_unknown_sizes)
    with pytest.warns(OmnifxWarning, match="not compiled as one graph: .*no size is known"):
        images = [generate(fast, seed=seed, steps=STEPS, text=text) for seed in (0, 1)]

    stats = omnifx.stats(fast)
    assert stats.graphs > 1
    assert letters_of(stats.generations[-1]) == PLAN
    for seed, letters in ((0, FULL), (1, PLAN)):
        expected = generate(Reference(model, letters), seed=seed, steps=STEPS, text=text)
        assert torch.allclose(images[seed], expected, atol=2e-5)


def test_one_graph_that_leaves_most_of_a_step_is_given_up_for_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omnifx.backend.MOST_LEFT", 0.001)
    model = lively(Masked(2, text=16))
    fast = compiled(model)
    text = noise(1, 5, 16, seed=7)

    with pytest.warns(OmnifxWarning, match=r"not compiled as one graph: a reuse step would cost .*% of a full one"):
        images = [generate(fast, seed=seed, steps=STEPS, text=text) for seed in (0, 1)]

    assert omnifx.stats(fast).graphs > 1
    assert letters_of(omnifx.stats(fast).generations[-1]) == PLAN
    expected = generate(Reference(model, PLAN), seed=1, steps=STEPS, text=text)
    assert torch.allclose(images[1], expected, atol=2e-5)


def test_parts_are_counted_once_a_step() -> None:
    fast = compiled(lively(BrokenDiT((0, 1))))
    for seed in (0, 1):
        generate(fast, seed=seed, steps=STEPS)

    log = omnifx.stats(fast).generations[1]

    assert [step.step for step in log.steps] == list(range(STEPS))
    assert all(step.compute == 1.0 for step in log.steps if step.variant.startswith("full"))
    assert len(find_session(fast).conductors) == 1


@torch._dynamo.disable
def nothing(module: nn.Module) -> None:
    """What runs before a hooked module."""


def hooked(module: Any, *args: Any) -> Any:
    """The forward of all hooked modules, as accelerate's is: a break at its beginning, and no operator of its own."""
    nothing(module)
    return module.unhooked(*args)


def hook(*modules: Any) -> None:
    for module in modules:
        module.unhooked, module.forward = module.forward, functools.partial(hooked, module)


@pytest.mark.parametrize("limit", [2, 3])
def test_behind_a_wrapper_that_dynamo_gives_up_the_graphs_are_those_of_plain_compile(limit: int) -> None:
    """At its limit Dynamo captures nothing more in the wrapper and in all that it calls, which is the whole model."""
    plain, model = lively(ToyDiT(2)), lively(ToyDiT(2))
    for each in (plain, model):
        hook(each, *each.blocks, each.norm, each.head)  # type: ignore[misc]

    with torch._dynamo.config.patch(recompile_limit=limit):
        before = counters["stats"]["unique_graphs"]
        generate(torch.compile(plain, backend="eager"), seed=0, steps=STEPS)
        graphs = counters["stats"]["unique_graphs"] - before
        fast = compiled(model)
        images = [generate(fast, seed=seed, steps=STEPS) for seed in (0, 1)]

    assert omnifx.stats(fast).graphs == graphs > 1
    assert letters_of(omnifx.stats(fast).generations[-1]) == PLAN
    for seed, letters in ((0, FULL), (1, PLAN)):
        expected = generate(Reference(model, letters), seed=seed, steps=STEPS)
        assert torch.allclose(images[seed], expected, atol=2e-5)
