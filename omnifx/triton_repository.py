"""Write a model repository for NVIDIA's Triton Inference Server: one Python-backend model that holds a whole bundle.

The sampling loop, the caches and all graphs live in the one process of that model, so nothing of a generation goes
through the server but the request and the samples. A folder of the repository::

    digits/config.pbtxt         inputs, outputs, batching, instances: to be read, and edited
    digits/1/model.py           what Triton loads; the work is done by omnifx.triton_model
    digits/1/bundle/            the bundle
    digits/1/sampling.json      scheduler, guidance; its tensors are in sampling.safetensors
    digits/1/sampler.py         a sampling loop of the user's own, if there is one
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from omnifx.bundle import MANIFEST, Manifest
from omnifx.bundle_loading import Runtime
from omnifx.errors import ConfigError
from omnifx.sampling import load_function
from omnifx.sampling_setup import Guidance, Sampling, latents_of, row_shape, samples_of, sampling_of

CONFIG = "config.pbtxt"
VERSION = "1"
BUNDLE = "bundle"
SAMPLER = "sampler.py"

SEED, LATENTS, STEP = "seed", "latents", "step"
"""Names of a request's and a response's tensors, beside the model's own arguments."""

_MODEL = '''"""Written by omnifx: what Triton's Python backend loads. The work is done by omnifx.triton_model."""

import locale


class TritonPythonModel:
    """A bundle, imported when it is wanted: Triton also loads this file only to look at it."""

    def initialize(self, args):
        if "utf" not in locale.getpreferredencoding(False).lower():
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")  # servers start this in ASCII; torch cannot be read in that
        from omnifx.triton_model import BundleModel

        self.bundle = BundleModel(args)

    def execute(self, requests):
        return self.bundle.execute(requests)
'''

_TYPES = {
    "float64": "TYPE_FP64", "float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_FP32",
    "int64": "TYPE_INT64", "int32": "TYPE_INT32", "int16": "TYPE_INT16", "int8": "TYPE_INT8", "uint8": "TYPE_UINT8",
    "bool": "TYPE_BOOL",
}  # fmt: skip
"""NumPy has no bfloat16, so clients send float32 instead."""


def write_triton(
    bundle: str | Path,
    repository: str | Path,
    *,
    name: str | None = None,
    scheduler: Any = None,
    guidance: Guidance = "none",
    guidance_scale: float = 1.0,
    negative: Mapping[str, float | Tensor | None] | None = None,
    fixed: Mapping[str, Tensor] | None = None,
    sampler: str | Path | None = None,
    stream: bool = False,
    runtime: Runtime = "onnxruntime",
    device: Literal["cpu", "gpu"] = "cpu",
    instances: int = 1,
    threads: int = 0,
    max_delay_ms: float = 5.0,
    overwrite: bool = False,
) -> Path:
    """Write a bundle as a model of a Triton model repository.

    A request makes samples from seeds and from the model's step-invariant arguments (class labels, embeddings of a
    prompt). Requests that wait are gathered into one run of the bundle, up to its batch; each sample is the same as in
    a run of its own.

    Args:
        bundle: What `omnifx.export` wrote; it is copied.
        repository: Folder of models; made if it is not there.
        name: Of the model; None: the bundle's folder.
        scheduler: A scheduler of diffusers on which `set_timesteps` was called; None: that of the bundle's manifest.
        guidance: "none", also for models that guide by themselves; "one-call": a batch of [negative; positive], so a
            run makes half as many samples as the bundle's batch; "two-calls": first the negative inputs.
        guidance_scale: Where a request gives none.
        negative: Arguments that differ in the negative half, with the row that they have where a request gives none, or
            None if every request must. None: all arguments with more than one number a sample, and labels, whose
            negative one is the last of diffusers' table.
        fixed: Values of arguments without a row for each sample (position ids), or that no request should give.
        sampler: A Python file with `sample(runner, request)`, in place of `omnifx.sampling.sample`.
        stream: Whether a request may ask for the latents of steps on the way. Such a model is asked by gRPC streams
            (or HTTP's `generate_stream`) only.
        runtime: Of `load_bundle`.
        device: "gpu": Triton gives each instance one.
        instances: Processes with a bundle each, on each device.
        threads: Of each instance, on the CPU; 0: as many as the runtime wants.
        max_delay_ms: How long a request waits for others, where the bundle's batch has room for more.
        overwrite: Whether a model of this name is replaced.

    Returns: The model's folder.
    Raises: ConfigError for options out of range; BundleError if the bundle is damaged, or its scheduler unknown.
    Memory: none to speak of; on disk, the bundle's bytes.
    """
    folder, place = Path(bundle), Path(repository)
    name = folder.resolve().name if name is None else name
    _check_options(name, runtime, device, instances, threads, max_delay_ms)
    manifest = Manifest.load(folder)
    if sampler is not None:
        load_function(Path(sampler))
    sampling = sampling_of(
        manifest,
        scheduler=scheduler,
        guidance=guidance,
        guidance_scale=guidance_scale,
        negative=negative,
        fixed=fixed,
        own_sampler=sampler is not None,
    )
    config = Config(
        name=name,
        manifest=manifest,
        sampling=sampling,
        stream=stream,
        runtime=runtime,
        device=device,
        instances=instances,
        threads=threads,
        max_delay_ms=max_delay_ms,
    )
    target = place / name
    if target.exists() and not (overwrite and (target / CONFIG).is_file()):
        raise ConfigError(f"triton: {target} is there already. Choose another name, or replace it with overwrite.")
    place.mkdir(parents=True, exist_ok=True)
    written = Path(tempfile.mkdtemp(prefix=f".{name}.partial-", dir=place))
    try:
        _write(written, folder, config, Path(sampler) if sampler is not None else None)
        written.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        os.rename(written, target)  # at once: a server that polls the repository never sees half a model
    except BaseException:
        shutil.rmtree(written, ignore_errors=True)
        raise
    return target


