"""Export a model with its plan as a bundle: static graphs, one file of weights, and a schedule that needs no Python.

The model is captured anew by `torch.export`, goes through the same passes as a compiled one, and is compared with the
eager model on other inputs before anything is written. The bundle is written beside its place and moved there at the
end, so that what was interrupted is no bundle.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import save_file
from torch import Tensor, nn

from omnifx.backends.eager import EagerLowering
from omnifx.backends.onnx import OPSETS, require_onnx, write_onnx
from omnifx.backends.weights_file import WeightsFile, bytes_of
from omnifx.bundle import (
    FORMAT,
    MANIFEST,
    WEIGHTS,
    Call,
    CallInput,
    Constant,
    FileInfo,
    Manifest,
    ModelInfo,
    PolicyInfo,
    Producer,
    Run,
    SchedulerInfo,
    Source,
    Step,
    TensorInfo,
    VariantInfo,
    file_info,
)
from omnifx.bundle_runner import BundleRunner
from omnifx.clock import close
from omnifx.errors import ConfigError, ExportError, PlanError
from omnifx.export_capture import (
    TOLERANCE,
    Captured,
    bind_arguments,
    capture_for_export,
    leaves_of_call,
    varied,
    verify,
)
from omnifx.export_graphs import Graph, GraphMaker, Port
from omnifx.export_schedule import ScheduleMaker, dtype_name
from omnifx.graph import clone, output_of
from omnifx.plan import Plan
from omnifx.profile import Profile
from omnifx.program import Program
from omnifx.session import fingerprint_of, versions

Target = Literal["onnx"]
MOST_REFERENCE_STEPS = 8
"""Steps that are recorded at most for a look at the bundle on another machine."""


def export(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    plan: Plan | str | Path,
    directory: str | Path,
    *,
    target: Target = "onnx",
    profile: Profile | str | Path | None = None,
    scheduler: Any = None,
    timestep: str | None = None,
    varying_inputs: Sequence[str] = (),
    check_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    opset: int = 20,
    per_step: bool = False,
    conditions: bool = True,
    overwrite: bool = False,
    progress: bool = True,
) -> Manifest:
    """Write a bundle that runs a model by a plan, without PyTorch's compiler and without this model's code.

    Args:
        model: The denoiser, in eval mode, in the type that it is to run in.
        example_inputs: One call's arguments; their shapes and types are those that the bundle will take.
        plan: A plan, or its file, made on this model at this size.
        directory: The bundle's folder; it must not be there, or be empty.
        target: "onnx": files for onnxruntime, and for builders of engines.
        profile: That the plan was made from, where the plan follows its trends (EOC).
        scheduler: A scheduler of diffusers, to be named in the manifest.
        timestep: Path of the argument that holds the timestep; None: told by its name, or its value.
        varying_inputs: Paths of further arguments that change from step to step, beside the latents.
        check_inputs: A second call's arguments, for the comparison with the eager model; None: made up.
        opset: Of ONNX, 18 to 25; from 23 on attention is one operator.
        per_step: Whether to write a graph for each step, with the step's constants inside.
        conditions: Whether what timestep and labels decide together is a graph of its own, for steps that reuse.
        overwrite: Whether a bundle that is there is replaced.
        progress: Whether to show a progress bar.

    Returns: The manifest, as it was written.
    Raises: ConfigError for options out of range; ExportError if the model or an operator cannot be exported, or the
        export differs from the model; PlanError if the plan does not fit.
    Memory: on the host, twice the weights at most: parameters that are folded are made anew, all others are written
        from where they are.
    """
    _check_options(target, opset)
    require_onnx()
    chosen = plan if isinstance(plan, Plan) else Plan.load(plan)
    known = Profile.load(profile) if isinstance(profile, str | Path) else profile
    model = getattr(model, "_orig_mod", model)
    place = _Place(Path(directory), overwrite)
    job = _prepared(model, example_inputs, chosen, check_inputs, timestep, tuple(varying_inputs), conditions)
    schedule = ScheduleMaker(job.program, job.maker, chosen, known.prior if known is not None else None)
    prologue, steps = schedule.make()
    written = _Schedule(prologue, steps, dict(schedule.graphs))
    if per_step:
        written = _baked(written, schedule)
    with place as folder, _bar(progress) as tick:
        files = _write_graphs(folder, written.graphs, schedule, opset, tick)
        manifest = _manifest(model, job, chosen, schedule, written, files, scheduler, opset)
        manifest = _with_reference(folder, manifest, job, written.graphs, schedule)
        manifest.save(folder)
    return manifest


@dataclass(frozen=True)
class _Job:
    captured: Captured
    program: Program
    maker: GraphMaker
    times: tuple[str, ...]
    check: dict[str, Tensor]
    """The leaves of the second call."""


@dataclass(frozen=True)
class _Schedule:
    prologue: tuple[Run, ...]
    steps: tuple[Step, ...]
    graphs: dict[str, Graph]


@dataclass(frozen=True)
class _Files:
    graphs: dict[str, FileInfo]
    weights: FileInfo
    constants: dict[str, Constant]


def _check_options(target: str, opset: int) -> None:
    if target != "onnx":
        raise ConfigError(f"export: target must be 'onnx', got {target!r}.")
    if not isinstance(opset, int) or not OPSETS[0] <= opset <= OPSETS[1]:
        raise ConfigError(f"export: opset must be a number from {OPSETS[0]} to {OPSETS[1]}, got {opset!r}.")


def _prepared(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    plan: Plan,
    check_inputs: Mapping[str, Any] | Sequence[Any] | None,
    timestep: str | None,
    varying: tuple[str, ...],
    conditions: bool,
) -> _Job:
    """Capture, compare with the eager model, and analyse."""
    arguments = bind_arguments(model, example_inputs)
    captured = capture_for_export(model, arguments)
    placeholders = [node for node in captured.gm.graph.nodes if node.op == "placeholder"]
    fakes = [node.meta["val"] for node in placeholders]
    program = Program(captured.gm, fakes, list(captured.static), EagerLowering(), budget=2**62)
    if program.side_effects:
        raise ExportError(f"export: {type(model).__name__} {program.side_effects}, so its graph is not the same twice.")
    names = [leaf.name for leaf in captured.leaves]
    if unknown := sorted(set(varying) - set(names)):
        raise ConfigError(f"export: varying_inputs {unknown} are no arguments of the call; it has {names}.")
    times = _time_inputs(program, captured, plan, timestep)
    found = fingerprint_of(model, program.names)
    if found != plan.fingerprint:
        raise PlanError(
            f"export: the plan was made for {plan.model} with other weights or branches than this "
            f"{type(model).__name__} has. Calibrate this model with `omnifx calibrate`, and plan anew."
        )
    moving = _moving(program)
    if check_inputs is None:
        leaves = {
            leaf.name: torch.full_like(leaf.value, plan.timesteps[-1])
            if leaf.name in times
            else varied(leaf, moves=leaf.name in moving or leaf.value.dim() > 2, seed=number)
            for number, leaf in enumerate(captured.leaves)
        }
    else:
        given = leaves_of_call(bind_arguments(model, check_inputs))
        leaves = {name: given[name] for name in names}
    verify(captured, model, arguments, leaves)
    maker = GraphMaker(program, captured, times, varying, conditions)
    return _Job(captured, program, maker, times, leaves)


def _moving(program: Program) -> set[str]:
    """Paths of the latents."""
    inputs = program.analysis.inputs
    return {inputs.plain_name(i) for i in (inputs.latents, *inputs.further_latents) if i is not None}


def _time_inputs(program: Program, captured: Captured, plan: Plan, given: str | None) -> tuple[str, ...]:
    """Paths of the arguments that hold the timestep.

    Raises: ConfigError if none is told apart.
    """
    inputs = program.analysis.inputs
    small = [inputs.plain_name(i) for i in inputs.small]
    if given is not None:
        if given not in small:
            raise ConfigError(f"export: timestep={given!r} is none of the small inputs of the model: {small}.")
        return (given,)
    named = [name for name in small if name.rpartition(".")[2] in ("timestep", "timesteps", "t", "time", "sigma")]
    if len(named) == 1:
        return (named[0],)
    values = {leaf.name: leaf.value for leaf in captured.leaves}
    equal = [
        name
        for name in named or small
        if values[name].numel() and any(all(close(float(v), t) for v in values[name].reshape(-1)) for t in plan.timesteps)
    ]
    if len(equal) != 1:
        raise ConfigError(
            f"export: which of the inputs {small} is the timestep? Name it: timestep=..., or let the example inputs hold "
            "one of the plan's timesteps."
        )
    return (equal[0],)


# -- writing -----------------------------------------------------------------------------------------------------------


@dataclass
class _Place:
    """The bundle's folder: written beside it, and moved there when all went well."""

    folder: Path
    overwrite: bool
    _temporary: Path | None = None

    def __post_init__(self) -> None:
        if self.folder.exists():
            if not self.folder.is_dir():
                raise ConfigError(f"export: {self.folder} is a file. Choose another folder.")
            if any(self.folder.iterdir()) and not (self.overwrite and (self.folder / MANIFEST).is_file()):
                raise ConfigError(
                    f"export: {self.folder} is not empty. Choose another folder, or replace a bundle with overwrite=True."
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
            shutil.rmtree(old)
        else:
            os.rename(self._temporary, self.folder)


class _bar:  # noqa: N801 - reads as a function
    """A progress bar; gives a function that sets the number of things to do, then counts them."""

    def __init__(self, shown: bool) -> None:
        columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, disable=not shown, transient=True)
        self._task = self._bar.add_task("exporting", total=None)

    def __enter__(self) -> Callable[[str, int], None]:
        self._bar.start()

        def tick(what: str, total: int) -> None:
            self._bar.update(self._task, description=what, total=total)
            self._bar.advance(self._task)

        return tick

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _write_graphs(
    folder: Path,
    graphs: Mapping[str, Graph],
    schedule: ScheduleMaker,
    opset: int,
    tick: Callable[[str, int], None],
) -> _Files:
    files, constants = {}, {}
    with WeightsFile(folder / WEIGHTS) as weights:
        for name, graph in graphs.items():
            tick(f"writing {name}.onnx", len(graphs))
            write_onnx(
                graph.gm,
                graph.state,
                inputs=[port.name for port in graph.inputs],
                outputs=[port.name for port in graph.outputs],
                path=folder / f"{name}.onnx",
                weights=weights,
                opset=opset,
            )
            files[name] = file_info(folder, f"{name}.onnx")
        for name, value in schedule.constants.items():
            data = bytes_of(value)
            constants[name] = Constant(
                shape=tuple(value.shape), dtype=dtype_name(value), offset=weights.add(data), bytes=data.nbytes
            )
    return _Files(files, file_info(folder, WEIGHTS), constants)


