"""A bundle: an exported model with its plan as a folder, and the manifest that says what is in it and how it runs.

The manifest holds no code and needs none: its schedule is a straight line of runs of static graphs over named buffers,
made from the plan when it was exported. Which step reads which cache, which of several buffers holds the newest value,
and the numbers of each step are all written down, so a runner in any language is a loop. Everything is JSON, ONNX and
safetensors, never a pickle; files are named, sized and hashed, and looked at before anything of them is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator
from pydantic.functional_validators import AfterValidator

from omnifx.errors import BundleError

FORMAT = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.bin"
MOST_MANIFEST_BYTES = 256 * 2**20

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or any(not _PART.fullmatch(part) for part in parts) or "/".join(parts) != path:
        raise ValueError(f"{path!r} is not a plain path inside of the bundle")
    return path


FilePath = Annotated[str, AfterValidator(_inside)]
"""A path that cannot leave the folder: plain names, joined by slashes."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Shape = tuple[Annotated[int, Field(ge=0)], ...]
DType = Literal["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class FileInfo(_Strict):
    """One file of a bundle."""

    path: FilePath
    bytes: int = Field(ge=0)
    sha256: Sha256


class TensorInfo(_Strict):
    """What a value looks like."""

    shape: Shape
    dtype: DType


class Constant(TensorInfo):
    """A tensor within the weights' file: contiguous, little-endian."""

    offset: int = Field(ge=0)
    bytes: int = Field(ge=0)


class BufferInfo(TensorInfo):
    """A buffer that each stream of each generation has of its own."""

    kind: str
    """What it holds: cut, noise, past_output, past_latents, score, stamp, invariant (of the prologue), condition,
    replay."""
    about: str = ""
    """Whose value it holds: a branch and the number of its cut, or a position of the model's outputs."""


class Source(_Strict):
    """Where an input of a run comes from; one of these."""

    call: str | None = None
    """An argument of the model, by path."""
    buffer: str | None = None
    output: int | None = Field(default=None, ge=0)
    """An output of the model in this step, which an earlier run of it gave."""
    constant: str | None = None
    """A tensor of the weights' file: what the timestep alone decides, trends of a prior."""
    numbers: tuple[FiniteFloat, ...] | None = None
    """Numbers of the plan: weights of predictions and combinations, coefficients of a correction."""
    fill: FiniteFloat | None = None
    """A tensor that holds one number everywhere."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(value is not None for value in self.__dict__.values()) != 1:
            raise ValueError("a source is exactly one of call, buffer, output, constant, numbers, fill")
        return self


class Target(_Strict):
    """Where an output of a run goes: a buffer, an output of the model, or nowhere."""

    buffer: str | None = None
    output: int | None = Field(default=None, ge=0)


class Run(_Strict):
    """One graph, run once."""

    variant: str
    inputs: dict[str, Source]
    outputs: dict[str, Target]


class Keep(_Strict):
    """A value that is copied into a buffer behind the runs of a step."""

    source: Source
    buffer: str


class Step(_Strict):
    """What one call of the model does."""

    timestep: FiniteFloat
    """As the model sees it."""
    action: str
    """A letter as in the plan's timeline: F full, r reuse, p prediction, t some tokens, c corrected, a combined, s
    skipped, m mixed."""
    runs: tuple[Run, ...] = Field(min_length=1)
    keeps: tuple[Keep, ...] = ()


class VariantInfo(_Strict):
    """One static graph."""

    file: FileInfo
    label: str
    actions: tuple[str, ...] = ()
    """Of each of the manifest's branches; empty for graphs that are no variant of the model."""
    inputs: dict[str, TensorInfo]
    outputs: dict[str, TensorInfo]
    dropped_inputs: tuple[str, ...] = ()
    """Arguments of the model that this graph does not read."""
    reads: tuple[str, ...] = ()
    """Branches and spans whose caches it reads."""
    writes: tuple[str, ...] = ()
    """Branches and spans whose caches it writes; those in both are updated for some tokens."""
    flops: int = Field(ge=0)
    params_bytes: int = Field(ge=0)
    """Bytes of weights that it reads."""
    tokens: int = Field(default=0, ge=0)
    """Most tokens of one sample that are chosen at once (k of its top-k)."""


class CallInput(TensorInfo):
    """An argument of the model that is a tensor."""

    role: Literal["latents", "timestep", "invariant", "varying"]
    """Invariant ones must stay the same in all steps of a stream: the prologue read them once."""


class Call(_Strict):
    """How the model is called."""

    parameters: tuple[str, ...]
    """Names of the arguments of its `forward`, in order."""
    inputs: dict[str, CallInput]
    """By path."""
    constants: dict[str, Any]
    """Arguments that are no tensors; the graphs are right for these values alone."""
    container: str
    """What a call returns: "tuple", "tensor" or a mapping's class."""
    fields: tuple[str, ...] = ()
    computed: tuple[int | None, ...]
    """For each returned value the output of the graph, None where the model returns None."""
    outputs: tuple[TensorInfo, ...]


class ModelInfo(_Strict):
    """The model that was exported."""

    name: str
    """Its class."""
    module: str
    config: dict[str, Any] = Field(default_factory=dict)
    fingerprint: str
    """Hash of its class, its weights (sampled) and its branches, as profiles and plans have it."""
    weights_sha256: Sha256
    """Of all parameters and buffers, by name and bytes."""


class Producer(_Strict):
    """What wrote the bundle."""

    versions: dict[str, str]
    opset: int
    dtype: str


class PolicyInfo(_Strict):
    """Where the plan comes from."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    fingerprint: str
    """Of the calibration."""
    speedup: float
    timeline: str
    notes: tuple[str, ...] = ()


class SamplerState(_Strict):
    """What a scheduler's `set_timesteps` left: with class and configuration, all that it takes to sample alike."""

    num_steps: int = Field(ge=1)
    timesteps: tuple[FiniteFloat, ...]
    """Its own, which a pipeline may scale for the model."""
    sigmas: tuple[FiniteFloat, ...] = ()
    """One more than timesteps, for schedulers that have them."""


class SchedulerInfo(_Strict):
    """The sampler that the steps belong to."""

    name: str = ""
    config: dict[str, Any] = Field(default_factory=dict)
    timesteps: tuple[FiniteFloat, ...] = Field(min_length=1)
    """As the model sees them."""
    state: SamplerState | None = None


class LayerSummary(_Strict):
    """What an engine of TensorRT consists of, as its builder listed it."""

    layers: int = Field(ge=0)
    kinds: dict[str, int]
    """Layers of each kind."""
    matrix_products: int = Field(ge=0)
    """Matrix products of the ONNX graph that are computed in it."""
    attentions: int = Field(ge=0)
    """Attentions (softmaxes) of the ONNX graph that are computed in it."""
    fused_attentions: int = Field(ge=0)
    """Kernels that are a whole attention."""
    scratch_bytes: int = Field(ge=0)
    """Memory of a run beside inputs and outputs."""
    weights_bytes: int = Field(ge=0)


class EngineBuild(_Strict):
    """How one engine was built."""

    key: Sha256
    """Of all that decides what it becomes: graph, weights, builder, options."""
    onnx_sha256: Sha256
    weights_sha256: Sha256
    """Of the weights that the graph reads, in the order in which it names them."""
    seconds: float = Field(ge=0)
    layers: LayerSummary | None = None


class EngineInfo(_Strict):
    """Engines that were built from the bundle for one target."""

    files: dict[str, FileInfo]
    """By variant; one file may hold several."""
    builder: dict[str, Any] = Field(default_factory=dict)
    """Name, version, compute capabilities, flags and limits."""
    builds: dict[str, EngineBuild] = Field(default_factory=dict)
    """By variant."""
    weights: dict[str, Constant] = Field(default_factory=dict)
    """Tensors of the weights' file that the engines are given when they are loaded, by name; where one variant has
    another tensor of this name, by ``variant:name``."""


class Manifest(_Strict):
    """All of a bundle but its tensors.

    Raises: BundleError from `load`, if the file is missing, of another format, or inconsistent.
    """

    format: int
    model: ModelInfo
    producer: Producer
    policy: PolicyInfo
    scheduler: SchedulerInfo
    call: Call
    branches: tuple[str, ...]
    buffers: dict[str, BufferInfo]
    variants: dict[str, VariantInfo]
    prologue: tuple[Run, ...] = ()
    """Runs before the first step of a stream: what step-invariant inputs alone decide."""
    steps: tuple[Step, ...] = Field(min_length=1)
    weights: FileInfo
    constants: dict[str, Constant] = Field(default_factory=dict)
    reference: FileInfo | None = None
    """A generation's first steps: latents and the outputs that the exported model gave in PyTorch."""
    engines: dict[str, EngineInfo] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.format != FORMAT:
            raise ValueError(f"format {self.format} is not known; this omnifx reads format {FORMAT}")
        if tuple(step.timestep for step in self.steps) != self.scheduler.timesteps:
            raise ValueError("the steps and the scheduler's timesteps differ")
        stored = [self.constants, *(engine.weights for engine in self.engines.values())]
        if bad := [name for some in stored for name, c in some.items() if c.offset + c.bytes > self.weights.bytes]:
            raise ValueError(f"constant {bad[0]} lies beyond the end of {self.weights.path}")
        written: set[str] = set()
        for run in self.prologue:
            self._check_run(run, written, set(), "the prologue")
        for k, step in enumerate(self.steps):
            outputs: set[int] = set()
            for run in step.runs:
                self._check_run(run, written, outputs, f"step {k}")
            if missing := [i for i in range(len(self.call.outputs)) if i not in outputs]:
                raise ValueError(f"step {k} computes no output {missing[0]} of the model")
            for keep in step.keeps:
                self._check_buffer(keep.buffer, f"step {k}")
                written.add(keep.buffer)
        return self

    def _check_run(self, run: Run, written: set[str], outputs: set[int], where: str) -> None:
        variant = self.variants.get(run.variant)
        if variant is None:
            raise ValueError(f"{where} runs the variant {run.variant}, which the bundle does not have")
        if run.inputs.keys() != variant.inputs.keys() or run.outputs.keys() != variant.outputs.keys():
            raise ValueError(f"{where} does not feed {run.variant} what it takes")
        for name, source in run.inputs.items():
            if source.buffer is not None:
                self._check_buffer(source.buffer, where)
                if source.buffer not in written:
                    raise ValueError(f"{where} reads the cache {source.buffer} before any step has written it")
                self._check_like(self.buffers[source.buffer], variant.inputs[name], f"{where}, {source.buffer}")
            if source.constant is not None and source.constant not in self.constants:
                raise ValueError(f"{where} reads the constant {source.constant}, which the bundle does not have")
            if source.call is not None and source.call not in self.call.inputs:
                raise ValueError(f"{where} reads the argument {source.call}, which the model does not have")
            if source.output is not None and source.output not in outputs:
                raise ValueError(f"{where} reads output {source.output} before it is computed")
        read = {source.buffer for source in run.inputs.values() if source.buffer is not None}
        for name, target in run.outputs.items():
            if target.buffer is not None:
                self._check_buffer(target.buffer, where)
                if target.buffer in read:
                    raise ValueError(f"{where} writes the cache {target.buffer} while it reads it")
                self._check_like(self.buffers[target.buffer], variant.outputs[name], f"{where}, {target.buffer}")
                written.add(target.buffer)
            if target.output is not None:
                outputs.add(target.output)

    def _check_buffer(self, name: str, where: str) -> None:
        if name not in self.buffers:
            raise ValueError(f"{where} uses the buffer {name}, which the bundle does not have")

    @staticmethod
    def _check_like(a: TensorInfo, b: TensorInfo, where: str) -> None:
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise ValueError(f"{where}: {a.dtype}{list(a.shape)} does not fit {b.dtype}{list(b.shape)}")

    @property
    def stream_bytes(self) -> int:
        """Bytes of all buffers of one stream."""
        return sum(num_bytes(buffer) for buffer in self.buffers.values())

    def files(self, targets: Collection[str] | None = None) -> Iterator[FileInfo]:
        """All files beside the manifest, each once; of engines only those for these targets."""
        found = [self.weights, self.reference, *(variant.file for variant in self.variants.values())]
        for target, engine in self.engines.items():
            if targets is None or target in targets:
                found += engine.files.values()
        yield from dict.fromkeys(file for file in found if file is not None)

    def save(self, folder: Path) -> None:
        """Write the manifest into a folder."""
        text = json.dumps(self.model_dump(mode="json", exclude_defaults=True), indent=1)
        replace_text(folder / MANIFEST, text + "\n")

    @classmethod
    def load(cls, folder: str | Path, *, verify: bool = True, targets: Collection[str] | None = None) -> Self:
        """Read a bundle's manifest; all files must be there, in their sizes, and with `verify` in their bytes.

        Engines for others than `targets` are not looked at; None: all are.

        Raises: BundleError that names the file or field.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        try:
            if path.stat().st_size > MOST_MANIFEST_BYTES:
                raise BundleError(f"{path} is larger than any manifest; this is no bundle.")
            raw = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise BundleError(
                f"{folder} is no bundle: {MANIFEST} cannot be read ({error.strerror}). An export that was interrupted "
                "leaves none; write it anew with `omnifx export`."
            ) from error
        except ValueError as error:
            raise BundleError(f"{path} is not JSON: {error}. Export the bundle anew.") from error
        found = raw.get("format") if isinstance(raw, Mapping) else None
        if isinstance(found, int) and found > FORMAT:
            raise BundleError(
                f"{path} has format {found}, but this omnifx reads format {FORMAT}. Update omnifx, or export it anew."
            )
        try:
            manifest = cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise BundleError(
                f"{path} is not a valid manifest: {f'{where}: ' if where else ''}{first['msg']}. Export it anew."
            ) from error
        for file in manifest.files(targets):
            check_file(folder, file, verify=verify)
        return manifest


def replace_text(path: Path, text: str) -> None:
    """Write a file at once: whoever reads it finds the old text or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def check_file(folder: Path, file: FileInfo, *, verify: bool) -> Path:
    """The path of a bundle's file, after a look at it: it must lie in the folder itself and be what the manifest says.

    Raises: BundleError.
    """
    path = folder / file.path
    if any(part.is_symlink() for part in (path, *path.parents[: len(Path(file.path).parts) - 1])):
        raise BundleError(f"{path} is a link; the files of a bundle must lie in its folder. Copy the file itself.")
    if not path.is_file():
        raise BundleError(f"{path} is missing. Copy the whole folder, or export it anew.")
    if (size := path.stat().st_size) != file.bytes:
        raise BundleError(
            f"{path} has {size:,} bytes, but the manifest says {file.bytes:,}: it was cut off or changed."
        )
    if verify and (digest := sha256_of(path)) != file.sha256:
        raise BundleError(f"{path} was altered: its SHA-256 is {digest[:12]}..., expected {file.sha256[:12]}...")
    return path


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_info(folder: Path, name: str) -> FileInfo:
    """What a manifest says of a file."""
    return FileInfo(path=name, bytes=(folder / name).stat().st_size, sha256=sha256_of(folder / name))


_ITEM_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2}


