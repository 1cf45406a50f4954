"""What an export writes: the folder that appears at once, the graphs, the weights they share, and the manifest."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from omnifx.backends.onnx import write_onnx
from omnifx.backends.weights_file import WeightsFile, bytes_of
from omnifx.bundle import (
    FORMAT,
    MANIFEST,
    WEIGHTS,
    Call,
    CallInput,
    Constant,
    EngineInfo,
    FileInfo,
    Manifest,
    ModelInfo,
    PolicyInfo,
    Producer,
    TensorInfo,
    VariantInfo,
    file_info,
)
from omnifx.errors import ConfigError
from omnifx.export_capture import Captured
from omnifx.export_graphs import Graph, GraphMaker, Port
from omnifx.export_schedule import Schedule, dtype_name
from omnifx.graph import output_of
from omnifx.plan import Plan
from omnifx.program import Program
from omnifx.schedulers import plain_config, scheduler_info
from omnifx.session import versions


@dataclass(frozen=True)
class Job:
    """A model that was captured, compared and analysed."""

    captured: Captured
    program: Program
    maker: GraphMaker
    times: tuple[str, ...]
    """Paths of the arguments that hold the timestep."""

    @property
    def moving(self) -> tuple[str, ...]:
        """Paths of the latents, the model's main ones first."""
        inputs = self.program.analysis.inputs
        return tuple(inputs.plain_name(i) for i in (inputs.latents, *inputs.further_latents) if i is not None)


@dataclass(frozen=True)
class Files:
    """What was written beside the manifest."""

    graphs: dict[str, FileInfo]
    weights: FileInfo
    constants: dict[str, Constant]
    engines: dict[str, EngineInfo] = field(default_factory=dict)


Tick = Callable[[str, int], None]
"""Told what is done next, of how many things."""


@dataclass(frozen=True)
class GraphFiles:
    """Where a target wrote the graphs."""

    graphs: dict[str, FileInfo]
    engines: dict[str, EngineInfo] = field(default_factory=dict)


class GraphWriter(Protocol):
    """Writes the graphs of a bundle for one target, and what they share into the weights' file."""

    def __call__(self, folder: Path, graphs: Mapping[str, Graph], weights: WeightsFile, tick: Tick) -> GraphFiles:
        """Write all graphs into the folder."""


@dataclass
class Place:
    """The bundle's folder: written beside it, and moved there when all went well."""

    folder: Path
    overwrite: bool
    carried: str = ""
    """A folder in the bundle that is replaced, which the new one keeps."""
    _temporary: Path | None = None

    def __post_init__(self) -> None:
        if self.folder.exists():
            if not self.folder.is_dir():
                raise ConfigError(f"export: {self.folder} is a file. Choose another folder.")
            if any(self.folder.iterdir()) and not (self.overwrite and (self.folder / MANIFEST).is_file()):
                raise ConfigError(
                    f"export: {self.folder} is not empty. Choose another folder, or replace a bundle with "
                    "overwrite=True."
                )
        if not self.folder.absolute().parent.is_dir():
            raise ConfigError(f"export: the folder of {self.folder} is not there. Make it first.")

    def __enter__(self) -> Path:
        parent = self.folder.absolute().parent
        self._temporary = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}.partial-", dir=parent))
        return self._temporary

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        assert self._temporary is not None  # __enter__ made it
        if kind is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            return
        self._temporary.chmod(0o755)
        if self.folder.exists():
            old = self._temporary.with_name(self._temporary.name + ".old")
            os.rename(self.folder, old)
            os.rename(self._temporary, self.folder)
            if self.carried and (old / self.carried).is_dir():
                os.rename(old / self.carried, self.folder / self.carried)
            shutil.rmtree(old)
        else:
            os.rename(self._temporary, self.folder)


@contextlib.contextmanager
def progress_bar(shown: bool) -> Iterator[Tick]:
    """A progress bar; gives a function that tells what is done next, of how many things."""
    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=not shown, transient=True) as bar:
        task = bar.add_task("exporting", total=None)

        def tick(what: str, total: int) -> None:
            bar.update(task, description=what, total=total, advance=1)

        yield tick


@dataclass(frozen=True)
class OnnxWriter:
    """Writes every graph as an ONNX file of its own."""

    opset: int

    def __call__(self, folder: Path, graphs: Mapping[str, Graph], weights: WeightsFile, tick: Tick) -> GraphFiles:
        """Write all graphs into the folder."""
        files = {}
        for name, graph in graphs.items():
            tick(f"writing {name}.onnx", len(graphs))
            write_onnx(
                graph.gm,
                graph.state,
                inputs=[port.name for port in graph.inputs],
                outputs=[port.name for port in graph.outputs],
                path=folder / f"{name}.onnx",
                weights=weights,
                opset=self.opset,
            )
            files[name] = file_info(folder, f"{name}.onnx")
        return GraphFiles(files)


