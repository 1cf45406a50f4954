"""SplitHead, ResumeTail, WriteResiduals, RestoreSpan: a step in two parts is the same step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from omnifx.errors import PassError
from omnifx.graph import EXTRA_INPUTS, EXTRA_OUTPUTS, clone, graph_text, total_flops
from omnifx.passes.eliminate import Eliminate
from omnifx.passes.split_probe import RestoreSpan, ResumeTail, SplitHead, WriteResiduals, split_at
from omnifx.policies.dbcache import DBCache
from omnifx.policies.dicache import DiCache
from omnifx.policies.easycache import EasyCache
from omnifx.policies.first_block_cache import FirstBlockCache
from omnifx.policies.teacache import TeaCache
from omnifx.probes import Pair, Probe, span_of, trunk_of
from omnifx.program import Program
from omnifx.runtime import AnyRuntimePolicy
from omnifx.stages import Stages
from tests.toys import TINY, Traced, distance, gated, toy, toy_inputs, trace

POLICIES: dict[str, AnyRuntimePolicy] = {
    "first-block-cache": FirstBlockCache(),
    "teacache": TeaCache(coefficients="identity"),
    "easycache": EasyCache(),
    "dicache": DiCache(),
}


def stages_of(traced: Traced, policy: AnyRuntimePolicy) -> Stages:
    program: Program = traced.program()
    trunk = trunk_of(program.gm, frame_axis=program.frame_axis)
    return Stages(program, policy.probe(program.gm, trunk))


def head_and_tails(traced: Traced, stages: Stages) -> tuple[list[Any], list[Any]]:
    """Outputs of head and full tail, and of head and the tail that restores, fed the step's own values."""
    kept = {label: torch.zeros(tuple(map(int, fake.shape))) for label, (fake, _) in stages.kept.items()}
    head, count = stages.head, stages.program.num_outputs
    assert head is not None
    with torch.no_grad():
        made = dict(
            zip(head.extra_outputs, head.run([*traced.inputs, *(kept[i] for i in head.extra_inputs)]), strict=True)
        )
        now = {f"now:{label[6:]}": value for label, value in made.items() if label.startswith("probe:")}
        carried = {label: value for label, value in made.items() if label.startswith("carry:")}
        full = list(stages.full.run(stages.feed(stages.full, traced.inputs, kept | carried | now)))
        own = made | dict(zip(stages.full.extra_outputs, full[count:], strict=True))
        own |= {f"{label}@1": value for label, value in own.items()} | now
        again = list(stages.reuse.run(stages.feed(stages.reuse, traced.inputs, own)))
    return full[:count], again[:count]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("make", [pytest.param(lambda: trace(toy(3), *toy_inputs(2)), id="toy")])
def test_head_and_full_tail_are_the_graph_bit_by_bit_and_cost_what_it_costs(
    make: Callable[[], Traced], policy: str
) -> None:
    traced = make()
    stages = stages_of(traced, POLICIES[policy])

    full, again = head_and_tails(traced, stages)

    assert torch.equal(full[0], traced.run()[0])
    assert distance(again[0], full[0]) < 1e-5
    assert stages.head is not None
    assert stages.head.flops + stages.full.flops == total_flops(traced.gm)
    assert stages.head.flops + stages.reuse.flops < 0.5 * total_flops(traced.gm)


@pytest.mark.parametrize("policy", ["first-block-cache", "dicache", "teacache"])
@pytest.mark.parametrize("name", TINY)
def test_real_models_are_split_at_their_first_block(name: str, policy: str) -> None:
    tiny = TINY[name]()
    traced = trace(tiny.model, **tiny.inputs)
    stages = stages_of(traced, POLICIES[policy])

    full, again = head_and_tails(traced, stages)

    for got, restored, true in zip(full, again, traced.run(), strict=True):
        if isinstance(true, Tensor) and true.is_floating_point():
            assert torch.equal(got, true)
            assert distance(restored, true) < 1e-5