def num_bytes(info: TensorInfo) -> int:
    """Bytes of a value."""
    count = 1
    for size in info.shape:
        count *= size
    return count * _ITEM_BYTES.get(info.dtype, 1)


def contents(manifest: Manifest) -> str:
    """What a bundle holds, in lines for people."""
    runs = Counter(run.variant for step in manifest.steps for run in step.runs)
    runs.update(run.variant for run in manifest.prologue)
    full = max((variant.flops for variant in manifest.variants.values()), default=0) or 1
    policy, steps = manifest.policy, len(manifest.steps)
    width = max(map(len, manifest.variants))
    lines = [
        f"{manifest.model.name}, {manifest.producer.dtype}: {steps} steps by {policy.name}, "
        f"{policy.speedup:.2f}x fewer FLOPs, {len(manifest.variants)} graphs",
        policy.timeline,
        f"{'graph':<{width}}  {'runs':>5} {'FLOPs':>7} {'weights':>12} {'file':>12}",
    ]
    owners = Counter(variant.file.path for variant in manifest.variants.values())
    for name, variant in manifest.variants.items():
        file = _mib(variant.file.bytes) if owners[variant.file.path] == 1 else variant.file.path
        lines.append(
            f"{name:<{width}}  {runs[name]:>5} {variant.flops / full:>7.1%} {_mib(variant.params_bytes):>12} {file:>12}"
        )
    for target, engines in manifest.engines.items():
        files = dict.fromkeys(engines.files.values())
        total, made = _mib(sum(file.bytes for file in files)), engines.builder
        where = ", ".join(made.get("compute_capabilities", ())) or "any that its runtime supports"
        lines.append(f"engines for {target} {made.get('version', '')}: {len(engines.files)}, {total}, compute {where}")
    shared, stream = _mib(manifest.weights.bytes), _mib(manifest.stream_bytes)
    return "\n".join([*lines, f"{manifest.weights.path}: {shared}, shared by all; buffers of one stream: {stream}"])


def _mib(number: int) -> str:
    return f"{number / 2**20:,.2f} MiB"


def json_schema() -> dict[str, Any]:
    """The JSON schema of manifests, as docs/bundle.schema.json holds it."""
    return Manifest.model_json_schema()


__all__ = [
    "FORMAT",
    "BufferInfo",
    "Call",
    "CallInput",
    "Constant",
    "EngineBuild",
    "EngineInfo",
    "FileInfo",
    "Keep",
    "LayerSummary",
    "Manifest",
    "ModelInfo",
    "PolicyInfo",
    "Producer",
    "Run",
    "SamplerState",
    "SchedulerInfo",
    "Source",
    "Step",
    "Target",
    "TensorInfo",
    "VariantInfo",
    "check_file",
    "contents",
    "file_info",
    "json_schema",
    "num_bytes",
    "replace_text",
]