def write_graphs(folder: Path, schedule: Schedule, write: GraphWriter, tick: Tick) -> Files:
    """Write every graph of a schedule, the weights and the constants."""
    constants = {}
    with WeightsFile(folder / WEIGHTS) as weights:
        written = write(folder, schedule.graphs, weights, tick)
        for name, value in schedule.constants.items():
            data = bytes_of(value)
            constants[name] = Constant(
                shape=tuple(value.shape), dtype=dtype_name(value), offset=weights.add(data), bytes=data.nbytes
            )
    return Files(written.graphs, file_info(folder, WEIGHTS), constants, written.engines)


def manifest_of(
    model: nn.Module, job: Job, plan: Plan, schedule: Schedule, files: Files, scheduler: Any, opset: int
) -> Manifest:
    """What the bundle's manifest says, but for the reference."""
    captured, program = job.captured, job.program
    types = Counter(tensor.dtype for _, tensor in captured.state if tensor.is_floating_point())
    outputs = output_of(program.gm).args[0]
    return Manifest(
        format=FORMAT,
        model=ModelInfo(
            name=type(model).__name__,
            module=type(model).__module__,
            config=plain_config(getattr(model, "config", None)),
            fingerprint=plan.fingerprint,
            weights_sha256=_weights_sha256(captured.state),
        ),
        producer=Producer(
            versions=_versions(),
            opset=opset,
            dtype=dtype_name(types.most_common(1)[0][0]) if types else "float32",
        ),
        policy=PolicyInfo(
            name=plan.policy,
            options=plan.policy_options,
            fingerprint=plan.fingerprint,
            speedup=plan.speedup,
            timeline=plan.timeline().splitlines()[-1],
            notes=plan.notes,
        ),
        scheduler=scheduler_info(scheduler, plan.timesteps),
        call=Call(
            parameters=captured.parameters,
            inputs={leaf.name: _call_input(job, leaf.name, leaf.value) for leaf in captured.leaves},
            constants={name: value for name, value in captured.constants.items() if name != "return_dict"},
            container=captured.returned.container,
            fields=captured.returned.fields,
            computed=captured.returned.computed,
            outputs=tuple(_tensor_info(node.meta["val"]) for node in outputs),  # type: ignore[union-attr]
        ),
        branches=program.names,
        buffers=schedule.buffers,
        variants={name: _variant_info(program, graph, files.graphs[name]) for name, graph in schedule.graphs.items()},
        prologue=schedule.prologue,
        steps=schedule.steps,
        weights=files.weights,
        constants=files.constants,
        engines=files.engines,
    )


def _variant_info(program: Program, graph: Graph, file: FileInfo) -> VariantInfo:
    spec = graph.spec
    columns = (*spec.branches, *(span.name for span in spec.spans)) if spec is not None else ()
    touched = {"reads": graph.inputs, "writes": graph.outputs}
    owners = {cut: name for name, cuts in program.cuts_by_column(columns).items() for cut in cuts} if columns else {}
    found = {
        word: tuple(dict.fromkeys(owners[cut] for port in ports if (cut := _cut_of(port)) in owners))
        for word, ports in touched.items()
    }
    return VariantInfo(
        file=file,
        label=graph.label,
        actions=spec.row[: len(program.names)] if spec is not None else (),
        inputs={port.name: _tensor_info(port.value) for port in graph.inputs},
        outputs={port.name: _tensor_info(port.value) for port in graph.outputs},
        dropped_inputs=graph.dropped,
        flops=graph.flops,
        params_bytes=graph.params_bytes,
        tokens=max((k for _, k in spec.partial), default=0) if spec is not None else 0,
        **found,
    )


def _cut_of(port: Port) -> str:
    kind, _, name = port.label.partition(":")
    return name.partition("@")[0] if kind == "cut" else ""


def _call_input(job: Job, name: str, value: Tensor) -> CallInput:
    role: Literal["latents", "timestep", "invariant", "varying"] = "varying"
    if name in job.moving:
        role = "latents" if name == job.moving[0] else "varying"
    elif name in job.times:
        role = "timestep"
    elif name in job.maker.invariants:
        role = "invariant"
    return CallInput(shape=tuple(value.shape), dtype=dtype_name(value), role=role)


def _tensor_info(value: Any) -> TensorInfo:
    return TensorInfo(shape=tuple(map(int, value.shape)), dtype=dtype_name(value))


def _weights_sha256(state: Sequence[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state, key=lambda entry: entry[0]):
        digest.update(f"{name}\0{tuple(tensor.shape)}{tensor.dtype}\0".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    found = versions()
    for package in ("onnx", "onnxscript", "onnx-ir"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


__all__ = [
    "Files",
    "GraphFiles",
    "GraphWriter",
    "Job",
    "OnnxWriter",
    "Place",
    "Tick",
    "manifest_of",
    "progress_bar",
    "write_graphs",
]
