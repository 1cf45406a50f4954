"""Spans: which blocks a model has, where ranges of them begin and end, and which are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from omnifx.errors import ConfigError, PlanError
from omnifx.plan import COMPUTE, REUSE, Plan
from omnifx.spans import Span, Spans
from tests.policies.stacks import block_profile
from tests.toys import TINY, Block, ToyDiT, lively, noise, toy, toy_inputs, trace


def spans_of(name: str) -> Spans:
    tiny = TINY[name]()
    return Spans(trace(tiny.model, **tiny.inputs).gm)


def shapes(spans: Spans, span: Span) -> list[tuple[int, ...]]:
    values = {node.name: node.meta.get("val") for node in spans.gm.graph.nodes}
    for start, end in zip(span.starts, span.ends, strict=True):
        assert values[start].shape == values[end].shape
    return [tuple(values[end].shape) for end in span.ends]


def test_blocks_are_the_branches_of_one_numbered_module() -> None:
    spans = Spans(trace(toy(2, text=24), *toy_inputs(text=24)).gm)

    assert [block.name for block in spans.blocks] == ["blocks.0", "blocks.1"]
    assert spans.blocks[1].branches == ("blocks.1.attn", "blocks.1.cross", "blocks.1.mlp")


def test_a_span_of_the_toy_takes_the_trunk_in_and_out() -> None:
    spans = Spans(trace(toy(3), *toy_inputs(batch=2)).gm)

    first, second = spans.named("span0-0"), spans.named("span1-2")

    assert first.ends == second.starts
    assert first.branches == ("blocks.0.attn", "blocks.0.mlp")
    assert shapes(spans, second) == [(2, 16, 32)]
    assert second.cache_bytes == 2 * 16 * 32 * 4
    assert second.cuts == (f"span1-2:{second.ends[0]}",)
    together = spans.named("span0-2").flops
    assert first.flops + second.flops < together < 1.01 * (first.flops + second.flops)  # the conditioning dies last


def test_every_trunk_that_goes_on_has_its_own_residual() -> None:
    """Flux: image and text apart in its first block, joined in the single ones; only the image leaves the last."""
    spans = spans_of("flux")
    image, text = 16, 6

    assert [shape[1] for shape in shapes(spans, spans.named("span0-0"))] == [image, text]
    assert [shape[1] for shape in shapes(spans, spans.named("span1-2"))] == [image + text]
    assert sorted(shape[1] for shape in shapes(spans, spans.named("span0-1"))) == [text, image]
    assert [shape[1] for shape in shapes(spans, spans.named("span0-2"))] == [image]


def test_a_trunk_that_changes_its_layout_ends_in_the_one_it_began_with() -> None:
    """Latte: frames and places take turns as the batch."""
    spans = spans_of("latte")
    frames, places = shapes(spans, spans.named("span0-0")), shapes(spans, spans.named("span1-1"))

    assert frames != places
    assert shapes(spans, spans.named("span0-1")) == shapes(spans, spans.named("span0-3")) == frames
    assert shapes(spans, spans.named("span1-2")) == places


def image(model: ToyDiT, tokens: Tensor) -> Tensor:
    """[1, 4, 8, 8] from 16 tokens."""
    return model.head(model.norm(tokens)).reshape(1, 4, 4, 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(1, 4, 8, 8)


class Skipping(ToyDiT):
    """The toy with a skip from behind its first block to before its last."""

    def __init__(self) -> None:
        super().__init__(num_blocks=3)
        self.join = nn.Linear(2 * self.width, self.width)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, text: Tensor | None = None) -> Tensor:
        c = self.time(t[:, None].cos().expand(-1, self.width)) + self.label(y)
        h = self.embed(x).flatten(2).transpose(1, 2) + self.position
        h = skip = self.blocks[0](h, c, None)
        h = self.blocks[1](h, c, None)
        return image(self, self.blocks[2](self.join(torch.cat([h, skip], dim=-1)), c, None))


def test_a_long_skip_out_of_a_span_refuses_it() -> None:
    spans = Spans(trace(lively(Skipping()), *toy_inputs()).gm)

    reasons = {name: spans.named(name).reason for name in ("span0-0", "span0-1", "span1-1", "span1-2", "span0-2")}

    assert "a long skip leaves it" in reasons["span0-1"]
    assert {name for name, reason in reasons.items() if not reason} == {"span0-0", "span1-1", "span1-2", "span0-2"}


class Turning(ToyDiT):
    """The toy with a block that swaps rows and columns of its square of tokens, of which there are as many."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, text: Tensor | None = None) -> Tensor:
        c = self.time(t[:, None].cos().expand(-1, self.width)) + self.label(y)
        h = self.embed(x).permute(0, 2, 3, 1).flatten(0, 1)  # [4 rows, 4 columns, width]
        h = self.blocks[0](h, c, None).transpose(0, 1)
        return image(self, self.blocks[1](h, c, None))


