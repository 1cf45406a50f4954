"""Export a model with its plan as a bundle: static graphs, one file of weights, and a schedule that needs no Python.

The model is captured anew by `torch.export`, goes through the same passes as a compiled one, and is compared with the
eager model on other inputs before anything is written. The bundle is written beside its place and moved there at the
end, so that what was interrupted is no bundle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from omnifx.backends.eager import EagerLowering
from omnifx.backends.onnx import OPSETS, require_onnx
from omnifx.bundle import Manifest
from omnifx.clock import close
from omnifx.engine_building import ENGINES, build_engines, require_builder
from omnifx.errors import ConfigError, ExportError, PlanError
from omnifx.export_aoti import AotiWriter
from omnifx.export_capture import Captured, bind_arguments, capture_for_export, leaves_of_call, varied, verify
from omnifx.export_files import GraphWriter, Job, OnnxWriter, Place, manifest_of, progress_bar, write_graphs
from omnifx.export_graphs import GraphMaker
from omnifx.export_per_step import one_graph_a_step
from omnifx.export_reference import with_reference
from omnifx.export_schedule import Schedule, ScheduleMaker
from omnifx.plan import Plan
from omnifx.profile import Profile
from omnifx.program import Program
from omnifx.session import fingerprint_of

Target = Literal["onnx", "tensorrt", "tensorrt-rtx", "aoti"]


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
    inductor: Mapping[str, Any] | None = None,
    per_step: bool = False,
    conditions: bool = True,
    same_weights: bool = True,
    overwrite: bool = False,
    engines: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Manifest:
    """Write a bundle that runs a model by a plan, without PyTorch's compiler and without this model's code.

    Args:
        model: The denoiser, in eval mode, in the type that it is to run in.
        example_inputs: One call's arguments; their shapes and types are those that the bundle will take.
        plan: A plan, or its file, made on this model at this size.
        directory: The bundle's folder; it must not be there, or be empty.
        target: "onnx": files for onnxruntime, and for builders of engines; "tensorrt" or "tensorrt-rtx": the same, and
            then engines in it; "aoti": machine code by AOTInductor.
        profile: That the plan was made from, where the plan follows its trends (EOC).
        scheduler: A scheduler of diffusers, to be named in the manifest.
        timestep: Path of the argument that holds the timestep; None: told by its name, or its value.
        varying_inputs: Paths of further arguments that change from step to step, beside the latents.
        check_inputs: A second call's arguments, for the comparison with the eager model; None: made up.
        opset: Of ONNX, 18 to 25; from 23 on attention is one operator.
        inductor: Inductor's own options by name, for the target "aoti".
        per_step: Whether to write a graph for each step, with the step's constants inside.
        conditions: Whether what timestep and labels decide together is a graph of its own, for steps that reuse.
        same_weights: Whether the plan must have been made with these very weights, in this type.
        overwrite: Whether a bundle that is there is replaced.
        engines: Options of `build_engines`, where the target has engines.
        progress: Whether to show a progress bar.

    Returns: The manifest, as it was written.
    Raises: ConfigError for options out of range; ExportError if the model or an operator cannot be exported, or the
        export differs from the model; PlanError if the plan does not fit.
    Memory: on the host, twice the weights at most: parameters that are folded are made anew, all others are written
        from where they are.
    """
    write = _writer(target, opset, inductor)
    built = target if target == "tensorrt" or target == "tensorrt-rtx" else None
    if built is not None:
        require_builder(built, **(engines or {}))
    elif engines:
        raise ConfigError(f"export: {', '.join(engines)} is for engines, but the target is {target!r}. Leave it out.")
    # engines of the bundle that is replaced: those that are as they would be built anew are listed again
    place = Place(Path(directory), overwrite, carried=ENGINES if built is not None else "")
    chosen = plan if isinstance(plan, Plan) else Plan.load(plan)
    model = getattr(model, "_orig_mod", model)
    prepared = prepare(
        model,
        example_inputs,
        chosen,
        profile=Profile.load(profile) if isinstance(profile, str | Path) else profile,
        timestep=timestep,
        varying_inputs=varying_inputs,
        check_inputs=check_inputs,
        conditions=conditions,
        same_weights=same_weights,
    )
    schedule = one_graph_a_step(prepared.schedule) if per_step else prepared.schedule
    with place as folder, progress_bar(progress) as tick:
        files = write_graphs(folder, schedule, write, tick)
        manifest = manifest_of(
            model, prepared.job, chosen, schedule, files, scheduler, 0 if target == "aoti" else opset
        )
        manifest = with_reference(folder, manifest, prepared.check, schedule)
        manifest.save(folder)
    if built is not None:  # in place: a build that ends early leaves the bundle, and `omnifx build` goes on with it
        manifest = build_engines(directory, built, progress=progress, **(engines or {}))
    return manifest


@dataclass(frozen=True)
class Prepared:
    """All that a target needs to write a bundle."""

    job: Job
    check: dict[str, Tensor]
    """The tensors of a second call, by path, on which the capture was compared with the model."""
    schedule: Schedule


def prepare(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    plan: Plan,
    *,
    profile: Profile | None = None,
    timestep: str | None = None,
    varying_inputs: Sequence[str] = (),
    check_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    conditions: bool = True,
    same_weights: bool = True,
) -> Prepared:
    """Capture a model, compare it with itself on other inputs, and make the graphs and the schedule; see `export`."""
    arguments = bind_arguments(model, example_inputs)

    def attempt(dynamo: bool) -> tuple[Job, dict[str, Tensor]]:
        captured = capture_for_export(model, arguments, dynamo=dynamo)
        job = _analysed(model, captured, plan, timestep, tuple(varying_inputs), conditions, same_weights)
        check = _check_leaves(model, job, plan, check_inputs)
        verify(captured, model, arguments, check)
        return job, check

    try:
        job, check = attempt(dynamo=False)
    except ExportError as first:
        if model.training:
            raise
        try:
            job, check = attempt(dynamo=True)
        except ExportError as second:
            raise ExportError(f"{first} Nor can it be captured through Dynamo: {second}") from first
    schedule = ScheduleMaker(job.program, job.maker, plan, profile.prior if profile is not None else None).make()
    return Prepared(job, check, schedule)


def _writer(target: str, opset: int, inductor: Mapping[str, Any] | None) -> GraphWriter:
    """What writes the graphs.

    Raises: ConfigError for options out of range; ExportError if packages are missing.
    """
    if target not in get_args(Target):
        raise ConfigError(f"export: target must be one of {', '.join(map(repr, get_args(Target)))}, got {target!r}.")
    if target == "aoti":
        return AotiWriter(dict(inductor or {}))
    if inductor:
        raise ConfigError("export: inductor=... is for the target 'aoti'; ONNX graphs are not compiled by it. Drop it.")
    if not isinstance(opset, int) or not OPSETS[0] <= opset <= OPSETS[1]:
        raise ConfigError(f"export: opset must be a number from {OPSETS[0]} to {OPSETS[1]}, got {opset!r}.")
    require_onnx()
    return OnnxWriter(opset)


def _analysed(
    model: nn.Module,
    captured: Captured,
    plan: Plan,
    timestep: str | None,
    varying: tuple[str, ...],
    conditions: bool,
    same_weights: bool,
) -> Job:
    """What the capture holds, once it is clear that the plan is for this model."""
    name = type(model).__name__
    placeholders = [node for node in captured.gm.graph.nodes if node.op == "placeholder"]
    fakes = [node.meta["val"] for node in placeholders]
    program = Program(captured.gm, fakes, list(captured.static), EagerLowering(), budget=2**62)
    if program.side_effects:
        raise ExportError(f"export: {name} {program.side_effects}, so its graph is not the same twice.")
    paths = [leaf.name for leaf in captured.leaves]
    if unknown := sorted(set(varying) - set(paths)):
        raise ConfigError(f"export: varying_inputs {unknown} are no arguments of the call; it has {paths}.")
    if plan.model != name or (same_weights and fingerprint_of(model, program.names) != plan.fingerprint):
        raise PlanError(
            f"export: the plan was made for {plan.model} with other weights, another type or other branches than this "
            f"{name} has. Calibrate this model with `omnifx calibrate` and plan anew; or, if you know that the plan "
            "fits, export with same_weights=False."
        )
    times = _time_inputs(program, captured, plan, timestep)
    return Job(captured, program, GraphMaker(program, captured, times, varying, conditions), times)


def _check_leaves(
    model: nn.Module, job: Job, plan: Plan, check_inputs: Mapping[str, Any] | Sequence[Any] | None
) -> dict[str, Tensor]:
    """The tensors of a second call: given ones, or others of the same kind as the example's, at the last timestep."""
    if check_inputs is not None:
        given = leaves_of_call(bind_arguments(model, check_inputs))
        return {leaf.name: given[leaf.name] for leaf in job.captured.leaves}
    return {
        leaf.name: torch.full_like(leaf.value, plan.timesteps[-1])
        if leaf.name in job.times
        else varied(leaf, moves=leaf.name in job.moving or leaf.value.dim() > 2, seed=number)
        for number, leaf in enumerate(job.captured.leaves)
    }


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
        if values[name].numel()
        and any(all(close(float(v), t) for v in values[name].reshape(-1)) for t in plan.timesteps)
    ]
    if len(equal) != 1:
        raise ConfigError(
            f"export: which of the inputs {small} is the timestep? Name it: timestep=..., or let the example inputs "
            "hold one of the plan's timesteps."
        )
    return (equal[0],)


__all__ = ["Prepared", "export", "prepare"]
