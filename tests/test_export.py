"""Exports to ONNX: what onnxruntime gives, what is shared, what is refused, and what an interrupted export leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import omnifx
from omnifx import export_files, exporter
from omnifx.backends.weights_file import PAGE
from omnifx.bundle import MANIFEST, WEIGHTS, Manifest, json_schema
from omnifx.cli import app
from omnifx.errors import BundleError, ConfigError, ExportError
from omnifx.plan import Plan
from tests.exporting import alter, build_with_rtx, in_torch, needs_onnx, plan_by_hand, planned
from tests.toys import distance, generate, noise, timesteps, toy, toy_inputs

needs_onnx()

TEXT = noise(1, 5, 8, seed=7)
EXAMPLE = toy_inputs(text=8)
SCHEMA = Path(__file__).parent.parent / "docs" / "bundle.schema.json"


def names_of(model: nn.Module, *example: Any) -> tuple[str, ...]:
    return tuple(branch.name for branch in omnifx.explain(model, *example).branches if branch.cacheable)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return toy(2, text=8)


@pytest.fixture(scope="module")
def plan(model: nn.Module) -> Plan:
    return plan_by_hand(model, names_of(model, *EXAMPLE), "FrFr", timesteps(4))


@pytest.fixture(scope="module")
def bundle(model: nn.Module, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that tests may read, but not change."""
    folder = tmp_path_factory.mktemp("exports") / "toy"
    omnifx.export(model, EXAMPLE, plan, folder, progress=False)
    return folder


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


# -- what is written ---------------------------------------------------------------------------------------------------


def test_a_bundle_runs_a_generation_as_pytorch_does(model: nn.Module, plan: Plan, bundle: Path) -> None:
    runner, reference = omnifx.load_bundle(bundle), in_torch(model, EXAMPLE, plan)
    run: Any = {"seed": 5, "steps": 4, "text": TEXT, "cfg": 0}

    assert distance(generate(runner, **run), generate(reference, **run)) < 1e-5
    assert runner.check() < 1e-5
    assert dict(runner.stats.runs) == {"prologue": 3, "full": 5, "reuse": 5, "reuse.conditions": 5}


def test_every_variant_gives_what_pytorch_gives(model: nn.Module, plan: Plan, bundle: Path) -> None:
    engine, torch_engine = omnifx.load_bundle(bundle).engine, in_torch(model, EXAMPLE, plan).engine
    for name, variant in Manifest.load(bundle).variants.items():
        inputs = {
            key: noise(*info.shape, seed=seed) if "float" in info.dtype else torch.full(info.shape, 3)
            for seed, (key, info) in enumerate(variant.inputs.items())
        }
        got = {key: torch.empty(info.shape) for key, info in variant.outputs.items()}
        true = {key: torch.empty(info.shape) for key, info in variant.outputs.items()}
        engine.run(name, inputs, got)
        torch_engine.run(name, inputs, true)
        for key in got:
            torch.testing.assert_close(got[key], true[key], rtol=1e-5, atol=1e-5)


def test_sessions_that_take_turns_give_the_same(bundle: Path) -> None:
    all_open, one_open = omnifx.load_bundle(bundle), omnifx.load_bundle(bundle, most_sessions=1)
    run: Any = {"seed": 5, "steps": 4, "text": TEXT, "cfg": 0}

    assert torch.equal(generate(one_open, **run), generate(all_open, **run))
    assert len(one_open.engine._sessions) == 1  # type: ignore[attr-defined]


def test_weights_are_held_once_and_aligned(model: nn.Module, bundle: Path) -> None:
    import onnx

    places: dict[int, int] = {}
    for variant in Manifest.load(bundle).variants.values():
        proto = onnx.load(bundle / variant.file.path, load_external_data=False)
        for tensor in proto.graph.initializer:
            if tensor.external_data:
                entry = {each.key: each.value for each in tensor.external_data}
                assert entry["location"] == WEIGHTS
                places[int(entry["offset"])] = int(entry["length"])
        assert (bundle / variant.file.path).stat().st_size < 200_000

    assert all(offset % PAGE == 0 for offset, length in places.items() if length >= PAGE)
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    assert sum(places.values()) < 1.1 * own, "some weights are held twice"
    content = (bundle / WEIGHTS).read_bytes()
    blobs = [content[offset : offset + length] for offset, length in places.items()]
    assert len(set(blobs)) == len(blobs)


