"""Build engines into a bundle: one for each graph, each at once, and again only where something changed.

An engine is built into a file beside its place and moved there; `build.json` then says what it was built from. The
manifest lists a target when all of its engines are there. So a build that was killed leaves a bundle that loads, and
the next one goes on where it ended.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from omnifx.backends.tensorrt import (
    BuildOptions,
    EngineBuilder,
    Source,
    command_line,
    parse_capabilities,
    read_source,
)
from omnifx.backends.tensorrt_library import EngineTarget
from omnifx.backends.tensorrt_progress import BuildProgress
from omnifx.bundle import EngineBuild, EngineInfo, FileInfo, Manifest, check_file, file_info, replace_text
from omnifx.errors import BundleError, ConfigError
from omnifx.options import parse_bytes

ENGINES = "engines"
"""The folder in a bundle that holds engines, in a folder for each target."""
RECORD = "build.json"
COMMANDS = "commands.txt"


def build_options(
    target: EngineTarget,
    *,
    compute_capabilities: str | Sequence[str] = (),
    workspace: int | str | None = None,
    timing_cache: str | Path | None = None,
) -> BuildOptions:
    """What `build_engines` is asked for, looked at. Raises ConfigError."""
    text = compute_capabilities if isinstance(compute_capabilities, str) else ",".join(compute_capabilities)
    try:
        most = parse_bytes(workspace) if workspace is not None else None
    except ValueError as error:
        raise ConfigError(f"build: workspace: {error}.") from error
    cache = Path(timing_cache) if timing_cache is not None else None
    if cache is not None and not cache.absolute().parent.is_dir():
        raise ConfigError(f"build: the folder of {cache} is not there. Make it first.")
    return BuildOptions(
        target=target,
        compute_capabilities=parse_capabilities(text) if text.strip() else (),
        workspace=most,
        timing_cache=cache,
    )


def require_builder(target: EngineTarget, **options: Any) -> None:
    """Raise ConfigError or ExportError unless engines can be built here; options are those of `build_engines`."""
    EngineBuilder(build_options(target, **options), BuildProgress(Console(stderr=True), False))


def build_engines(
    directory: str | Path,
    target: EngineTarget,
    *,
    compute_capabilities: str | Sequence[str] = (),
    workspace: int | str | None = None,
    timing_cache: str | Path | None = None,
    progress: bool = True,
) -> Manifest:
    """Build the engines of a bundle for one target; other targets' stay as they are.

    Engines whose graph, weights, builder and options are as they were are not built again.

    Args:
        directory: A bundle, as `omnifx.export` wrote it.
        target: "tensorrt-rtx", which needs no GPU, or "tensorrt", for the GPU of this machine.
        compute_capabilities: TensorRT-RTX: of the GPUs that will run them, such as "86,89,120" or ["8.9"]; empty: what
            its engines run on by default (8.6 and newer of GeForce and RTX).
        workspace: Most bytes that a layer may use beside its values, such as "4GiB"; None: no limit.
        timing_cache: TensorRT: a file of measured times, read and written.
        progress: Whether to show what is built.

    Returns: The manifest, with the engines in it.
    Raises: ConfigError for options out of range; ExportError if the package or the GPU is missing, or a graph cannot be
        built; BundleError if the directory is no bundle, or is being built by another process.
    Memory: on the host, up to twice the largest graph's weights.
    """
    folder = Path(directory)
    options = build_options(
        target, compute_capabilities=compute_capabilities, workspace=workspace, timing_cache=timing_cache
    )
    manifest = Manifest.load(folder, targets=())  # engines that were altered are built again
    if other := [
        variant.file.path for variant in manifest.variants.values() if not variant.file.path.endswith(".onnx")
    ]:
        raise ConfigError(f"build: engines are built from ONNX, but the bundle holds {other[0]}. Export it as ONNX.")
    shown = BuildProgress(Console(stderr=True), progress)
    builder = EngineBuilder(options, shown)
    with _alone(folder):
        return _Build(folder, manifest, builder, shown).run()


class _Build:
    """One build of a bundle's engines."""

    def __init__(self, folder: Path, manifest: Manifest, builder: EngineBuilder, progress: BuildProgress) -> None:
        self.folder, self.manifest, self.builder, self.progress = folder, manifest, builder, progress
        self.options = builder.options
        self.place = Path(ENGINES) / self.options.target
        (folder / self.place).mkdir(parents=True, exist_ok=True)
        before = self._record()
        self.sources = {
            name: read_source(folder / variant.file.path, variant.file.sha256)
            for name, variant in manifest.variants.items()
        }
        self.keys = {name: _key(source, builder.description) for name, source in self.sources.items()}
        kept = [name for name in manifest.variants if self._is_current(name, before)]
        self.info = EngineInfo(
            files={name: before.files[name] for name in kept},
            builder=builder.description,
            builds={name: before.builds[name] for name in kept},
        )

    def run(self) -> Manifest:
        """Build what is missing, and list all in the manifest."""
        missing = [name for name in self.manifest.variants if name not in self.info.files]
        if missing and self.options.target in self.manifest.engines:
            self._list(None)  # its files are about to be replaced
        with self.progress.running(len(missing)):
            for number, name in enumerate(missing, start=1):
                self.progress.engine(name, number)
                self._build(name)
                self.progress.done(name, number, _said(self.info, name))
        self._clean()
        lines = [
            command_line(self.options, Path(variant.file.path), self._engine(name))
            for name, variant in self.manifest.variants.items()
        ]
        about = "# From the bundle's folder: the same engines with NVIDIA's own tool. These lines were never run.\n"
        replace_text(self.folder / self.place / COMMANDS, about + "\n".join(lines) + "\n")
        self._save_record()
        return self._list(self.info)

    def _build(self, name: str) -> None:
        variant, source = self.manifest.variants[name], self.sources[name]
        path = self._engine(name)
        built = self.builder.build(
            self.folder / variant.file.path,
            self.folder / path,
            inputs=variant.inputs,
            outputs=variant.outputs,
            operators=source.operators,
        )
        build = EngineBuild(
            key=self.keys[name],
            onnx_sha256=source.onnx_sha256,
            weights_sha256=source.weights_sha256,
            seconds=round(built.seconds, 3),
            layers=built.summary,
        )
        order = list(self.manifest.variants)
        files = {**self.info.files, name: file_info(self.folder, path.as_posix())}
        builds = {**self.info.builds, name: build}
        self.info = self.info.model_copy(
            update={"files": _sorted(files, order), "builds": _sorted(builds, order)},
        )
        self._save_record()

    def _engine(self, name: str) -> Path:
        return self.place / f"{name}.engine"

    def _is_current(self, name: str, before: EngineInfo) -> bool:
        """Whether an engine that is there is what would be built."""
        file, build = before.files.get(name), before.builds.get(name)
        if file is None or build is None or build.key != self.keys[name] or file.path != self._engine(name).as_posix():
            return False
        try:
            check_file(self.folder, file, verify=True)
        except BundleError:
            return False
        return True

    def _record(self) -> EngineInfo:
        """What an earlier build left, whether it came to its end or not."""
        path = self.folder / self.place / RECORD
        try:
            return EngineInfo.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, ValidationError):
            return EngineInfo(files={})

    def _save_record(self) -> None:
        text = json.dumps(self.info.model_dump(mode="json"), indent=1)
        replace_text(self.folder / self.place / RECORD, text + "\n")

    def _list(self, info: EngineInfo | None) -> Manifest:
        """Write the manifest with these engines of the target, or without any."""
        engines = {name: each for name, each in self.manifest.engines.items() if name != self.options.target}
        if info is not None:
            engines[self.options.target] = info
        if engines != self.manifest.engines:
            self.manifest = self.manifest.model_copy(update={"engines": engines})
            self.manifest.save(self.folder)
        return self.manifest

    def _clean(self) -> None:
        """Remove engines of graphs that the bundle no longer has, and what interrupted builds left."""
        known = {self._engine(name).name for name in self.manifest.variants}
        for path in (self.folder / self.place).iterdir():
            if path.name not in known and path.name.endswith((".engine", ".engine.partial")):
                path.unlink()


def _key(source: Source, builder: Mapping[str, Any]) -> str:
    text = json.dumps([source.onnx_sha256, source.weights_sha256, builder], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _sorted(found: Mapping[str, Any], order: Sequence[str]) -> dict[str, Any]:
    return {name: found[name] for name in order if name in found}


def _said(info: EngineInfo, name: str) -> str:
    """What came of one engine, for a line of progress."""
    file: FileInfo = info.files[name]
    build = info.builds[name]
    text = f"{file.bytes / 2**20:,.2f} MiB in {build.seconds:.1f} s"
    if (layers := build.layers) is None:
        return text
    return f"{text}, {layers.layers} layers, {layers.matrix_products} matrix products, {layers.attentions} attentions"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While this process builds in a folder, no other does. The lock ends with the process, however it ends."""
    import fcntl  # here, so that omnifx imports where there is none

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BundleError(f"build: another process builds engines in {folder}. Wait until it ends.") from error
        yield
    finally:
        os.close(handle)


__all__ = ["COMMANDS", "ENGINES", "RECORD", "build_engines", "build_options", "require_builder"]
