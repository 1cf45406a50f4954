"""Combined outputs at run time: they are the planned sums of the planned values, or the step runs in full, with its
reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import omnifx
from omnifx.errors import OmnifxWarning, PlanError
from omnifx.passes import combine_output
from omnifx.pictures import kinds_of_steps
from omnifx.plan import COMPUTE, REUSE, SKIP, Combination, Correction, Plan
from omnifx.policies.fora import Fora
from omnifx.session import find_session
from tests.combining import Combined, CombinedReference, generate, sampling
from tests.profiles import make_profile
from tests.toys import EAGER, TINY, Tiny, ToyDiT, distance, free_toy, letters_of, lively, noise, toy, toy_in_parts

OUTPUTS = Combination(outputs=(1.4, -0.4))
LATENTS = Combination(outputs=(1.2, -0.2), latents=(0.3, -0.15))
ALL = Combination(reuse=0.6, noise=-0.4, outputs=(0.5, -0.1), latents=(0.2, 0.1))

LETTERS = "FFasFasF"
KNOWN = {2: ALL, 3: LATENTS, 5: Combination(reuse=0.8, noise=0.5, outputs=(0.2,)), 6: OUTPUTS}
"""Reuse and skips behind two full steps, then behind a third one."""


def tiny_toy(model: nn.Module | None = None, *, batch: int = 1) -> Tiny:
    """A toy in the shape of the other models."""
    inputs = {"x": noise(batch, 4, 8, 8), "t": torch.full((batch,), 500.0), "y": torch.full((batch,), 3)}
    modules = tuple(f"blocks.{i}.{part}" for i in range(2) for part in ("attn", "mlp"))
    return Tiny(model if model is not None else toy(), inputs, modules, latents=("x",), times=("t",))


def compiled(model: nn.Module, letters: str = LETTERS, known: Mapping[int, Combination] = KNOWN, **options: Any) -> Any:
    history = options.pop("history", 2)
    policy = Combined(letters=letters, combinations=known, history=history)
    return torch.compile(model, backend="omnicache", options={**EAGER, "policy": policy, **options})


def calibrated(tiny: Tiny, letters: str = LETTERS, known: Mapping[int, Combination] = KNOWN, **options: Any) -> Any:
    """A compiled model that has measured one generation."""
    fast = compiled(tiny.model, letters, known, **options)
    with omnifx.generation(fast):
        generate(fast, tiny, steps=len(letters), seed=100)
    return fast


def last(fast: Any) -> Any:
    return omnifx.stats(fast).generations[-1]


def expected(tiny: Tiny, letters: str = LETTERS, known: Mapping[int, Combination] = KNOWN, **arguments: Any) -> Tensor:
    return generate(CombinedReference(tiny, letters, known), tiny, **{"steps": len(letters), "seed": 1, **arguments})


def assert_equal_steps(got: Tensor, wanted: Tensor) -> None:
    assert [distance(a, b) < 1e-5 for a, b in zip(got, wanted, strict=True)] == [True] * len(wanted)


# -- what is computed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("letters", "known"),
    [
        ("FFssFs", {2: OUTPUTS, 3: OUTPUTS, 5: Combination(outputs=(1.5, -0.5))}),
        ("FsFssF", {1: Combination(outputs=(1.0,), latents=(0.3,)), 3: LATENTS, 4: LATENTS}),
        (LETTERS, KNOWN),
        ("FFra", {3: Combination(reuse=1.0, noise=-0.5)}),
        ("FFsF", {2: Combination(noise=0.7, outputs=(0.9,))}),
    ],
    ids=["outputs", "latents", "all", "noise", "skipped_noise"],
)
@pytest.mark.parametrize("name", ["dit", "pixart", "flux"])
def test_a_generation_is_that_of_plain_tensors(name: str, letters: str, known: dict[int, Combination]) -> None:
    tiny = TINY[name]()
    fast = calibrated(tiny, letters, known)

    got = generate(fast, tiny, steps=len(letters), seed=1)

    assert last(fast).reasons == {}
    assert letters_of(last(fast)) == letters.replace("a", "r")
    assert_equal_steps(got, expected(tiny, letters, known))
    assert omnifx.stats(fast).recompilations == 0


def test_combinations_are_visible_at_all() -> None:
    tiny = tiny_toy()
    found = [expected(tiny, LETTERS, {**KNOWN, step: OUTPUTS}) for step in (2, 3, 5)]

    assert all(distance(got[step], expected(tiny)[step]) > 1e-2 for got, step in zip(found, (2, 3, 5), strict=True))


def test_the_whole_output_of_the_reuse_graph_has_the_bits_of_reuse() -> None:
    tiny = tiny_toy()
    plain = generate(calibrated(tiny, "FFrrF", {}, history=0), tiny, steps=5, seed=1)
    torch._dynamo.reset()
    fast = calibrated(tiny, "FFaaF", {2: Combination(reuse=1.0), 3: Combination(reuse=1.0)})

    assert torch.equal(generate(fast, tiny, steps=5, seed=1), plain)
    assert [step.variant for step in last(fast).steps][2:4] == ["reuse+combine"] * 2


def test_statistics_name_the_variants_and_a_skipped_step_costs_nothing() -> None:
    tiny = tiny_toy()
    fast = calibrated(tiny)
    known = set(omnifx.stats(fast).variants_compiled)

    generate(fast, tiny, steps=len(LETTERS), seed=1)

    steps = last(fast).steps
    assert [s.variant for s in steps if s.variant != "full+write"] == ["reuse+combine", "skip"] * 2
    assert [s.spent for s in steps if s.variant == "skip"] == [0, 0]
    assert {"skip", "reuse+combine"} <= known  # the policy tells its rows ahead
    assert set(omnifx.stats(fast).variants_compiled) == known
    assert "2 x skip" in str(omnifx.stats(fast))


def test_plans_that_only_skip_run_the_plain_graph() -> None:
    tiny = tiny_toy()
    fast = calibrated(tiny, "FFss", {2: OUTPUTS, 3: LATENTS})

    got = generate(fast, tiny, steps=4, seed=1)

    assert last(fast).variants == ["full+write", "full+write", "skip", "skip"]  # the graph that recorded serves
    assert find_session(fast).store.held_bytes == 0
    assert_equal_steps(got, expected(tiny, "FFss", {2: OUTPUTS, 3: LATENTS}))
    ((profile, plan),) = omnifx.plans(fast)
    assert plan.kept == ()

    torch._dynamo.reset()
    options = {**EAGER, "profile": profile, "plan": plan}
    fast = torch.compile(tiny.model, backend="omnicache", options=options)  # as in a process that recorded nothing
    again = generate(fast, tiny, steps=4, seed=1)
    assert last(fast).variants == ["full", "full", "skip", "skip"]
    torch.testing.assert_close(again, got, rtol=0, atol=0)


def test_a_plan_with_combinations_comes_from_its_file(tmp_path: Path) -> None:
    tiny = tiny_toy()
    ((profile, plan),) = omnifx.plans(calibrated(tiny))
    plan.save(tmp_path / "plan.json")
    torch._dynamo.reset()

    options = {**EAGER, "policy": Fora(interval=2), "profile": profile, "plan": tmp_path / "plan.json"}
    fast = torch.compile(tiny.model, backend="omnicache", options=options)

    assert_equal_steps(generate(fast, tiny, steps=len(LETTERS), seed=1), expected(tiny))
    assert omnifx.stats(fast).recompilations == 0


@pytest.mark.slow  # Inductor
def test_with_inductor_nothing_is_compiled_late() -> None:
    tiny = tiny_toy()
    fast = calibrated(tiny, lowering="inductor")

    with torch._dynamo.config.patch(error_on_recompile=True):
        got = generate(fast, tiny, steps=len(LETTERS), seed=1)

    assert last(fast).reasons == {}
    assert [s.variant for s in last(fast).steps if s.variant != "full+write"] == ["reuse+combine", "skip"] * 2
    assert_equal_steps(got, expected(tiny))
    assert omnifx.stats(fast).recompilations == 0


@pytest.mark.slow  # Inductor
def test_with_inductor_channels_of_a_predicted_variance_are_combined_too() -> None:
    tiny = TINY["pixart"]()
    fast = calibrated(tiny, lowering="inductor")

    got = generate(fast, tiny, steps=len(LETTERS), seed=1)

    assert last(fast).reasons == {}
    assert_equal_steps(got, expected(tiny))


# -- generations and streams -------------------------------------------------------------------------------------------


def test_interleaved_generations_keep_to_their_own_history() -> None:
    tiny = tiny_toy()
    fast = calibrated(tiny)
    running = [sampling(fast, tiny, steps=len(LETTERS), seed=seed) for seed in (1, 2)]

    steps = [[next(run) for run in running] for _ in range(len(LETTERS))]

    for number, seed in enumerate((1, 2)):
        assert_equal_steps(torch.stack([step[number] for step in steps]), expected(tiny, seed=seed))
    assert all(log.reasons == {} for log in omnifx.stats(fast).generations[1:])


def test_guidance_as_two_calls_is_two_histories() -> None:
    tiny = tiny_toy()

    def guided(models: Callable[[int], Any]) -> Any:
        def call(**inputs: Any) -> Tensor:
            one, two = (models(label)(**inputs | {"y": torch.tensor([label])}) for label in (3, 9))
            return two + 2.0 * (one - two)

        return call

    fast = compiled(tiny.model)
    calls = guided(lambda label: fast)
    for seed in (100, 1):
        with omnifx.generation(fast):
            got = generate(calls, tiny, steps=len(LETTERS), seed=seed)

    references = {label: CombinedReference(tiny, LETTERS, KNOWN) for label in (3, 9)}
    assert_equal_steps(got, generate(guided(references.__getitem__), tiny, steps=len(LETTERS), seed=1))
    assert [letters_of(last(fast), stream) for stream in (0, 1)] == [LETTERS.replace("a", "r")] * 2
    assert last(fast).reasons == {}


def test_another_size_in_the_middle_has_a_history_of_its_own() -> None:
    small = tiny_toy(free_toy(2))
    large = Tiny(small.model, small.inputs | {"x": noise(1, 4, 12, 12)}, small.modules, small.latents, small.times)
    fast = torch.compile(
        small.model, backend="omnicache", dynamic=True,
        options={**EAGER, "policy": Combined(letters=LETTERS, combinations=KNOWN)},
    )  # fmt: skip
    with omnifx.generation(fast):
        generate(fast, small, steps=len(LETTERS), seed=100)

    running = [sampling(fast, tiny, steps=len(LETTERS), seed=1) for tiny in (small, large)]
    steps = [[next(run) for run in running] for _ in range(len(LETTERS))]

    for number, tiny in enumerate((small, large)):
        assert_equal_steps(torch.stack([step[number] for step in steps]), expected(tiny))
    assert [letters_of(log) for log in omnifx.stats(fast).generations[1:]] == [LETTERS.replace("a", "r")] * 2
    assert omnifx.stats(fast).graphs == 1


def test_plans_of_several_step_counts_share_their_first_full_step() -> None:
    tiny = tiny_toy()
    fast = calibrated(tiny)
    with omnifx.generation(fast, steps=6):
        generate(fast, tiny, steps=6, seed=100)

    for steps in (8, 6):
        got = generate(fast, tiny, steps=steps, seed=1)

        assert last(fast).reasons == {}
        assert letters_of(last(fast)) == LETTERS[:steps].replace("a", "r")
        assert_equal_steps(got, expected(tiny, steps=steps))


# -- what is held ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("letters", "known", "cuts", "values"),
    [
        ("FFsFs", {2: OUTPUTS, 4: OUTPUTS}, 0, 4),
        ("FFsFs", {2: Combination(outputs=(1.0,)), 4: OUTPUTS}, 0, 4),
        ("FFaFs", {2: Combination(reuse=1.0), 4: OUTPUTS}, 1, 4),
        ("FFaFs", {2: ALL, 4: OUTPUTS}, 1, 5),
        ("FFaF", {2: Combination(reuse=1.0, noise=0.5)}, 1, 1),
    ],
)
def test_a_stream_is_admitted_with_the_bytes_of_its_history(
    letters: str, known: dict[int, Combination], cuts: int, values: int
) -> None:
    tiny = tiny_toy()
    fast = calibrated(tiny, letters, known, history=2 if values >= 4 else 0)
    session = find_session(fast)
    store, program = session.store, session.runners[0].program
    assert store is not None
    store.peak_bytes = 0
    held = [store.held_bytes for _ in sampling(fast, tiny, steps=len(letters), seed=1)]

    assert last(fast).reasons == {}
    assert max(held) == store.peak_bytes == cuts * program.cache_bytes + values * 4 * 4 * 8 * 8
    assert last(fast).peak_cache_bytes == store.peak_bytes


def test_without_room_for_its_history_a_generation_runs_in_full() -> None:
    tiny = tiny_toy()
    ((profile, plan),) = omnifx.plans(calibrated(tiny, "FFss", {2: OUTPUTS, 3: OUTPUTS}))
    torch._dynamo.reset()
    cuts = sum(branch.cache_bytes for branch in profile.meta.branches)
    deep = plan.model_copy(update={"history": 1 + cuts // 2048})  # of 2,048 bytes each; the last ones are never read

    fast = compiled(tiny.model, profile=profile, plan=deep, cache_budget=cuts)
    got = generate(fast, tiny, steps=4, seed=1)

    assert last(fast).variants == ["full"] * 4
    (reason,) = last(fast).reasons
    assert f"caches need {deep.history * 2048:,} bytes, but cache_budget is {cuts:,}" in reason
    assert_equal_steps(got, expected(tiny, "FFFF", {}))


# -- when it is refused ------------------------------------------------------------------------------------------------


def test_after_a_change_of_weights_no_value_of_the_old_ones_is_combined() -> None:
    letters = "FFasFasFas"
    known = {k: ALL if letters[k] == "a" else LATENTS for k in range(10) if letters[k] != "F"}
    tiny, other = tiny_toy(), tiny_toy()

    def changing(model: nn.Module) -> Callable[[int, dict[str, Any]], None]:
        def before(step: int, inputs: dict[str, Any]) -> None:
            if step == 3:
                with torch.no_grad():
                    model.get_submodule("blocks.0.mlp.down").weight.mul_(1.5)

        return before

    fast = calibrated(tiny, letters, known)
    tiny.model.load_state_dict(other.model.state_dict())
    got = generate(fast, tiny, steps=10, seed=1, before=changing(tiny.model))

    # step 3 finds other weights; 5 and 6 find one full step of the new ones; 8 and 9 find what they are planned for
    assert letters_of(last(fast)) == "FFrFFFFFrs"
    assert last(fast).reasons == {"the weights changed since the caches were made": 3}
    assert_equal_steps(got, expected(other, "FFaSFSSFas", known, before=changing(other.model)))


def test_a_label_that_changes_in_the_middle_runs_in_full() -> None:
    tiny = tiny_toy()
    fast = calibrated(tiny)

    def relabel(step: int, inputs: dict[str, Any]) -> None:
        inputs["y"] = torch.tensor([3 if step < 3 else 5])

    got = generate(fast, tiny, steps=len(LETTERS), seed=1, before=relabel)

    assert "".join(map(letters_of, omnifx.stats(fast).generations[1:])) == "FFrFFFFF"
    assert_equal_steps(got, expected(tiny, "FFaSSSSS", before=relabel))


def stopped_at(fast: Any, tiny: Tiny, step: int) -> tuple[Any, list[Tensor], Iterator[Tensor]]:
    """The one stream of a generation, and its first outputs."""
    running = sampling(fast, tiny, steps=len(LETTERS), seed=1)
    done = [next(running) for _ in range(step)]
    (stream,) = find_session(fast).conductors[0].streams
    return stream, done, running


def test_a_step_that_could_not_be_combined_leaves_history_and_noise_alone() -> None:
    tiny = tiny_toy()
    fast = calibrated(tiny)
    stream, done, running = stopped_at(fast, tiny, 2)

    stream.doubt = "the test doubts it"
    done.append(next(running))
    stream.doubt = ""
    done += running

    assert last(fast).reasons == {"the test doubts it": 1}
    assert letters_of(last(fast)) == "FFFsFrsF"
    assert_equal_steps(torch.stack(done), expected(tiny, "FFSsFasF"))


def test_outputs_of_other_steps_than_planned_are_not_combined() -> None:
    tiny = tiny_toy()
    fast = calibrated(tiny)
    stream, done, running = stopped_at(fast, tiny, 2)

    stream.cache.history = stream.cache.history[:1]  # as if step 0 had not been kept
    done += running

    assert letters_of(last(fast)) == "FFFFFrsF"
    assert last(fast).reasons == {"outputs are kept of steps [1], but the plan combines those of [1, 0]": 2}
    assert_equal_steps(torch.stack(done), expected(tiny, "FFSSFasF"))


def test_noise_of_other_steps_than_planned_is_not_combined() -> None:
    tiny = tiny_toy()
    fast = calibrated(tiny)
    stream, done, running = stopped_at(fast, tiny, 5)

    stream.cache.noise_of = (1, stream.cache.noise_of[1])
    done += running

    assert last(fast).reasons == {"the plan combines the noise that step 4 measures, which is not known": 1}
    assert_equal_steps(torch.stack(done), expected(tiny, "FFasFSsF"))


def test_cuts_of_other_steps_than_planned_are_not_combined() -> None:
    tiny = tiny_toy()
    fast = calibrated(tiny)
    stream, done, running = stopped_at(fast, tiny, 5)

    stream.cache.steps = dict.fromkeys(stream.cache.steps, (1,))
    done += running

    ((reason, count),) = last(fast).reasons.items()
    assert "is stored of steps [1], but the plan reuses that of [4]" in reason
    assert count == 1
    assert_equal_steps(torch.stack(done), expected(tiny, "FFasFSsF"))


def test_variants_that_do_not_reproduce_a_step_are_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    plus = combine_output._plus
    monkeypatch.setattr(combine_output, "_plus", lambda *args, first: 1.1 * plus(*args, first=first))
    tiny = tiny_toy()

    with pytest.warns(OmnifxWarning, match="fed a step's own cuts differs from that step"):
        fast = calibrated(tiny)
    got = generate(fast, tiny, steps=len(LETTERS), seed=1)

    notes = " ".join(omnifx.stats(fast).notes)
    assert [f"the variant {label} fed a step's own" in notes for label in ("reuse+combine", "skip")] == [True, True]
    assert_equal_steps(got, expected(tiny, "F" * len(LETTERS), {}))


def test_an_evicted_history_is_not_read() -> None:
    tiny = tiny_toy()
    fast = calibrated(tiny)
    session = find_session(fast)
    stream, done, running = stopped_at(fast, tiny, 2)

    assert session.store is not None
    session.store.release(stream.key)
    done += running

    assert stream.cache.history == ()
    assert letters_of(last(fast)) == "F" * len(LETTERS)
    assert set(last(fast).reasons) == {"its caches were evicted to keep cache_budget"}
    assert_equal_steps(torch.stack(done), expected(tiny, "FFSSFSSF"))


def test_a_history_evicted_after_the_decision_to_combine_it_is_never_read_as_zeros() -> None:
    """What another thread may do between two lines of this one."""
    tiny = tiny_toy()
    fast = calibrated(tiny)
    (runner,) = find_session(fast).runners
    extra_inputs, evicted = runner._extra_inputs, []

    def evict_then_read(variant: Any, job: Any, args: Any) -> Any:
        if variant.spec.skips and not evicted:
            evicted.append(job)
            runner.conductor.store.release(job.call.stream.key)
        return extra_inputs(variant, job, args)

    runner._extra_inputs = evict_then_read
    got = generate(fast, tiny, steps=len(LETTERS), seed=1)

    assert evicted
    assert letters_of(last(fast)) == "FFrsFFFF"
    assert_equal_steps(got, expected(tiny, "FFasFSSF"))


def test_a_model_in_parts_skips_steps_but_runs_others_in_full_and_says_why() -> None:
    model = toy_in_parts()
    tiny = tiny_toy(model)
    fast = compiled(model)
    for seed in (100, 101):
        with omnifx.generation(fast):
            generate(fast, tiny, steps=len(LETTERS), seed=seed)

    got = generate(fast, tiny, steps=len(LETTERS), seed=1)

    reason = "outputs of the reuse graph can be combined in a model that is one graph only"
    assert last(fast).reasons == {reason: 2}
    assert_equal_steps(got, expected(tiny_toy(), LETTERS.replace("a", "S")))


class Told(ToyDiT):
    """The toy, which also returns the mean of its latents."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, text: Tensor | None = None) -> Any:
        return super().forward(x, t, y, text), x.mean((2, 3))


