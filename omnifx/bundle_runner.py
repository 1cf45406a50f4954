"""Run a bundle in a model's place: each call is one step of one stream, told by its timestep and inputs.

A stream is one of the calls of a step that have their own conditioning (guidance makes two), in one generation. Its
first call runs the prologue and owns buffers from then on; its last one frees them. Nothing is guessed: a timestep that
is not the next one of any stream, or inputs that changed amid a generation, are refused.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from omnifx.bundle import Manifest, Run, Source, TensorInfo, num_bytes
from omnifx.clock import Watched, close, mark, marked_for, shown
from omnifx.errors import BundleError
from omnifx.export_capture import difference, leaves_of_call

MOST_STREAMS = 32
"""Streams that may be under way at once; of more, the one longest unused is forgotten."""


class Engine(Protocol):
    """Runs the graphs of a bundle; may be called from several threads."""

    device: torch.device

    def run(self, name: str, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor | None]) -> None:
        """Run a graph once; outputs are written into the tensors that are given."""


@dataclass
class BundleStats:
    """What ran so far."""

    runs: Counter[str] = field(default_factory=Counter)
    """How often each graph ran."""
    calls: int = 0
    generations: int = 0
    """Streams that reached their last step."""
    live_streams: int = 0
    held_bytes: int = 0
    """Bytes of the buffers of the streams under way."""
    evicted: int = 0
    """Streams that were forgotten before their end, because there were too many."""


@dataclass
class _Stream:
    mark: object
    context: str
    fixed: dict[str, Watched]
    latents: Tensor
    """Some of the last call's elements."""
    step: int = -1
    buffers: dict[str, Tensor] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