def _manifest(
    model: nn.Module,
    job: _Job,
    plan: Plan,
    schedule: ScheduleMaker,
    written: _Schedule,
    files: _Files,
    scheduler: Any,
    opset: int,
) -> Manifest:
    captured, program = job.captured, job.program
    types = Counter(tensor.dtype for _, tensor in captured.state if tensor.is_floating_point())
    outputs = output_of(program.gm).args[0]
    used = {s.constant for run in _runs(written) for s in run.inputs.values() if s.constant is not None}
    return Manifest(
        format=FORMAT,
        model=ModelInfo(
            name=type(model).__name__,
            module=type(model).__module__,
            config=_plain_config(getattr(model, "config", None)),
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
        scheduler=SchedulerInfo(
            name=type(scheduler).__name__ if scheduler is not None else "",
            config=_plain_config(getattr(scheduler, "config", None)),
            timesteps=plan.timesteps,
        ),
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
        buffers=schedule.buffers.infos,
        variants={name: _variant_info(program, graph, files.graphs[name]) for name, graph in written.graphs.items()},
        prologue=written.prologue,
        steps=written.steps,
        weights=files.weights,
        constants={name: constant for name, constant in files.constants.items() if name in used},
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


def _call_input(job: _Job, name: str, value: Tensor) -> CallInput:
    role: Literal["latents", "timestep", "invariant", "varying"] = "varying"
    if name in _moving(job.program):
        first = job.program.analysis.inputs.latents
        role = "latents" if first is not None and job.program.analysis.inputs.plain_name(first) == name else "varying"
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


def _plain_config(config: Any) -> dict[str, Any]:
    """A configuration of diffusers as JSON can hold it."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(config or {}), default=str))
    return {key: value for key, value in plain.items() if not key.startswith("_")}


def _versions() -> dict[str, str]:
    import onnx
    import onnxscript

    return {**versions(), "onnx": onnx.__version__, "onnxscript": onnxscript.__version__}


def _runs(written: _Schedule) -> list[Run]:
    return [*written.prologue, *(run for step in written.steps for run in step.runs)]


# -- one graph a step --------------------------------------------------------------------------------------------------


def _baked(written: _Schedule, schedule: ScheduleMaker) -> _Schedule:
    """The same schedule, with the constants of every step inside of graphs of its own."""
    graphs = {name: written.graphs[name] for name in dict.fromkeys(run.variant for run in written.prologue)}
    steps = []
    for k, step in enumerate(written.steps):
        runs = []
        for number, run in enumerate(step.runs):
            graph = written.graphs[run.variant]
            fixed = {name: source for name, source in run.inputs.items() if _is_fixed(source)}
            name = f"step{k:03d}_{number}_{graph.name}" if fixed else graph.name
            if fixed:
                values = {p.name: _fixed_value(fixed[p.name], p.value, schedule) for p in graph.inputs if p.name in fixed}
                graph = _bake(graph, values, name)
            graphs[name] = graph
            inputs = {key: source for key, source in run.inputs.items() if key not in fixed}
            runs.append(Run(variant=name, inputs=inputs, outputs=run.outputs))
        steps.append(step.model_copy(update={"runs": tuple(runs)}))
    return _Schedule(written.prologue, tuple(steps), graphs)


def _is_fixed(source: Source) -> bool:
    return source.constant is not None or source.numbers is not None or source.fill is not None


def _fixed_value(source: Source, like: Tensor, schedule: ScheduleMaker) -> Tensor:
    if source.constant is not None:
        return schedule.constants[source.constant]
    if source.numbers is not None:
        return torch.tensor(source.numbers, dtype=like.dtype)
    return torch.full(tuple(like.shape), source.fill or 0.0, dtype=like.dtype)


def _bake(graph: Graph, values: Mapping[str, Tensor], name: str) -> Graph:
    """The graph with some inputs among its parameters."""
    gm = clone(graph.gm)
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    own = dict(zip((port.name for port in graph.inputs), placeholders[len(graph.state) :], strict=True))
    first = placeholders[len(graph.state)]
    state = list(graph.state)
    for port in graph.inputs:
        if port.name in values:
            with gm.graph.inserting_before(first):
                fixed = gm.graph.placeholder(f"baked_{own[port.name].name}")
            fixed.meta = dict(own[port.name].meta)
            own[port.name].replace_all_uses_with(fixed)
            if own[port.name] is first:
                first = fixed.next if fixed.next is not first else first.next
            gm.graph.erase_node(own[port.name])
            device = own[port.name].meta["val"].device
            state.append((f"baked.{own[port.name].name}", values[port.name].to(device)))
    gm.recompile()
    inputs = tuple(port for port in graph.inputs if port.name not in values)
    return Graph(name, gm, inputs, graph.outputs, graph.label, graph.spec, graph.dropped, None, tuple(state))


# -- the reference -----------------------------------------------------------------------------------------------------


@dataclass
class TorchEngine:
    """Runs the graphs of an export in PyTorch, operator by operator: what a runtime must agree with."""

    graphs: Mapping[str, Graph]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def run(self, name: str, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor | None]) -> None:
        """Run a graph once."""
        made = self.graphs[name].run(inputs)
        for key, place in outputs.items():
            if place is not None:
                place.copy_(made[key])


def _with_reference(
    folder: Path, manifest: Manifest, job: _Job, graphs: Mapping[str, Graph], schedule: ScheduleMaker
) -> Manifest:
    """Record the first steps as PyTorch runs them, and compare onnxruntime with them, if it is here."""
    stored = {f"input.{name}": value for name, value in job.check.items()}
    generator = torch.Generator().manual_seed(0)
    num_steps = _covering(manifest)
    moving = [name for name, info in manifest.call.inputs.items() if info.role in ("latents", "varying")]
    for k in range(num_steps):
        for name in moving:
            value = job.check[name]
            fresh = torch.randn(value.shape, generator=generator).to(value.device)
            moved = value.float() * 0.97**k + 0.05 * k * fresh if value.is_floating_point() else value
            stored[f"input.{k}.{name}"] = moved.to(value.dtype)
    device = next(iter(job.check.values())).device
    constants = {name: value.to(device) for name, value in schedule.constants.items()}
    runner = BundleRunner(manifest, TorchEngine(graphs, device), constants, folder=folder)
    for k, outputs in enumerate(runner.replay(stored, num_steps)):
        stored |= {f"output.{k}.{i}": value for i, value in enumerate(outputs)}
    save_file({name: value.contiguous().cpu() for name, value in stored.items()}, folder / "reference.safetensors")
    manifest = manifest.model_copy(update={"reference": file_info(folder, "reference.safetensors")})
    _compare(folder, manifest)
    return manifest


def _covering(manifest: Manifest) -> int:
    """The first steps that together run every graph, but `MOST_REFERENCE_STEPS` at most."""
    left = {run.variant for step in manifest.steps for run in step.runs}
    for k, step in enumerate(manifest.steps[:MOST_REFERENCE_STEPS]):
        left -= {run.variant for run in step.runs}
        if not left:
            return k + 1
    return min(len(manifest.steps), MOST_REFERENCE_STEPS)


def _compare(folder: Path, manifest: Manifest) -> None:
    """Raise ExportError if onnxruntime gives something else than PyTorch did."""
    if manifest.producer.dtype == "bfloat16":
        return  # onnxruntime has hardly any operator of this type on the CPU
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        return
    from omnifx.bundle_loading import open_bundle

    error = open_bundle(folder, manifest, runtime="onnxruntime", device=torch.device("cpu")).check()
    allowed = TOLERANCE[getattr(torch, manifest.producer.dtype)]
    if not error <= allowed:
        raise ExportError(
            f"export: in onnxruntime the bundle differs from PyTorch by {error:.1e} of an output's norm (allowed: "
            f"{allowed:g}). Nothing was written. Please report this with the model's class."
        )


__all__ = ["TorchEngine", "export"]