class Pooled(ToyDiT):
    """The toy, whose output has half of the rows and columns."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, text: Tensor | None = None) -> Any:
        return nn.functional.avg_pool2d(super().forward(x, t, y, text), 2).repeat(1, 1, 2, 1)


@pytest.mark.parametrize(
    ("make", "combination", "reason"),
    [
        (Told, OUTPUTS, "outputs cannot be combined here: 2 outputs of the model depend on its latents"),
        (Pooled, LATENTS, "latents cannot be combined with outputs here: its output [1, 4, 8, 4] and its latents"),
    ],
)
def test_what_a_model_cannot_combine_runs_in_full_and_says_why(
    make: type[ToyDiT], combination: Combination, reason: str
) -> None:
    tiny = tiny_toy(lively(make(2)))

    def call(model: Any) -> Any:
        def square(**inputs: Any) -> Tensor:
            output = model(**inputs)
            found = (output[0] if isinstance(output, tuple) else output).clone()
            return found if found.shape[-1] == 8 else found.repeat(1, 1, 1, 2)

        return square

    fast = compiled(tiny.model, "FFsF", {2: combination})
    with omnifx.generation(fast):
        generate(call(fast), tiny, steps=4, seed=100)

    got = generate(call(fast), tiny, steps=4, seed=1)

    assert [text.startswith(reason) for text in last(fast).reasons] == [True]
    assert letters_of(last(fast)) == "FFFF"
    assert_equal_steps(got, generate(call(tiny.model), tiny, steps=4, seed=1))


def test_latents_that_cannot_be_added_do_not_keep_outputs_from_being_combined() -> None:
    tiny = tiny_toy(lively(Pooled(2)))
    fast = calibrated_pooled(tiny)

    outputs = [run.clone() for run in pooled(fast, tiny, seed=1)]

    assert last(fast).reasons == {}
    assert letters_of(last(fast)) == "FFsF"
    assert distance(outputs[2], 1.4 * outputs[1] - 0.4 * outputs[0]) < 1e-6


def pooled(model: Any, tiny: Tiny, *, seed: int) -> list[Tensor]:
    """Outputs at latents that drift by themselves."""
    start, drift = noise(1, 4, 8, 8, seed=seed), noise(1, 4, 8, 8, seed=seed + 1)
    inputs = dict(tiny.inputs)
    with torch.no_grad():
        return [
            model(**inputs | {"x": start + 0.1 * k * drift, "t": torch.tensor([500.0 * (1 - k / 4)])}) for k in range(4)
        ]


def calibrated_pooled(tiny: Tiny) -> Any:
    fast = compiled(tiny.model, "FFsF", {2: OUTPUTS})
    with omnifx.generation(fast):
        pooled(fast, tiny, seed=100)
    return fast


# -- plans -------------------------------------------------------------------------------------------------------------


def toy_plan(letters: str, known: Mapping[int, Combination], **fields: Any) -> Plan:
    actions = [{"F": COMPUTE, "r": REUSE, "a": REUSE, "s": SKIP}[letter] for letter in letters]
    combinations = [known.get(k) for k in range(len(letters))]
    return Plan.uniform(
        make_profile(len(letters)), actions, policy="toy", combinations=combinations, **{"history": 2, **fields}
    )


@pytest.mark.parametrize(
    ("letters", "known", "fields", "says"),
    [
        ("Fs", {}, {}, "step 1 is skipped, so it needs a combination of old outputs, without reuse"),
        ("Fs", {1: Combination(reuse=0.5, outputs=(1.0,))}, {}, "step 1 is skipped, so it needs a combination of old"),
        ("Fs", {1: Combination(latents=(1.0,))}, {}, "step 1 is skipped, so it needs a combination of old outputs"),
        ("FFr", {1: OUTPUTS}, {}, "step 1 combines outputs, so it must reuse or skip all branches, without spans"),
        ("FFa", {2: OUTPUTS}, {"history": 1}, "step 2 combines 2 outputs, but the plan's history is 1"),
        ("Fa", {1: OUTPUTS}, {}, "step 1 combines 2 outputs, but 1 full steps are before it"),
        ("Fa", {1: Combination(latents=(1.0, 1.0))}, {}, "step 1 combines 2 outputs, but 1 full steps are before it"),
        ("Fa", {1: Combination(noise=1.0)}, {}, "step 1 combines noise, which is measured from the second full step"),
        (
            "FFa",
            {2: OUTPUTS},
            {"corrections": [None, None, Correction(gamma=1.0)]},
            "step 2 has a correction and a combination",
        ),
        ("sF", {0: OUTPUTS}, {}, "step 0 reuses a branch"),
        ("FF", {}, {"history": -1}, "history: Input should be greater than or equal to 0"),
    ],
)
def test_plans_that_combine_what_is_not_there_are_refused(
    letters: str, known: dict[int, Combination], fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(PlanError, match=says):
        toy_plan(letters, known, **fields)


def test_a_row_that_skips_some_branches_is_refused() -> None:
    rows = [(COMPUTE, COMPUTE), (COMPUTE, COMPUTE), (SKIP, REUSE)]

    with pytest.raises(PlanError, match=r"variants \[1\] skip some columns and not others"):
        Plan.from_rows(make_profile(3), rows, policy="toy", combinations=[None, None, OUTPUTS], history=2)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    toy_plan("FFs", {2: OUTPUTS}).save(path := tmp_path / "plan.json")
    path.write_text(path.read_text().replace("-0.4", "NaN"))

    with pytest.raises(PlanError, match=r"steps.2.combination.outputs.1"):
        Plan.load(path)


def test_a_plan_knows_what_it_combines(tmp_path: Path) -> None:
    plan = toy_plan("FFrasFs", {3: ALL, 4: OUTPUTS, 6: OUTPUTS})
    plan.save(tmp_path / "plan.json")

    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.timeline().endswith("FFrasFs")
    assert plan.full_before() == ((), (0,), (1, 0), (1, 0), (1, 0), (1, 0), (5, 1))
    assert plan.readings == (((REUSE, REUSE), False),)
    assert plan.combined_rows == ((REUSE, REUSE), (SKIP, SKIP))
    assert (plan.reads_noise, plan.combines_noise, plan.corrects) == (True, True, False)
    assert plan.kept == plan.branches
    assert plan.num_reuse_steps == 4
    assert kinds_of_steps(plan) == ["full", "full", "reuse", "combined", "skip", "full", "skip"]


def test_a_plan_that_only_skips_keeps_no_cuts_and_costs_its_full_steps() -> None:
    profile = make_profile(4, branch_flops=(60, 15))

    plan = Plan.uniform(
        profile, [COMPUTE, COMPUTE, SKIP, SKIP], policy="toy", combinations=[None, None, OUTPUTS, OUTPUTS], history=2
    )

    assert plan.kept == ()
    assert not plan.reads_noise
    assert plan.reuse_flops == (1.0, 0.0)
    assert plan.speedup == 2.0
    assert profile.meta.cost_of((REUSE, REUSE)) == pytest.approx(0.25)


def test_plans_from_before_there_were_combinations_still_load(tmp_path: Path) -> None:
    plan = Plan.uniform(make_profile(2), [COMPUTE, REUSE], policy="toy")
    plan.save(path := tmp_path / "plan.json")
    old = {key: value for key, value in json.loads(path.read_text()).items() if key != "history"}
    for step in old["steps"]:
        del step["combination"]
    path.write_text(json.dumps(old))

    assert Plan.load(path) == plan


def test_weights_stand_in_the_order_of_the_graph() -> None:
    assert ALL.vector(3) == (0.6, -0.4, 0.5, -0.1, 0.0, 0.2, 0.1, 0.0)
    assert Combination(reuse=1.0).vector(0) == (1.0, 0.0)
