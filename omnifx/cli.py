"""The command `omnifx`: see what a model holds, measure it, plan, and show what all of it buys.

Results go to stdout, progress to stderr. What omnifx refuses ends with one message and exit status 2; `OMNIFX_DEBUG=1`
shows where it came from.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils._pytree import tree_map_only
from typer.core import TyperGroup

import omnifx
from omnifx import cli_bench, cli_build, cli_triton
from omnifx import demo as demos
from omnifx.bundle import Manifest, contents
from omnifx.errors import ConfigError, OmnifxError
from omnifx.example_inputs import build_model, example_inputs
from omnifx.plan import REUSE, Plan
from omnifx.policy import policies as known_policies
from omnifx.policy import resolve
from omnifx.profile import Profile
from omnifx.report import MatchReport, tokens_text, unnumbered
from omnifx.results import Results
from omnifx.runtime import RuntimePolicy
from omnifx.transfer import resampled


class Commands(TyperGroup):
    """Commands whose refusals are messages, not tracebacks."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            refusal = _refusal(error)
            if refusal is None or os.environ.get("OMNIFX_DEBUG"):
                raise
            typer.secho(f"omnifx: {refusal}", fg="red", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=Commands,
    help="Fast inference of diffusion transformers: compile the denoising loop, and reuse across steps what repeats.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Lowering = Literal["inductor", "eager"]


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the versions of omnifx and torch.")] = False,
) -> None:
    """Fast inference of diffusion transformers: compile the denoising loop, and reuse across steps what repeats."""
    if version:
        typer.echo(f"omnifx {omnifx.__version__}, torch {torch.__version__}")
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures and numbers; made if it is not there.")],
    model: Annotated[
        demos.ModelName, typer.Option(help="The digits model: predicts noise (dit) or a flow (flow).")
    ] = "dit",
    steps: Annotated[int, typer.Option(help="Denoising steps of a generation.")] = 50,
    speedup: Annotated[float, typer.Option(help="FLOPs uncached over planned.")] = 2.0,
    samples: Annotated[int, typer.Option(help="Samples of one generation.")] = 32,
    repeats: Annotated[int, typer.Option(help="Generations of each way, each of other seeds; times are medians.")] = 3,
    lowering: Annotated[Lowering, typer.Option(help="eager: no compiling, and no times worth reading.")] = "inductor",
) -> None:
    """The tour: a small trained model, uncached and accelerated on the same seeds, in numbers and pictures.

    Compiles several graphs: about 2 minutes on 2 cores at first, less when Inductor's cache knows them.
    """
    result = demos.run_demo(
        out,
        model=model,
        steps=steps,
        speedup=speedup,
        samples=samples,
        repeats=repeats,
        lowering=lowering,
        command=_command_line(),
    )
    console = _console()
    console.print()
    console.print(result.table())
    console.print(
        f"seconds: median of {repeats} generations of {samples} samples, ways taking turns, compiling left out. "
        "Frechet distance falls with the number of samples: compare it within this table.\n"
        f"{escape(result.plan.timeline())}\n"
        "F full, r reuse, c reuse with corrected output, a reuse combined with older outputs, s older outputs combined",
        highlight=False,
    )
    console.print(f"wrote in {result.seconds:.0f} s:", highlight=False)
    for path in result.files:
        typer.echo(f"  {path}")


