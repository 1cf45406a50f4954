"""What `omnifx bench` measures: a pipeline of diffusers with the user's prompts, or a model and its `generate`.

Both become a `Target`: a denoiser, and a function that runs one ordinary generation with whatever stands for it.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL.Image import Image
from torch import Generator, Tensor, nn

from omnifx.errors import ConfigError

DENOISERS = ("transformer", "unet")
"""Components that are called at every step, the first that a pipeline has."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_Call = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A model, and how to generate with it."""

    title: str
    model: nn.Module
    """The denoiser, as it is."""
    generate: Callable[[Any, int, int | None], object]
    """``generate(model, seed, steps)`` runs one generation with the model it is given; None steps: its own number. It
    returns samples [N, C, (T,) H, W], or images; equal seeds start from equal noise."""
    takes_steps: bool
    """Whether it can be asked for a number of steps."""
    sampler: str
    steps: int | None = None
    """What is asked for; None: its own number."""
    value_range: tuple[float, float] | None = None
    """Smallest and largest possible value of a sample; None: 0 and 1 for images, -1 and 1 for tensors."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """What decides the samples, in words: results are continued only if it is the same."""
    notes: tuple[str, ...] = ()


def script_target(
    made: object, *, title: str, steps: int | None = None, value_range: tuple[float, float] | None = None
) -> Target:
    """Of what a user's factory returned: ``(model, generate)``, as for `omnifx.calibrate`.

    Args:
        made: ``generate(model, seed)`` runs one generation with the model it is given, and returns its samples: a
            tensor [N, C, (T,) H, W], or a list of images. If it takes a third argument `steps`, the same number of
            FLOPs can also be spent on fewer steps.
        title: What to call it.
        steps: Passed to `generate`; None: its own number.
        value_range: Smallest and largest possible value of a sample.

    Raises: ConfigError if it is something else, or `steps` are asked of a `generate` that takes none.
    """
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module) and callable(made[1])):
        found = f"({', '.join(type(m).__name__ for m in made)})" if isinstance(made, tuple) else type(made).__name__
        raise ConfigError(
            f"bench: {title}() returned {found}, expected (model, generate), where generate(model, seed) runs one "
            "generation and returns its samples."
        )
    model, function = made
    known = _parameters(function)
    takes_steps = "steps" in known
    own = known["steps"].default if takes_steps else None
    if steps is not None and not takes_steps:
        raise ConfigError(
            f"bench: generate of {title} takes no argument 'steps', so {steps} steps cannot be asked of it. Write it "
            "as generate(model, seed, steps=...), or leave --steps away."
        )

    def generate(way: Any, seed: int, asked: int | None) -> object:
        return function(way, seed) if asked is None else function(way, seed, steps=asked)

    return Target(
        title=title,
        model=model,
        generate=generate,
        takes_steps=takes_steps,
        sampler="its own sampler",
        steps=own if steps is None and isinstance(own, int) else steps,
        value_range=value_range,
        settings={"target": title, "steps": str(steps), "range": str(value_range)},
    )


def load_pipeline(
    folder: str | Path, *, dtype: str | None = None, device: str | None = None, scheduler: str | None = None
) -> Any:
    """A pipeline of diffusers from a folder (or from the hub), ready to run.

    Args:
        folder: What ``pipe.save_pretrained`` wrote, or the name of a repository of the hub.
        dtype: One of `DTYPES`; None: float32.
        device: Such as "cuda:1"; None: "cuda" where there is one, else "cpu".
        scheduler: Class name of a scheduler of diffusers to take instead, with the config of the pipeline's own.

    Raises: ConfigError if there is no such pipeline, or one of the names is not known.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"bench: dtype must be one of {list(DTYPES)}, got {dtype!r}.")
    if scheduler is not None and not _is_scheduler(getattr(diffusers, scheduler, None)):
        known = sorted(n for n in dir(diffusers) if n.endswith("Scheduler") and _is_scheduler(getattr(diffusers, n)))
        raise ConfigError(
            f"bench: diffusers {diffusers.__version__} has no scheduler {scheduler!r}; it has {', '.join(known)}."
        )
    where = Path(folder)
    if where.exists() and not (where / "model_index.json").is_file():
        raise ConfigError(
            f"bench: {folder} is not the folder of a pipeline: it has no model_index.json, which pipe.save_pretrained "
            "writes. A script is named file.py:factory."
        )
    if not where.exists() and (where.is_absolute() or str(folder).count("/") != 1):
        raise ConfigError(
            f"bench: there is no folder {folder}. Name the folder of a pipeline, the hub's owner/name, or "
            "file.py:factory."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the older ones that we support do not know the new name
            # Not imported above: with its models it takes a third of the time that `omnifx` needs to start.
            pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder), torch_dtype=DTYPES[dtype or "float32"])
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"bench: the pipeline {folder} cannot be loaded: {error}") from error
    if scheduler is not None:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline_target(
    pipe: Any,
    *,
    title: str = "",
    prompts: Sequence[str] = (),
    class_labels: Sequence[int] = (),
    batch: int = 1,
    steps: int | None = None,
    guidance: float | None = None,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Target:
    """Of a pipeline of diffusers; its `transformer`, or else its `unet`, is what gets replaced.

    Args:
        pipe: As `load_pipeline` gives it, or the user's own.
        title: What to call it; empty: its class.
        prompts: Taken in turn by the samples: sample i has prompt i modulo their number.
        class_labels: The same for pipelines that are conditioned on classes.
        batch: Samples of one generation.
        steps: Denoising steps; None: the pipeline's own default.
        guidance: Scale of guidance; None: the pipeline's own default.
        size: Height and width in pixels.
        frames: Frames of a video.
        arguments: Further arguments of the pipeline's call.

    Raises: ConfigError if the pipeline has no denoiser, or does not take one of these arguments.
    """
    title = title or type(pipe).__name__
    name = _denoiser_of(pipe)
    known = _parameters(pipe.__call__)
    call = _constant_arguments(type(pipe).__name__, known, steps, guidance, size, frames, arguments)
    own = known["num_inference_steps"].default if "num_inference_steps" in known else None
    steps = call.get("num_inference_steps", own if isinstance(own, int) else None)
    conditions = _conditions(type(pipe).__name__, known, prompts, class_labels, call)
    if batch < 1:
        raise ConfigError(f"bench: batch must be >= 1 (samples of a generation), got {batch!r}.")
    model = getattr(pipe, name)

    def generate(way: Any, seed: int, asked: int | None) -> object:
        numbers = range(seed * batch, (seed + 1) * batch)
        each: _Call = {key: [values[i % len(values)] for i in numbers] for key, values in conditions.items()}
        if not conditions and "batch_size" in known:
            each["batch_size"] = batch
        if "generator" in known:  # on the host, so that a seed means the same noise on every device
            each["generator"] = [Generator().manual_seed(i) for i in numbers]
        if asked is not None:
            each["num_inference_steps"] = asked
        setattr(pipe, name, way)
        try:
            return _samples_of(pipe(**{**call, **each}))
        finally:
            setattr(pipe, name, model)

    scheduler = getattr(pipe, "scheduler", None)
    others = [other for other in pipe.components if other.startswith(f"{name}_") and getattr(pipe, other) is not None]
    sampler = type(scheduler).__name__ + (f", guidance {guidance:g}" if guidance is not None else "")
    told = {
        "target": title,
        "scheduler": f"{type(scheduler).__name__} {dict(getattr(scheduler, 'config', {}))}",
        "call": str(call),
        "conditions": json.dumps(conditions),
        "batch": str(batch),
        "steps": str(steps),
        "dtype": str(next(model.parameters()).dtype),
    }
    return Target(
        title=title,
        model=model,
        generate=generate,
        takes_steps="num_inference_steps" in known,
        sampler=sampler,
        steps=steps,
        value_range=(0.0, 1.0),
        settings=told,
        notes=(
            f"pipe.{name} is compiled",
            *(f"pipe.{other} stays as it is" for other in others),
            *(f"{key}: {len(values)} in turn" for key, values in conditions.items()),
        ),
    )


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not empty. Raises: ConfigError if there are none."""
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"bench: the prompts {path} cannot be read: {error}.") from error
    if not found:
        raise ConfigError(f"bench: {path} holds no prompts; write one a line.")
    return found


def as_samples(value: object) -> tuple[Tensor, bool]:
    """What a generation returned as samples [N, C, (T,) H, W], float32 on the host, and whether they were images: then
    their values lie in [0, 1].

    Raises: ConfigError for anything else, or samples that are not finite.
    """
    images = isinstance(value, list | tuple) and bool(value) and all(isinstance(item, Image) for item in value)
    if images:
        assert isinstance(value, list | tuple)  # said above
        value = torch.stack([_pixels(image) for image in value])
    if not isinstance(value, Tensor):
        found = "None" if value is None else type(value).__name__
        raise ConfigError(
            f"bench: generate returned {found}, expected its samples: a tensor [N, C, (T,) H, W], or a list of images."
        )
    if value.dim() not in (4, 5) or not value.numel():
        raise ConfigError(
            f"bench: generate returned shape {list(value.shape)}, expected samples [N, C, H, W] or [N, C, T, H, W]."
        )
    if value.dtype == torch.uint8:
        images, value = True, value / 255
    value = value.detach().to("cpu", torch.float32)
    if not value.isfinite().all():
        raise ConfigError("bench: generate returned samples with NaN or infinity. Look at the uncached model first.")
    return value, images


def _denoiser_of(pipe: Any) -> str:
    for name in DENOISERS:
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name
    there = [name for name, part in getattr(pipe, "components", {}).items() if isinstance(part, nn.Module)]
    raise ConfigError(
        f"bench: {type(pipe).__name__} has no denoiser: neither {' nor '.join(DENOISERS)} is among its models "
        f"{there}. Write a factory that returns (model, generate), and name it file.py:factory."
    )


def _constant_arguments(
    who: str,
    known: Mapping[str, inspect.Parameter],
    steps: int | None,
    guidance: float | None,
    size: tuple[int, int] | None,
    frames: int | None,
    arguments: Mapping[str, Any] | None,
) -> _Call:
    """The arguments that all calls of a pipeline share."""
    height, width = size or (None, None)
    asked = {
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "height": height,
        "width": width,
        "num_frames": frames,
    }
    call: _Call = {"output_type": "pt"} if "output_type" in known else {}
    call |= {key: value for key, value in asked.items() if value is not None} | dict(arguments or {})
    free = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
    if unknown := [key for key in call if key not in known and not free]:
        raise ConfigError(f"bench: {who} takes no argument {', '.join(unknown)}; it takes {', '.join(known)}.")
    return call


def _conditions(
    who: str,
    known: Mapping[str, inspect.Parameter],
    prompts: Sequence[str],
    class_labels: Sequence[int],
    call: Mapping[str, Any],
) -> dict[str, list[Any]]:
    """The arguments that samples take in turn."""
    asked: dict[str, list[Any]] = {"prompt": list(prompts), "class_labels": list(class_labels)}
    conditions = {key: values for key, values in asked.items() if values}
    if wrong := [key for key in conditions if key not in known]:
        raise ConfigError(f"bench: {who} takes no argument {', '.join(wrong)}; it takes {', '.join(known)}.")
    for key, said in (("prompt", "--prompts FILE"), ("class_labels", "--class-labels 1,2,3")):
        if key in known and key not in conditions and not any(name.startswith(key) for name in call):
            raise ConfigError(f"bench: {who} is conditioned on {key}: give {said}.")
    return conditions


def _samples_of(output: Any) -> object:
    """The samples in a pipeline's output, [N, C, (T,) H, W]; images as they are."""
    frames = getattr(output, "frames", None)
    value = frames if frames is not None else getattr(output, "images", None)
    if value is None:
        value = output[0] if isinstance(output, tuple) and output else output
    if isinstance(value, np.ndarray):  # [N, (T,) H, W, C]
        value = torch.from_numpy(value).movedim(-1, 1)
    elif isinstance(value, Tensor) and value.dim() == 5 and frames is not None:  # [N, T, C, H, W]
        value = value.transpose(1, 2)
    elif isinstance(value, list) and value and isinstance(value[0], list):  # a list of images a video
        value = torch.stack([torch.stack([_pixels(image) for image in video], dim=1) for video in value])
    return value


def _pixels(image: Image) -> Tensor:
    """An image as [C, H, W] in [0, 1]."""
    pixels = torch.from_numpy(np.array(image.convert("L" if image.mode in ("L", "1") else "RGB")))
    return (pixels[None] if pixels.dim() == 2 else pixels.movedim(-1, 0)) / 255


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # written in C
        return {}


def _is_scheduler(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)


__all__ = [
    "DENOISERS",
    "DTYPES",
    "Target",
    "as_samples",
    "load_pipeline",
    "pipeline_target",
    "read_prompts",
    "script_target",
]