def test_linear_layers_read_the_weights_of_the_model(model: nn.Module, bundle: Path) -> None:
    import onnx

    proto = onnx.load(bundle / "full.onnx", load_external_data=False)
    names = {tensor.name for tensor in proto.graph.initializer}
    assert {"blocks.0.mlp.up.weight", "blocks.1.attn.q.weight"} <= names
    assert not [node for node in proto.graph.node if node.op_type in ("Dropout", "Einsum", "If")]


def test_the_manifest_says_what_is_in_the_files(bundle: Path, plan: Plan) -> None:
    import onnx

    manifest = Manifest.load(bundle)
    assert manifest.policy.timeline == "FrFr"
    assert manifest.scheduler.timesteps == plan.timesteps
    assert {name: info.role for name, info in manifest.call.inputs.items()} == {
        "x": "latents", "t": "timestep", "y": "invariant", "text": "invariant",
    }  # fmt: skip
    for variant in manifest.variants.values():
        graph = onnx.load(bundle / variant.file.path, load_external_data=False).graph
        for ports, infos in ((graph.input, variant.inputs), (graph.output, variant.outputs)):
            shapes = {port.name: tuple(d.dim_value for d in port.type.tensor_type.shape.dim) for port in ports}
            assert shapes == {name: info.shape for name, info in infos.items()}
    assert manifest.variants["reuse"].reads == manifest.branches
    assert manifest.variants["full"].writes == manifest.branches
    assert not [path for path in bundle.iterdir() if path.suffix in (".pkl", ".pt", ".pth")]


def test_the_schema_in_the_docs_is_that_of_the_manifest() -> None:
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == json_schema()


@pytest.mark.parametrize(
    ("policy", "speedup"), [("taylorseer", None), ("omnicache", 1.6), ("auto", 1.8), ("toca", None)]
)
def test_bundles_of_policies_follow_the_compiled_model(policy: str, speedup: float | None, tmp_path: Path) -> None:
    def one(denoiser: Any, seed: int) -> Tensor:
        return generate(denoiser, seed=seed, steps=9)

    case = planned(toy(1), one, policy, speedup=speedup)
    omnifx.export(case.model, toy_inputs(), case.plan, tmp_path / "b", profile=case.profile, progress=False)

    runner = omnifx.load_bundle(tmp_path / "b")

    assert distance(one(runner, 5), one(case.compiled(tmp_path), 5)) < 1e-5
    assert runner.check() < 1e-5
    if policy == "toca":
        import onnx

        partial = [name for name, variant in runner.manifest.variants.items() if variant.tokens]
        for name in partial:
            graph = onnx.load(tmp_path / "b" / f"{name}.onnx", load_external_data=False).graph
            assert {"TopK", "GatherND", "ScatterND"} <= {node.op_type for node in graph.node}
        assert partial
    build_with_rtx(tmp_path / "b")


def test_one_graph_a_step_needs_no_numbers(model: nn.Module, plan: Plan, bundle: Path, tmp_path: Path) -> None:
    short = plan.model_copy(update={"timesteps": plan.timesteps[:2], "steps": plan.steps[:2]})
    manifest = omnifx.export(model, EXAMPLE, short, tmp_path / "b", per_step=True, progress=False)

    assert list(manifest.variants) == ["prologue", "step000_0_full", "step001_0_reuse.conditions", "reuse"]
    assert not manifest.constants
    runner, same = omnifx.load_bundle(tmp_path / "b"), omnifx.load_bundle(bundle)
    for k, time in enumerate(timesteps(4)[:2]):
        call = (noise(1, 4, 8, 8, seed=k), torch.tensor([time]), torch.tensor([3]), TEXT)
        assert distance(runner(*call), same(*call)) < 1e-5


