"""ToCa and DuCa: which (step, branch, token) is computed, and what comes out, against eager models with hooks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import omnifx
from omnifx.errors import ConfigError
from omnifx.plan import COMPUTE, REUSE, Plan, partial, partial_tokens, reuses
from omnifx.policies.duca import DuCa
from omnifx.policies.fora import Fora
from omnifx.policies.toca import OVERHEAD, RELEASES, ToCa, layers_of, speedup_in_time
from omnifx.policy import resolve
from omnifx.profile import BranchMeta, Profile
from omnifx.session import find_session
from tests.profiles import make_profile
from tests.reuse import EAGER, distance, noise
from tests.tokenwise import TokenReference, attention_map, drive, follow, heads_of, run_planned
from tests.toys import free_toy, generate, lively, toy
from tests.zoo.models import ZOO

STEPS = 12

Kinds = list[tuple[str, dict[str, int]]]
"""What each step does, and how many tokens each module computes there."""


def model_of(name: str, **config: Any) -> nn.Module:
    return lively(getattr(diffusers, name)(**{**ZOO[name].config, **config}))


def times(step: int, batch: int) -> Tensor:
    return torch.full((batch,), 981.0 - 80.0 * step)


# -- a generation of each family, against the formulas -----------------------------------------------------------------


def dit_inputs(step: int, x: Tensor) -> dict[str, Any]:
    labels = torch.arange(3, 3 + len(x))
    return {"hidden_states": x, "timestep": times(step, len(x)), "class_labels": labels, "return_dict": False}


def dit_full(steps: int, interval: int, *, adaptive: bool) -> list[bool]:
    """ToCa's release for DiT: the step's number falls to 0; full where it is a multiple of the threshold."""
    full, threshold = [], interval
    for k in range(steps):
        s = steps - 1 - k
        if k == 0 or s % threshold == 0:
            full.append(True)
            threshold = round(interval / (1.4 - 0.8 * s / steps))
            if 0.2 * steps <= s < 0.4 * steps:
                threshold = 2
        else:
            full.append(False)
    return full if adaptive else [k % interval == 0 for k in range(steps)]


def dit_reference(model: nn.Module, score: str, interval: int) -> TokenReference:
    def raw(layer: int) -> Callable[[TokenReference], Tensor]:
        def of(reference: TokenReference) -> Tensor:
            q, k, v = (reference.full[f"transformer_blocks.{layer}.attn1.to_{part}"] for part in "qkv")
            if score == "attention":
                return attention_map(q, k, 2).sum(1)
            return sum((1 - heads_of(v, 2)[:, head].norm(dim=-1)) for head in range(2))  # type: ignore[return-value]

        return of

    return TokenReference(
        model,
        held=[f"transformer_blocks.{i}.attn1" for i in range(2)],
        partial={f"transformer_blocks.{i}.ff": raw(i) for i in range(2)},
        staleness=0.25 / interval,
        bonus=0.6,
        window=2,
    )


def run_reference(
    reference: TokenReference, inputs: Callable[[int, Tensor], dict[str, Any]], start: Tensor, kinds: Kinds
) -> list[Tensor]:
    x, outputs = start, []
    for step, (kind, ks) in enumerate(kinds):
        outputs.append(reference(kind, ks, **inputs(step, x)))
        x = follow(x, outputs[-1], len(kinds))
    return outputs


def assert_same(ours: list[Tensor], theirs: list[Tensor], chosen: dict[Any, Any], expected: dict[Any, Any]) -> None:
    for step, (got, wanted) in enumerate(zip(ours, theirs, strict=True)):
        assert distance(got, wanted) < 1e-5, f"step {step}"
    last = len(ours) - 1
    assert chosen == {key: tokens for key, tokens in expected.items() if key[0] != last}
    assert chosen


@pytest.mark.parametrize(
    ("score", "adaptive", "batch"), [("kv-norm", True, 1), ("attention", True, 2), ("kv-norm", False, 2)]
)
def test_a_dit_computes_the_tokens_that_the_papers_formulas_choose(score: Any, adaptive: bool, batch: int) -> None:
    interval, r0, start = 3, 0.3, noise(batch, 4, 16, 16)
    kinds: Kinds = []
    for k, full in enumerate(dit_full(STEPS, interval, adaptive=adaptive)):
        s = STEPS - 1 - k
        shares = [min(1.0, max(0.0, r0 * (0.8 + 0.4 * i / 1) * (3 - 4 * s / STEPS) * 2.5)) for i in range(2)]
        ks = {f"transformer_blocks.{i}.ff": int(share * 64) for i, share in enumerate(shares)}
        kinds.append(("F" if full else "P", ks))
    reference = dit_reference(model_of("DiTTransformer2DModel", sample_size=16), score, interval)
    expected = run_reference(reference, dit_inputs, start, kinds)

    policy = ToCa(interval=interval, ratio=r0, adaptive=adaptive, score=score, groups=None)
    ran = run_planned(model_of("DiTTransformer2DModel", sample_size=16), policy, dit_inputs, start, STEPS)

    assert ran.reasons == {}
    assert [reuses(row) for row in ran.plan.rows] == [kind == "P" for kind, _ in kinds]
    assert_same(ran.outputs, expected, ran.chosen, reference.chosen)


def test_a_dit_with_a_policy_of_few_variants_does_what_its_plan_says() -> None:
    start = noise(1, 4, 16, 16)
    policy = ToCa(ratio=0.2, groups=3)

    ran = run_planned(model_of("DiTTransformer2DModel", sample_size=16), policy, dit_inputs, start, STEPS)

    names = [f"transformer_blocks.{i}.ff" for i in range(2)]
    kinds: Kinds = []
    for row in ran.plan.rows:
        actions = dict(zip(ran.plan.branches, row, strict=True))
        kinds.append(("F" if not reuses(row) else "P", {n: partial_tokens(actions[n]) or 0 for n in names}))
    assert len({tuple(ks.values()) for kind, ks in kinds if kind == "P"}) <= 3
    reference = dit_reference(model_of("DiTTransformer2DModel", sample_size=16), "kv-norm", 3)
    expected = run_reference(reference, dit_inputs, start, kinds)
    assert_same(ran.outputs, expected, ran.chosen, reference.chosen)


def test_duca_alternates_partial_steps_with_steps_that_reuse_everything() -> None:
    start, r0 = noise(1, 4, 16, 16), 0.3
    kinds: Kinds = []
    for k in range(STEPS):
        shares = [min(1.0, max(0.0, r0 * (0.8 + 0.4 * i) * (3 - 4 * (STEPS - 1 - k) / STEPS) * 2.5)) for i in range(2)]
        ks = {f"transformer_blocks.{i}.ff": int(share * 64) for i, share in enumerate(shares)}
        kinds.append(("FPRP"[k % 4], ks))
    reference = dit_reference(model_of("DiTTransformer2DModel", sample_size=16), "kv-norm", 4)
    expected = run_reference(reference, dit_inputs, start, kinds)

    policy = DuCa(interval=4, ratio=r0, groups=None)
    ran = run_planned(model_of("DiTTransformer2DModel", sample_size=16), policy, dit_inputs, start, STEPS)

    assert [variant.split("+")[0] for variant in ran.variants][:3:2] == ["full", "reuse"]
    assert_same(ran.outputs, expected, ran.chosen, reference.chosen)


def pixart_inputs(step: int, x: Tensor) -> dict[str, Any]:
    return {
        "hidden_states": x, "encoder_hidden_states": noise(len(x), 6, 24, seed=1), "timestep": times(step, len(x)),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, "return_dict": False,
    }  # fmt: skip


class CrossMaps:
    """The mean cross-attention map of each block, halves of the batch averaged; what is computed renews its rows."""

    def __init__(self) -> None:
        self.maps: dict[str, Tensor] = {}

    def renew(self, reference: TokenReference, name: str, rows: Tensor) -> None:
        if not name.endswith("attn2"):
            return
        fresh = attention_map(reference.seen[f"{name}.to_q"], reference.seen[f"{name}.to_k"], 2)
        half = len(fresh) // 2
        if half:
            fresh = torch.cat([0.5 * fresh[:half] + 0.5 * fresh[half:]] * 2)
        kept = self.maps.get(name, fresh).clone()
        for sample, chosen in enumerate(rows):
            kept[sample, chosen] = fresh[sample, chosen]
        self.maps[name] = kept

    def scorer(self, layer: int) -> Callable[[TokenReference], Tensor]:
        def of(reference: TokenReference) -> Tensor:
            rows = self.maps[f"transformer_blocks.{layer}.attn2"]
            return 1 - (rows * (rows + 1e-7).log()).sum(-1)

        return of


def test_a_pixart_chooses_by_entropy_and_both_halves_share() -> None:
    start, r0, interval = noise(2, 4, 16, 16), 0.3, 3
    kinds: Kinds = []
    threshold = 1
    for step in range(STEPS):
        full = step == 0 or step % threshold == 0
        if full:
            threshold = round(interval / (0.8 + 0.4 * step / STEPS))
        ks = {}
        for i in range(2):
            share = r0 * (1.6 - 1.2 * i) * (1.9 - 1.8 * step / STEPS)
            ks[f"transformer_blocks.{i}.attn2"] = int(min(1.0, share * 0.6) * 64)
            ks[f"transformer_blocks.{i}.ff"] = int(min(1.0, share * 1.6) * 64)
        kinds.append(("F" if full else "P", ks))
    maps = CrossMaps()
    reference = TokenReference(
        model_of("PixArtTransformer2DModel", sample_size=16),
        held=[f"transformer_blocks.{i}.attn1" for i in range(2)],
        partial={f"transformer_blocks.{i}.{part}": maps.scorer(i) for i in range(2) for part in ("attn2", "ff")},
        staleness=0.25 / interval,
        bonus=0.4,
        window=4,
        shares_halves=True,
        chosen_by=maps.renew,
    )
    expected = run_reference(reference, pixart_inputs, start, kinds)

    policy = ToCa(release="pixart", groups=None)
    ran = run_planned(model_of("PixArtTransformer2DModel", sample_size=16), policy, pixart_inputs, start, STEPS)

    assert ran.reasons == {}
    assert_same(ran.outputs, expected, ran.chosen, reference.chosen)
    assert all(first == second for first, second in ran.chosen.values())


def flux_inputs(step: int, x: Tensor) -> dict[str, Any]:
    made: dict[str, Any] = ZOO["FluxTransformer2DModel"].make().inputs
    return {**made, "hidden_states": x, "timestep": torch.tensor([0.9 - 0.07 * step])}


def test_flux_joins_fresh_mlps_with_old_attention_rows() -> None:
    """Double blocks: both MLPs; single blocks: MLP and output projection of fresh tokens on cached attention rows."""
    start, r0, interval, steps = noise(1, 16, 8), 0.8, 3, 11
    kinds: Kinds = []
    for step in range(steps):
        full = step < 3 or (step - 2) % interval == 0
        ks = {}
        for name, layer, factor, tokens in (
            ("transformer_blocks.0.ff", 0, 0.4, 16), ("transformer_blocks.0.ff_context", 0, 0.4, 6),
            ("single_transformer_blocks.0.proj_out", 0, 1.6, 22), ("single_transformer_blocks.1.proj_out", 1, 1.6, 22),
        ):  # fmt: skip
            ks[name] = int(min(1.0, r0 * (1.5 - layer / 27) * factor) * tokens)
        kinds.append(("F" if full else "P", ks))

    def raw(name: str) -> Callable[[TokenReference], Tensor]:
        return lambda reference: heads_of(reference.full[name], 2).norm(dim=-1).mean(1)

    reference = TokenReference(
        model_of("FluxTransformer2DModel"),
        held=["transformer_blocks.0.attn", *(f"single_transformer_blocks.{i}.attn" for i in range(2))],
        partial={
            "transformer_blocks.0.ff": raw("transformer_blocks.0.attn.to_v"),
            "transformer_blocks.0.ff_context": raw("transformer_blocks.0.attn.add_v_proj"),
            **{
                f"single_transformer_blocks.{i}.proj_out": raw(f"single_transformer_blocks.{i}.attn.to_v")
                for i in range(2)
            },
        },
        staleness=0.25 / interval,
    )
    expected = run_reference(reference, flux_inputs, start, kinds)

    policy = ToCa(release="flux", ratio=r0, interval=interval, groups=None)
    ran = run_planned(model_of("FluxTransformer2DModel"), policy, flux_inputs, start, steps)

    assert ran.reasons == {}
    chosen = {(step, name.removesuffix(".proj_out")): tokens for (step, name), tokens in reference.chosen.items()}
    assert_same(ran.outputs, expected, ran.chosen, chosen)


@pytest.mark.slow
def test_inductor_computes_what_the_eager_lowering_does() -> None:
    start, policy = noise(2, 4, 16, 16), ToCa(release="pixart", groups=2)

    eager, compiled = (
        run_planned(
            model_of("PixArtTransformer2DModel", sample_size=16), policy, pixart_inputs, start, 8, lowering=lowering
        )
        for lowering in ("eager", "inductor")
    )

    assert compiled.reasons == {}
    assert compiled.chosen == eager.chosen
    for got, wanted in zip(compiled.outputs, eager.outputs, strict=True):
        assert distance(got, wanted) < 1e-5


# -- what it costs and refuses -----------------------------------------------------------------------------------------


def test_without_fresh_tokens_it_is_fora() -> None:
    start = noise(1, 4, 16, 16)
    policies = (ToCa(ratio=0.0, interval=3, adaptive=False), Fora(interval=3))

    toca, fora = (
        run_planned(model_of("DiTTransformer2DModel", sample_size=16), policy, dit_inputs, start, STEPS)
        for policy in policies
    )

    assert toca.variants[1:3] == fora.variants[1:3] == ["reuse", "reuse"]
    for ours, theirs in zip(toca.outputs, fora.outputs, strict=True):
        assert torch.equal(ours, theirs)


def test_scores_stamps_and_held_attentions_are_counted_before_the_first_reuse() -> None:
    model = model_of("FluxTransformer2DModel")
    fast = torch.compile(model, backend="omnicache", options={**EAGER, "policy": ToCa(release="flux")}, fullgraph=True)

    for _ in drive(fast, flux_inputs, noise(1, 16, 8), 4):
        pass

    (runner,) = find_session(fast).runners
    cuts = runner.program.cache_bytes
    stamps, scores, held = 4 * (16 + 6 + 2 * 22), 4 * (22 + 2 * 22), 2 * 4 * 22 * 32
    assert omnifx.stats(fast).peak_cache_bytes == cuts + stamps + scores + held


def test_a_generation_of_another_size_is_computed_in_full_and_says_why() -> None:
    policy = ToCa(ratio=0.4, interval=2, adaptive=False, groups=1)
    fast = torch.compile(free_toy(), backend="omnicache", options={**EAGER, "policy": policy}, dynamic=False)
    generate(fast, seed=0, latents=noise(1, 4, 8, 8))

    generate(fast, seed=1, latents=noise(1, 4, 16, 16))

    log = omnifx.stats(fast).generations[-1]
    assert {v.split("+")[0] for v in log.variants} == {"full"}
    assert any("the plan computes some of 16 tokens of blocks.0.mlp: it has 64" in reason for reason in log.reasons)


def test_a_plan_with_tokens_survives_its_file(tmp_path: Any) -> None:
    plan = ToCa(ratio=0.2).plan(profile_of(20))

    plan.save(tmp_path / "plan.json")

    assert Plan.load(tmp_path / "plan.json") == plan
    assert any(partial_tokens(action) for row in plan.variants for action in row)


def test_notes_say_how_many_variants_there_are_and_what_is_reused_whole() -> None:
    notes = ToCa(ratio=0.2).plan(profile_of(50)).notes

    assert "2 self_attention reused whole: its keys need every token" in notes
    assert any(note.endswith("of which compute some tokens") for note in notes)


def test_a_profile_without_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"toca: the profile does not say .* Calibrate again"):
        ToCa().plan(make_profile(10))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"release": "sd3"}, "release must be one of"),
        ({"score": "beauty"}, "score must be one of"),
        ({"interval": 0}, "interval must be a whole number >= 1"),
        ({"interval": 2.5}, "interval must be a whole number >= 1"),
        ({"groups": 0}, "groups must be a whole number >= 1"),
        ({"ratio": -0.1}, "ratio must be a number >= 0"),
        ({"ratio": math.nan}, "ratio must be a number >= 0"),
        ({"bonus": "much"}, "bonus must be a number >= 0"),
        ({"release": "flux", "adaptive": True}, "has no adaptive intervals"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ToCa(**options)


def test_they_are_known_by_their_names() -> None:
    assert resolve("toca") == ToCa()
    assert resolve("duca") == DuCa()


# -- ratios and intervals ----------------------------------------------------------------------------------------------


def profile_of(steps: int, *, tokens: int = 256, blocks: int = 2) -> Profile:
    """A profile of blocks with a self-attention, a cross-attention and an MLP."""
    profile = make_profile(steps)
    branches = []
    for i in range(blocks):
        branches += [
            BranchMeta(
                name=f"blocks.{i}.attn", kind="self_attention", flops=30, cache_bytes=8, tokens=0,
                token_reason="its keys need every token",
            ),
            BranchMeta(
                name=f"blocks.{i}.cross", kind="cross_attention", flops=10, cache_bytes=8, tokens=tokens,
                token_flops=10,
            ),
            BranchMeta(
                name=f"blocks.{i}.mlp", kind="mlp", flops=60, cache_bytes=8, tokens=tokens, token_flops=60,
                scores=("keys",), grid=(16, 16),
            ),
        ]  # fmt: skip
    meta = profile.meta.model_copy(update={"branches": tuple(branches), "flops": 100 * blocks})
    return replace(profile, meta=meta)


@given(
    steps=st.integers(1, 80),
    interval=st.one_of(st.none(), st.integers(1, 12)),
    ratio=st.one_of(st.none(), st.floats(0.0, 2.0)),
    release=st.sampled_from(sorted(RELEASES)),
    groups=st.one_of(st.none(), st.integers(1, 6)),
    duca=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_plans_are_valid(
    steps: int, interval: int | None, ratio: float | None, release: str, groups: int | None, duca: bool
) -> None:
    policy = (DuCa if duca else ToCa)(release=release, interval=interval, ratio=ratio, groups=groups)

    plan = policy.plan(profile_of(steps))

    assert not reuses(plan.rows[0])
    assert plan.selection == policy.selection
    for row in plan.rows:
        for name, action in zip(plan.branches, row, strict=True):
            k = partial_tokens(action)
            assert k is None or (0 <= k <= 256 and not name.endswith(".attn"))
            assert k is not None or action in (COMPUTE, REUSE)
    partial_rows = {row for row in plan.rows if any(partial_tokens(action) is not None for action in row)}
    assert groups is None or len(partial_rows) <= groups
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


@given(steps=st.integers(2, 120), interval=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_gaps_between_full_steps_keep_the_interval(steps: int, interval: int) -> None:
    fixed = ToCa(adaptive=False).full_steps(steps, interval)
    adaptive = ToCa().full_steps(steps, interval)
    flux = ToCa(release="flux").full_steps(steps, interval)

    assert fixed == [k % interval == 0 for k in range(steps)]
    assert flux == [k < 3 or (k - 2) % interval == 0 for k in range(steps)]
    assert adaptive == dit_full(steps, interval, adaptive=True)
    ones = [k for k, full in enumerate(adaptive) if full]
    assert max(b - a for a, b in zip(ones, [*ones[1:], steps], strict=True)) <= max(2, round(interval / 0.6))


def test_the_published_thresholds_are_met() -> None:
    """5 at the start and 2 at the end for N = 3, 7 and 3 for N = 4; PixArt: 4 and 2."""
    dit, pixart = RELEASES["dit"], RELEASES["pixart"]
    assert [dit.threshold(3, s, 50) for s in (49, 15, 0)] == [5, 2, 2]
    assert [RELEASES["dit-ddpm"].threshold(4, s, 250) for s in (249, 60, 0)] == [7, 2, 3]
    assert [pixart.threshold(3, s, 20) for s in (0, 19)] == [4, 3]


def test_the_published_ratios_are_met() -> None:
    """OpenSora computes 14.95% of the tokens of an MLP; DiT none early, and 0.07 * 3 * 2.5 at the end."""
    assert RELEASES["open-sora"].share(0.1, "mlp", 0.5, 0.3) == pytest.approx(0.1495)
    assert RELEASES["open-sora"].share(0.1, "cross_attention", 0.5, 0.3) == 0.0
    assert RELEASES["dit"].share(0.07, "mlp", 0.5, 0.98) == 0.0
    assert RELEASES["dit"].share(0.07, "mlp", 0.5, 0.0) == pytest.approx(0.07 * 3 * 2.5)
    assert RELEASES["flux"].share(0.1, "parallel", 37 / 27, 0.5) == pytest.approx(0.1 * (1.5 - 37 / 27) * 1.6)
    assert RELEASES["dit"].share(0.07, "self_attention", 1.0, 0.0) == 0.0


def test_layers_count_anew_in_each_stack() -> None:
    names = ["double.0.img", "double.0.txt", "double.1.img", "single.0", "single.1", "single.2"]
    branches = [BranchMeta(name=name, kind="mlp", flops=1, cache_bytes=1) for name in names]

    assert layers_of(branches, depth=None) == [0, 0, 1, 0, 0.5, 1]
    assert layers_of(branches, depth=4) == [0, 0, 0.25, 0, 0.25, 0.5]


def test_a_speedup_is_reached_by_the_smallest_interval_or_refused() -> None:
    profile = profile_of(50)

    plan = ToCa(adaptive=False).plan(profile, speedup=2.0)

    assert plan.speedup > speedup_in_time(plan) >= 1.99
    smaller = ToCa(adaptive=False, interval=plan.policy_options["interval"] - 1).plan(profile)
    assert speedup_in_time(smaller) < 2.0
    with pytest.raises(ConfigError, match="toca: speedup must be in"):
        ToCa().plan(profile, speedup=40.0)


def test_what_partial_steps_cost_beyond_their_flops_is_counted() -> None:
    plan = ToCa(ratio=0.2, adaptive=False, interval=2).plan(profile_of(10))

    partial_steps = sum(any(map(partial_tokens, row)) for row in plan.rows)
    assert partial_steps > 0
    assert 10 / speedup_in_time(plan) == pytest.approx(10 / plan.speedup + OVERHEAD * partial_steps)
    fora = Fora(interval=2).plan(profile_of(10))
    assert speedup_in_time(fora) == fora.speedup


def test_a_step_of_nearly_all_tokens_is_computed_in_full() -> None:
    """Its FLOPs are .97 of a full step's: with what choosing the tokens costs it would take longer."""
    few = ToCa(release="open-sora", ratio=0.4, interval=2).plan(profile_of(10))
    profile = profile_of(10)
    branches = [
        b.model_copy(update={"flops": 1, "cache_bytes": 8}) if b.kind == "self_attention" else b
        for b in profile.meta.branches
    ]
    bare = replace(profile, meta=profile.meta.model_copy(update={"branches": tuple(branches)}))
    most = ToCa(release="flux", ratio=100.0, interval=2).plan(bare)

    assert any(any(map(partial_tokens, row)) for row in few.rows)
    assert not any(any(map(partial_tokens, row)) for row in most.rows)
    assert most.rows[5] == (COMPUTE,) * len(most.branches)


