"""Engines that TensorRT-RTX really builds, without a GPU: what its build log says of them, and what a bundle does with
builds that end early, change or are refused."""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from typer.testing import CliRunner

import omnifx
from omnifx.backends.tensorrt import BuildOptions, Built, EngineBuilder, command_line, parse_capabilities, read_source
from omnifx.backends.tensorrt_log import BuildLog
from omnifx.backends.tensorrt_progress import BuildProgress
from omnifx.bundle import LayerSummary, Manifest, TensorInfo, contents
from omnifx.cli import app
from omnifx.engine_building import RECORD, build_engines, build_options
from omnifx.errors import BundleError, ConfigError, ExportError
from tests.exporting import build_with_rtx, layers_of, needs_onnx, plan_by_hand, planned
from tests.toys import generate, timesteps, toy, toy_inputs

needs_onnx()
trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'omnifx[tensorrt-rtx]'")

RTX = "tensorrt-rtx"
GPUS = "86,89,120"
QUIET = BuildProgress(console=SimpleNamespace(is_terminal=False), shown=False)  # type: ignore[arg-type]


class Cast(nn.Module):
    """To a type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def export_toy(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Manifest:
    """A bundle of the toy, in some type."""
    model = toy(1).to(dtype)
    model.time = nn.Sequential(Cast(dtype), model.time)  # type: ignore[assignment]
    example = tuple(value.to(dtype) if value.dim() == 4 else value for value in toy_inputs())
    plan = plan_by_hand(model, ("blocks.0.attn", "blocks.0.mlp"), "Fr", timesteps(2))
    return omnifx.export(model, example, plan, folder, progress=False, **options)


@pytest.fixture(scope="module")
def onnx_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "toy"
    export_toy(folder)
    return folder


@pytest.fixture
def bundle(onnx_bundle: Path, tmp_path: Path) -> Path:
    """A bundle without engines, that a test may change."""
    return Path(shutil.copytree(onnx_bundle, tmp_path / "bundle"))


# -- what is built -----------------------------------------------------------------------------------------------------


def test_the_digits_model_is_built_for_three_generations_of_gpus(tmp_path: Path) -> None:
    from examples.export_onnx import make

    model, example = make()
    names = [f"transformer_blocks.{i}.{part}" for i in range(8) for part in ("attn1", "ff")]
    plan = plan_by_hand(model, names, "Fr", (999.0, 500.0))
    manifest = omnifx.export(
        model, example, plan, tmp_path / "b", target=RTX, engines={"compute_capabilities": GPUS}, progress=False
    )

    assert Manifest.load(tmp_path / "b") == manifest
    engines, layers = manifest.engines[RTX], layers_of(manifest)
    assert engines.builder["compute_capabilities"] == ["8.6", "8.9", "12.0"]
    assert engines.builder["version"] == trt.__version__
    assert engines.files.keys() == layers.keys() == manifest.variants.keys()
    assert layers["full"].attentions == 8
    assert layers["reuse"].attentions == layers["reuse"].fused_attentions == 0
    assert layers["reuse"].matrix_products < layers["full"].matrix_products / 10
    assert engines.files["reuse"].bytes < engines.files["full"].bytes / 4
    assert layers["reuse"].weights_bytes < layers["full"].weights_bytes / 10
    assert f"engines for tensorrt-rtx {trt.__version__}: {len(layers)}" in contents(manifest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_are_those_of_the_model(dtype: torch.dtype, tmp_path: Path) -> None:
    export_toy(tmp_path / "b", dtype)
    manifest = build_engines(tmp_path / "b", RTX, compute_capabilities=GPUS, progress=False)

    layers = layers_of(manifest)
    assert (layers["full"].attentions, layers["full"].fused_attentions, layers["reuse"].attentions) == (1, 1, 0)
    assert manifest.variants["full"].outputs["output:0"].dtype == str(dtype).removeprefix("torch.")


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["eoc", "goc"])
def test_plans_that_fit_predictors_are_built(policy: str, tmp_path: Path) -> None:
    def one(denoiser: Any, seed: int) -> Tensor:
        return generate(denoiser, seed=seed, steps=9)

    case = planned(toy(1), one, policy)
    omnifx.export(case.model, toy_inputs(), case.plan, tmp_path / "b", profile=case.profile, progress=False)

    assert set(case.plan.timeline().splitlines()[-1]) > {"F"}
    build_with_rtx(tmp_path / "b")


def test_nothing_of_removed_branches_is_left_in_an_engine(bundle: Path, tmp_path: Path) -> None:
    import onnx

    manifest = Manifest.load(bundle)
    builder = EngineBuilder(build_options("tensorrt-rtx", compute_capabilities=GPUS), QUIET)
    read: dict[str, set[str]] = {}
    for name in ("full", "reuse"):
        variant, path = manifest.variants[name], bundle / f"{name}.onnx"
        operators = read_source(path, variant.file.sha256).operators
        built = builder.build(
            path, tmp_path / f"{name}.engine", inputs=variant.inputs, outputs=variant.outputs, operators=operators
        )
        graph = onnx.load(path, load_external_data=False).graph
        kept = [node for node in graph.node if node.name in built.log.nodes]
        assert kept, "the log names no ONNX nodes"
        read[name] = {value for node in kept for value in node.input}

    branches = ("blocks.0.attn.", "blocks.0.mlp.")
    assert {value for value in read["full"] if value.startswith(branches)} >= {f"{branches[0]}q.weight"}
    assert not {value for value in read["reuse"] if value.startswith(branches)}


def test_the_same_builder_runs_tensorrt(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT itself cannot be installed here; TensorRT-RTX, whose API it shares, stands in for it."""
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    build_engines(bundle, RTX, compute_capabilities=GPUS, progress=False)
    manifest = build_engines(bundle, "tensorrt", workspace="1GiB", progress=False)

    assert manifest.engines.keys() == {"tensorrt", RTX}
    assert manifest.engines["tensorrt"].builder["compute_capabilities"] == ["9.0"]
    assert manifest.engines["tensorrt"].builder["device"] == "NVIDIA H200"
    assert "trtexec --onnx=full.onnx" in (bundle / "engines/tensorrt/commands.txt").read_text(encoding="utf-8")
    Manifest.load(bundle)


