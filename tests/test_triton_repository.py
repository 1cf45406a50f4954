"""Model repositories for Triton: what is written, what is refused, and what the model does where no server is."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import omnifx
from omnifx import triton_model
from omnifx.bundle import FileInfo, Manifest, file_info
from omnifx.bundle_runner import BundleRunner
from omnifx.cli import app
from omnifx.cli_triton import write_beside
from omnifx.errors import BundleError, ConfigError
from omnifx.sampling import Sampler, SampleRequest, sample
from omnifx.triton_model import BundleModel
from tests.sampled import BATCH, LABELS, NEGATIVES, PATTERN, TEXTS, made, model, runner, sampler
from tests.toys import distance, toy_inputs

CONFIG = """\
# ToyDiT, 4 steps by by hand: FrFr
# Written by omnifx. What a request holds for one sample; rows of several samples, and several requests,
# are gathered into runs of 2. Parameters of a request: steps, guidance_scale, stream_every.
name: "toy"
backend: "python"
max_batch_size: 2
input [
  { name: "seed" data_type: TYPE_INT64 dims: [ 1 ] },
  { name: "y" data_type: TYPE_INT64 dims: [ 1 ] },
  { name: "text" data_type: TYPE_FP32 dims: [ 5, 8 ] },
  { name: "negative_y" data_type: TYPE_INT64 dims: [ 1 ] optional: true },
  { name: "negative_text" data_type: TYPE_FP32 dims: [ 5, 8 ] }
]
output [
  { name: "latents" data_type: TYPE_FP32 dims: [ 4, 8, 8 ] },
  { name: "step" data_type: TYPE_INT32 dims: [ 1 ] }
]
dynamic_batching { max_queue_delay_microseconds: 2500 }
model_transaction_policy { decoupled: true }
instance_group [ { count: 3 kind: KIND_GPU } ]
# of omnifx.load_bundle
parameters { key: "runtime" value: { string_value: "onnxruntime" } }
# of each instance; 0: as many as the runtime wants
parameters { key: "threads" value: { string_value: "2" } }
# replay the bundle's reference before serving, and refuse what differs
parameters { key: "check" value: { string_value: "true" } }
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A folder that is a bundle to all who do not run it."""
    folder = tmp_path / "toy"
    folder.mkdir()

    def file(name: str) -> FileInfo:
        (folder / name).write_bytes(b"x" * 10_000_000 if name == "weights.bin" else name.encode())
        return file_info(folder, name)

    manifest = runner().manifest
    variants = {
        name: info.model_copy(update={"file": file(f"{name}.onnx")}) for name, info in manifest.variants.items()
    }
    manifest = manifest.model_copy(update={"variants": variants, "weights": file("weights.bin")})
    manifest.save(folder)
    return folder


# -- what is written ---------------------------------------------------------------------------------------------------


def test_a_repository_holds_the_bundle_and_says_how_to_ask(bundle: Path, tmp_path: Path) -> None:
    (bundle / "notes.txt").write_text("not of the bundle")
    written = omnifx.write_triton(
        bundle,
        tmp_path / "models",
        scheduler=made("DDIMScheduler"),
        guidance="one-call",
        negative={"y": 9, "text": None},
        stream=True,
        device="gpu",
        instances=3,
        threads=2,
        max_delay_ms=2.5,
    )

    assert (written / "config.pbtxt").read_text() == CONFIG
    assert sorted(path.name for path in (written / "1").iterdir()) == [
        "bundle", "model.py", "sampling.json", "sampling.safetensors",
    ]  # fmt: skip
    copied = Manifest.load(written / "1" / "bundle")
    assert copied.steps == runner().manifest.steps
    assert not (written / "1" / "bundle" / "notes.txt").exists()
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["toy"], "nothing half-written is left"


def test_a_type_that_numpy_lacks_is_asked_for_as_another(bundle: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(bundle)
    text = manifest.call.inputs["text"].model_copy(update={"dtype": "bfloat16"})
    call = manifest.call.model_copy(update={"inputs": {**manifest.call.inputs, "text": text}})
    steps = tuple(step.model_copy(update={"runs": manifest.steps[0].runs}) for step in manifest.steps)
    manifest.model_copy(update={"call": call, "steps": steps}).save(bundle)

    written = omnifx.write_triton(bundle, tmp_path / "models", scheduler=made("DDIMScheduler"))

    assert '{ name: "text" data_type: TYPE_FP32 dims: [ 5, 8 ] }' in (written / "config.pbtxt").read_text()


def test_the_command_writes_the_same(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "import diffusers\n"
        "def scheduler():\n"
        "    made = diffusers.DDIMScheduler()\n"
        "    made.set_timesteps(4)\n"
        "    return made\n"
        "def sample(runner, request):\n"
        "    return 0\n"
    )
    options = "--scheduler mine.py:scheduler --guidance one-call --negative y=9 --negative text --stream --device gpu"
    more = "--instances 3 --threads 2 --max-delay-ms 2.5 --sampler mine.py"

    ran = CliRunner().invoke(app, ["triton", str(bundle), "--out", "models", *options.split(), *more.split()])

    assert ran.exit_code == 0, ran.output
    assert "next: tritonserver --model-repository=" in ran.output
    assert Path("models/toy/config.pbtxt").read_text() == CONFIG
    assert Path("models/toy/1/sampler.py").read_text() == Path("mine.py").read_text()
    wrong = CliRunner().invoke(app, ["triton", str(bundle), "--out", "models", "--negative", "y=none"])
    assert wrong.exit_code == 2
    assert "--negative takes NAME or NAME=NUMBER, got 'y=none'" in wrong.output


def test_an_export_can_be_served_at_once(bundle: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(bundle)
    scheduler = made("DDIMScheduler")
    manifest = manifest.model_copy(
        update={"scheduler": omnifx.schedulers.scheduler_info(scheduler, manifest.scheduler.timesteps)}
    )
    manifest.save(bundle)

    write_beside((model(), toy_inputs(BATCH, text=8), scheduler), bundle, tmp_path / "models")

    assert "max_batch_size: 4" in (tmp_path / "models" / "toy" / "config.pbtxt").read_text()


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_model_that_is_there_is_replaced_only_if_asked(bundle: Path, tmp_path: Path) -> None:
    write: Callable[..., Path] = omnifx.write_triton
    scheduler = made("DDIMScheduler")
    written = write(bundle, tmp_path / "models", name="m", scheduler=scheduler)
    with pytest.raises(ConfigError, match="is there already"):
        write(bundle, tmp_path / "models", name="m", scheduler=scheduler)
    (written / "1" / "old").touch()
    write(bundle, tmp_path / "models", name="m", scheduler=scheduler, overwrite=True)
    assert not (written / "1" / "old").exists()
    (tmp_path / "models" / "mine").mkdir()
    with pytest.raises(ConfigError, match="is there already"):
        write(bundle, tmp_path / "models", name="mine", scheduler=scheduler, overwrite=True)


def test_an_interrupted_writing_leaves_nothing(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="no space left"):
        omnifx.write_triton(bundle, tmp_path / "models", scheduler=made("DDIMScheduler"))
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "a/b"}, "a model's name has letters"),
        ({"runtime": "tflite"}, r"runtime must be one of \['onnxruntime'.*\], got 'tflite'"),
        ({"device": "tpu"}, "device must be 'cpu' or 'gpu', got 'tpu'"),
        ({"instances": 0}, "instances must be a number >= 1, got 0"),
        ({"threads": -1}, "threads must be a number >= 0, got -1"),
        ({"max_delay_ms": -1.0}, r"max_delay_ms must be >= 0, got -1\.0"),
        ({"sampler": "none.py"}, r"there is no Python file none\.py"),
    ],
)
def test_options_out_of_range_are_refused(bundle: Path, tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        omnifx.write_triton(bundle, tmp_path / "models", **{"scheduler": made("DDIMScheduler"), **options})
    assert not (tmp_path / "models").exists()


def test_a_bundle_without_a_scheduler_or_with_damage_is_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not say what scheduler its steps belong to"):
        omnifx.write_triton(bundle, tmp_path / "models")
    (bundle / "weights.bin").write_bytes(b"")
    with pytest.raises(BundleError, match=r"weights\.bin has 0 bytes"):
        omnifx.write_triton(bundle, tmp_path / "models", scheduler=made("DDIMScheduler"))


# -- the model, with a stand-in for Triton's side ----------------------------------------------------------------------


class ModelError(Exception):
    """Stands for pb.TritonModelException."""


class Response(SimpleNamespace):
    def __init__(self, tensors: Any = (), error: Any = None) -> None:
        super().__init__(latents=dict(tensors).get("latents"), error=error)


class Request:
    """One row of the toy, or what is given."""

    def __init__(self, row: int, cancelled: Callable[[], bool] = lambda: False, **more: Any) -> None:
        self.tensors = {
            "seed": torch.tensor([[10 + row]]),
            "y": LABELS[[row]].reshape(1, 1),
            "text": TEXTS[[row]],
            "negative_text": NEGATIVES[[row]],
        } | more.pop("tensors", {})
        self.given, self.is_cancelled = more, cancelled

    def parameters(self) -> dict[str, Any]:
        return self.given


def no_metrics(**options: Any) -> Any:
    raise ModelError("metrics are disabled")


no_metrics.COUNTER = no_metrics.GAUGE = 0  # type: ignore[attr-defined]


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., BundleModel]:
    """A model as Triton makes it, on a server without metrics, with a sampling loop."""
    pb = SimpleNamespace(
        get_input_tensor_by_name=lambda request, name: (
            SimpleNamespace(to_dlpack=lambda: torch.utils.dlpack.to_dlpack(request.tensors[name]))
            if name in request.tensors
            else None
        ),
        Tensor=SimpleNamespace(from_dlpack=lambda name, value: (name, value)),
        InferenceResponse=Response,
        TritonError=lambda text, code="INTERNAL": (code, text),
        MetricFamily=no_metrics,
        TritonModelException=ModelError,
        Logger=SimpleNamespace(log_info=print, log_warn=print, log_error=print),
    )
    pb.TritonError.CANCELLED, pb.TritonError.INVALID_ARG = "CANCELLED", "INVALID_ARG"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", pb)

    def make(function: Any = None) -> BundleModel:
        found = sampler(guidance="one-call", negative={"text": None})
        folder = tmp_path / "model" / "1"
        folder.mkdir(parents=True)
        found.sampling.save(folder)
        monkeypatch.setattr(triton_model, "load_bundle", lambda *args, **options: found.runner)
        served = BundleModel(
            {
                "model_config": "{}",
                "model_name": "model",
                "model_repository": str(tmp_path / "model"),
                "model_version": "1",
                "model_instance_name": "model_0_0",
                "model_instance_kind": "CPU",
                "model_instance_device_id": "0",
            }
        )
        served._sampler = Sampler(found.runner, found.sampling, function)
        return served

    return make


def answers(served: BundleModel, *requests: Request) -> list[Any]:
    found = served.execute(requests)
    assert found is not None
    return [response.error or response.latents for response in found]


def test_a_bad_request_leaves_its_neighbours_alone(serving: Callable[..., BundleModel]) -> None:
    served = serving()
    alone = [answers(served, Request(row))[0] for row in (0, 1, 2)]

    rest = {"y": LABELS[[0]].reshape(1, 1), "text": TEXTS[[0]], "seed": torch.tensor([[10]])}
    bad = [
        Request(0, steps=5),
        Request(0, steps="many"),
        Request(0, guidance_scale=True),
        Request(0, stream_every=1),
        Request(0),
        Request(0),
    ]
    bad[4].tensors = rest
    bad[5].tensors = {**rest, "negative_text": NEGATIVES[[0]]}
    del bad[5].tensors["y"]
    got = answers(served, Request(0), *bad, Request(1), Request(2, steps=4, guidance_scale="1.0"))

    assert [text.partition(":")[0] for _, text in got[1:7]] == [
        "steps is 5, but the bundle was made for 4",
        "the parameter steps must be a finite number, got 'many'.",
        "the parameter guidance_scale must be a finite number, got True.",
        "stream_every is for models that stream. Write this one with stream=True, or leave it out.",
        "negative_text is missing; guidance needs it.",
        "y is missing.",
    ]
    assert {code for code, _ in got[1:7]} == {"INVALID_ARG"}
    for true, found in zip(alone[:2], (got[0], got[7]), strict=True):
        assert distance(found, true) < 1e-5
    assert distance(got[8], alone[2]) == 0, "a scale of 1 is what requests get by default"


def test_a_run_that_nobody_waits_for_ends_early(serving: Callable[..., BundleModel]) -> None:
    served = serving()
    before = served._sampler.runner.stats.calls
    left = iter([False, True])

    got = answers(served, Request(0, cancelled=lambda: next(left)), Request(1, cancelled=lambda: True))

    assert [code for code, _ in got] == ["CANCELLED", "CANCELLED"]
    assert served._sampler.runner.stats.calls - before == 2
    assert served._sampler.runner.stats.held_bytes == 0
    patient = answers(served, Request(0), Request(1, cancelled=lambda: True))
    assert all(isinstance(each, Tensor) for each in patient), "one still waits"


def test_what_the_sampler_refuses_fails_one_request_only(serving: Callable[..., BundleModel]) -> None:
    def picky(found: BundleRunner, request: SampleRequest) -> Tensor:
        if 12 in request.seeds:
            raise KeyError("no such thing")
        return sample(found, request)

    got = answers(serving(picky), *map(Request, (0, 1, 2, 3)))

    assert got[2] == ("INTERNAL", "sampling: the sampler failed with KeyError: 'no such thing'")
    assert all(isinstance(each, Tensor) for each in (*got[:2], got[3]))


def test_a_bundle_that_computes_something_else_here_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    found = runner()
    monkeypatch.setattr(type(found), "check", lambda self: 0.5)
    with pytest.raises(BundleError, match=r"reference differs here by 5.0e-01 of an output's norm \(allowed: 0.0001\)"):
        triton_model._check(found)


def test_steps_of_the_toy_are_as_planned() -> None:
    assert [step.action for step in runner().manifest.steps] == list(PATTERN)