@pytest.mark.parametrize("name", ["sd3", "flux", "toy"])
def test_blocks_between_the_first_and_the_last_are_skipped_on_every_trunk_that_is_read_behind_them(name: str) -> None:
    if name == "toy":
        traced = trace(toy(3), *toy_inputs())
    else:
        tiny = TINY[name]()
        traced = trace(tiny.model, **tiny.inputs)
    blocks = len(trunk_of(traced.gm).ends)
    if blocks < 3:
        pytest.skip(f"{blocks} blocks")
    stages = stages_of(traced, DBCache(front=1, back=1))

    full, again = head_and_tails(traced, stages)

    assert torch.equal(full[0], traced.run()[0])
    assert distance(again[0], full[0]) < 1e-5
    assert len(stages.probe.span) == (1 if name == "toy" else 2)  # the text's trunk as well


def test_views_are_made_again_and_their_values_carried_once() -> None:
    traced = trace(toy(3), *toy_inputs())
    stages = stages_of(traced, FirstBlockCache())
    nodes = {node.name: node for node in traced.gm.graph.nodes}

    targets = {str(nodes[name].target) for name in stages.split.carried}

    assert stages.probe.span[0].start in stages.split.carried
    assert not targets & {"aten.view.default", "aten.permute.default", "aten.unsqueeze.default"}


def test_a_split_graph_is_what_it_says() -> None:
    traced = gated()
    probe = Probe(
        signals=("size",),
        reads=(("cut", "sigmoid"),),
        measure=lambda values, old: ({"size": values["cut"].reshape(1, -1).sum(1)}, {}),
        span=(Pair("arg1_1", "add"),),
    )
    split = split_at(traced.gm, probe)
    head, full, reuse = (clone(traced.gm) for _ in range(3))

    SplitHead(probe=probe, carried=split.carried)(head)
    WriteResiduals(probe=probe)(full)
    ResumeTail(carried=split.carried, head=split.head)(full)
    RestoreSpan(probe=probe, span=("mm", "mm_1"))(reuse)
    ResumeTail(carried=split.carried, head=split.head)(reuse)

    inputs = "arg0_1 | arg1_1 | arg2_1 | arg3_1 | arg4_1"
    assert graph_text(head).startswith(f"{inputs} | sigmoid = sigmoid(arg0_1) | ")
    assert graph_text(head).endswith("sigmoid)")
    assert head.meta[EXTRA_OUTPUTS] == ["signal", "carry:sigmoid"]
    assert full.meta[EXTRA_INPUTS] == ["carry:sigmoid"]
    assert full.meta[EXTRA_OUTPUTS] == ["delta:0"]
    assert "sigmoid(" not in graph_text(full)
    assert reuse.meta[EXTRA_INPUTS] == ["delta:0"]
    assert "mm_1" not in graph_text(reuse)
    assert "return(unsqueeze_3)" in graph_text(reuse)


def test_what_is_not_there_is_refused() -> None:
    traced = trace(toy(2), *toy_inputs())
    probe = Probe(signals=("s",), reads=(("x", "nowhere"),), measure=lambda values, old: ({}, {}))

    with pytest.raises(PassError, match=r"the probe reads \['nowhere'\]"):
        split_at(traced.gm, probe)
    with pytest.raises(PassError, match="none of the 2 blocks"):
        span_of(traced.gm, 2, 4)
    with pytest.raises(PassError, match="nothing to skip of 2 blocks"):
        stages_of(traced, DBCache(front=2))
    with pytest.raises(PassError, match="measures nothing before the step"):
        SplitHead(probe=Probe(signals=()), carried=())(clone(traced.gm))


def test_a_span_that_something_behind_it_reads_is_refused() -> None:
    traced = trace(toy(2), *toy_inputs())
    probe = FirstBlockCache().probe(traced.gm, trunk_of(traced.gm))
    gm = clone(traced.gm)

    with pytest.raises(PassError, match="something behind them reads them"):
        RestoreSpan(probe=probe, span=tuple(n.name for n in gm.graph.nodes if "mm" in n.name))(gm)


def test_unused_inputs_are_dropped() -> None:
    traced = trace(toy(2), *toy_inputs())
    stages = stages_of(traced, FirstBlockCache())

    assert Eliminate()(clone(stages.program.gm)) is False
    assert set(stages.reuse.extra_inputs) <= {"delta:0", *(f"carry:{name}" for name in stages.split.carried)}
