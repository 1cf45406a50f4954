"""The pipeline: which passes make a variant, and in which order."""

import pytest
import torch

from omnifx.graph import graph_text, run_passes
from omnifx.passes.pipeline import VariantSpec, pipeline
from omnifx.plan import COMPUTE, PREDICT, REUSE, SKIP, partial
from omnifx.tokens import Selection
from tests.toys import gated, noise, toy, toy_inputs, trace

BOTH = ("attn", "mlp")
OLDEST = Selection(score="none", staleness=0.1)


def names(spec: VariantSpec) -> list[str]:
    return [step.name for step in pipeline(spec, ())]


@pytest.mark.parametrize(
    ("spec", "passes", "label"),
    [
        (VariantSpec(BOTH, (COMPUTE, COMPUTE), writes=BOTH), ["WriteCuts", "Eliminate"], "full+write"),
        (
            VariantSpec(BOTH, (COMPUTE, COMPUTE), writes=BOTH, measures=True),
            ["MeasureNoise", "WriteCuts", "Eliminate"],
            "full+write+measure",
        ),
        (
            VariantSpec(BOTH, (REUSE, REUSE), writes=()),
            ["ReadCuts", "Eliminate", "NarrowLinears", "HoistConditions"],
            "reuse",
        ),
        (
            VariantSpec(BOTH, (REUSE, REUSE), writes=(), corrects=True),
            ["CorrectNoise", "ReadCuts", "Eliminate", "NarrowLinears", "HoistConditions"],
            "reuse+correct",
        ),
        (
            VariantSpec(BOTH, (PREDICT, PREDICT), writes=(), corrects=True, terms=2, stores=True),
            ["CorrectNoise", "PredictCuts", "Eliminate", "NarrowLinears", "HoistConditions"],
            "predict+correct+store",
        ),
        (
            VariantSpec(BOTH, (PREDICT, REUSE), writes=(), terms=1, trend="shift"),
            ["ReadCuts", "PredictCuts", "FollowTrends", "Eliminate", "NarrowLinears", "HoistConditions"],
            "reuse1-predict1+trend",
        ),
        (
            VariantSpec(BOTH, (REUSE, REUSE), writes=(), combines=2, combines_noise=True),
            ["CombineOutput", "ReadCuts", "Eliminate", "NarrowLinears", "HoistConditions"],
            "reuse+combine",
        ),
        (VariantSpec(BOTH, (SKIP, SKIP), writes=(), combines=2), ["CombineOutput", "Eliminate"], "skip"),
        (
            VariantSpec(BOTH, (REUSE, COMPUTE), writes=("mlp",)),
            ["ReadCuts", "WriteCuts", "Eliminate", "NarrowLinears", "HoistConditions"],
            "reuse1+write",
        ),
        (
            VariantSpec(BOTH, (partial(3), REUSE), writes=(), selection=OLDEST),
            ["ReadCuts", "Eliminate", "GuardTokens", "Eliminate", "NarrowLinears", "HoistConditions"],
            "partial3",
        ),
        (
            VariantSpec(BOTH, (partial(3), PREDICT), writes=(), corrects=True, terms=1, selection=OLDEST),
            [
                *("CorrectNoise", "PredictCuts", "Eliminate", "GuardTokens", "Eliminate"),
                *("NarrowLinears", "HoistConditions"),
            ],
            "partial3-predict1+correct",
        ),
        (
            VariantSpec(BOTH, (COMPUTE, partial(3)), writes=("attn",), selection=OLDEST),
            [
                *("WriteCuts", "Eliminate", "GuardTokens", "Eliminate"),
                *("ScoreTokens", "NarrowLinears", "HoistConditions"),
            ],
            "partial3of1+write+score",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_variant_has_its_passes_in_order(spec: VariantSpec, passes: list[str], label: str) -> None:
    assert names(spec) == passes
    assert spec.label == label


def test_a_row_reads_what_it_reuses() -> None:
    assert VariantSpec(BOTH, (REUSE, COMPUTE), writes=("mlp",)).reads == ("attn",)


def test_dumps_hold_the_graph_before_and_after_each_pass(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    traced = gated()
    monkeypatch.setenv("OMNIFX_DUMP", str(tmp_path))

    seconds = run_passes(traced.gm, pipeline(VariantSpec(("branch.mlp",), (REUSE,), writes=()), ()), label="reuse")

    assert list(seconds) == ["ReadCuts", "Eliminate", "NarrowLinears", "HoistConditions"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"reuse.0{i}_{name}.{when}.txt"
        for i, name in enumerate(["ReadCuts", "Eliminate", "NarrowLinears", "HoistConditions"])
        for when in ("after", "before")
    ]
    assert "cached_unsqueeze_2" in (tmp_path / "reuse.01_Eliminate.after.txt").read_text()


@pytest.mark.parametrize("measures", [False, True])
def test_every_mixed_row_fed_its_own_cuts_computes_the_same_bits(measures: bool) -> None:
    traced = trace(toy(2), *toy_inputs())
    program = traced.program()
    full = program.variant(program.full(measures=measures))
    zeros = [torch.zeros(tuple(value.shape)) for value in full.extra_values]
    outputs = full.run([*traced.inputs, *zeros])
    cuts = dict(zip(full.extra_outputs, outputs[program.num_outputs :], strict=True))
    assert torch.equal(outputs[0], traced.run()[0])

    for bits in range(1, 2 ** len(program.names)):
        row = tuple(REUSE if bits >> i & 1 else COMPUTE for i in range(len(program.names)))
        variant = program.variant(program.reusing(row, corrects=False))
        again = variant.run(variant.feed(traced.inputs, cuts))
        assert torch.equal(again[0], outputs[0]), row
        for label, value in zip(variant.extra_outputs, again[1:], strict=True):
            assert torch.equal(value, cuts[label]), (row, label)


def test_the_captured_graph_is_never_changed() -> None:
    traced = trace(toy(1), *toy_inputs())
    program = traced.program()
    before = graph_text(program.gm)

    for spec in (program.plain, program.full(measures=True), program.reusing(program.reuse_row, corrects=True)):
        program.variant(spec)

    assert graph_text(program.gm) == before


def test_a_correcting_variant_subtracts_the_noise_it_is_given() -> None:
    traced = trace(toy(1), *toy_inputs())
    program = traced.program()
    variant = program.variant(program.reusing(program.reuse_row, corrects=True))
    plain = program.variant(program.reusing(program.reuse_row, corrects=False))
    q = noise(1, 4, 8, 8, seed=3)
    cuts = {
        label: noise(1, 16, 32, seed=i)
        for i, label in enumerate(label for label in plain.extra_inputs if label[:4] == "cut:")
    }
    given = {"coefficients": torch.tensor([0.5, 0.0]), "noise:0": q, "low_pass:8": torch.eye(8)} | cuts

    corrected = variant.run(variant.feed(traced.inputs, given))[0]

    base = plain.run(plain.feed(traced.inputs, given))[0]
    assert torch.allclose(corrected, base - 0.5 * q, atol=1e-6)