def test_a_timing_cache_is_read_and_replaced_only_by_its_like(bundle: Path, tmp_path: Path) -> None:
    given: list[bytes] = []
    path = tmp_path / "times"
    builder = EngineBuilder(BuildOptions(target="tensorrt-rtx"), QUIET)
    builder.options = BuildOptions(target="tensorrt", timing_cache=path)
    config = SimpleNamespace(
        create_timing_cache=lambda data: given.append(data) or SimpleNamespace(),
        set_timing_cache=lambda cache, ignore: given[-1] != b"other",
    )

    builder._timing_cache(config)
    path.write_bytes(b"times")
    builder._timing_cache(config)
    assert given == [b"", b"times"]
    path.write_bytes(b"other")
    with pytest.raises(ExportError, match=r"the timing cache .* is of another GPU, driver or version"):
        builder._timing_cache(config)


# -- builds that end early, and builds again ---------------------------------------------------------------------------


class _Killed(BaseException):
    """Stands for a signal."""


def count_builds(monkeypatch: pytest.MonkeyPatch, *, die_at: str = "") -> list[str]:
    """Names of the graphs that are built from now on; at one of them the process "dies"."""
    names: list[str] = []
    build = EngineBuilder.build

    def counted(self: EngineBuilder, graph: Path, out: Path, **given: Any) -> Built:
        names.append(graph.stem)
        if graph.stem == die_at:
            out.with_name(f".{out.name}.partial").write_bytes(b"half")
            raise _Killed
        return build(self, graph, out, **given)

    monkeypatch.setattr(EngineBuilder, "build", counted)
    return names


