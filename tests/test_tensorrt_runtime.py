"""Running engines: against a stand-in for TensorRT that computes at the addresses it is given, and checks the rules."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import omnifx
from omnifx.backends.tensorrt_runtime import TensorRTRuntime
from omnifx.bundle import Manifest
from omnifx.bundle_runner import BundleRunner
from omnifx.errors import BundleError, ConfigError
from tests.exporting import in_torch, plan_by_hand
from tests.fake_tensorrt import FakeGpu, FakeTensorRT, with_engines
from tests.toys import generate, noise, timesteps, toy, toy_inputs

EXAMPLE = toy_inputs(text=8)
TEXT = noise(1, 5, 8, seed=7)
RUN: dict[str, Any] = {"steps": 4, "text": TEXT, "cfg": 0}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return toy(2, text=8)


@pytest.fixture(scope="module")
def reference(model: nn.Module) -> BundleRunner:
    """The same graphs in PyTorch."""
    names = tuple(branch.name for branch in omnifx.explain(model, *EXAMPLE).branches if branch.cacheable)
    return in_torch(model, EXAMPLE, plan_by_hand(model, names, "FrFr", timesteps(4)))


class Case:
    """A bundle with engines of the stand-in."""

    def __init__(self, reference: BundleRunner, folder: Path) -> None:
        self.gpu = FakeGpu()
        self.trt = FakeTensorRT(self.gpu, reference.engine.graphs)  # type: ignore[attr-defined]
        self.folder = folder
        self.manifest = with_engines(reference.manifest, folder)
        self.constants = reference._constants

    def runtime(self, **options: Any) -> TensorRTRuntime:
        given = {"device": torch.device("cpu"), "gpu": self.gpu, "trt": self.trt, **options}
        return TensorRTRuntime(self.folder, self.manifest, "tensorrt-rtx", **given)

    def runner(self, **options: Any) -> BundleRunner:
        return BundleRunner(self.manifest, self.runtime(**options), self.constants)


@pytest.fixture
def case(reference: BundleRunner, tmp_path: Path) -> Case:
    return Case(reference, tmp_path)


def example(manifest: Manifest, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Values for one run of a graph."""
    variant = manifest.variants[name]
    inputs = {
        key: noise(*info.shape, seed=i) if info.dtype == "float32" else torch.full(info.shape, 3)
        for i, (key, info) in enumerate(variant.inputs.items())
    }
    outputs: dict[str, Tensor | None] = {key: torch.empty(info.shape) for key, info in variant.outputs.items()}
    return inputs, outputs


# -- what runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_generation_equals_that_of_pytorch(reference: BundleRunner, case: Case, cuda_graphs: bool) -> None:
    runner = case.runner(cuda_graphs=cuda_graphs)

    for seed in (5, 6):
        assert torch.equal(generate(runner, seed=seed, **RUN), generate(reference, seed=seed, **RUN))

    assert runner.stats.runs["full"] == runner.stats.runs["reuse"] == 8


def test_contexts_of_a_stream_share_the_largest_scratch_memory(case: Case) -> None:
    runner = case.runner()
    generate(runner, seed=5, **RUN)

    largest = 1000 * len(case.manifest.variants)
    assert isinstance(runner.engine, TensorRTRuntime)
    assert runner.engine.stats.lanes == 1
    assert runner.engine.stats.contexts == len(case.manifest.variants)
    assert runner.engine.stats.scratch_bytes == largest
    assert len({scratch for _, _, scratch in case.trt.runs}) == 1
    assert {stream for _, stream, _ in case.trt.runs} == {999}


def test_each_stream_has_contexts_and_scratch_memory_of_its_own(case: Case) -> None:
    engine = case.runtime()
    for stream in (1, 2, 1):
        with case.gpu.on(stream):
            engine.run("full", *example(case.manifest, "full"))

    scratch = {stream: address for _, stream, address in case.trt.runs}
    assert engine.stats.lanes == engine.stats.contexts == 2
    assert scratch[1] != scratch[2]
    assert len({address for _, _, address in case.trt.runs}) == 2


def test_streams_beyond_the_most_are_given_up_when_their_work_is_done(case: Case) -> None:
    engine = case.runtime(max_lanes=2)
    for stream in (1, 2, 3):
        with case.gpu.on(stream):
            engine.run("full", *example(case.manifest, "full"))

    assert engine.stats.lanes == 2
    assert case.gpu.synchronized == 1


def test_generations_run_at_once_each_on_its_stream(reference: BundleRunner, case: Case) -> None:
    runner = case.runner()
    alone = [generate(reference, seed=seed, **RUN) for seed in range(4)]
    got: dict[int, Tensor] = {}

    def one(seed: int) -> None:
        with case.gpu.on(seed + 1), runner.generation():
            got[seed] = generate(runner, seed=seed, **RUN)

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert all(torch.equal(got[seed], alone[seed]) for seed in range(4))
    pairs = {(stream, scratch) for _, stream, scratch in case.trt.runs}
    assert len(pairs) == len({scratch for _, scratch in pairs}) == 4


def test_a_graph_is_captured_at_the_second_run_on_the_same_addresses(case: Case) -> None:
    engine = case.runtime(cuda_graphs=True)
    inputs, outputs = example(case.manifest, "full")
    for run in range(4):
        next(iter(inputs.values())).fill_(0.1 * run)  # the addresses stay, the values do not
        engine.run("full", inputs, outputs)
        assert len(case.trt.runs) == run + 1
    assert (case.gpu.captured, engine.stats.graphs, engine.stats.replays) == (1, 1, 2)
    replayed = {key: value.clone() for key, value in outputs.items() if value is not None}

    others = {key: torch.empty_like(value) for key, value in replayed.items()}
    engine.run("full", inputs, others)  # type: ignore[arg-type]

    assert (case.gpu.captured, engine.stats.replays) == (1, 2)
    assert all(torch.equal(others[key], replayed[key]) for key in others)