class BundleRunner:
    """A bundle with the calling convention of the model that it was made from.

    Several generations may run at once, from any threads: each stream has its own buffers. Two that cannot be told
    apart by their inputs are told apart by ``with runner.generation():``, or by their latents.

    Args:
        manifest: What `Manifest.load` gave.
        engine: Runs the graphs.
        constants: The tensors of the manifest's constants, on the engine's device.
        folder: Where the bundle lies, for `check`.
        max_streams: Streams that may be under way at once.

    Memory: `Manifest.stream_bytes` for each stream under way.
    """

    def __init__(
        self,
        manifest: Manifest,
        engine: Engine,
        constants: Mapping[str, Tensor],
        *,
        folder: Path | None = None,
        max_streams: int = MOST_STREAMS,
    ) -> None:
        self.manifest = manifest
        self.engine = engine
        self.folder = folder
        self.max_streams = max_streams
        self.config = SimpleNamespace(**manifest.model.config)
        self._constants = dict(constants)
        self._streams: OrderedDict[int, _Stream] = OrderedDict()
        self._numbers = itertools.count()
        self._fills: dict[tuple[Any, ...], Tensor] = {}
        self._lock = threading.RLock()
        self._contexts = threading.local()
        self._stats = BundleStats()
        call = manifest.call
        self._latents = next((name for name, info in call.inputs.items() if info.role == "latents"), None)
        self._times = [name for name, info in call.inputs.items() if info.role == "timestep"]
        self._fixed = [name for name, info in call.inputs.items() if info.role == "invariant"]

    # -- what pipelines ask of a model ---------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """The type of the model's weights."""
        return _dtype(self.manifest.producer.dtype)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.engine.device

    def eval(self) -> BundleRunner:
        """Nothing: a bundle only infers."""
        return self

    @contextlib.contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Tells the streams of a step apart by name, as pipelines of diffusers do."""
        before = getattr(self._contexts, "name", "")
        self._contexts.name = name
        try:
            yield
        finally:
            self._contexts.name = before

    @contextlib.contextmanager
    def generation(self) -> Iterator[None]:
        """The calls inside, in this thread or task, are one generation."""
        with mark(self, None) as token:
            try:
                yield
            finally:
                with self._lock:
                    for key in [key for key, stream in self._streams.items() if stream.mark is token]:
                        del self._streams[key]

    @property
    def stats(self) -> BundleStats:
        """What ran so far."""
        with self._lock:
            live = len(self._streams)
            held = sum(t.numel() * t.element_size() for s in self._streams.values() for t in s.buffers.values())
            return BundleStats(
                Counter(self._stats.runs),
                self._stats.calls,
                self._stats.generations,
                live,
                held,
                self._stats.evicted,
            )

    def expect(self, timesteps: Sequence[float] | Tensor) -> None:
        """Raise BundleError unless a sampler's timesteps, as the model sees them, are the bundle's."""
        given = [float(t) for t in timesteps]
        known = self.manifest.scheduler.timesteps
        if len(given) != len(known) or not all(map(close, given, known)):
            raise BundleError(
                f"{self._name}: the sampler has {len(given)} timesteps {shown(given)}, but the bundle was made for "
                f"{len(known)}: {shown(known)}. Set the sampler up in the same way, or export for its timesteps."
            )

    # -- calls ---------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One step of one stream.

        Raises: BundleError for arguments, shapes or timesteps that the bundle was not made for.
        """
        leaves, wants_mapping = self._arguments(args, kwargs)
        stream = self._stream_of(leaves)
        with stream.lock:
            outputs = self._step(stream, leaves)
        with self._lock:
            self._stats.calls += 1
            if stream.step + 1 == len(self.manifest.steps):
                self._stats.generations += 1
                self._streams = OrderedDict((k, s) for k, s in self._streams.items() if s is not stream)
        return self._returned(outputs, wants_mapping)

    forward = __call__

    def check(self) -> float:
        """Replay the bundle's reference; returns the largest difference, relative to the outputs' norms.

        Raises: BundleError if the bundle has none.
        """
        from safetensors.torch import load_file

        reference = self.manifest.reference
        if reference is None or self.folder is None:
            raise BundleError(f"{self._name}: the bundle holds no reference. Export it anew.")
        stored = load_file(self.folder / reference.path, device=str(self.device))
        steps = sum(name.startswith("output.") for name in stored) // len(self.manifest.call.outputs)
        return max(
            difference(value, stored[f"output.{k}.{i}"])
            for k, outputs in enumerate(self.replay(stored, steps))
            for i, value in enumerate(outputs)
        )

    def replay(self, stored: Mapping[str, Tensor], steps: int) -> Iterator[list[Tensor]]:
        """The outputs of the first steps on stored arguments, as a reference holds them."""
        stream = _Stream(None, "", {}, torch.empty(0))
        for k in range(steps):
            stream.step = k
            yield self._step(stream, reference_leaves(self.manifest, stored, k))

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Tensor], bool]:
        call = self.manifest.call
        if len(args) > len(call.parameters):
            raise BundleError(f"{self._name} takes {len(call.parameters)} arguments, got {len(args)}.")
        given = {**dict(zip(call.parameters, args, strict=False)), **kwargs}
        wants_mapping = bool(given.pop("return_dict", True)) and "return_dict" in call.parameters
        leaves = leaves_of_call(given)
        found: dict[str, Tensor] = {}
        for name, info in call.inputs.items():
            value = leaves.pop(name, None)
            if isinstance(value, int | float) and info.role == "timestep":
                value = torch.full(info.shape, value, dtype=_dtype(info.dtype), device=self.device)
            if not isinstance(value, Tensor):
                raise BundleError(f"{self._name}: the argument {name} is missing; the bundle was made with it.")
            if info.role == "timestep" and value.dim() == 0:
                value = value.expand(info.shape)
            if tuple(value.shape) != info.shape:
                raise BundleError(
                    f"{self._name}: {name} has the shape {list(value.shape)}, but the bundle was made for "
                    f"{list(info.shape)}. Export one for this size."
                )
            if value.device.type != self.device.type:
                raise BundleError(f"{self._name}: {name} is on {value.device}, but the bundle runs on {self.device}.")
            found[name] = value.detach().to(_dtype(info.dtype)).contiguous()
        for name in [name for name, value in call.constants.items() if value is not None and name not in leaves]:
            raise BundleError(
                f"{self._name}: {name} is missing, but the bundle was made with {call.constants[name]!r}. Pass that."
            )
        for name, value in leaves.items():
            if name in call.constants and call.constants[name] == value:
                continue
            if value is None and name not in call.constants:
                continue
            raise BundleError(
                f"{self._name}: {name} is {_described(value)}, but the bundle was made with "
                f"{call.constants.get(name, 'no such argument')!r}. Export it with this value."
            )
        return found, wants_mapping

    def _stream_of(self, leaves: Mapping[str, Tensor]) -> _Stream:
        """The stream whose next step a call is, at that step."""
        time = self._timestep(leaves)
        fixed = {name: Watched.of(leaves[name]) for name in self._fixed}
        token, context = marked_for(self), getattr(self._contexts, "name", "")
        sample = _sampled(leaves[self._latents]) if self._latents is not None else torch.empty(0)
        steps = self.manifest.steps
        with self._lock:
            fitting = [
                (key, stream)
                for key, stream in self._streams.items()
                if stream.mark is token
                and stream.context == context
                and stream.step + 1 < len(steps)
                and close(steps[stream.step + 1].timestep, time)
                and all(stream.fixed[name].same(watched) for name, watched in fixed.items())
            ]
            if not fitting:
                if not close(steps[0].timestep, time):
                    raise BundleError(self._why_not(time, token, context, fixed, sample))
                key, stream = next(self._numbers), _Stream(token, context, fixed, sample)
            else:
                key, stream = self._nearest(fitting, sample)
            self._streams[key] = stream
            self._streams.move_to_end(key)
            while len(self._streams) > self.max_streams:
                self._streams.popitem(last=False)
                self._stats.evicted += 1
            stream.step += 1
            stream.latents, stream.fixed = sample, fixed
            return stream

    def _timestep(self, leaves: Mapping[str, Tensor]) -> float:
        values = [float(v) for name in self._times for v in leaves[name].reshape(-1).tolist()]
        if any(not close(value, values[0]) for value in values):
            raise BundleError(
                f"{self._name}: the timesteps of a call differ ({shown(values)}); a bundle has one for all samples."
            )
        return values[0]

    def _nearest(self, fitting: list[tuple[int, _Stream]], sample: Tensor) -> tuple[int, _Stream]:
        """Of streams with equal inputs, the one whose latents are nearest: those of another are far away."""
        moves = sorted((float((sample - s.latents).norm()), key) for key, s in fitting)
        if len(moves) > 1 and not moves[0][0] * 4 < moves[1][0]:
            raise BundleError(
                f"{self._name}: {len(moves)} generations with equal inputs fit this call. Mark them: with "
                "runner.generation(): ..."
            )
        return moves[0][1], dict(fitting)[moves[0][1]]

    def _why_not(self, time: float, token: object, context: str, fixed: Mapping[str, Watched], sample: Tensor) -> str:
        """Why a call is no step of any stream."""
        known = self.manifest.scheduler.timesteps
        at = next((k for k, timestep in enumerate(known) if close(timestep, time)), None)
        if at is None:
            return (
                f"{self._name}: the timestep {time:g} is none of the bundle's {len(known)}: {shown(known)}. Set the "
                "sampler up as it was exported, or export for its timesteps."
            )
        waiting = [s for s in self._streams.values() if s.mark is token and s.context == context and s.step + 1 == at]
        for stream in waiting:
            changed = [name for name, watched in fixed.items() if not stream.fixed[name].same(watched)]
            near = float((sample - stream.latents).norm()) < 0.7 * float(stream.latents.norm())
            if changed and near:
                return (
                    f"{self._name}: {changed[0]} changed amid a generation (step {at}, timestep {time:g}); the bundle "
                    "takes it as the same in all steps. Export with varying_inputs=[...] if it is meant to change."
                )
        return (
            f"{self._name}: timestep {time:g} is step {at}, but no generation with these inputs is at step {at - 1}. "
            f"Begin with timestep {known[0]:g}, and leave no step out."
        )

    # -- one step ------------------------------------------------------------------------------------------------------

    def _step(self, stream: _Stream, leaves: Mapping[str, Tensor]) -> list[Tensor]:
        step = self.manifest.steps[stream.step]
        if stream.step == 0:
            stream.buffers = {name: self._empty(info) for name, info in self.manifest.buffers.items()}
            for run in self.manifest.prologue:
                self._run(run, stream, leaves, {})
        outputs: dict[int, Tensor] = {}
        for run in step.runs:
            self._run(run, stream, leaves, outputs)
        for keep in step.keeps:
            info = self.manifest.buffers[keep.buffer]
            stream.buffers[keep.buffer].copy_(self._value(keep.source, info, stream, leaves, outputs))
        return [outputs[i] for i in range(len(self.manifest.call.outputs))]

    def _run(self, run: Run, stream: _Stream, leaves: Mapping[str, Tensor], outputs: dict[int, Tensor]) -> None:
        variant = self.manifest.variants[run.variant]
        inputs = {
            name: self._value(source, variant.inputs[name], stream, leaves, outputs)
            for name, source in run.inputs.items()
        }
        written: dict[str, Tensor | None] = {}
        for name, target in run.outputs.items():
            if target.buffer is not None:
                written[name] = stream.buffers[target.buffer]
            elif target.output is not None:
                written[name] = outputs[target.output] = self._empty(variant.outputs[name])
            else:
                written[name] = None
        self.engine.run(run.variant, inputs, written)
        with self._lock:
            self._stats.runs[run.variant] += 1

    def _value(
        self,
        source: Source,
        info: TensorInfo,
        stream: _Stream,
        leaves: Mapping[str, Tensor],
        outputs: Mapping[int, Tensor],
    ) -> Tensor:
        if source.call is not None:
            return leaves[source.call]
        if source.buffer is not None:
            return stream.buffers[source.buffer]
        if source.output is not None:
            return outputs[source.output]
        if source.constant is not None:
            return self._constants[source.constant]
        key = (source.numbers, source.fill, info.shape, info.dtype)
        with self._lock:
            if key not in self._fills:
                dtype = _dtype(info.dtype)
                self._fills[key] = (
                    torch.tensor(source.numbers, dtype=dtype, device=self.device)
                    if source.numbers is not None
                    else torch.full(info.shape, source.fill or 0.0, dtype=dtype, device=self.device)
                )
                if self.device.type == "cuda":  # generations on other CUDA streams read it, too
                    torch.cuda.current_stream(self.device).synchronize()
            return self._fills[key]

    def _empty(self, info: TensorInfo) -> Tensor:
        return torch.empty(info.shape, dtype=_dtype(info.dtype), device=self.device)

    def _returned(self, outputs: list[Tensor], wants_mapping: bool) -> Any:
        call = self.manifest.call
        values = [outputs[i] if i is not None else None for i in call.computed]
        if wants_mapping:
            from diffusers.models.modeling_outputs import Transformer2DModelOutput

            return Transformer2DModelOutput(sample=values[0])
        if call.container == "tensor":
            return values[0]
        return dict(zip(call.fields, values, strict=True)) if call.fields else tuple(values)

    @property
    def _name(self) -> str:
        return f"the bundle of {self.manifest.model.name}"