@app.command()
def explain(
    target: Annotated[
        str,
        typer.Argument(
            help="A model class of diffusers, or module:factory / file.py:factory returning (model, kwargs)."
        ),
    ],
    config: Annotated[
        str | None, typer.Option(help="Constructor arguments of the class: JSON, or a JSON file.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Latents' sides in latent pixels: 64, 64x96, or 13x60x90 for video.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples in a call.")] = 1,
    inputs: Annotated[
        str | None,
        typer.Option(help="module:function or file.py:function that takes the model and returns a call's kwargs."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every branch on a line of its own.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON.")] = False,
    html: Annotated[
        Path | None, typer.Option(help="Also write a page with a picture of the model: one file, for any browser.")
    ] = None,
) -> None:
    """What omnifx finds in a model: branches, their kinds, FLOPs and cache bytes, and what it refuses and why.

    A class of diffusers is built on the meta device: no weights, no download, no memory, whatever its size.
    """
    sides = _parse_size(size)
    if html is not None:
        _check_folder(html)
    if ":" in target:
        if given := [name for name, value in (("--config", config), ("--size", size), ("--inputs", inputs)) if value]:
            raise ConfigError(
                f"explain: {', '.join(given)} is for classes of diffusers; {target} makes its own model and inputs."
            )
        made = _load_object(target)()
        if not (
            isinstance(made, tuple)
            and len(made) == 2
            and isinstance(made[0], nn.Module)
            and isinstance(made[1], Mapping)
        ):
            raise ConfigError(f"explain: {target}() returned {_described(made)}, expected (model, kwargs of one call).")
        model, kwargs = made[0], dict(made[1])
    else:
        model = build_model(target, _parse_config(config))
        kwargs = example_inputs(model, size=sides, batch=batch) if inputs is None else _own_inputs(inputs, model)
    with Console(stderr=True).status(f"capturing {type(model).__name__}"):
        report = omnifx.explain(model, **kwargs)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=1))
    elif every:
        typer.echo(str(report))
    else:
        typer.echo(folded(report))
    if html is not None:
        typer.echo(f"wrote {report.save_html(html)}", err=as_json)


@app.command()
def calibrate(
    target: Annotated[str, typer.Argument(help="module:factory or file.py:factory returning (model, generate).")],
    out: Annotated[Path, typer.Option(help="Where to write the profile.")] = Path("profile.safetensors"),
    runs: Annotated[int, typer.Option(help="Generations to measure; from 3 on, a third judges the corrections.")] = 1,
    refine: Annotated[
        int, typer.Option(help="On how many of these runs plans are tried out, to choose among the policy's variants.")
    ] = 0,
    rollouts: Annotated[
        int,
        typer.Option(help="Further generations, whose samples tell what PSNR plans reach; generate() returns them."),
    ] = 0,
    min_psnr: Annotated[
        list[float] | None, typer.Option(help="dB that plans will be asked for, to measure those very plans.")
    ] = None,
    policy: Annotated[str, typer.Option(help="What the profile is for; see `omnifx policies`.")] = "auto",
    lowering: Annotated[Lowering, typer.Option(help="How the measured generations run.")] = "inductor",
) -> None:
    """Measure ordinary generations of a model, each run in full, and write a profile to plan from.

    `generate(model, seed)` runs one generation with the model it is given.
    """
    made = _load_object(target)()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module) and callable(made[1])):
        raise ConfigError(f"calibrate: {target}() returned {_described(made)}, expected (model, generate).")
    _check_folder(out)
    model, generate = made
    profile = omnifx.calibrate(
        model,
        generate,
        policy=policy,
        runs=runs,
        refine=refine,
        rollouts=rollouts,
        min_psnr=min_psnr or (),
        save=out,
        options={"lowering": lowering},
    )
    meta = profile.meta
    typer.echo(
        f"{meta.model}: {meta.num_runs} run(s) of {profile.num_steps} steps, {meta.num_streams} stream(s), "
        f"{len(meta.branches)} branches that hold {1 - meta.cost_of((REUSE,) * len(meta.branches)):.1%} "
        f"of {meta.flops / 1e9:,.3f} GFLOP a call"
    )
    for tried in meta.refined:
        typer.echo(
            f"{tried.asked:g}x: {tried.psnr:.1f} dB with {tried.better or 'no change'} ({tried.plain_psnr:.1f} before)"
        )
    for quality in meta.quality:
        shown = ", ".join(f"{point.psnr:.1f} at {point.speedup:.2f}x" for point in quality.points)
        typer.echo(f"PSNR in dB over {quality.num_samples} held-back samples: {shown}")
    size = f"{out.stat().st_size / 2**20:.1f} MiB"
    chosen = resolve(policy)
    if isinstance(chosen, RuntimePolicy):
        typer.echo(chosen.learned(profile.points())[1])
        options = {"policy": policy, "profile": str(out)}
        typer.echo(f'wrote {out} ({size}); next: torch.compile(model, backend="omnicache", options={options})')
    else:
        typer.echo(f"wrote {out} ({size}); next: omnifx plan {out} --speedup 2")


