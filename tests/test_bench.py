"""`omnifx bench` on scripts: what it measures is what the samples say, and what it cannot measure it refuses."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from rich.console import Console
from torch import Tensor, nn
from typer.testing import CliRunner

from examples.digits.sampling import sample_dit
from omnifx.bench import legend, run_bench, table_of
from omnifx.bench_targets import Target, script_target
from omnifx.bench_ways import CALIBRATION_SEED, Settings, parse_policy, ways_of, with_steps
from omnifx.cli import app
from omnifx.comparing import bands
from omnifx.errors import ConfigError, ResultsError
from omnifx.example_inputs import lively
from omnifx.metrics import psnr
from omnifx.policies.fora import Fora
from omnifx.results import Results, Row

STEPS = 6
FEW = Settings(samples=4, sets=2, runs=1, repeats=1, keep=3, lowering="eager")


def load() -> Any:
    """Two blocks with random weights, for the sampler of the digits."""
    made: Any = DiTTransformer2DModel(  # type: ignore[no-untyped-call]
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        out_channels=1,
        sample_size=8,
        patch_size=1,
        num_embeds_ada_norm=10,
    )
    return lively(made)


def generate(model: Any, seed: int, steps: int = STEPS) -> Tensor:
    """Two digits."""
    return sample_dit(model, seeds=range(2 * seed, 2 * seed + 2), labels=torch.tensor([3, 7]), steps=steps)


def target(function: Any = generate, **more: Any) -> Target:
    return script_target((load(), function), title="digits.py:make", **more)


def measure(out: Path, of: Target | None = None, **more: Any) -> Results:
    arguments = {"policies": ("auto",), "speedups": (2.0,), "settings": FEW, "progress": False, **more}
    return run_bench(of or target(), out, **arguments)


def rows_of(results: Results) -> dict[str, Row]:
    return {f"{row.method} {row.setting}".strip(): row for row in results.cases[0].rows}


@dataclass
class Measured:
    """A run that several tests look at."""

    out: Path
    results: Results
    seeds: list[int]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    out, seeds = tmp_path_factory.mktemp("bench") / "out", []

    def noting(model: Any, seed: int, steps: int = STEPS) -> Tensor:
        seeds.append(seed)
        return generate(model, seed, steps)

    policies = ("auto", "first-block-cache(threshold=0.95)")
    results = measure(out, target(noting), policies=policies, features=pixels, features_name="pixels")
    return Measured(out, results, seeds)


def pixels(samples: Tensor) -> Tensor:
    return samples.flatten(1)[:, :2]


def test_a_script_is_measured_uncached_against_plans_and_fewer_steps(measured: Measured) -> None:
    rows, case = rows_of(measured.results), measured.results.cases[0]
    assert Results.load(measured.out) == measured.results
    assert [(row.method, row.family, row.setting) for row in case.rows] == [
        ("uncached", "uncached", ""),
        ("auto", "ours", "speedup=2"),
        ("first-block-cache", "policy", "threshold=0.95"),
        ("fewer steps", "solver", "3 of 6 steps"),
    ]
    assert (case.steps, case.model, case.data_range, case.refused) == (STEPS, "DiTTransformer2DModel", 2.0, {})
    assert rows["auto speedup=2"].compute < 0.51
    assert rows["fewer steps 3 of 6 steps"].compute == 0.5
    auto, decided = rows["auto speedup=2"], rows["first-block-cache threshold=0.95"].timeline
    assert set(auto.metrics) == {"psnr", "p10", "ssim", "frechet", "seconds", "cache", "compile"}
    assert set(rows["uncached"].metrics) == {"seconds", "frechet"}
    assert auto.timeline is not None
    assert len(auto.timeline.steps) == len(auto.timeline.timesteps) == STEPS
    assert decided is not None
    assert len(decided.steps) == STEPS
    assert "r" in decided.steps
    assert all(row.time is not None and row.time > 0 for row in case.rows)


def test_the_table_tells_what_was_skipped(measured: Measured) -> None:
    case = measured.results.cases[0]
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(table_of(case))
    text = console.export_text()
    assert all(word in text for word in ("first-block-cache", "threshold=0.95", "3 of 6 steps", "Frechet", "6F"))
    assert legend(case).startswith("F full")


def test_figures_are_those_of_the_samples(measured: Measured) -> None:
    model, row = load(), rows_of(measured.results)["fewer steps 3 of 6 steps"]
    uncached = torch.cat([generate(model, seed) for seed in (0, 1)])
    fewer = torch.cat([generate(model, seed, steps=3) for seed in (0, 1)])
    sets = [float(psnr(fewer[i : i + 2], uncached[i : i + 2]).mean()) for i in (0, 2)]
    assert row.metrics["psnr"].sets == pytest.approx(sets, rel=1e-4)
    assert row.metrics["psnr"].spread == pytest.approx(abs(sets[0] - sets[1]) / 2**0.5, rel=1e-3)
    assert row.bands == pytest.approx(bands(fewer[:2], uncached[:2]), rel=1e-3)
    samples = measured.results.samples_of(measured.out, measured.results.cases[0])
    assert samples["uncached"].dtype == torch.float16
    torch.testing.assert_close(samples["uncached"].float(), uncached[:3], atol=2e-3, rtol=1e-3)
    assert row.samples is not None
    torch.testing.assert_close(samples[row.samples].float(), fewer[:3], atol=2e-3, rtol=1e-3)


def test_drift_begins_where_the_plan_first_skips_and_ends_at_the_samples(measured: Measured) -> None:
    row = rows_of(measured.results)["auto speedup=2"]
    assert row.timeline is not None
    skipped = next(i for i, letter in enumerate(row.timeline.steps) if letter != "F")
    assert len(row.drift) == STEPS
    assert max(row.drift[:skipped], default=0.0) < 1e-5
    assert row.drift[skipped] > 1e-5
    samples = measured.results.samples_of(measured.out, measured.results.cases[0])
    ours, uncached = samples["auto-speedup-2"][:2].double(), samples["uncached"][:2].double()
    assert row.drift[-1] == pytest.approx(float((ours - uncached).norm() / uncached.norm()), rel=0.05)


def test_seeds_are_calibrated_on_or_reported_but_never_both(measured: Measured) -> None:
    assert set(measured.seeds) == {0, 1, CALIBRATION_SEED}
    assert measured.results.cases[0].seeds == {
        "calibration": "generations 1000000-1000000, 2 samples each",
        "report": "generations 0-0, 1-1, 2 samples each",
    }
    with pytest.raises(ConfigError, match="reach those of the calibration"):
        Settings(samples=CALIBRATION_SEED + 1).seeds(1)


def test_a_run_is_continued(measured: Measured, tmp_path: Path) -> None:
    out = Path(shutil.copytree(measured.out, tmp_path / "out"))
    calls: list[int] = []

    def counting(model: Any, seed: int, steps: int = STEPS) -> Tensor:
        calls.append(steps)
        return generate(model, seed, steps)

    second = measure(
        out, target(counting), policies=("auto", "fora"), features=pixels, features_name="pixels", resume=True
    )

    old, new = rows_of(measured.results), rows_of(second)
    assert {name for name in new if name not in old} == {"fora speedup=2"}
    assert all(new[name] == row for name, row in old.items())  # times, too: not measured again
    assert 3 not in calls
    samples = second.samples_of(out, second.cases[0])
    assert set(samples) == {row.samples for row in new.values()}


def test_results_of_other_settings_are_not_continued(tmp_path: Path) -> None:
    measure(tmp_path, policies=())
    with pytest.raises(ResultsError, match="holds results already"):
        measure(tmp_path)
    with pytest.raises(ResultsError, match="steps was None, now 5"):
        measure(tmp_path, target(steps=5), resume=True)
    other = target()
    with torch.no_grad():
        next(other.model.parameters()).mul_(2.0)
    with pytest.raises(ResultsError, match="weights was "):
        measure(tmp_path, other, resume=True)
    with pytest.raises(ResultsError, match="the uncached samples are not those of"):
        measure(tmp_path, target(lambda model, seed, steps=STEPS: generate(model, seed + 50, steps)), resume=True)


def test_what_cannot_be_measured_is_listed_with_its_reason(tmp_path: Path) -> None:
    def stepless(model: Any, seed: int) -> Tensor:
        return generate(model, seed)

    results = measure(tmp_path, target(stepless), policies=("fora",), speedups=(1.5, 1.6, 30.0))

    refused = results.cases[0].refused
    assert "speedup must be in [1, " in refused["fora, speedup=30"]
    assert refused["fora, speedup=1.6"] == "bench: the plan is that of speedup=1.5, which is measured."
    assert "takes no argument 'steps'" in refused["fewer steps, 4 of 6 steps"]
    assert Results.load(tmp_path).cases[0].refused == refused


def test_a_way_that_fails_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def brittle(model: Any, seed: int, steps: int = STEPS) -> Tensor:
        if steps == 3:
            raise RuntimeError("three is too few")
        return generate(model, seed, steps)

    results = measure(tmp_path, target(brittle), policies=(), speedups=(2.0, 1.5))

    assert "failed with RuntimeError: three is too few" in results.cases[0].refused["fewer steps, 3 of 6 steps"]
    assert "fewer steps 4 of 6 steps" in rows_of(results)
    monkeypatch.setenv("OMNIFX_DEBUG", "1")
    with pytest.raises(RuntimeError, match="three is too few"):
        measure(tmp_path, target(brittle), policies=(), speedups=(2.0, 1.5), resume=True)


class Nothing(nn.Module):
    """Holds nothing that could be cached."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 8))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x @ self.weight * timestep


