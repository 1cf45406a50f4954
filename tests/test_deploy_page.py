"""docs/deploy.md from a pipeline to Triton: the page's own commands, run as they stand there by one shell.

The shell's folder is a stand-in for the checkout: links to its files, and to the environments that `make` would make,
which are those of this test. So `make` finds nothing to do, and what the commands write is thrown away.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import omnifx
from examples.deploy import BATCH, pipeline
from examples.digits.models import load_classifier
from examples.serve_triton import Installation
from tests.exporting import ROOT, TRITON, needs_onnx

needs_onnx()

PAGE = ROOT / "docs" / "deploy.md"
SECTION = "## From a pipeline to Triton\n"
PORTS = (8000, 8001, 8002)


@dataclass
class Followed:
    """What following the page left behind."""

    folder: Path
    output: str


def blocks() -> list[str]:
    """The page's commands."""
    section = PAGE.read_text(encoding="utf-8").split(SECTION)[1].split("\n## ")[0]
    return re.findall(r"^```bash\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """The same one by one; one goes on over lines that are indented."""
    return re.findall(r"^\S.*(?:\n[ \t].*)*", "".join(blocks()), flags=re.MULTILINE)


def taken(port: int) -> bool:
    """Whether something listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Followed:
    """A folder in which the page's commands were run."""
    found = Installation.find(TRITON)
    if isinstance(found, str):
        pytest.skip(f"no Triton server: {found}; `make .venv-triton/.installed` makes one (Linux on x86_64)")
    if missing := [name for name in ("bash", "make", "curl") if shutil.which(name) is None]:
        pytest.skip(f"the page's commands need {missing[0]}")
    if any(map(taken, PORTS)):
        pytest.skip(f"the page's ports, {PORTS}, are in use on this machine")
    if not (Path(sys.executable).parent / "activate").is_file():
        pytest.skip(f"{sys.executable} is not of a virtual environment, as `make` makes them")
    folder = stand_in(tmp_path_factory.mktemp("page") / "checkout")
    script = "\n".join(["set -euo pipefail", "trap 'kill $(jobs -p) 2>/dev/null || true' ERR", *blocks()])
    # The pipe ends with the last process that holds it: the server, which the page stops in the background.
    ran = subprocess.run(
        ["bash", "-c", script], cwd=folder, text=True, timeout=900, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    log = folder / "models.log"
    assert ran.returncode == 0, ran.stdout[-5000:] + (log.read_text(errors="replace")[-5000:] if log.is_file() else "")
    return Followed(folder, ran.stdout)


def stand_in(folder: Path) -> Path:
    """A folder like the checkout, with its environments."""
    folder.mkdir()
    for path in ROOT.iterdir():
        if not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    for name, place in ((".venv", Path(sys.executable).parent.parent), (".venv-triton", TRITON)):
        (folder / name).mkdir()
        for path in place.iterdir():
            if path.name != ".installed":
                (folder / name / path.name).symlink_to(path)
        (folder / name / ".installed").touch()
    return folder


def test_the_page_takes_at_most_ten_commands() -> None:
    words = [os.path.basename(command.split()[0]) for command in commands()]

    assert words == ["make", "source", "omnifx", "omnifx", "omnifx", "python", "curl", "kill"]
    assert "These eight commands" in PAGE.read_text(encoding="utf-8")


def test_the_server_answers_what_the_pipeline_samples_with_the_bundle(followed: Followed) -> None:
    (output,) = json.loads((followed.folder / "three.json").read_text(encoding="utf-8"))["outputs"]
    served = torch.tensor(output["data"]).reshape(output["shape"])
    pipe = pipeline()
    plain: Tensor = pipe([3] * BATCH, seeds=[7] * BATCH)
    pipe.transformer = omnifx.load_bundle(followed.folder / "digits")
    cached: Tensor = pipe([3] * BATCH, seeds=[7] * BATCH)

    assert (output["name"], output["datatype"], served.shape) == ("latents", "FP32", (1, 1, 8, 8))
    torch.testing.assert_close(served, cached[:1], rtol=0, atol=1e-5)
    assert 0 < float((cached - plain).abs().max()) < 0.5, "the plan reuses, and does little harm"
    assert int(load_classifier()(served).argmax()) == 3


def test_what_the_commands_say_is_what_they_did(followed: Followed) -> None:
    assert "wrote digits.safetensors" in followed.output
    assert "wrote plan.json" in followed.output
    assert "wrote models/digits" in followed.output
    assert "http 127.0.0.1:8000, grpc 127.0.0.1:8001, metrics 127.0.0.1:8002/metrics" in followed.output
    assert "'.venv-triton/.installed' is up to date" in followed.output


def test_the_server_is_gone_afterwards(followed: Followed) -> None:
    assert not any(map(taken, PORTS))