def test_inputs_at_odd_addresses_are_copied(case: Case) -> None:
    engine = case.runtime()
    inputs, outputs = example(case.manifest, "full")
    engine.run("full", inputs, outputs)
    straight = {key: value.clone() for key, value in outputs.items() if value is not None}
    name = next(key for key, value in inputs.items() if value.dtype == torch.float32)
    room = torch.empty(inputs[name].numel() + 1)
    odd = room[1:].view(inputs[name].shape).copy_(inputs[name])

    engine.run("full", inputs | {name: odd}, outputs)

    assert engine.stats.copies == 1
    assert all(torch.equal(outputs[key], value) for key, value in straight.items())  # type: ignore[arg-type]


def test_outputs_that_nobody_keeps_have_room_of_their_own(case: Case) -> None:
    engine = case.runtime()
    inputs, outputs = example(case.manifest, "full")
    wanted = next(iter(outputs))
    engine.run("full", inputs, outputs)
    true = outputs[wanted]
    assert true is not None

    engine.run("full", inputs, {key: torch.empty_like(true) if key == wanted else None for key in outputs})

    (context,) = engine._lanes[0].contexts.values()
    assert len(set(context.addresses.values())) == len(context.addresses)


def test_kernels_that_were_compiled_are_kept_in_a_file(case: Case, tmp_path: Path) -> None:
    file = tmp_path / "kernels.bin"
    generate(case.runner(runtime_cache=file), seed=5, **RUN)
    assert file.read_bytes() == b"kernels"

    case.trt.caches.clear()
    case.runtime(runtime_cache=file)
    assert case.trt.caches[0].loaded == b"kernels"


# -- what is refused ---------------------------------------------------------------------------------------------------


def altered(case: Case, **builder: Any) -> Manifest:
    engines = case.manifest.engines["tensorrt-rtx"]
    engines = engines.model_copy(update={"builder": {**engines.builder, **builder}})
    return case.manifest.model_copy(update={"engines": {"tensorrt-rtx": engines}})


def _other_gpu(case: Case) -> None:
    case.gpu.capability = "9.0"


def _other_version(case: Case) -> None:
    case.manifest = altered(case, version="1.6.0")


def _hopper(case: Case) -> None:
    case.gpu.capability = "9.0"
    case.manifest = altered(case, compute_capabilities=[])


def _no_engines(case: Case) -> None:
    case.manifest = case.manifest.model_copy(update={"engines": {}})


def _one_missing(case: Case) -> None:
    engines = case.manifest.engines["tensorrt-rtx"]
    files = {name: file for name, file in engines.files.items() if name != "reuse"}
    case.manifest = case.manifest.model_copy(
        update={"engines": {"tensorrt-rtx": engines.model_copy(update={"files": files})}}
    )


def _damaged(case: Case) -> None:
    (case.folder / "reuse.engine").write_text("{", encoding="utf-8")


def _of_another_graph(case: Case) -> None:
    (case.folder / "reuse.engine").write_bytes((case.folder / "full.engine").read_bytes())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_other_gpu, r"the GPU has compute capability 9.0, but the engines were built for 8.6, 8.9, 12.0"),
        (_hopper, r"9.0, but the engines were built for GeForce and RTX GPUs. Build for it: .* take --target tensorrt"),
        (_other_version, r"built by version 1.6.0, but TensorRT-RTX 1.7.1.116 is here. Install that version"),
        (_no_engines, r"has no engines for it, only for nothing. Build them: omnifx build .* --target tensorrt-rtx"),
        (_one_missing, r"the engine of reuse is missing. omnifx build"),
        (_damaged, r"reuse.engine cannot be loaded: Serialization assertion failed"),
        (_of_another_graph, r"reuse.engine is not the engine of reuse: "),
    ],
)
def test_engines_that_cannot_run_here_are_refused(case: Case, spoil: Callable[[Case], None], message: str) -> None:
    spoil(case)
    with pytest.raises(BundleError, match=message):
        case.runtime()


def test_a_run_that_fails_says_why(case: Case) -> None:
    case.trt.fails = "full"
    with pytest.raises(BundleError, match=r"full could not be run: an illegal memory access"):
        generate(case.runner(), seed=5, **RUN)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(case: Case) -> None:
    with pytest.raises(BundleError, match=r"on an NVIDIA GPU, but torch finds none here. .*runtime='onnxruntime'"):
        case.runtime(gpu=None, device=torch.device("cuda"))
    with pytest.raises(BundleError, match=r"engines run on a CUDA device, got 'cpu'"):
        case.runtime(gpu=None)


def test_options_out_of_range_are_refused(case: Case) -> None:
    with pytest.raises(ConfigError, match=r"max_lanes must be a number >= 1, got 0"):
        case.runtime(max_lanes=0)
    with pytest.raises(ConfigError, match=r"runtime_cache is for TensorRT-RTX"):
        TensorRTRuntime(case.folder, case.manifest, "tensorrt", device=torch.device("cpu"), runtime_cache="c")


def test_a_missing_package_is_named(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", None)
    with pytest.raises(BundleError, match=r"TensorRT-RTX is missing here .*pip install 'omnifx\[tensorrt-rtx\]'"):
        case.runtime(trt=None)
