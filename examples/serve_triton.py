"""Start NVIDIA's Triton Inference Server on this machine, without a container: the package nvidia-pytriton carries it.

The package is in an environment of its own, since it asks for other versions of packages than we do; what the server
runs is this interpreter, with its packages. In NVIDIA's container none of this is needed: docs/deploy_triton.md.

Run: python -m examples.serve_triton --models models --environment .venv-triton --port 8000
"""

import argparse
import contextlib
import os
import shutil
import signal
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
def serving(
    repository: Path, found: Installation, *, port: int | None = None, seconds: float = 300
) -> Iterator[Server]:
    """Run a server for this machine alone as long as the block lasts; its log is beside the repository.

    HTTP is at `port`, gRPC and metrics are at the next two; None: three free ones.
    """
    ports = [port, port + 1, port + 2] if port is not None else _free_ports(3)
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
    parser.add_argument("--models", type=Path, default=Path("models"), help="what `omnifx triton --out` wrote")
    parser.add_argument(
        "--environment", type=Path, default=Path(".venv-triton"), help="where nvidia-pytriton is installed"
    )
    parser.add_argument("--port", type=int, help="of HTTP; gRPC and metrics take the next two; default: free ones")
    parser.add_argument("--smoke", action="store_true", help="only tell whether a server could be started")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # an end like Ctrl-C: the server must not stay behind

    found = Installation.find(arguments.environment)
    if arguments.smoke:
        print(found)
    elif isinstance(found, str):
        parser.exit(2, f"{found}\n")
    elif not arguments.models.is_dir():
        parser.exit(2, f"there is no folder {arguments.models}; write one with `omnifx triton`\n")
    else:
        models = arguments.models.resolve()
        with contextlib.suppress(KeyboardInterrupt), serving(models, found, port=arguments.port) as server:
            print(
                f"http {server.http}, grpc {server.grpc}, metrics {server.metrics}/metrics; log: {server.log}",
                flush=True,
            )
            while True:
                time.sleep(1)


if __name__ == "__main__":
    main()