def test_a_killed_build_leaves_a_bundle_and_the_next_one_goes_on(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        count_builds(patch, die_at="reuse")
        with pytest.raises(_Killed):
            build_engines(bundle, RTX, progress=False)
    assert Manifest.load(bundle).engines == {}
    omnifx.load_bundle(bundle)

    names = count_builds(monkeypatch)
    manifest = build_engines(bundle, RTX, progress=False)

    assert "full" not in names
    assert "reuse" in names
    assert Manifest.load(bundle) == manifest
    assert manifest.engines[RTX].files.keys() == manifest.variants.keys()
    assert not list((bundle / "engines" / RTX).glob(".*"))
    assert json.loads((bundle / "engines" / RTX / RECORD).read_text()) == manifest.engines[RTX].model_dump(mode="json")


def test_only_what_changed_is_built_again(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_engines(bundle, RTX, progress=False)
    names = count_builds(monkeypatch)

    assert build_engines(bundle, RTX, progress=False) == first
    assert names == []

    engine = bundle / first.engines[RTX].files["reuse"].path
    engine.write_bytes(engine.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError, match=r"reuse.engine was altered"):
        Manifest.load(bundle)
    omnifx.load_bundle(bundle)  # what runs something else does not look at engines
    build_engines(bundle, RTX, progress=False)
    Manifest.load(bundle)
    assert names == ["reuse"]

    names.clear()
    build_engines(bundle, RTX, compute_capabilities=["8.9"], progress=False)
    assert names == list(first.variants)


def test_a_bundle_that_is_replaced_keeps_the_engines_that_are_right(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_engines(bundle, RTX, progress=False)
    names = count_builds(monkeypatch)

    assert export_toy(bundle, target=RTX, overwrite=True) == first
    assert names == []
    assert export_toy(bundle, overwrite=True).engines == {}
    assert not (bundle / "engines").exists()


def test_an_interrupt_ends_a_build_and_leaves_nothing(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: BuildProgress, name: str, step: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(BuildProgress, "step_complete", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, RTX, progress=False)

    assert not list((bundle / "engines" / RTX).iterdir())
    assert Manifest.load(bundle).engines == {}


def test_two_processes_do_not_build_in_one_folder(bundle: Path) -> None:
    handle = os.open(bundle, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(BundleError, match="another process builds engines in"):
            build_engines(bundle, RTX, progress=False)
    finally:
        os.close(handle)


# -- what is refused ---------------------------------------------------------------------------------------------------


def onnx_file(folder: Path, operator: str, *, size: int = 4, dtype: str = "FLOAT", k: int = 0) -> Path:
    """A graph of one operator on `x`."""
    import onnx
    from onnx import helper

    kind, other = getattr(onnx.TensorProto, dtype), onnx.TensorProto.INT64
    inputs = ["x", "k"] if k else ["x"]
    outputs = [helper.make_tensor_value_info("y", kind, [k or size])]
    if k:
        outputs.append(helper.make_tensor_value_info("i", other, [k]))
    graph = helper.make_graph(
        [helper.make_node(operator, inputs, [value.name for value in outputs], name="one")],
        "one",
        [helper.make_tensor_value_info("x", kind, [size])],
        outputs,
        [helper.make_tensor("k", other, [1], [k])] if k else [],
    )
    path = folder / "one.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def build_one(path: Path, inputs: dict[str, TensorInfo], outputs: dict[str, TensorInfo], **options: Any) -> Built:
    builder = EngineBuilder(build_options("tensorrt-rtx", **options), QUIET)
    out = path.with_suffix(".engine")
    return builder.build(path, out, inputs=inputs, outputs=outputs, operators={})


FOUR = TensorInfo(shape=(4,), dtype="float32")


def test_an_operator_that_tensorrt_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"cannot build one.onnx: the operator Bernoulli \(node one\) is not supported"
    ):
        build_one(onnx_file(tmp_path, "Bernoulli"), {"x": FOUR}, {"y": FOUR})


def test_more_tokens_than_tensorrt_chooses_are_refused(tmp_path: Path) -> None:
    path = onnx_file(tmp_path, "TopK", size=5000, k=3841)
    with pytest.raises(ExportError, match=r"K exceeds the maximum value .* plan with fewer tokens"):
        build_one(path, {"x": FOUR}, {"y": FOUR})


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ({"x": FOUR}, {"z": FOUR}, "gives other values than the graph: z is missing"),
        ({}, {"y": FOUR}, "takes other values than the graph: x is not known"),
        ({"x": FOUR}, {"y": FOUR.model_copy(update={"shape": (2, 2)})}, r"y is float32\[4\], not float32\[2, 2\]"),
        ({"x": FOUR.model_copy(update={"dtype": "float16"})}, {"y": FOUR}, r"x is float32\[4\], not float16\[4\]"),
    ],
)
def test_an_engine_with_other_inputs_or_outputs_is_refused(
    inputs: dict[str, TensorInfo], outputs: dict[str, TensorInfo], message: str, tmp_path: Path
) -> None:
    path = onnx_file(tmp_path, "Sigmoid")
    with pytest.raises(ExportError, match=message):
        build_one(path, inputs, outputs)
    assert not path.with_suffix(".engine").exists()


def test_a_workspace_that_is_too_small_is_named(bundle: Path) -> None:
    with pytest.raises(ExportError, match=r"The workspace of 1,024 bytes is too small for one of its layers"):
        build_engines(bundle, RTX, workspace=1024, progress=False)
    assert Manifest.load(bundle).engines == {}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"compute_capabilities": "90"},
            ExportError,
            r"Hopper \(9.0\) is no target of TensorRT-RTX: .*--target tensorrt",
        ),
        ({"compute_capabilities": "8.7"}, ExportError, r"8.7 is no target of TensorRT-RTX"),
        ({"compute_capabilities": "ada"}, ConfigError, r"must be a list such as 86,89,120, got 'ada'"),
        ({"workspace": "much"}, ConfigError, r"workspace: expected bytes"),
        ({"workspace": 0}, ConfigError, r"workspace must be > 0"),
        ({"timing_cache": "times"}, ConfigError, r"TensorRT-RTX has no timing cache"),
        ({"timing_cache": "/none/times"}, ConfigError, r"the folder of /none/times is not there"),
    ],
)
def test_options_out_of_range_are_refused(
    options: dict[str, Any], error: type[Exception], message: str, bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        build_engines(bundle, RTX, progress=False, **options)
    with pytest.raises(error, match=message):  # and an export says so before it begins
        omnifx.export(toy(1), toy_inputs(), tmp_path / "none", tmp_path / "b", target=RTX, engines=options)
    assert not (tmp_path / "b").exists()


def test_tensorrt_takes_no_compute_capabilities_and_needs_a_gpu(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="TensorRT builds for the GPU that it runs on"):
        build_engines(bundle, "tensorrt", compute_capabilities="90", progress=False)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ExportError, match=r"and here is none. Copy the bundle there and run `omnifx build"):
        build_engines(bundle, "tensorrt", progress=False)


