"""What this machine can do, what it cannot, why not, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import platformdirs
import torch

State = Literal["ok", "optional", "problem"]

_COMPILE = """
import time, torch
def f(x):
    return torch.nn.functional.gelu(x @ x.T).sum(1)
device = "cuda" if torch.cuda.is_available() else "cpu"
x = torch.ones(32, 32, device=device)
start = time.perf_counter()
y = torch.compile(f)(x)
print("seconds", time.perf_counter() - start)
assert torch.allclose(y, f(x), rtol=1e-4)
"""
_COMPILE_TIMEOUT_S = 300


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `advice` is empty where there is nothing to do."""

    subject: str
    state: State
    detail: str
    advice: str = ""


def examine(*, compiles: bool = True) -> list[Finding]:
    """Look at this machine.

    Args:
        compiles: Whether to compile a small function with Inductor, in a process and folder of its own.
    """
    findings = [_python(), _torch(), _cuda(), _compiler(), _python_headers()]
    if compiles:
        findings.append(_inductor())
    findings += [_package("diffusers", needed=True), _package("onnx", extra="onnx"), _onnxruntime()]
    findings += [
        _package("tensorrt", extra="tensorrt", only_gpu=True),
        _package("tensorrt_rtx", extra="tensorrt-rtx"),
    ]
    return [*findings, _user_cache(), _memory()]


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return Finding("Python", "ok", found)


def _torch() -> Finding:
    version = str(torch.__version__)
    minor = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    found = f"{version}, {torch.get_num_threads()} threads"
    if not (2, 11) <= minor < (2, 14):
        return Finding("torch", "problem", found, "supported are 2.11 to 2.13; others may capture other graphs")
    return Finding("torch", "ok", found)


def _cuda() -> Finding:
    if torch.version.cuda is None:
        found = "this build of torch is without CUDA: models run on the CPU"
        return Finding("CUDA", "optional", found, "with an NVIDIA GPU, install a CUDA build of torch")
    if not torch.cuda.is_available():
        found = f"torch is built for CUDA {torch.version.cuda}, but no device answers"
        return Finding("CUDA", "problem", found, "look at nvidia-smi")
    major, minor = torch.cuda.get_device_capability()
    names = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()} (compute {major}.{minor})"
    names += f", CUDA {torch.version.cuda}"
    if (major, minor) < (7, 0):
        return Finding("CUDA", "problem", names, "Inductor's Triton needs compute 7.0 or newer")
    return Finding("CUDA", "ok", names)


def _compiler() -> Finding:
    wanted = os.environ.get("CXX", "g++").split()[0]
    path = shutil.which(wanted)
    if path is None:
        return Finding("C++ compiler", "problem", f"no {wanted} on the PATH", "apt-get install g++, or set CXX")
    try:
        shown = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("C++ compiler", "problem", f"{path} does not run: {error}", "set CXX to one that does")
    return Finding("C++ compiler", "ok", shown.splitlines()[0] if shown else path)


def _python_headers() -> Finding:
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if header.exists():
        return Finding("Python headers", "ok", "Python.h is there")
    return Finding(
        "Python headers", "problem", "Python.h, which Inductor includes, is missing", "apt-get install python3-dev"
    )


def _inductor() -> Finding:
    with tempfile.TemporaryDirectory(prefix="omnifx-doctor-") as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": str(Path(folder) / "triton")}
        try:
            done = subprocess.run(
                [sys.executable, "-c", _COMPILE],
                env={**os.environ, **caches},
                capture_output=True,
                text=True,
                timeout=_COMPILE_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            found = f"a small function was not compiled in {_COMPILE_TIMEOUT_S} s"
            return Finding("Inductor", "problem", found, "is the machine overloaded?")
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        telling = [line for line in said if "Error" in line or "error:" in line] or said or ["no message"]
        advice = 'mend the lines above, or use options={"lowering": "eager"}'
        return Finding("Inductor", "problem", telling[-1].strip()[:200], advice)
    seconds = float(done.stdout.split("seconds")[-1])
    return Finding("Inductor", "ok", f"compiled and ran a small function in {seconds:.1f} s, nothing cached")


def _package(name: str, *, needed: bool = False, extra: str = "", only_gpu: bool = False) -> Finding:
    version = _version(name)
    if version is not None:
        return Finding(name, "ok", version)
    if needed:
        return Finding(name, "problem", "not installed", f"pip install {name}")
    why = "not installed; needed only for its export target"
    if only_gpu and not torch.cuda.is_available():
        return Finding(name, "optional", f"{why}, with an NVIDIA GPU", f"there: pip install 'omnifx[{extra}]'")
    return Finding(name, "optional", why, f"pip install 'omnifx[{extra}]'")


def _onnxruntime() -> Finding:
    if (version := _version("onnxruntime")) is None:
        found = "not installed; needed only to run ONNX bundles"
        return Finding("onnxruntime", "optional", found, "pip install 'omnifx[onnx]'")
    import onnxruntime

    providers = ", ".join(name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers())
    return Finding("onnxruntime", "ok", f"{version}, providers {providers}")


def _version(module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    for name in (module, module.replace("_", "-"), f"{module}-gpu", f"{module.replace('_', '-')}-cu12"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "installed, version unknown"


def _user_cache() -> Finding:
    folder = Path(platformdirs.user_cache_dir("omnifx"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        advice = "give the folder to your user, or set XDG_CACHE_HOME; until then each process measures anew"
        return Finding("profile cache", "problem", f"{folder} is not writable: {error.strerror}", advice)
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    return Finding("profile cache", "ok", f"{folder}: {len(files)} files, {size / 2**20:.1f} MiB")


def _memory() -> Finding:
    texts = []
    if {"SC_PHYS_PAGES", "SC_AVPHYS_PAGES"} <= set(os.sysconf_names):
        total, free = (os.sysconf(key) * os.sysconf("SC_PAGE_SIZE") for key in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
        texts.append(f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free")
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        texts.append(f"GPU {total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free")
    if not texts:
        return Finding("memory", "optional", "this system does not tell")
    return Finding("memory", "ok", "; ".join(texts))