def test_a_layout_that_shapes_cannot_tell_is_refused() -> None:
    spans = Spans(trace(lively(Turning(2)), *toy_inputs()).gm)

    assert spans.named("span0-0").reason == spans.named("span1-1").reason == ""
    assert "axes of the same size are swapped" in spans.named("span0-1").reason


class Sharing(nn.Module):
    """Two blocks, the second of which also reads what the first one's attention made."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(32, 2, 0) for _ in range(2))
        self.embed, self.head = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, c = self.embed(x), t[:, None].cos().expand(-1, 32)
        made = self.blocks[0].attn(h)
        h = h + made
        h = h + self.blocks[0].mlp(h)
        h = h + self.blocks[1].attn(h + made) + 0 * c[:, None]
        return self.head(h + self.blocks[1].mlp(h))


def test_a_value_from_inside_that_is_used_behind_refuses_it() -> None:
    spans = Spans(trace(lively(Sharing()), noise(1, 5, 8), torch.tensor([0.5])).gm)

    assert "in it is also used behind it" in spans.named("span0-0").reason
    assert spans.named("span0-1").reason == ""


@pytest.mark.parametrize("name", ["span2-1", "span0-7", "blocks.0", "span-1-2"])
def test_what_is_no_span_is_refused(name: str) -> None:
    spans = Spans(trace(toy(2), *toy_inputs()).gm)
    with pytest.raises(PlanError, match=f"'{name}' is no span of this model, whose blocks are 0 to 1"):
        spans.named(name)


# -- in plans ----------------------------------------------------------------------------------------------------------


def plan(*rows: str, spans: tuple[str, ...] = ("span0-1",)) -> Plan:
    """A plan of a model of two blocks, from letters: c computes, r reuses."""
    actions = [tuple(COMPUTE if letter == "c" else REUSE for letter in row) for row in rows]
    return Plan.from_rows(block_profile(len(rows), 2), actions, policy="toy", spans=spans)


def test_a_reused_span_covers_its_branches_and_counts_for_all_of_them() -> None:
    made = plan("ccccc", "ccccr", "rcccc", "rrrrr")

    assert made.variants[1] == (REUSE,) * 5
    assert len(made.variants) == 3
    assert made.reuse_flops == pytest.approx((1.0, 4 / 48, 38 / 48))
    assert made.kept == ("blocks.0.attn", "span0-1")
    assert made.timeline().splitlines()[1] == "Frmr"
    assert plan("ccccc", "ccccr").kept == ("span0-1",)


def test_spans_inside_each_other_count_once() -> None:
    made = plan("cccccc", "ccccrr", spans=("span0-1", "span1-1"))
    assert made.reuse_flops[1] == pytest.approx(4 / 48)


def test_a_plan_with_spans_comes_back_and_one_without_still_loads() -> None:
    made = plan("ccccc", "ccccr")
    data = made.model_dump(mode="json")

    assert Plan.model_validate(data) == made
    old = {key: value for key, value in plan("cccc", spans=()).model_dump(mode="json").items() if key != "spans"}
    assert Plan.model_validate(old).span_names == ()
    data["variants"][1][0] = "compute"
    with pytest.raises(
        ValueError, match=r"variants \[1\] compute or predict a branch inside of a span that they reuse"
    ):
        Plan.model_validate(data)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: block_profile(4, leaks=True).meta.span("span0-1"),
            "blocks 0 to 1 of Toy cannot be reused as one: its",
        ),
        (
            lambda: block_profile(4).meta.span("span1-2"),
            "does not hold the range of blocks span1-2: it knows those from",
        ),
    ],
)
def test_spans_that_a_profile_cannot_give_are_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()