@app.command()
def plan(
    profile: Annotated[Path, typer.Argument(help="What `omnifx calibrate` wrote.")],
    policy: Annotated[str, typer.Option(help="See `omnifx policies`.")] = "auto",
    speedup: Annotated[
        float | None, typer.Option(help="FLOPs uncached over planned; without it, the policy's default.")
    ] = None,
    min_psnr: Annotated[
        float | None, typer.Option(help="dB against the uncached samples, instead; needs a profile with rollouts.")
    ] = None,
    target_ms: Annotated[
        float | None, typer.Option(help="Milliseconds for the model's calls of a generation, instead.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps, if others than were measured: the profile is interpolated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the plan, as JSON.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Where to draw the plan: .png, .svg or .pdf.")] = None,
) -> None:
    """Plan which step computes and which reuses, from a profile; prints the timeline and what was decided."""
    measured = Profile.load(profile)
    if steps is not None and steps != measured.num_steps:
        measured = resampled(measured, steps=steps)
    made = omnifx.make_plan(measured, policy=policy, speedup=speedup, min_psnr=min_psnr, target_ms=target_ms)
    typer.echo(str(made))
    _write_plan(made, measured, out, picture)


@app.command()
def export(
    target_model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="module:factory or file.py:factory returning (model, arguments[, scheduler])."
        ),
    ],
    plan: Annotated[Path, typer.Option(help="What `omnifx plan --out` wrote for this model, at this size.")],
    out: Annotated[Path, typer.Option(help="The bundle's folder; it must be new, or empty.")],
    target: Annotated[
        str,
        typer.Option(
            help="onnx: files for onnxruntime; tensorrt, tensorrt-rtx: engines beside them; aoti: machine code."
        ),
    ] = "onnx",
    profile: Annotated[
        Path | None, typer.Option(help="What the plan was made from; needed where it follows trends (eoc).")
    ] = None,
    timestep: Annotated[
        str | None, typer.Option(help="The argument that holds the timestep, if that is unclear.")
    ] = None,
    varying: Annotated[
        list[str] | None, typer.Option(help="An argument that changes from step to step, beside the latents.")
    ] = None,
    opset: Annotated[int, typer.Option(help="Of ONNX; from 23 on attention is one operator.")] = 20,
    per_step: Annotated[
        bool, typer.Option("--per-step", help="A graph for each step, with its numbers inside.")
    ] = False,
    same_weights: Annotated[
        bool, typer.Option("--same-weights/--any-weights", help="Whether the plan must be of these very weights.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle that is there.")] = False,
    sm: cli_build.Capabilities = "",
    workspace: cli_build.Workspace = None,
    timing_cache: cli_build.TimingCache = None,
    triton: Annotated[
        Path | None, typer.Option(help="Also a model repository for Triton, without guidance; more: `omnifx triton`.")
    ] = None,
) -> None:
    """Write a model with its plan as a bundle: static graphs and a schedule, for runtimes without PyTorch.

    `arguments` are those of one call, by name or in order; their shapes and types are those that the bundle will take.
    A third value, a scheduler of diffusers on which set_timesteps was called, is written down for who samples.
    """
    from omnifx.exporter import export as write

    made = _load_object(target_model)()
    fits = isinstance(made, tuple) and len(made) in (2, 3)
    if not (fits and isinstance(made[0], nn.Module) and isinstance(made[1], Mapping | tuple | list)):
        raise ConfigError(
            f"export: {target_model}() returned {_described(made)}, expected (model, a call's arguments), or these two "
            "and a scheduler."
        )
    if triton is not None and len(made) == 2:
        raise ConfigError(f"export: --triton needs a scheduler as the third value of {target_model}().")
    manifest = write(
        made[0],
        made[1],
        plan,
        out,
        target=cast(Any, target),
        scheduler=made[2] if len(made) == 3 else None,
        profile=profile,
        timestep=timestep,
        varying_inputs=varying or (),
        opset=opset,
        per_step=per_step,
        same_weights=same_weights,
        overwrite=overwrite,
        engines=cli_build.given(sm, workspace, timing_cache),
    )
    typer.echo(contents(manifest))
    typer.echo(f"wrote {out}; next: omnifx bundle {out} --check")
    if triton is not None:
        cli_triton.write_beside(made, out, triton)


