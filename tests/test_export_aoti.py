"""Exports to AOTInductor: what the compiled graphs give from Python and from C++, what they share, what is refused."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import omnifx
from omnifx.bundle import MANIFEST, WEIGHTS, Manifest, file_info
from omnifx.cli import app
from omnifx.errors import BundleError, ConfigError, ExportError
from omnifx.plan import Plan
from tests.exporting import alter, in_torch, plan_by_hand, planned
from tests.toys import distance, generate, noise, timesteps, toy, toy_inputs

EXAMPLE = toy_inputs(text=8)
RUN: Any = {"steps": 4, "text": noise(1, 5, 8, seed=7), "cfg": 0}
QUICK = {"aot_inductor.compile_wrapper_opt_level": "O0"}
"""Options that compile sooner; the kernels stay as they are."""
CPP = Path(__file__).parent.parent / "examples" / "cpp"

pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler: g++")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return toy(1, text=8)


@pytest.fixture(scope="module")
def plan(model: nn.Module) -> Plan:
    names = tuple(branch.name for branch in omnifx.explain(model, *EXAMPLE).branches if branch.cacheable)
    return plan_by_hand(model, names, "FrFr", timesteps(4))


@pytest.fixture(scope="module")
def bundle(model: nn.Module, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that tests may read, but not change; made where no package of ONNX is to be had."""
    folder = tmp_path_factory.mktemp("exports") / "toy"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("onnx", "onnx_ir", "onnxscript", "onnxruntime"):
            patch.setitem(sys.modules, name, None)
        omnifx.export(model, EXAMPLE, plan, folder, target="aoti", inductor=QUICK, conditions=False, progress=False)
    return folder


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def load(folder: Path, **options: Any) -> Any:
    return omnifx.load_bundle(folder, runtime="aoti", **options)


# -- what is written ---------------------------------------------------------------------------------------------------


def test_a_bundle_runs_a_generation_as_pytorch_does(model: nn.Module, plan: Plan, bundle: Path) -> None:
    runner, reference = load(bundle), in_torch(model, EXAMPLE, plan, conditions=False)

    assert distance(generate(runner, seed=5, **RUN), generate(reference, seed=5, **RUN)) < 1e-5
    assert runner.check() < 1e-5
    assert dict(runner.stats.runs) == {"prologue": 3, "full": 5, "reuse": 5}


def test_generations_of_several_threads_do_not_meet(bundle: Path) -> None:
    runner = load(bundle, num_runners=2)
    alone = [generate(runner, seed=seed, **RUN) for seed in range(4)]

    def one(seed: int) -> Tensor:
        with runner.generation():
            return generate(runner, seed=seed, **RUN)

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(one, range(4)))

    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)


def test_all_graphs_read_the_same_weights(bundle: Path) -> None:
    engine = load(bundle).engine
    variants = Manifest.load(bundle).variants

    def run(name: str) -> Tensor:
        inputs = {
            key: noise(*info.shape, seed=seed) if "float" in info.dtype else torch.full(info.shape, 3)
            for seed, (key, info) in enumerate(variants[name].inputs.items())
        }
        found = {key: torch.empty(info.shape) for key, info in variants[name].outputs.items()}
        engine.run(name, inputs, found)
        return found["output:0"]

    before = {name: run(name) for name in ("full", "reuse")}
    engine.weights["head.bias"].add_(1.0)  # pages of this process alone: the file stays as it is

    for name, value in before.items():
        torch.testing.assert_close(run(name), value + 1.0, rtol=0, atol=1e-5)


def test_a_bundle_that_is_dropped_leaves_no_weights_behind(bundle: Path) -> None:
    def mapped() -> bool:
        return str(bundle / WEIGHTS) in Path("/proc/self/maps").read_text(encoding="utf-8")

    gc.collect()
    before = mapped()
    runner = load(bundle)
    held = mapped()
    del runner
    gc.collect()

    assert (before, held, mapped()) == (False, True, False)