# -- what is refused ---------------------------------------------------------------------------------------------------


class _Killed(BaseException):
    """Stands for a signal."""


@pytest.mark.parametrize("at", ["write_onnx", "manifest_of"])
def test_an_interrupted_export_leaves_nothing(
    at: str, model: nn.Module, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*args: Any, **kwargs: Any) -> Any:
        raise _Killed

    monkeypatch.setattr(export_files if at == "write_onnx" else exporter, at, die)
    if at == "manifest_of":
        monkeypatch.setattr(exporter, "write_graphs", lambda *args: None)
    with pytest.raises(_Killed):
        omnifx.export(model, EXAMPLE, plan, tmp_path / "b", progress=False)

    assert not [path for path in tmp_path.iterdir() if path.name != "cache"]
    with pytest.raises(BundleError, match=r"is no bundle: manifest.json cannot be read"):
        omnifx.load_bundle(tmp_path / "b")


def test_a_killed_process_leaves_a_folder_that_does_not_load(copied: Path) -> None:
    (copied / MANIFEST).unlink()  # it is written last
    with pytest.raises(BundleError, match="An export that was interrupted leaves none"):
        omnifx.load_bundle(copied)


def test_a_folder_with_something_in_it_is_left_alone(model: nn.Module, plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        omnifx.export(model, EXAMPLE, plan, tmp_path / "b", overwrite=True, progress=False)
    with pytest.raises(ConfigError, match=r"the folder of .* is not there"):
        omnifx.export(model, EXAMPLE, plan, tmp_path / "none" / "b", progress=False)
    with pytest.raises(ConfigError, match=r"target must be one of 'onnx', .*got 'tflite'"):
        omnifx.export(model, EXAMPLE, plan, tmp_path / "c", target="tflite", progress=False)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="opset must be a number from 18"):
        omnifx.export(model, EXAMPLE, plan, tmp_path / "c", opset=11, progress=False)


def test_a_truncated_file_is_refused(copied: Path) -> None:
    with (copied / WEIGHTS).open("r+b") as file:
        file.truncate(100)
    with pytest.raises(BundleError, match=r"weights.bin has 100 bytes, but the manifest says .* cut off or changed"):
        omnifx.load_bundle(copied, verify=False)


def test_an_altered_file_is_refused(copied: Path) -> None:
    alter(copied / "reuse.onnx", at=50)
    with pytest.raises(BundleError, match=r"reuse.onnx was altered: its SHA-256 is"):
        omnifx.load_bundle(copied)


def test_a_missing_file_and_a_link_are_refused(copied: Path, bundle: Path) -> None:
    (copied / "full.onnx").unlink()
    with pytest.raises(BundleError, match=r"full.onnx is missing"):
        omnifx.load_bundle(copied)
    (copied / "full.onnx").symlink_to(bundle / "full.onnx")
    with pytest.raises(BundleError, match=r"full.onnx is a link"):
        omnifx.load_bundle(copied)


def _edited(folder: Path, edit: Any) -> None:
    raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    edit(raw)
    (folder / MANIFEST).write_text(json.dumps(raw), encoding="utf-8")


def _drop_variant(raw: Any) -> None:
    del raw["variants"]["reuse"]


def _read_too_early(raw: Any) -> None:
    raw["steps"] = raw["steps"][1:]
    raw["scheduler"]["timesteps"] = raw["scheduler"]["timesteps"][1:]


def _leave(raw: Any) -> None:
    raw["weights"]["path"] = "../weights.bin"


def _leave_absolutely(raw: Any) -> None:
    raw["variants"]["full"]["file"]["path"] = "/etc/passwd"


def _future(raw: Any) -> None:
    raw["format"] = 2


def _reshape(raw: Any) -> None:
    next(iter(raw["buffers"].values()))["shape"] = [1]


def _wrong_hash(raw: Any) -> None:
    raw["weights"]["sha256"] = "0" * 64