@app.command()
def bundle(
    folder: Annotated[Path, typer.Argument(help="What `omnifx export` wrote.")],
    check: Annotated[
        bool, typer.Option("--check", help="Run its first steps in its runtime, and compare with what PyTorch gave.")
    ] = False,
    runtime: Annotated[
        Literal["onnxruntime", "tensorrt", "tensorrt-rtx", "aoti"] | None,
        typer.Option(help="What to run them in; by default onnxruntime, or aoti if the bundle is for that."),
    ] = None,
) -> None:
    """What a bundle holds; its files are looked at and hashed."""
    from omnifx.bundle_loading import own_runtime

    manifest = Manifest.load(folder)
    typer.echo(contents(manifest))
    if check:
        chosen = runtime or own_runtime(manifest)
        error = omnifx.load_bundle(folder, runtime=chosen, verify=False).check()
        typer.echo(f"{chosen} differs from PyTorch by {error:.1e} of an output's norm at most")


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="A folder of results, as `omnifx bench` writes them.")],
    html: Annotated[
        Path | None, typer.Option(help="Write a page with plots, plans and samples: one file, for any browser.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Folder for the plots, plans and samples as PNG; made if it is not there.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write the tables into this page of Markdown, between marks of their own.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail if the page of Markdown differs.")
    ] = False,
) -> None:
    """Who is ahead at which share of the compute: a comparison as tables, as a page, or as figures for documents."""
    from omnifx import reporting

    found = Results.load(results)
    if check:
        reporting.check(found, results, html=html, figures=figures, markdown=markdown)
        return
    for path in (html, markdown):
        if path is not None:
            _check_folder(path)
    reporting.show(found, _console())
    for path in reporting.write(found, results, html=html, figures=figures, markdown=markdown):
        typer.echo(f"wrote {path}")


@app.command()
def policies() -> None:
    """List the policies, what each does, and its options with their defaults."""
    table = Table(show_lines=True)
    for name in ("policy", "what it does", "options"):
        table.add_column(name)
    for name, cls in known_policies().items():
        first = (inspect.getdoc(cls) or "").split("\n")[0]
        options = ", ".join(f"{key}={value!r}" for key, value in cls().options.items()) or "none"
        table.add_row(name, escape(first), escape(options))
    _console().print(table)


@app.command()
def doctor(
    compiles: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile a small function with Inductor.")
    ] = True,
) -> None:
    """What works on this machine, what does not, why not, and what to do."""
    from omnifx.doctor import examine

    table = Table()
    for name in ("", "state", "found", "what to do"):
        table.add_column(name, overflow="fold")
    with Console(stderr=True).status("looking at this machine"):
        findings = examine(compiles=compiles)
    words = {"ok": "[green]ok[/]", "optional": "[yellow]missing[/]", "problem": "[bold red]problem[/]"}
    for finding in findings:
        table.add_row(finding.subject, words[finding.state], escape(finding.detail), escape(finding.advice))
    _console().print(table)
    problems = [finding.subject for finding in findings if finding.state == "problem"]
    typer.echo(f"to mend: {', '.join(problems)}" if problems else "all that omnifx needs is here")


app.command()(cli_bench.bench)
app.command()(cli_build.build)
app.command()(cli_triton.command(lambda target: _load_object(target)))