def test_weights_are_held_once_and_never_in_the_package(model: nn.Module, bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    weights = manifest.engines["aoti"].weights
    values = dict(model.named_parameters())

    held = {info.offset: info.bytes for info in weights.values()}
    assert sum(held.values()) <= sum(p.numel() * p.element_size() for p in values.values())
    content = (bundle / WEIGHTS).read_bytes()
    for name, info in weights.items():
        stored = torch.frombuffer(bytearray(content[info.offset : info.offset + info.bytes]), dtype=torch.float32)
        assert torch.equal(stored.reshape(info.shape), values[name]), name
    with zipfile.ZipFile(bundle / "model.pt2") as archive:
        suffixes = {Path(name).suffix for name in archive.namelist() if "/data/aotinductor/" in name}
    assert suffixes == {".so", ".json"}


def test_the_manifest_says_what_the_code_was_made_for(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    engine = manifest.engines["aoti"]

    assert set(engine.files) == set(manifest.variants) == {"full", "reuse", "prologue"}
    assert engine.builder["torch"] == torch.__version__
    assert engine.builder["device"] == "cpu"
    assert engine.builder["options"] == QUICK
    assert sorted(path.name for path in bundle.iterdir()) == [MANIFEST, "model.pt2", "reference.safetensors", WEIGHTS]


def test_the_command_checks_a_bundle_in_its_own_runtime(bundle: Path) -> None:
    result = CliRunner().invoke(app, ["bundle", str(bundle), "--check"])

    assert result.exit_code == 0, result.output
    assert "aoti differs from PyTorch by" in result.output


# -- from C++ ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The program of examples/cpp, built as docs/deploy_aoti.md says, without optimisation."""
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    json_package = importlib.util.find_spec("nlohmann_json")
    if cmake is None or json_package is None or json_package.origin is None:
        pytest.skip("cmake or nlohmann-json is not installed: pip install cmake nlohmann-json")
    build = tmp_path_factory.mktemp("cpp")
    options = {
        "CMAKE_PREFIX_PATH": torch.utils.cmake_prefix_path,
        "JSON_INCLUDE_DIR": Path(json_package.origin).parent / "include",
        "CMAKE_CXX_FLAGS": "-O0",
    }
    commands = (
        [cmake, "-S", CPP, "-B", build, *(f"-D{key}={value}" for key, value in options.items())],
        [cmake, "--build", build],
    )
    for command in commands:
        made = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stdout + made.stderr

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([build / "run_bundle", *map(str, words)], capture_output=True, text=True, check=False)

    return run


def test_a_program_in_cpp_runs_a_bundle(run_bundle: Any, bundle: Path, copied: Path) -> None:
    done = run_bundle(bundle, 1e-5)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("2 of 4 steps, largest difference from PyTorch: ")

    assert run_bundle(bundle, 0).returncode == 1
    done = run_bundle(bundle.parent)
    assert (done.returncode, "its manifest.json cannot be read" in done.stderr) == (2, True)
    text = (copied / MANIFEST).read_text(encoding="utf-8")
    (copied / MANIFEST).write_text(text.replace(f'"{WEIGHTS}"', f'"../{copied.name}/{WEIGHTS}"'), encoding="utf-8")
    assert f"../{copied.name}/{WEIGHTS} is not in the bundle's folder" in run_bundle(copied).stderr
    (copied / MANIFEST).write_text(text, encoding="utf-8")
    with (copied / WEIGHTS).open("r+b") as file:
        file.truncate(100)
    assert "weights.bin was cut off or changed" in run_bundle(copied).stderr


# -- what is refused ---------------------------------------------------------------------------------------------------


def _edited(folder: Path, edit: Callable[[Any], None]) -> None:
    raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    edit(raw)
    (folder / MANIFEST).write_text(json.dumps(raw), encoding="utf-8")


def _other_torch(raw: Any) -> None:
    raw["engines"]["aoti"]["builder"]["torch"] = "2.1.0+cu130"


def _other_device(raw: Any) -> None:
    raw["engines"]["aoti"]["builder"]["device"] = "cuda"


def _other_machine(raw: Any) -> None:
    raw["engines"]["aoti"]["builder"]["machine"] = "pdp11"


def _other_cpu(raw: Any) -> None:
    raw["engines"]["aoti"]["builder"]["cpu"] = "AVX4096"


def _no_graph(raw: Any) -> None:
    del raw["engines"]["aoti"]["files"]["reuse"]


def _no_engine(raw: Any) -> None:
    del raw["engines"]


def _no_weight(raw: Any) -> None:
    del raw["engines"]["aoti"]["weights"]["head.bias"]


def _short_weight(raw: Any) -> None:
    raw["engines"]["aoti"]["weights"]["head.bias"]["bytes"] = 8


def _weight_beyond(raw: Any) -> None:
    raw["engines"]["aoti"]["weights"]["head.bias"]["offset"] = 2**40


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_other_torch, r"was compiled with torch 2.1.0, but torch .* is installed. Install that one"),
        (_other_device, r"was compiled for cuda, not for cpu"),
        (_other_machine, r"was compiled for pdp11 with"),
        (_other_cpu, r"with AVX4096, but this machine is"),
        (_no_graph, r"has no compiled graph reuse"),
        (_no_engine, r"was not exported for 'aoti'"),
        (_no_weight, r"the graph full wants the weight head.bias, which is not in the bundle"),
        (_short_weight, r"the weight head.bias has 8 bytes, expected 64"),
        (_weight_beyond, r"head.bias lies beyond the end of weights.bin"),
    ],
)
def test_a_bundle_that_was_made_for_something_else_is_refused(
    copied: Path, edit: Callable[[Any], None], message: str
) -> None:
    _edited(copied, edit)
    with pytest.raises(BundleError, match=message):
        load(copied)


