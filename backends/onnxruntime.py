"""Run a bundle's graphs in onnxruntime: values are handed over by pointer, on whatever device they are.

All sessions map the same file of weights. A run binds its inputs and outputs to memory that the caller owns, so caches
are never copied, and never leave the device.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnifx.errors import BundleError

_ONNX_TYPES = {
    torch.float32: 1, torch.uint8: 2, torch.int8: 3, torch.int16: 5, torch.int32: 6, torch.int64: 7, torch.bool: 9,
    torch.float16: 10, torch.float64: 11, torch.bfloat16: 16,
}  # fmt: skip
"""Numbers of `onnx.TensorProto.DataType`."""


class OnnxRuntime:
    """Sessions of the graphs of one bundle.

    Args:
        files: The ONNX file of each graph, by name; they lie in one folder with the weights.
        device: "cpu" or a CUDA device.
        providers: Execution providers of onnxruntime; None: CUDA's on a CUDA device, the CPU's otherwise.
        options: A `SessionOptions` of onnxruntime for all sessions.
        most_sessions: Sessions that are open at once, opened when they are needed; None: all, from the start.

    Raises: BundleError if onnxruntime is missing, lacks the device, or refuses a graph.
    Memory: on the CPU, onnxruntime packs weights anew for its matrix products; with the session option
        ``session.disable_prepacking`` they stay mapped from the file, which each session does for itself.
    """

    def __init__(
        self,
        files: Mapping[str, Path],
        *,
        device: torch.device,
        providers: Sequence[Any] | None = None,
        options: Any | None = None,
        most_sessions: int | None = None,
    ) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise BundleError(
                "load_bundle: onnxruntime is missing. pip install 'omnifx[onnx]', or 'omnifx[gpu]' on a GPU."
            ) from error
        self.device = device
        self._kind, self._index = device.type, device.index or 0
        if providers is None:
            providers = [("CUDAExecutionProvider", {"device_id": self._index})] if device.type == "cuda" else []
            providers = [*providers, "CPUExecutionProvider"]
        names = [each if isinstance(each, str) else each[0] for each in providers]
        if missing := [name for name in names if name not in onnxruntime.get_available_providers()]:
            raise BundleError(
                f"load_bundle: this onnxruntime has no {missing[0]}, only {onnxruntime.get_available_providers()}. "
                "pip install 'omnifx[gpu]' instead of 'omnifx[onnx]', or give another device."
            )
        self._files, self._options, self._providers = dict(files), options, list(providers)
        self._most = len(files) if most_sessions is None else most_sessions
        self._lock = threading.Lock()
        self._sessions: dict[str, Any] = {}  # the one longest unused first
        for name in files if most_sessions is None else ():
            self._session(name)

    def _session(self, name: str) -> Any:
        import onnxruntime

        with self._lock:
            session = self._sessions.pop(name, None)
            if session is None:
                while len(self._sessions) >= self._most:
                    del self._sessions[next(iter(self._sessions))]
                path = self._files[name]
                try:
                    session = onnxruntime.InferenceSession(path, self._options, providers=self._providers)
                except Exception as error:
                    raise BundleError(f"load_bundle: onnxruntime refuses {path.name}: {error}") from error
            self._sessions[name] = session
            return session

    def run(self, name: str, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor | None]) -> None:
        """Run a graph once. Inputs are contiguous; outputs are written where they are, None ones are not kept."""
        session = self._session(name)
        binding = session.io_binding()
        for key, value in inputs.items():
            binding.bind_input(
                key, self._kind, self._index, _ONNX_TYPES[value.dtype], list(value.shape), value.data_ptr()
            )
        for key, given in outputs.items():
            if given is None:
                binding.bind_output(key, self._kind, self._index)
            else:
                binding.bind_output(
                    key, self._kind, self._index, _ONNX_TYPES[given.dtype], list(given.shape), given.data_ptr()
                )
        if self._kind == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # onnxruntime runs on a stream of its own
        session.run_with_iobinding(binding)
        if self._kind == "cuda":
            binding.synchronize_outputs()


__all__ = ["OnnxRuntime"]