def _beyond(raw: Any) -> None:
    next(iter(raw["constants"].values()))["offset"] = 2**40


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_drop_variant, "step 1 runs the variant reuse, which the bundle does not have"),
        (_read_too_early, "step 0 reads the cache cut:blocks.0.attn:0 before any step has written it"),
        (_leave, r"weights.path: .*'../weights.bin' is not a plain path inside of the bundle"),
        (_leave_absolutely, r"'/etc/passwd' is not a plain path inside of the bundle"),
        (_future, r"has format 2, but this omnifx reads format 1. Update omnifx"),
        (_reshape, r"does not fit float32"),
        (_wrong_hash, r"weights.bin was altered"),
        (_beyond, r"lies beyond the end of weights.bin"),
    ],
)
def test_a_manifest_that_does_not_hold_together_is_refused(copied: Path, edit: Any, message: str) -> None:
    _edited(copied, edit)
    with pytest.raises(BundleError, match=message):
        omnifx.load_bundle(copied)


def test_a_manifest_that_is_no_json_is_refused(copied: Path) -> None:
    (copied / MANIFEST).write_text("{", encoding="utf-8")
    with pytest.raises(BundleError, match="is not JSON"):
        omnifx.load_bundle(copied)


def test_an_operator_without_onnx_form_is_named(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = toy(1)

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            out: Tensor = self.inner(x, t, y)
            return out + torch.special.bessel_j0(out.mean())

    model = Odd().eval()
    plan = plan_by_hand(model, names_of(model, *toy_inputs()), "Fr", timesteps(2))
    with pytest.raises(ExportError, match=r"full has no ONNX form: .*bessel_j0"):
        omnifx.export(model, toy_inputs(), plan, tmp_path / "b", progress=False)
    assert not (tmp_path / "b").exists()


def test_an_unknown_runtime_is_refused(bundle: Path) -> None:
    with pytest.raises(ConfigError, match=r"runtime must be one of 'onnxruntime', .*got 'abacus'"):
        omnifx.load_bundle(bundle, runtime="abacus")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_streams must be a number >= 1"):
        omnifx.load_bundle(bundle, max_streams=0)


# -- the command line --------------------------------------------------------------------------------------------------


def test_the_command_shows_and_checks_a_bundle(bundle: Path) -> None:
    result = CliRunner().invoke(app, ["bundle", str(bundle), "--check"])

    assert result.exit_code == 0, result.output
    assert "ToyDiT, float32: 4 steps by by hand" in result.output
    assert "FrFr" in result.output
    assert "onnxruntime differs from PyTorch by" in result.output


def test_the_command_exports_what_a_factory_makes(
    plan: Plan, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan.save(tmp_path / "plan.json")
    script = "from tests.toys import toy, toy_inputs\ndef make():\n    return toy(2, text=8), toy_inputs(text=8)\n"
    (tmp_path / "mine.py").write_text(script, encoding="utf-8")
    seen: dict[str, Any] = {}

    def export(model: nn.Module, example: Any, plan: Path, out: Path, **options: Any) -> Manifest:
        seen.update(options, model=model, plan=plan, out=out)
        return Manifest.load(bundle)

    monkeypatch.setattr(exporter, "export", export)
    command = ["export", f"{tmp_path / 'mine.py'}:make", "--plan", str(tmp_path / "plan.json"), "--out"]
    result = CliRunner().invoke(
        app, [*command, str(tmp_path / "b"), "--varying", "text", "--per-step", "--opset", "21"]
    )

    assert result.exit_code == 0, result.output
    assert type(seen["model"]).__name__ == "ToyDiT"
    assert (seen["target"], seen["opset"], seen["per_step"], seen["varying_inputs"]) == ("onnx", 21, True, ["text"])
    assert seen["same_weights"] is True


def test_the_command_says_what_it_refuses(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bundle", str(tmp_path)])

    assert result.exit_code == 2
    assert "is no bundle: manifest.json cannot be read" in result.output