def test_an_altered_package_is_refused(copied: Path) -> None:
    alter(copied / "model.pt2", at=5000)
    with pytest.raises(BundleError, match=r"model.pt2 was altered: its SHA-256 is"):
        load(copied)


def _repacked(folder: Path, keep: Callable[[str], bool], more: dict[str, bytes] | None = None) -> None:
    """Write the package anew, with less or more in it."""
    path = folder / "model.pt2"
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist() if keep(name)}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**content, **(more or {})}.items():
            archive.writestr(name, data)
    _relisted(folder)


def _relisted(folder: Path) -> None:
    """Let the manifest say what the package is now."""
    info = file_info(folder, "model.pt2").model_dump()

    def edit(raw: Any) -> None:
        for variant in raw["variants"]:
            raw["variants"][variant]["file"] = raw["engines"]["aoti"]["files"][variant] = info

    _edited(folder, edit)


@pytest.mark.parametrize(
    "name", ["data/weights/weight_0", "data/aotinductor/full/weights_config.json", "models/x.json"]
)
def test_a_package_with_anything_to_unpickle_is_refused(copied: Path, name: str) -> None:
    _repacked(copied, lambda _: True, {f"model/{name}": b"\x80\x04."})
    with pytest.raises(BundleError, match=f"holds {name}, which is not machine code"):
        load(copied)


def test_a_package_that_lacks_a_graph_is_refused(copied: Path) -> None:
    _repacked(copied, lambda name: "/reuse/" not in name)
    with pytest.raises(BundleError, match=r"the graph reuse cannot be loaded: .*Export it anew"):
        load(copied)


def test_a_file_that_is_no_package_is_refused(copied: Path) -> None:
    (copied / "model.pt2").write_bytes(b"no zip")
    _relisted(copied)
    with pytest.raises(BundleError, match=r"is no package of compiled graphs"):
        load(copied)