def test_options_of_engines_are_refused_where_none_are_built(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"export: workspace is for engines, but the target is 'onnx'"):
        omnifx.export(toy(1), toy_inputs(), tmp_path / "none", tmp_path / "b", engines={"workspace": 1})


def test_a_missing_package_is_named(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(ExportError, match=r"TensorRT-RTX is missing here .*pip install 'omnifx\[tensorrt-rtx\]'"):
        build_engines(bundle, RTX, progress=False)


# -- the command line --------------------------------------------------------------------------------------------------


def test_the_command_builds_and_says_what_it_did(bundle: Path) -> None:
    result = CliRunner().invoke(app, ["build", str(bundle), "--target", RTX, "--sm", GPUS, "--workspace", "4GiB"])

    assert result.exit_code == 0, result.output
    assert "full (1 of 3): " in result.output
    assert "compute 8.6, 8.9, 12.0" in result.output
    line = "tensorrt_rtx --onnx=full.onnx --saveEngine=engines/tensorrt-rtx/full.engine --computeCapabilities=86,89,120"
    assert f"{line} --memPoolSize=workspace:4096M --profilingVerbosity=detailed --skipInference" in result.output


def test_on_a_terminal_a_bar_shows_the_engine_and_the_phase(bundle: Path) -> None:
    out = io.StringIO()
    progress = BuildProgress(Console(file=out, force_terminal=True, width=120), shown=True)
    seen: list[tuple[bool, object]] = []
    finish = progress.phase_finish

    def look(name: str) -> None:
        assert progress._bar is not None
        seen.extend((task.visible, task.total) for task in progress._bar.tasks if task.description.startswith("  "))
        finish(name)

    progress.phase_finish = look  # type: ignore[method-assign]
    manifest = Manifest.load(bundle)
    builder = EngineBuilder(build_options("tensorrt-rtx"), progress)
    variant, path = manifest.variants["reuse"], bundle / "reuse.onnx"
    with progress.running(1):
        progress.engine("reuse", 1)
        builder.build(path, path.with_suffix(".engine"), inputs=variant.inputs, outputs=variant.outputs, operators={})
        progress.done("reuse", 1, "whole")

    assert "building reuse" in out.getvalue()
    assert "reuse (1 of 1): whole" in out.getvalue()
    assert any(visible and total for visible, total in seen)


def test_capabilities_are_written_in_several_ways() -> None:
    assert parse_capabilities("86,sm_89 12.0") == parse_capabilities("8.6 8.9, SM120") == ("8.6", "8.9", "12.0")


def test_the_lines_for_trtexec_name_limits_and_caches(tmp_path: Path) -> None:
    options = BuildOptions(target="tensorrt", workspace=2**32, timing_cache=Path("a b"))
    assert command_line(options, Path("full.onnx"), Path("full.engine")) == (
        "trtexec --onnx=full.onnx --saveEngine=full.engine --stronglyTyped --memPoolSize=workspace:4096M "
        "'--timingCacheFile=a b' --profilingVerbosity=detailed --skipInference"
    )


def test_a_log_is_read_line_by_line() -> None:
    log = BuildLog()
    log.hear("VERBOSE", "Total Weights Memory: 1232 bytes")
    log.hear("VERBOSE", "Total Activation Memory: 99 bytes")
    log.hear(
        "VERBOSE",
        "Layers:\n"
        "Name: _gemm_mha_v2_myl0_7, LayerType: kgen, Inputs: [], TacticName: _gemm_mha_v2_0x1, StreamId: 0, "
        "Metadata: [ONNX Layer: node_Softmax_1][ONNX Layer: node_MatMul_2]\n"
        "Name: node_scaled_dot_product_attention_myl0_8, LayerType: gemm, Inputs: [], TacticName: sm80_xmma, "
        "StreamId: 0, Metadata: [ONNX Layer: node_scaled_dot_product_attention]\n\n"
        "I/O Tensors:\n"
        " Name: cut:a, b#1, IOMode: Input, DataType: Half, Dimensions: [16,64], Location: Device\n"
        " Name: output:0, IOMode: Output, DataType: BFloat16, Dimensions: [], Location: Device\n",
    )
    log.hear("WARNING", "careful")
    log.hear("ERROR", "IBuilder:\n  went wrong")

    assert log.inputs == {"cut:a, b#1": TensorInfo(shape=(16, 64), dtype="float16")}
    assert log.outputs == {"output:0": TensorInfo(shape=(), dtype="bfloat16")}
    assert (log.warnings, log.reason()) == (["careful"], "IBuilder: went wrong")
    operators = {
        "node_Softmax_1": "Softmax", "node_MatMul_2": "MatMul", "node_scaled_dot_product_attention": "MatMul",
        "gone": "Gemm",
    }  # fmt: skip
    assert log.summary(operators) == LayerSummary(
        layers=2,
        kinds={"gemm": 1, "kgen": 1},
        matrix_products=2,
        attentions=1,
        fused_attentions=1,
        scratch_bytes=99,
        weights_bytes=1232,
    )


def test_a_bundle_of_something_else_is_not_built(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.load(bundle)
    variants = dict(manifest.variants)
    file = variants["full"].file.model_copy(update={"path": "full.pt2"})
    shutil.copy(bundle / "full.onnx", bundle / "full.pt2")
    variants["full"] = variants["full"].model_copy(update={"file": file})
    manifest.model_copy(update={"variants": variants}).save(bundle)

    with pytest.raises(ConfigError, match=r"engines are built from ONNX, but the bundle holds full.pt2"):
        build_engines(bundle, RTX, progress=False)
