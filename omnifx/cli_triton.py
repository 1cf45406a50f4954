"""The command `omnifx triton`: a bundle as a model that NVIDIA's Triton Inference Server serves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from omnifx.bundle_loading import Runtime
from omnifx.errors import ConfigError
from omnifx.sampling_setup import Guidance
from omnifx.triton_repository import write_triton

Load = Callable[[str], Any]
"""Finds what module:name or file.py:name stands for."""


def command(load: Load) -> Callable[..., None]:
    """The command, with what finds a user's factories."""

    def triton(
        bundle: Annotated[Path, typer.Argument(help="What `omnifx export` wrote.")],
        out: Annotated[Path, typer.Option(help="The model repository: a folder of models; made if it is not there.")],
        name: Annotated[str | None, typer.Option(help="Of the model; default: the bundle's folder.")] = None,
        scheduler: Annotated[
            str | None,
            typer.Option(
                help="module:factory or file.py:factory returning a scheduler of diffusers, set_timesteps called; "
                "default: what the bundle says."
            ),
        ] = None,
        guidance: Annotated[
            Guidance, typer.Option(help="How classifier-free guidance calls the model in a step.")
        ] = "none",
        guidance_scale: Annotated[float, typer.Option(help="Where a request gives none.")] = 1.0,
        negative: Annotated[
            list[str] | None,
            typer.Option(
                metavar="NAME[=NUMBER]",
                help="An argument with another value in the negative half, and that value where a request gives none; "
                "default: labels and embeddings.",
            ),
        ] = None,
        fixed: Annotated[
            Path | None,
            typer.Option(help="A safetensors file of arguments that no request gives (position ids), by name."),
        ] = None,
        sampler: Annotated[
            Path | None, typer.Option(help="A Python file with sample(runner, request), for another loop.")
        ] = None,
        stream: Annotated[
            bool, typer.Option("--stream", help="Requests may ask for steps on the way; only gRPC streams then.")
        ] = False,
        runtime: Annotated[Runtime, typer.Option(help="Of omnifx.load_bundle.")] = "onnxruntime",
        device: Annotated[Literal["cpu", "gpu"], typer.Option(help="Where instances run.")] = "cpu",
        instances: Annotated[int, typer.Option(help="Processes with a bundle each, on each device.")] = 1,
        threads: Annotated[int, typer.Option(help="Of each instance; 0: as many as the runtime wants.")] = 0,
        max_delay_ms: Annotated[float, typer.Option(help="How long a request waits for others.")] = 5.0,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model of this name.")] = False,
    ) -> None:
        """Write a bundle as a model of a repository for NVIDIA's Triton Inference Server: docs/deploy_triton.md."""
        from safetensors.torch import load_file

        if fixed is not None and not fixed.is_file():
            raise ConfigError(f"triton: there is no file {fixed}.")
        written = write_triton(
            bundle,
            out,
            name=name,
            scheduler=load(scheduler)() if scheduler is not None else None,
            guidance=guidance,
            guidance_scale=guidance_scale,
            negative=dict(map(_pair, negative)) if negative else None,
            fixed=load_file(fixed) if fixed is not None else None,
            sampler=sampler,
            stream=stream,
            runtime=runtime,
            device=device,
            instances=instances,
            threads=threads,
            max_delay_ms=max_delay_ms,
            overwrite=overwrite,
        )
        typer.echo(f"wrote {written}; next: tritonserver --model-repository={out.resolve()}")

    return triton


def write_beside(exported: tuple[Any, ...], bundle: Path, repository: Path) -> None:
    """Serve what `omnifx export` just wrote, with no guidance: the option `--triton`.

    Args:
        exported: What the user's factory returned: a model, a call's arguments, and perhaps a scheduler.
        bundle: The bundle.
        repository: The model repository.
    """
    from torch import Tensor

    from omnifx.bundle import Manifest
    from omnifx.export_capture import bind_arguments, leaves_of_call
    from omnifx.sampling_setup import latents_of

    manifest = Manifest.load(bundle, verify=False)
    batch, leaves = latents_of(manifest)[1].shape[0], leaves_of_call(bind_arguments(exported[0], exported[1]))
    shared = {
        name: cast(Tensor, leaves[name])
        for name, info in manifest.call.inputs.items()
        if info.role == "invariant" and info.shape[:1] != (batch,)
    }
    written = write_triton(bundle, repository, fixed=shared)
    typer.echo(f"wrote {written}; next: tritonserver --model-repository={repository.resolve()}")


def _pair(text: str) -> tuple[str, float | None]:
    name, equals, number = text.partition("=")
    try:
        return name, float(number) if equals else None
    except ValueError as error:
        raise ConfigError(f"triton: --negative takes NAME or NAME=NUMBER, got {text!r}.") from error


__all__ = ["command", "write_beside"]