def test_a_model_without_anything_to_reuse_is_refused(tmp_path: Path) -> None:
    def loop(model: Any, seed: int) -> Tensor:
        x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        for step in range(4):
            x = x - 0.01 * model(x, torch.tensor(0.1 * step))
        return x

    made = script_target((Nothing(), loop), title="loop", value_range=(-5.0, 5.0))
    results = measure(tmp_path, made, policies=("auto", "first-block-cache"))

    assert [row.method for row in results.cases[0].rows] == ["uncached"]
    assert set(results.cases[0].refused) >= {"auto, speedup=2", "first-block-cache, its defaults"}


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda model, seed: (generate(model, seed), None)[1], "generate returned None, expected its samples"),
        (lambda model, seed: generate(model, seed)[0], r"generate returned shape \[1, 8, 8\]"),
        (lambda model, seed: generate(model, seed) * torch.nan, "NaN or infinity"),
        (lambda model, seed: 127 + 127 * generate(model, seed), "--range=LOWEST,HIGHEST"),
        (lambda model, seed: torch.zeros(2, 1, 8, 8), "never called the model"),
        (lambda model, seed: generate(model, seed)[: 1 + (seed > 1000)], "all must have one shape"),
    ],
)  # fmt: skip
def test_generations_that_cannot_be_compared_end_the_run(tmp_path: Path, broken: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        measure(tmp_path, target(broken))


def test_frechet_distances_need_two_samples(tmp_path: Path) -> None:
    def one(model: Any, seed: int) -> Tensor:
        return generate(model, seed)[:1]

    with pytest.raises(ConfigError, match="at least 2 samples in each set"):
        measure(tmp_path, target(one), features=pixels, settings=Settings(samples=2, sets=2, lowering="eager"))


def test_factories_return_a_model_and_generate() -> None:
    with pytest.raises(ConfigError, match=r"digits\(\) returned \(DiTTransformer2DModel, int\), expected \(model, gen"):
        script_target((load(), 3), title="digits")
    with pytest.raises(ConfigError, match="takes no argument 'steps', so 20 steps cannot be asked of it"):
        script_target((load(), lambda model, seed: None), title="digits", steps=20)


def test_ways_are_policies_at_speedups_or_at_their_own_options() -> None:
    ways = with_steps(ways_of(("auto", "fora(interval=3)", "teacache", Fora(predictor="taylor:1")), (2, 4)), 10)

    assert [way.label for way in ways] == [
        "auto, speedup=2",
        "auto, speedup=4",
        "fora, interval=3",
        "teacache, its defaults",
        "fora (predictor=taylor:1), speedup=2",
        "fora (predictor=taylor:1), speedup=4",
        "fewer steps, 5 of 10 steps",
        "fewer steps, 2 of 10 steps",
    ]
    assert parse_policy(" fora( interval=3, predictor=taylor:2 ) ") == Fora(interval=3, predictor="taylor:2")
    for text, said in (("fora(", "such as auto"), ("fora(3)", "such as interval=3"), ("fora(x=3)", "no options .'x'.")):
        with pytest.raises(ConfigError, match=said):
            parse_policy(text)
    with pytest.raises(ConfigError, match="speedups must be >= 1"):
        ways_of(("auto",), (0.5,))


SCRIPT = """
from tests.test_bench import generate, load
def make():
    return load(), generate
def look(samples):
    return samples.flatten(1)[:, :2]
"""


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    assert result.exit_code == status, (result.output, result.exception)
    return result.output


def test_the_command_measures_a_script_and_says_what_is_next(tmp_path: Path) -> None:
    script, out = tmp_path / "mine.py", tmp_path / "out"
    script.write_text(SCRIPT)
    few = ("--samples", 2, "--runs", 1, "--repeats", 1, "--lowering", "eager", "--speedups", "2,30")

    shown = run(f"{script}:make", "--out", out, *few, "--policies", "auto", "--features", f"{script}:look")

    assert "not measured: auto, speedup=30: auto: speedup must be in" in shown.replace("\n", " ")
    assert shown.rstrip().endswith(f"next: omnifx report {out} --html report.html")
    assert {row.method for row in Results.load(out).cases[0].rows} == {"uncached", "auto", "fewer steps"}
    told = json.loads((out / "settings.json").read_text())
    assert told["features"] == f"{script}:look"
    assert told["samples"] == "2"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("{script}",), "name the function in"),
        (("{script}:make", "--guidance", 3), "--guidance is for pipelines"),
        (("{script}:make", "--speedups", "2;3"), "--speedups must be numbers"),
        (("{script}:make", "--range", "1,-1"), "the lowest and the highest"),
        (("{script}:make", "--policies", "nothing"), "found 'nothing', expected one of"),
        (("{script}:make", "--samples", 0), "samples must be a number >= 1"),
        (("{script}:look",), "expected"),
    ],
)
def test_the_command_refuses(tmp_path: Path, given: tuple[str, ...], said: str) -> None:
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT.replace("(samples)", "()").replace("samples.flatten(1)[:, :2]", "1"))
    arguments = [str(argument).replace("{script}", str(script)) for argument in given]

    assert said in run(*arguments, "--out", tmp_path / "out", status=2)