def folded(report: MatchReport) -> str:
    """A report with the branches that differ only in their block's number on one line."""
    groups: dict[tuple[str, str, int, int, str, str], list[str]] = {}
    for branch in report.branches:
        size = branch.cache_bytes if branch.cacheable else -1
        pattern = unnumbered(branch.name)
        key = (pattern, branch.kind, branch.flops, size, branch.reason, tokens_text(branch))
        groups.setdefault(key, []).append(branch.name)
    width = max([len(key[0]) for key in groups] + [6])
    lines = [
        str(report).splitlines()[0],
        f"{'branch':<{width}}  {'kind':<16} {'count':>5} {'share':>6} {'GFLOP each':>11} {'cache each':>11} "
        f"{'tokens':>7}",
    ]
    for (pattern, kind, flops, size, reason, tokens), names in groups.items():
        share = len(names) * flops / report.flops if report.flops else 0.0
        cache = f"{size / 2**20:,.2f} MiB" if size >= 0 else "-"
        numbers = f"{len(names):>5} {share:>6.1%} {flops / 1e9:>11,.3f} {cache:>11} {tokens:>7}"
        lines.append(f"{pattern:<{width}}  {kind:<16} {numbers}")
        if reason:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            lines.append(f"{'':<{width}}  not cached: {reason} ({shown})")
    tail = str(report).splitlines()
    summary = next(i for i, line in enumerate(tail) if line.startswith("a full step costs"))
    return "\n".join([*lines, *tail[summary:]])


def _refusal(error: BaseException) -> str | None:
    """The message of an error that omnifx raised on purpose, however Dynamo wrapped it, or of a capture; else None."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OmnifxError):
            return str(seen)
        seen = getattr(seen, "inner_exception", None) or seen.__cause__
    if isinstance(error, TorchDynamoException):
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return f"the model could not be captured: {first.strip()} Do these inputs fit it? OMNIFX_DEBUG=1 shows all."
    return None


def _load_object(target: str) -> Any:
    """What `module:name` or `file.py:name` stands for; the working folder is on the path, as with `python -m`.

    Raises: ConfigError if there is no such thing. What the module itself raises on import passes through.
    """
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise ConfigError(f"expected module:name or file.py:name, got {target!r}.")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    if place.endswith(".py"):
        path = Path(place)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if not path.is_file() or spec is None or spec.loader is None:
            raise ConfigError(f"{target}: there is no file {path}.")
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)  # dataclasses and pickles of the file look their module up by name
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not (place == error.name or place.startswith(f"{error.name}.")):
                raise
            raise ConfigError(f"{target}: there is no module {place} (looked in {Path.cwd()} too).") from error
    found = getattr(module, name, None)
    if not callable(found):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        there = sorted(key for key in functions if not key.startswith("_"))
        raise ConfigError(f"{target}: {place} has no function {name}; it has {', '.join(there) or 'none'}.")
    return found


def _own_inputs(target: str, model: nn.Module) -> dict[str, Any]:
    kwargs = _load_object(target)(model)
    if not isinstance(kwargs, Mapping):
        raise ConfigError(f"explain: {target}(model) returned {_described(kwargs)}, expected one call's kwargs.")
    return cast(dict[str, Any], tree_map_only(Tensor, lambda tensor: tensor.to("meta"), dict(kwargs)))


def _parse_config(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        source = text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8")
        loaded = json.loads(source)
    except OSError as error:
        raise ConfigError(f"explain: --config {text!r} is neither JSON nor a file: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"explain: --config is not JSON: {error}.") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"explain: --config holds {_described(loaded)}, expected an object of constructor arguments.")
    return {key: value for key, value in loaded.items() if not key.startswith("_")}  # as diffusers writes


def _parse_size(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){0,2}", text):
        raise ConfigError(f"explain: --size must be such as 64, 64x96 or 13x60x90 (latent pixels), got {text!r}.")
    return tuple(int(side) for side in text.split("x"))


def _check_folder(path: Path) -> None:
    if not path.parent.is_dir():
        raise ConfigError(f"the folder of {path} is not there. Make it first: mkdir -p {path.parent}")


def _write_plan(made: Plan, measured: Profile, out: Path | None, picture: Path | None) -> None:
    for path in (out, picture):
        if path is not None:
            _check_folder(path)
    if out is not None:
        made.save(out)
        typer.echo(f"wrote {out}")
    if picture is not None:
        from omnifx.pictures import plan_figure, save_figure

        typer.echo(f"wrote {save_figure(plan_figure(made, measured), picture)}")


def _console() -> Console:
    """For results: a pipe or a file gets lines wide enough for every table."""
    return Console(width=None if sys.stdout.isatty() else 160)


def _command_line() -> list[str]:
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def _described(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(item).__name__ for item in value)})"
    return type(value).__name__


__all__ = ["app", "folded"]


if __name__ == "__main__":
    app()