def reference_leaves(manifest: Manifest, stored: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """The arguments of step `k` of a bundle's reference."""
    leaves = {}
    for name, info in manifest.call.inputs.items():
        value = stored.get(f"input.{k}.{name}", stored.get(f"input.{name}"))
        if info.role == "timestep":
            like = stored[f"input.{name}"]
            value = torch.full_like(like, manifest.steps[k].timestep)
        assert value is not None  # the exporter stored every argument
        leaves[name] = value
    return leaves


def read_constants(manifest: Manifest, folder: Path, device: torch.device) -> dict[str, Tensor]:
    """The tensors of the manifest's constants; equal ones share memory."""
    path = folder / manifest.weights.path
    known: dict[tuple[int, str, tuple[int, ...]], Tensor] = {}
    found = {}
    with path.open("rb") as file:
        for name, info in manifest.constants.items():
            if info.bytes != num_bytes(info):
                raise BundleError(f"{path}: the constant {name} has {info.bytes} bytes, expected {num_bytes(info)}.")
            key = (info.offset, info.dtype, info.shape)
            if key not in known:
                file.seek(info.offset)
                raw = bytearray(file.read(info.bytes))
                empty = torch.empty(info.shape, dtype=_dtype(info.dtype))
                known[key] = (
                    torch.frombuffer(raw, dtype=empty.dtype).reshape(info.shape).to(device) if raw else empty.to(device)
                )
            found[name] = known[key]
    return found


def _dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


def _sampled(latents: Tensor) -> Tensor:
    """Up to 256 elements, evenly spread."""
    flat = latents.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // 256)][:256].float().cpu()


def _described(value: object) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


__all__ = ["BundleRunner", "BundleStats", "Engine", "read_constants", "reference_leaves"]
