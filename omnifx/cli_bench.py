"""The command `omnifx bench`: measure a pipeline of diffusers, or a script, uncached against plans."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.markup import escape

from omnifx.bench import legend, run_bench, table_of
from omnifx.bench_targets import Target, load_pipeline, pipeline_target, read_prompts, script_target
from omnifx.bench_ways import DEFAULT_POLICIES, DEFAULT_SPEEDUPS, Settings
from omnifx.errors import ConfigError

Lowering = Literal["inductor", "eager"]
POLICIES = " ".join(DEFAULT_POLICIES)
SPEEDUPS = " ".join(map("{:g}".format, DEFAULT_SPEEDUPS))


def bench(
    target: Annotated[
        str,
        typer.Argument(
            help="The folder of a pipeline of diffusers (or its name on the hub), or module:factory / file.py:factory "
            "returning (model, generate)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the results; made if it is not there.")],
    policies: Annotated[str, typer.Option(help='Such as "auto fora(interval=3)"; see `omnifx policies`.')] = POLICIES,
    speedups: Annotated[
        str, typer.Option(help="FLOPs uncached over planned; fewer steps are tried at the same compute.")
    ] = SPEEDUPS,
    samples: Annotated[int, typer.Option(help="Samples to compare.")] = 16,
    sets: Annotated[int, typer.Option(help="Sets of seeds that they are split into; several give a spread.")] = 1,
    runs: Annotated[int, typer.Option(help="Generations to calibrate on; their seeds are not reported.")] = 3,
    repeats: Annotated[int, typer.Option(help="Generations that are timed in turns with uncached ones.")] = 3,
    keep: Annotated[int, typer.Option(help="Samples of each way to keep, to look at.")] = 8,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; default: the target's own.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Pipelines: a file of prompts, one a line.")] = None,
    class_labels: Annotated[str | None, typer.Option(help="Pipelines of classes: such as 1,2,3.")] = None,
    batch: Annotated[int, typer.Option(help="Pipelines: samples of one generation.")] = 1,
    guidance: Annotated[float | None, typer.Option(help="Pipelines: scale of guidance.")] = None,
    size: Annotated[str | None, typer.Option(help="Pipelines: pixels, such as 512 or 480x832.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Pipelines: frames of a video.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Pipelines: float32 (default), bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="Pipelines: default cuda where there is one, else cpu.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Pipelines: another scheduler of diffusers, by name.")] = None,
    arguments: Annotated[
        str | None, typer.Option(help="Pipelines: further arguments of the call, a JSON object.")
    ] = None,
    value_range: Annotated[
        str | None,
        typer.Option("--range", help="Scripts: range of the samples' values. Default: -1,1, or 0,1 for images."),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(help="module:function or file.py:function, samples -> [N, D], for Frechet distances."),
    ] = None,
    lowering: Annotated[Lowering, typer.Option(help="eager: no compiling, and no times worth reading.")] = "inductor",
    resume: Annotated[bool, typer.Option("--resume", help="Keep the rows that the folder has.")] = False,
) -> None:
    """Measure your own pipeline: uncached against plans and fewer steps, with your prompts, sampler and seeds.

    `generate(model, seed)` of a script runs one generation with the model it is given, and returns its samples: a
    tensor [N, C, (T,) H, W], or images. If it takes a third argument `steps`, fewer steps are measured too.
    """
    from omnifx.cli import _command_line, _console, _load_object

    settings = Settings(samples=samples, sets=sets, runs=runs, repeats=repeats, keep=keep, lowering=lowering)
    extract = _load_object(features) if features is not None else None
    wanted = _numbers("--speedups", speedups)
    for_pipelines: dict[str, Any] = {
        "--prompts": prompts,
        "--class-labels": class_labels,
        "--guidance": guidance,
        "--size": size,
        "--frames": frames,
        "--dtype": dtype,
        "--device": device,
        "--scheduler": scheduler,
        "--arguments": arguments,
        "--batch": None if batch == 1 else batch,
    }
    made: Target
    if ":" in target and not Path(target).is_dir():
        _refuse(target, "makes its own samples", "pipelines", for_pipelines)
        made = script_target(_load_object(target)(), title=target, steps=steps, value_range=_range(value_range))
    elif target.endswith(".py"):
        raise ConfigError(f"bench: name the function in {target} that returns (model, generate): {target}:factory.")
    else:
        _refuse(target, "gives images in [0, 1]", "scripts", {"--range": value_range})
        made = pipeline_target(
            load_pipeline(target, dtype=dtype, device=device, scheduler=scheduler),
            title=Path(target).name,
            prompts=read_prompts(prompts) if prompts is not None else (),
            class_labels=_integers("--class-labels", class_labels),
            batch=batch,
            steps=steps,
            guidance=guidance,
            size=_size(size),
            frames=frames,
            arguments=_arguments(arguments),
        )
    results = run_bench(
        made,
        out,
        policies=re.findall(r"[^\s,(]+(?:\([^)]*\))?", policies),
        speedups=wanted,
        settings=settings,
        features=extract,
        features_name=features or "",
        resume=resume,
        command=_command_line(),
    )
    (case,) = results.cases
    console = _console()
    console.print(table_of(case))
    console.print(
        f"{legend(case)}\ncompute, time: FLOPs and seconds over those of the uncached run; PSNR and SSIM to its "
        f"samples of the same seeds; {results.environment['samples']} samples on {results.environment['device']}, "
        f"{torch.get_num_threads()} threads",
        highlight=False,
    )
    for way, reason in case.refused.items():
        console.print(f"not measured: {escape(way)}: {escape(reason.removeprefix('bench: '))}", highlight=False)
    typer.echo(f"wrote {out}; next: omnifx report {out} --html report.html")


def _refuse(target: str, because: str, whose: str, given: dict[str, Any]) -> None:
    if names := [name for name, value in given.items() if value is not None]:
        raise ConfigError(f"bench: {', '.join(names)} is for {whose}; {target} {because}.")


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in re.split(r"[\s,]+", text.strip())]
    except ValueError as error:
        raise ConfigError(f"bench: {option} must be numbers such as 1.5,2, got {text!r}.") from error


def _integers(option: str, text: str | None) -> list[int]:
    if text is None:
        return []
    if not re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", text):
        raise ConfigError(f"bench: {option} must be numbers such as 1,2,3, got {text!r}.")
    return [int(part) for part in text.split(",")]


def _range(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    found = _numbers("--range", text)
    if len(found) != 2 or not found[0] < found[1]:
        raise ConfigError(f"bench: --range must be the lowest and the highest value, such as -1,1, got {text!r}.")
    return found[0], found[1]


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", text):
        raise ConfigError(f"bench: --size must be pixels such as 512 or 480x832 (height x width), got {text!r}.")
    sides = [int(side) for side in text.split("x")]
    return sides[0], sides[-1]


def _arguments(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigError(f"bench: --arguments is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"bench: --arguments must be an object of arguments, got {type(found).__name__}.")
    return found
