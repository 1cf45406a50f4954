"""Run-time policies against references in plain tensor code: the same steps, and the same samples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import omnifx
from omnifx.errors import ConfigError
from omnifx.options import Options
from omnifx.policies.adacache import AdaCache
from omnifx.policies.dbcache import DBCache
from omnifx.policies.dicache import DiCache
from omnifx.policies.easycache import EasyCache
from omnifx.policies.first_block_cache import FirstBlockCache
from omnifx.policies.teacache import TeaCache, published
from omnifx.policy import policies, resolve
from omnifx.runtime import AnyRuntimePolicy, RuntimePolicy, Step
from tests.runtime import Eager, EagerAda, EagerBlocks, EagerDi, EagerEasy, EagerTaylor, EagerTea, letters
from tests.toys import EAGER, TINY, ToyDiT, distance, generate, noise, toy

STEPS = 12
BLOCKS = 4
POLYNOMIAL = (0.3, -0.2, 0.1, 0.8, 0.02)
BOOK = ((0.5, 4), (0.8, 3), (1.1, 2), (2.0, 1))

Case = tuple[AnyRuntimePolicy, Callable[[ToyDiT], Eager]]

CASES: dict[str, Case] = {
    "first-block-cache": (
        FirstBlockCache(threshold=0.7),
        lambda model: EagerBlocks(model, 0.7, equal=True),
    ),
    "dbcache": (
        DBCache(front=1, back=1, warmup=3, most_skips=2, threshold=0.9),
        lambda model: EagerBlocks(model, 0.9, front=1, back=1, warmup=3, most=2),
    ),
    "dbcache-front": (
        DBCache(front=2, back=0, warmup=2, most_skips=3, threshold=0.9),
        lambda model: EagerBlocks(model, 0.9, front=2, back=0, warmup=2, most=3),
    ),
    "dbcache-taylor": (
        DBCache(front=1, back=1, warmup=3, most_skips=2, threshold=0.9, predictor="taylor:1"),
        lambda model: EagerTaylor(model, 0.9, order=1, front=1, back=1, warmup=3, most=2),
    ),
    "dbcache-taylor-2": (
        DBCache(front=1, back=0, warmup=4, most_skips=3, threshold=1.2, predictor="taylor:2"),
        lambda model: EagerTaylor(model, 1.2, order=2, front=1, back=0, warmup=4, most=3),
    ),
    "first-block-cache-taylor": (
        FirstBlockCache(threshold=0.7, predictor="taylor:1"),
        lambda model: EagerTaylor(model, 0.7, order=1, equal=True),
    ),
    "teacache": (
        TeaCache(threshold=0.9, coefficients=POLYNOMIAL),
        lambda model: EagerTea(model, 0.9, POLYNOMIAL, STEPS),
    ),
    "teacache-identity": (
        TeaCache(threshold=0.7, coefficients="identity"),
        lambda model: EagerTea(model, 0.7, (1.0, 0.0), STEPS),
    ),
    "easycache": (EasyCache(threshold=0.9, warmup=3), lambda model: EagerEasy(model, 0.9, 3, STEPS)),
    "dicache": (
        DiCache(threshold=1.0, retention=0.2),
        lambda model: EagerDi(model, 1.0, depth=1, error="d_y", retention=0.2, steps=STEPS),
    ),
    "dicache-difference": (
        DiCache(depth=2, error="difference", threshold=0.6, retention=0.0),
        lambda model: EagerDi(model, 0.6, depth=2, error="difference", retention=0.0, steps=STEPS),
    ),
    "adacache": (AdaCache(codebook=BOOK), lambda model: EagerAda(model, BOOK, BLOCKS // 2 - 1)),
    "adacache-block": (AdaCache(codebook=BOOK, block=3), lambda model: EagerAda(model, BOOK, 3)),
}  # fmt: skip


def compiled(model: ToyDiT, policy: AnyRuntimePolicy | str, **options: Any) -> Any:
    return torch.compile(model, backend="omnicache", options={**EAGER, "policy": policy, "steps": STEPS, **options})


@pytest.mark.parametrize("name", CASES)
def test_the_steps_and_the_sample_are_those_of_the_reference(name: str) -> None:
    policy, make = CASES[name]
    model = toy(BLOCKS)
    fast = compiled(model, policy)

    for seed in (0, 1):
        reference = make(model)
        expected = generate(reference, seed=seed, steps=STEPS)
        image = generate(fast, seed=seed, steps=STEPS)

        log = omnifx.stats(fast).generations[-1]
        assert letters(log) == reference.letters[3]
        assert "r" in letters(log)
        assert "F" in letters(log)[1:]
        assert distance(image, expected) < 1e-5
    stats = omnifx.stats(fast)
    assert stats.graphs == 1
    assert stats.recompilations == 0


@pytest.mark.parametrize("name", ["first-block-cache", "easycache", "dicache", "adacache"])
def test_the_streams_of_a_generation_decide_each_for_itself(name: str) -> None:
    policy, make = CASES[name]
    model = toy(BLOCKS)
    fast, reference = compiled(model, policy), make(model)

    image = generate(fast, seed=2, steps=STEPS, cfg=7)

    expected = generate(reference, seed=2, steps=STEPS, cfg=7)
    (log,) = omnifx.stats(fast).generations
    assert [letters(log, stream) for stream in (0, 1)] == [reference.letters[3], reference.letters[7]]
    assert distance(image, expected) < 1e-5


@pytest.mark.parametrize("name", ["first-block-cache", "teacache", "easycache", "dicache"])
def test_each_step_shows_its_signal_and_its_decision(name: str) -> None:
    policy, make = CASES[name]
    model = toy(BLOCKS)
    fast, reference = compiled(model, policy), make(model)
    generate(fast, seed=0, steps=STEPS)
    generate(reference, seed=0, steps=STEPS)

    (log,) = omnifx.stats(fast).generations

    key = "change" if name == "first-block-cache" else "accumulated"
    seen = [step.signals[key] for step in log.steps if key in step.signals]
    assert log.steps[0].decision == "the first step"
    assert all(step.decision for step in log.steps)
    assert seen == pytest.approx(reference.values[3], rel=1e-3)
    assert log.reasons == {}


def test_a_batch_skips_only_if_all_of_its_samples_would() -> None:
    model = toy(BLOCKS)
    fast = compiled(model, FirstBlockCache(threshold=0.7))
    reference = EagerBlocks(model, 0.7, equal=True)
    latents = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (0, 1)])

    image = generate(fast, seed=0, steps=STEPS, latents=latents)

    expected = generate(reference, seed=0, steps=STEPS, latents=latents)
    alone = []
    for sample in latents:
        single = EagerBlocks(model, 0.7, equal=True)
        generate(single, seed=0, steps=STEPS, latents=sample[None])
        alone.append(single.letters[3])
    (log,) = omnifx.stats(fast).generations
    assert letters(log) == reference.letters[3]
    assert distance(image, expected) < 1e-5
    assert letters(log).count("F") >= max(single.count("F") for single in alone)


def test_skipped_steps_cost_the_head_alone() -> None:
    model = toy(BLOCKS)
    fast = compiled(model, FirstBlockCache(threshold=0.7))
    generate(fast, seed=0, steps=STEPS)

    (log,) = omnifx.stats(fast).generations

    full = {step.spent for step in log.steps if step.variant == "full"}
    skipped = {step.compute for step in log.steps if step.variant == "reuse"}
    assert full == {log.steps[0].whole}  # nothing is computed twice
    assert all(0.2 < share < 0.45 for share in skipped)  # one block of four, and the ends
    assert log.speedup > 1.0


def test_without_a_published_polynomial_the_first_generation_teaches_one() -> None:
    model = toy(BLOCKS)
    fast = compiled(model, TeaCache(threshold=0.9))

    first, second = (generate(fast, seed=seed, steps=STEPS) for seed in (0, 1))

    stats = omnifx.stats(fast)
    assert letters(stats.generations[0]) == "F" * STEPS
    assert distance(first, generate(model, seed=0, steps=STEPS)) < 1e-5
    (note,) = [note for note in stats.notes if "was fitted to" in note]
    points = learnt_points(model)
    x, y = torch.tensor(points, dtype=torch.float64).T
    coefficients = torch.linalg.lstsq(
        torch.stack([x**n for n in (4, 3, 2, 1, 0)], 1), y[:, None], driver="gelsd"
    ).solution[:, 0]
    shown = [float(c) for c in note.split("(")[1].split(")")[0].split(", ")]
    estimates = [sum(c * float(v) ** n for c, n in zip(shown, (4, 3, 2, 1, 0), strict=True)) for v in x]
    expected = [float(torch.stack([v**n for n in (4, 3, 2, 1, 0)]) @ coefficients) for v in x]
    assert estimates == pytest.approx(expected, rel=1e-2, abs=1e-3)
    assert "r" in letters(stats.generations[1])
    assert distance(second, generate(model, seed=1, steps=STEPS)) > 1e-4


def learnt_points(model: ToyDiT) -> list[tuple[float, float]]:
    """Changes of the modulated input and of the output over the generation of seed 0, the last one's apart."""
    eager = Eager(model)
    seen: list[tuple[Any, Any]] = []

    def watching(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = model(x, t, y)
        seen.append((eager.modulated(*eager.begin(x, t, y)), out))
        return out

    generate(watching, seed=0, steps=STEPS)
    axes = (1, 2)
    found = []
    for (m, a), (n, b) in itertools.pairwise(seen):
        d = (n - m).abs().mean(axes) / m.abs().mean(axes)
        found.append((float(d), float((b - a).abs().mean() / a.abs().mean())))
    return found[:-1]


@pytest.mark.parametrize("name", ["latte", "wan", "flux"])
@pytest.mark.parametrize("policy", ["dicache", "first-block-cache", "dbcache", "moreg"])
def test_real_models_run_as_one_graph_and_skip(name: str, policy: str) -> None:
    """Latte permutes its trunk, FLUX joins two, and both are captured with fake tensors around."""
    if policy == "moreg" and name == "flux":
        pytest.skip("no video")
    tiny = TINY[name]()
    chosen: dict[str, AnyRuntimePolicy] = {
        "dicache": DiCache(threshold=1e9, retention=0.0),
        "first-block-cache": FirstBlockCache(threshold=1e9),
        "dbcache": DBCache(threshold=1e9, warmup=3, predictor="taylor:2"),
        "moreg": AdaCache(codebook=((1e9, 3),), moreg=True),
    }
    fast = torch.compile(tiny.model, backend="omnicache", options={**EAGER, "policy": chosen[policy], "steps": 6})
    inputs = dict(tiny.inputs)
    with torch.no_grad():
        for k in range(6):
            for at in tiny.latents:
                inputs[at] = tiny.inputs[at] + 0.03 * k * noise(*tiny.inputs[at].shape, seed=5)
            for at in tiny.times:
                inputs[at] = (tiny.inputs[at] * (1.0 - k / 10)).to(tiny.inputs[at].dtype)
            fast(**inputs)

    stats = omnifx.stats(fast)
    rows = {"dicache": "FrrrrF", "first-block-cache": "Frrrrr", "dbcache": "FFFrrr", "moreg": "FFrrFr"}
    expected = rows[policy]
    assert letters(stats.generations[-1]) == expected
    assert stats.graphs == 1


# -- decisions ---------------------------------------------------------------------------------------------------------

POLICIES: list[AnyRuntimePolicy] = [
    FirstBlockCache(),
    DBCache(),
    TeaCache(coefficients="identity"),
    TeaCache(coefficients=POLYNOMIAL, threshold=0.2),
    EasyCache(warmup=2),
    DiCache(),
    DiCache(error="difference"),
    AdaCache(),
    AdaCache(codebook="slow", moreg=True),
    AdaCache(codebook="100-steps"),
]


def width(policy: AnyRuntimePolicy) -> int:
    """How many signals a policy takes."""
    return 3 if isinstance(policy, DiCache) else 2 if isinstance(policy, AdaCache) and policy.moreg else 1


def run(policy: AnyRuntimePolicy, rows: list[tuple[float, ...]], *, total: int | None) -> str:
    """Decide step by step, with signals as a runner gives them."""
    state, found, fresh = policy.start(), "", True
    for k, row in enumerate(rows):
        signals = row[: width(policy)] if fresh else ()
        decision = policy.decide(state, signals, Step(k, total, "the first step" if k == 0 else ""))
        assert decision == policy.decide(state, signals, Step(k, total, "the first step" if k == 0 else ""))
        state = decision.state
        found += "F" if decision.computes else "r"
        fresh = decision.computes or not isinstance(policy, AdaCache)
    return found


signal = st.floats(0.0, 1.0) | st.just(math.inf)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@given(rows=st.lists(st.tuples(signal, signal, signal), min_size=1, max_size=40), known=st.booleans())
@settings(max_examples=60, deadline=None)
def test_decisions_keep_their_rules(
    policy: AnyRuntimePolicy, rows: list[tuple[float, float, float]], known: bool
) -> None:
    found = run(policy, list(rows), total=len(rows) if known else None)

    assert found[0] == "F"
    if known and isinstance(policy, TeaCache | EasyCache | DiCache):
        assert found[-1] == "F"
    if not isinstance(policy, AdaCache):  # which looks at a signal only after a computed step
        unskippable = [k for k, row in enumerate(rows) if math.inf in row[: width(policy)]]
        if isinstance(policy, DiCache):
            at = 0 if policy.error == "d_y" else 2
            unskippable = [k for k, row in enumerate(rows) if row[at] == math.inf]
        assert all(found[k] == "F" for k in unskippable)
    if isinstance(policy, DBCache):
        assert found[: policy.warmup] == "F" * min(len(rows), policy.warmup)
        assert "r" * (policy.most_skips + 1) not in found
    if isinstance(policy, EasyCache):
        assert found[: policy.warmup] == "F" * min(len(rows), policy.warmup)
    if isinstance(policy, AdaCache):
        assert found[:2] == "FF"[: len(rows)]
        assert "r" * max(rate for _, rate in policy.book) not in found


@pytest.mark.parametrize("policy", [p for p in POLICIES if not isinstance(p, AdaCache)], ids=repr)
@given(rows=st.lists(st.tuples(signal, signal, signal), min_size=2, max_size=30), at=st.integers(0, 29))
@settings(max_examples=40, deadline=None)
def test_a_step_that_must_compute_does(
    policy: AnyRuntimePolicy, rows: list[tuple[float, float, float]], at: int
) -> None:
    state = policy.start()
    for k, row in enumerate(rows):
        must = "because" if k in (0, at) else ""
        decision = policy.decide(state, row[: width(policy)], Step(k, None, must))
        assert decision.computes or not must
        state = decision.state


@given(step=st.floats(1e-4, 0.2))
@settings(max_examples=40, deadline=None)
def test_a_steady_change_is_skipped_until_it_adds_up_to_the_threshold(step: float) -> None:
    policy = TeaCache(coefficients="identity", threshold=0.25)

    found = run(policy, [(step,) * 3] * 40, total=None)

    runs = {len(part) for part in found[: found.rindex("F")].split("F")[1:]}
    assert runs <= {n for n in range(60) if n * step < 0.25 + 1e-9 and (n + 1) * step >= 0.25 - 1e-9}


def test_the_codebook_says_how_many_steps_lie_between_computed_ones() -> None:
    found = run(AdaCache(codebook="slow"), [(0.1,)] * 12, total=None)

    assert found == "FFrFrrFrrFrr"  # 0.1 a step asks for 2, then 0.1 / 2 for 3


def test_motion_makes_more_steps_compute() -> None:
    calm, wild = AdaCache(moreg=True), AdaCache(moreg=True)
    rows = 30
    still = run(calm, [(0.05, 0.2)] * rows, total=rows)
    moving = run(wild, [(0.05, 0.6)] * rows, total=rows)

    assert moving.count("F") > still.count("F")


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "options", "says"),
    [
        (FirstBlockCache, {"threshold": -1.0}, "first-block-cache: threshold must be a number in"),
        (FirstBlockCache, {"threshold": float("nan")}, "threshold must be a number"),
        (DBCache, {"front": 0}, "dbcache: front must be a whole number >= 1"),
        (DBCache, {"most_skips": 1.5}, "most_skips must be a whole number"),
        (DBCache, {"predictor": "tailor"}, "predictor: found 'tailor', expected one of"),
        (DBCache, {"predictor": "fitted:3"}, "dbcache: predictor 'fitted:3' needs a profile of the generation"),
        (FirstBlockCache, {"predictor": "taylor:1@timesteps"}, "first-block-cache: predictor .* needs a profile"),
        (EasyCache, {"warmup": 1}, "easycache: warmup must be a whole number >= 2"),
        (TeaCache, {"coefficients": "fitted"}, "teacache: coefficients must be numbers"),
        (TeaCache, {"coefficients": ("a",)}, "coefficients must be a number"),
        (DiCache, {"error": "d_x"}, "dicache: error must be 'd_y' or 'difference'"),
        (DiCache, {"retention": 1.5}, "retention must be a number in"),
        (AdaCache, {"codebook": "faster"}, "adacache: codebook must be one of"),
        (AdaCache, {"codebook": ((0.2, 2), (0.1, 1))}, "bounds must ascend"),
    ],
)
def test_bad_options_are_refused(policy: type[AnyRuntimePolicy], options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        policy(**options)


def test_they_are_known_by_their_names_and_promise_no_speedup() -> None:
    found = {name for name, cls in policies().items() if issubclass(cls, RuntimePolicy)}

    assert {"teacache", "adacache", "first-block-cache", "dbcache", "easycache", "dicache"} <= found
    for name in found:
        assert resolve(name).name == name
        with pytest.raises(ConfigError, match=f"{name} decides at run time, .* so no ratio can be promised"):
            Options.parse({"policy": name, "speedup": 2.0})


def test_a_polynomial_that_goes_below_zero_skips_nothing() -> None:
    latte, _ = TeaCache().for_model("LatteTransformer3DModel")
    assert isinstance(latte, TeaCache)

    assert latte.estimate(0.05) > 0.0
    assert latte.estimate(0.5) == math.inf
    assert run(latte, [(0.5,)] * 4, total=None) == "FFFF"


def test_published_polynomials_are_chosen_by_the_models_class() -> None:
    policy, said = TeaCache().for_model("FluxTransformer2DModel")

    assert policy.coefficients == tuple(published()["FluxTransformer2DModel"]["coefficients"])
    assert policy.threshold == 0.25
    assert "TeaCache4FLUX" in said
    assert TeaCache().for_model("Unknown")[0].learns
    assert TeaCache(coefficients=(1.0, 0.0)).for_model("FluxTransformer2DModel")[0].coefficients == (1.0, 0.0)