def test_open_sora_computes_cross_attention_half_as_often() -> None:
    plan = ToCa(release="open-sora").plan(profile_of(12))

    crosses = [dict(zip(plan.branches, row, strict=True))["blocks.0.cross"] == COMPUTE for row in plan.rows]
    mlps = [dict(zip(plan.branches, row, strict=True))["blocks.0.mlp"] == COMPUTE for row in plan.rows]
    assert [k for k, computed in enumerate(crosses) if computed] == [0, 1, 2, 6]
    assert [k for k, computed in enumerate(mlps) if computed] == [0, 1, 2, 3, 6, 9]


def test_the_cost_of_a_row_counts_its_tokens() -> None:
    meta = profile_of(4, tokens=100, blocks=1).meta

    assert meta.cost_of((REUSE, partial(25), partial(50))) == pytest.approx(1 - 0.3 - 0.075 - 0.3)
    assert meta.cost_of((REUSE, partial(0), COMPUTE)) == pytest.approx(1 - 0.3 - 0.1)


def test_a_branch_computed_whole_between_partial_steps_counts_from_there() -> None:
    """OpenSora's steps that compute all but the cross-attention: MLPs begin to count anew, whatever others do."""
    policy = ToCa(release="open-sora", ratio=0.5)
    ran_model = toy(1, text=24)

    def inputs(step: int, x: Tensor) -> dict[str, Any]:
        return {"x": x, "t": times(step, 1), "y": torch.tensor([3]), "text": noise(1, 5, 24, seed=7)}

    class Tupled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = ran_model

        def forward(self, **kwargs: Any) -> tuple[Tensor]:
            return (self.model(**kwargs),)

    ran = run_planned(Tupled(), policy, inputs, noise(1, 4, 8, 8), 8)

    assert ran.reasons == {}
    k = int(0.5 * 1.495 * 16)
    computed = {step: rows for (step, branch), rows in ran.chosen.items() if branch.endswith("mlp")}
    assert sorted(computed) == [4, 5]
    first, second = (set(computed[step][0]) for step in (4, 5))
    assert len(first) == len(second) == k
    assert first | second == set(range(16))  # what was not computed is the oldest now
