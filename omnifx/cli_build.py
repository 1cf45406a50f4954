"""The command `omnifx build`: engines for a bundle that is there, on the machine that is to run them or before."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from omnifx.bundle import contents
from omnifx.engine_building import COMMANDS, ENGINES, build_engines

Capabilities = Annotated[
    str,
    typer.Option("--sm", help="tensorrt-rtx: compute capabilities of the GPUs, such as 86,89,120; default: its own."),
]
Workspace = Annotated[
    str | None, typer.Option(help="Engines: most memory that one layer may use beside its values, such as 4GiB.")
]
TimingCache = Annotated[Path | None, typer.Option(help="tensorrt: a file of measured times, read and written.")]


def build(
    bundle: Annotated[Path, typer.Argument(help="What `omnifx export` wrote.")],
    target: Annotated[
        Literal["tensorrt", "tensorrt-rtx"],
        typer.Option(help="tensorrt-rtx needs no GPU; tensorrt builds for the GPU of this machine."),
    ],
    sm: Capabilities = "",
    workspace: Workspace = None,
    timing_cache: TimingCache = None,
) -> None:
    """Build engines into a bundle: one for each of its graphs, and only those that are not there yet.

    Types are those of the bundle: export a model in the type that it is to run in. An interrupted build goes on.
    """
    manifest = build_engines(bundle, target, compute_capabilities=sm, workspace=workspace, timing_cache=timing_cache)
    typer.echo(contents(manifest))
    commands = bundle / ENGINES / target / COMMANDS
    typer.echo(f"{commands}:\n{commands.read_text(encoding='utf-8').rstrip()}")


def given(sm: str, workspace: str | None, timing_cache: Path | None) -> dict[str, Any]:
    """Options of `build_engines` that were given."""
    found = {"compute_capabilities": sm or None, "workspace": workspace, "timing_cache": timing_cache}
    return {name: value for name, value in found.items() if value is not None}


__all__ = ["Capabilities", "TimingCache", "Workspace", "build", "given"]
