"""Serve the guided digits DiT with NVIDIA's Triton Inference Server: export, write a model repository, start a server.

Run: python -m examples.serve_triton --out digits-triton
and, where Triton is not installed, but the package nvidia-pytriton (which carries its binary) is in an environment:
     python -m examples.serve_triton --out digits-triton --serve .venv-triton
"""

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

import omnifx
from examples.digits.models import NULL_CLASS, load_dit
from examples.digits.sampling import NOISE_SCHEDULE, sample_dit

SAMPLES = 4  # of one run; with guidance in one call, the batch is twice that
SCALE = 2.0


def make(steps: int = 50) -> tuple[Any, dict[str, Tensor], Any]:
    """What `omnifx export` asks for: a model, one call's arguments, and the scheduler that the steps belong to."""
    scheduler: Any = DDIMScheduler(clip_sample=True, **NOISE_SCHEDULE)
    scheduler.set_timesteps(steps)
    labels = torch.cat([torch.full((SAMPLES,), NULL_CLASS), torch.arange(SAMPLES)])
    noise = torch.randn(2 * SAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return (
        load_dit(),
        {"hidden_states": noise, "timestep": torch.full((len(labels),), 500), "class_labels": labels},
        scheduler,
    )


def generate(model: Any, seed: int, steps: int = 50) -> Tensor:
    """One generation, as a run of the server makes it."""
    seeds = range(SAMPLES * seed, SAMPLES * (seed + 1))
    return sample_dit(model, seeds=seeds, labels=torch.arange(SAMPLES), steps=steps, cfg=SCALE)


@dataclass(frozen=True)
class Installation:
    """A Triton server from the package nvidia-pytriton, and the interpreter that its Python backend is to run."""

    server: Path
    """The folder `tritonserver` of the package."""
    stub: Path
    """The backend's process, for this version of Python."""
    libraries: tuple[Path, ...]

    @classmethod
    def find(cls, environment: Path) -> "Installation | str":
        """The one in a virtual environment; or why there is none that fits."""
        found = sorted(environment.glob("lib/python*/site-packages/pytriton/tritonserver/bin/tritonserver"))
        if not found:
            return f"{environment} has no nvidia-pytriton"
        server = found[0].parents[1]
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
        if not stub.is_file():
            return f"nvidia-pytriton has no stub for Python {version}"
        base = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")
        folders = [base, base / (sysconfig.get_config_var("MULTIARCH") or "")]
        shared = [folder for folder in folders if (folder / f"libpython{version}.so.1.0").is_file()]
        if not shared:
            return f"this Python has no libpython{version}.so.1.0, which the stub loads (looked in {base})"
        return cls(server, stub, (shared[0], server.parents[1] / "nvidia_pytriton.libs"))


@dataclass(frozen=True)
class Server:
    """A server that is ready."""

    http: str
    grpc: str
    metrics: str
    log: Path


@contextlib.contextmanager
def serving(repository: Path, found: Installation, *, seconds: float = 300) -> Iterator[Server]:
    """Run a server on this machine's free ports as long as the block lasts; its log is beside the repository."""
    ports = _free_ports(3)
    with tempfile.TemporaryDirectory() as work:
        backend = Path(work) / "python"
        shutil.copytree(found.server / "backends" / "python", backend)
        shutil.copyfile(found.stub, backend / found.stub.name)
        (backend / found.stub.name).chmod(0o755)
        names = ("http", "grpc", "metrics")
        command = [
            str(found.server / "bin" / "tritonserver"),
            f"--model-repository={repository}",
            f"--backend-directory={work}",
            *(f"--{name}-port={port}" for name, port in zip(names, ports, strict=True)),
            *(f"--{name}-address=127.0.0.1" for name in names),
        ]
        # The stub runs the interpreter of the first `python3` on the path, with its packages; it ignores PYTHONPATH.
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "LD_LIBRARY_PATH": os.pathsep.join(map(str, found.libraries)),
        }
        log = repository.with_name(f"{repository.name}.log")
        with log.open("w") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            _wait(process, ports[0], log, seconds)
            yield Server(*(f"127.0.0.1:{port}" for port in ports), log)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path, seconds: float) -> None:
    """Until the server is ready.

    Raises: RuntimeError with the log's end if it gives up.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5)
            return
        time.sleep(0.2)
    raise RuntimeError(f"the server did not start:\n{log.read_text(errors='replace')[-5000:]}")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for bundle and repository; without it, they are thrown away")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument(
        "--serve", type=Path, metavar="ENVIRONMENT", help="serve until interrupted, with nvidia-pytriton"
    )
    parser.add_argument("--smoke", action="store_true", help="few steps")
    arguments = parser.parse_args()
    steps = 4 if arguments.smoke else arguments.steps
    folder = arguments.out or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)

    model, example, scheduler = make(steps)
    profile = omnifx.calibrate(
        model, lambda denoiser, seed: generate(denoiser, seed, steps), policy="fora", options={"lowering": "eager"}
    )
    plan = omnifx.make_plan(profile, policy="fora")
    omnifx.export(model, example, plan, folder / "bundle", scheduler=scheduler, overwrite=True)
    written = omnifx.write_triton(
        folder / "bundle", folder / "models", name="digits", guidance="one-call", guidance_scale=SCALE, overwrite=True
    )
    print((written / "config.pbtxt").read_text())
    print(f"in a container: tritonserver --model-repository={folder / 'models'}")

    if arguments.serve is not None:
        found = Installation.find(arguments.serve)
        if isinstance(found, str):
            parser.exit(2, f"{found}\n")
        with serving(folder / "models", found) as server:
            print(f"http {server.http}, grpc {server.grpc}, metrics {server.metrics}/metrics; log: {server.log}")
            with contextlib.suppress(KeyboardInterrupt):
                while True:
                    time.sleep(1)


if __name__ == "__main__":
    main()
