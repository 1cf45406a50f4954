"""Load a bundle: look at its files, open a runtime on them, and give a runner in the model's place."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import torch

from omnifx.backends.aoti_runtime import AotiRuntime
from omnifx.backends.onnxruntime import OnnxRuntime
from omnifx.backends.tensorrt_library import LIBRARIES
from omnifx.backends.tensorrt_runtime import TensorRTRuntime
from omnifx.bundle import Manifest
from omnifx.bundle_runner import MOST_STREAMS, BundleRunner, Engine, read_constants
from omnifx.errors import BundleError, ConfigError

Runtime = Literal["onnxruntime", "tensorrt", "tensorrt-rtx", "aoti"]


def load_bundle(
    directory: str | Path,
    *,
    runtime: Runtime = "onnxruntime",
    device: str | torch.device | None = None,
    verify: bool = True,
    max_streams: int = MOST_STREAMS,
    **options: Any,
) -> BundleRunner:
    """Load an exported bundle; the result is called as the model was.

    Args:
        directory: What `omnifx.export` wrote.
        runtime: "onnxruntime"; "tensorrt", "tensorrt-rtx", whose engines `omnifx build` put into the bundle; or "aoti"
            for what was exported with that target.
        device: Where to run: "cpu", or a CUDA device; None: "cuda" for engines, "cpu" otherwise.
        verify: Whether to hash every file; sizes are always looked at.
        max_streams: Streams (calls of a step, of all generations) that may be under way at once.
        options: Of the runtime: `providers`, `options` (a `SessionOptions`) and `most_sessions` of onnxruntime;
            `cuda_graphs`, `runtime_cache`, `max_lanes` of TensorRT, see
            `omnifx.backends.tensorrt_runtime.TensorRTRuntime`; `num_runners` of aoti.

    Raises: BundleError if anything is missing, altered, of a future format or inconsistent; nothing was loaded then.
    Memory: the weights, as the runtime holds them, and `Manifest.stream_bytes` for each stream under way.
    """
    if runtime not in get_args(Runtime):
        known = ", ".join(map(repr, get_args(Runtime)))
        raise ConfigError(f"load_bundle: runtime must be one of {known}, got {runtime!r}.")
    if not isinstance(max_streams, int) or max_streams < 1:
        raise ConfigError(f"load_bundle: max_streams must be a number >= 1, got {max_streams!r}.")
    folder = Path(directory)
    manifest = Manifest.load(folder, verify=verify, targets=(runtime,))
    place = torch.device(device if device is not None else "cuda" if runtime in LIBRARIES else "cpu")
    return open_bundle(folder, manifest, runtime=runtime, device=place, max_streams=max_streams, **options)


def open_bundle(
    folder: Path,
    manifest: Manifest,
    *,
    runtime: Runtime,
    device: torch.device,
    max_streams: int = MOST_STREAMS,
    **options: Any,
) -> BundleRunner:
    """A runner for a bundle whose files were looked at."""
    engine: Engine
    if runtime == "tensorrt" or runtime == "tensorrt-rtx":
        engine = TensorRTRuntime(folder, manifest, runtime, device=device, **options)
    elif runtime == "aoti":
        engine = AotiRuntime(folder, manifest, device=device, **options)
    else:
        files = {name: folder / variant.file.path for name, variant in manifest.variants.items()}
        if "aoti" in manifest.engines and any(path.suffix != ".onnx" for path in files.values()):
            raise BundleError(
                f"{folder} holds no ONNX graphs; it was exported for 'aoti'. Load it with runtime='aoti'."
            )
        engine = OnnxRuntime(files, device=device, **options)
    constants = read_constants(manifest, folder, engine.device)
    return BundleRunner(manifest, engine, constants, folder=folder, max_streams=max_streams)


def own_runtime(manifest: Manifest) -> Runtime:
    """The runtime that a bundle was exported for."""
    return "aoti" if "aoti" in manifest.engines else "onnxruntime"


__all__ = ["load_bundle", "open_bundle", "own_runtime"]