def test_what_does_not_go_together_is_refused(model: nn.Module, plan: Plan, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"holds no ONNX graphs; it was exported for 'aoti'"):
        omnifx.load_bundle(bundle)
    with pytest.raises(ConfigError, match="num_runners must be a number >= 1, got 0"):
        load(bundle, num_runners=0)
    for inductor, target, message in (
        ({"no.such": 1}, "aoti", "inductor has no option 'no.such'"),
        ({"aot_inductor.package_constants_in_so": True}, "aoti", "decides where weights are, and cannot be chosen"),
        (QUICK, "onnx", "inductor=... is for the target 'aoti'"),
    ):
        with pytest.raises(ConfigError, match=message):
            omnifx.export(model, EXAMPLE, plan, tmp_path / "b", target=target, inductor=inductor, progress=False)  # type: ignore[arg-type]


def test_what_inductor_cannot_compile_leaves_nothing(
    model: nn.Module, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(torch._inductor, "aot_compile", fail)
    with pytest.raises(ExportError, match="Inductor cannot compile full: no kernel for this"):
        omnifx.export(model, EXAMPLE, plan, tmp_path / "b", target="aoti", progress=False)
    assert not [path for path in tmp_path.iterdir() if path.name != "cache"]


# -- all kinds of graphs -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "speedup"), [("taylorseer", None), ("omnicache", 1.6), ("auto", 1.8), ("toca", None)]
)
def test_bundles_of_policies_follow_the_compiled_model(
    policy: str, speedup: float | None, tmp_path: Path, run_bundle: Any
) -> None:
    def one(denoiser: Any, seed: int) -> Tensor:
        return generate(denoiser, seed=seed, steps=9)

    case = planned(toy(1), one, policy, speedup=speedup)
    folder = tmp_path / "b"
    omnifx.export(
        case.model, toy_inputs(), case.plan, folder, target="aoti", profile=case.profile, inductor=QUICK, progress=False
    )

    runner = load(folder)

    assert distance(one(runner, 5), one(case.compiled(tmp_path), 5)) < 1e-5
    assert runner.check() < 1e-5
    done = run_bundle(folder, 1e-5)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_one_graph_a_step_holds_its_numbers_in_the_weights_file(model: nn.Module, plan: Plan, tmp_path: Path) -> None:
    short = plan.model_copy(update={"timesteps": plan.timesteps[::2], "steps": plan.steps[::2]})
    manifest = omnifx.export(
        model, EXAMPLE, short, tmp_path / "b", target="aoti", per_step=True, inductor=QUICK, progress=False
    )

    assert list(manifest.variants) == ["prologue", "step000_0_full", "step001_0_full"]
    assert any(name.startswith("step001_0_full:baked.") for name in manifest.engines["aoti"].weights)
    assert load(tmp_path / "b").check() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_digits_model_runs_from_a_bundle(dtype: torch.dtype, tmp_path: Path) -> None:
    from examples.digits.models import load_dit

    model = load_dit().to(dtype)
    labels = torch.arange(4)
    example = {
        "hidden_states": noise(4, 1, 8, 8, seed=0).to(dtype),
        "timestep": torch.full((4,), 500),
        "class_labels": labels,
    }
    names = tuple(branch.name for branch in omnifx.explain(model, **example).branches if branch.cacheable)
    plan = plan_by_hand(model, names, "FrrFrr", timesteps(6))
    omnifx.export(model, example, plan, tmp_path / "b", target="aoti", inductor=QUICK, progress=False)

    runner, reference = load(tmp_path / "b"), in_torch(model, example, plan)

    def outputs(denoiser: Any) -> list[Tensor]:
        x = noise(4, 1, 8, 8, seed=5).to(dtype)
        found = []
        for time in plan.timesteps:
            call = {"timestep": torch.full((4,), round(time)), "class_labels": labels, "return_dict": False}
            found.append(denoiser(hidden_states=x, **call)[0])
            x = noise(4, 1, 8, 8, seed=int(time)).to(dtype)  # of its own: differences do not add up
        return found

    allowed = 1e-5 if dtype == torch.float32 else 3e-2
    for a, b in zip(outputs(runner), outputs(reference), strict=True):
        assert distance(a, b) < allowed