def _check_options(name: str, runtime: str, device: str, instances: int, threads: int, max_delay_ms: float) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ConfigError(f"triton: a model's name has letters, digits, '_', '-' and '.', got {name!r}. Give name=.")
    if runtime not in get_args(Runtime):
        raise ConfigError(f"triton: runtime must be one of {list(get_args(Runtime))}, got {runtime!r}.")
    if device not in ("cpu", "gpu"):
        raise ConfigError(f"triton: device must be 'cpu' or 'gpu', got {device!r}.")
    if not isinstance(instances, int) or instances < 1:
        raise ConfigError(f"triton: instances must be a number >= 1, got {instances!r}.")
    if not isinstance(threads, int) or threads < 0:
        raise ConfigError(f"triton: threads must be a number >= 0, got {threads!r}.")
    if not max_delay_ms >= 0:
        raise ConfigError(f"triton: max_delay_ms must be >= 0, got {max_delay_ms!r}.")


def _write(written: Path, folder: Path, config: Config, sampler: Path | None) -> None:
    (written / CONFIG).write_text(config.text(), encoding="utf-8")
    version = written / VERSION
    version.mkdir()
    (version / "model.py").write_text(_MODEL, encoding="utf-8")
    config.sampling.save(version)
    if sampler is not None:
        shutil.copyfile(sampler, version / SAMPLER)
    for path in (MANIFEST, *dict.fromkeys(file.path for file in config.manifest.files())):
        (version / BUNDLE / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / path, version / BUNDLE / path)


class Port(NamedTuple):
    """A tensor of a request or of an answer."""

    name: str
    kind: str
    """Triton's word for its type."""
    shape: tuple[int, ...]
    """Of one sample's row."""
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class Config:
    """A model's `config.pbtxt`."""

    name: str
    manifest: Manifest
    sampling: Sampling
    stream: bool
    runtime: str
    device: str
    instances: int
    threads: int
    max_delay_ms: float

    def text(self) -> str:
        """All of it.

        Raises: ConfigError if an argument of the model is called as a tensor of each request.
        """
        samples = samples_of(self.manifest, self.sampling.guidance)
        policy = self.manifest.policy
        about = f"{self.manifest.model.name}, {len(self.manifest.steps)} steps by {policy.name}: {policy.timeline}"
        lines = [
            f"# {about}",
            "# Written by omnifx. What a request holds for one sample; rows of several samples, and several requests,",
            f"# are gathered into runs of {samples}. Parameters of a request: steps, guidance_scale, stream_every.",
            f'name: "{self.name}"',
            'backend: "python"',
            f"max_batch_size: {samples}",
            *_tensors("input", self._inputs()),
            *_tensors("output", self._outputs()),
            f"dynamic_batching {{ max_queue_delay_microseconds: {round(1000 * self.max_delay_ms)} }}",
            f"model_transaction_policy {{ decoupled: {'true' if self.stream else 'false'} }}",
            f"instance_group [ {{ count: {self.instances} kind: KIND_{self.device.upper()} }} ]",
            *_parameter("runtime", self.runtime, "of omnifx.load_bundle"),
            *_parameter("threads", str(self.threads), "of each instance; 0: as many as the runtime wants"),
            *_parameter("check", "true", "replay the bundle's reference before serving, and refuse what differs"),
        ]
        return "\n".join(lines) + "\n"

    def _inputs(self) -> list[Port]:
        found = [Port(SEED, "TYPE_INT64", (1,))]
        for name in self.sampling.inputs:
            found.append(Port(name, *self._row(name)))
        for name in self.sampling.negative:
            stored = f"negative.{name}" in self.sampling.tensors
            found.append(Port(f"negative_{name}", *self._row(name), optional=stored))
        names = [each.name for each in found]
        if twice := sorted({each for each in names if names.count(each) > 1}):
            raise ConfigError(f"triton: {twice[0]} is both an argument of the model and a tensor of every request.")
        return found

    def _outputs(self) -> list[Port]:
        found = [Port(LATENTS, "TYPE_FP32", latents_of(self.manifest)[1].shape[1:] or (1,))]
        return [*found, Port(STEP, "TYPE_INT32", (1,))] if self.stream else found

    def _row(self, name: str) -> tuple[str, tuple[int, ...]]:
        return _TYPES[self.manifest.call.inputs[name].dtype], row_shape(self.manifest, name) or (1,)


def _tensors(word: str, ports: Sequence[Port]) -> list[str]:
    lines = [
        f'  {{ name: "{port.name}" data_type: {port.kind} dims: [ {", ".join(map(str, port.shape))} ]'
        + (" optional: true }" if port.optional else " }")
        for port in ports
    ]
    return [f"{word} [", ",\n".join(lines), "]"]


def _parameter(key: str, value: str, about: str) -> list[str]:
    return [f"# {about}", f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}']


__all__ = ["write_triton"]
