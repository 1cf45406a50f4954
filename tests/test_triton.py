"""A real Triton server on this machine's CPU, asked for digits by a real client, both from the package nvidia-pytriton.

They are in an environment of their own, `.venv-triton` (`make .venv-triton/.installed`), since they want other versions
of packages than we do; OMNIFX_TRITON names another place. What the server runs is this interpreter and checkout.
"""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import omnifx
from examples.digits.models import NULL_CLASS, load_classifier, load_dit
from examples.digits.sampling import sample_dit
from examples.export_onnx import scheduler_of
from examples.serve_triton import Installation, serving
from tests.exporting import ROOT, TRITON, needs_onnx, plan_by_hand

needs_onnx()

PATTERN = "FrFrFrFrFrFr"
STEPS, CLIENTS, EACH = len(PATTERN), 8, 4
NUMBERS = range(CLIENTS * EACH)
PLAIN, STREAM = "digits", "digits_stream"
SAMPLES, SCALE = 4, 2.0  # of a run, whose batch is twice that: guidance is one call
LABELS = torch.arange(SAMPLES)


@dataclass
class Asked:
    """What a client got, what the server's metrics were then, and the bundle."""

    bundle: Path
    answers: dict[str, Any]
    samples: dict[str, Any]
    metrics: dict[tuple[str, str], float]
    """By name and a label: of the plain model, `instance`, or the graph where there is one."""


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """A server with two models of one bundle, and all that the client asked of it."""
    found = Installation.find(TRITON)
    if isinstance(found, str):
        pytest.skip(f"no Triton server: {found}; `make .venv-triton/.installed` makes one (Linux on x86_64)")
    folder = tmp_path_factory.mktemp("triton")
    bundle, models = folder / "bundle", folder / "models"
    model, scheduler = load_dit(), scheduler_of(STEPS)
    example = {
        "hidden_states": torch.randn(2 * SAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.full((2 * SAMPLES,), 500),
        "class_labels": torch.cat([torch.full_like(LABELS, NULL_CLASS), LABELS]),
    }
    names = [branch.name for branch in omnifx.explain(model, **example).branches if branch.cacheable]
    plan = plan_by_hand(model, names, PATTERN, [float(t) for t in scheduler.timesteps])
    omnifx.export(model, example, plan, bundle, scheduler=scheduler, progress=False)
    for name, streams in ((PLAIN, False), (STREAM, True)):
        omnifx.write_triton(
            bundle, models, name=name, guidance="one-call", guidance_scale=SCALE, stream=streams, threads=1,
            max_delay_ms=200,
        )  # fmt: skip
    job: dict[str, Any] = {"clients": CLIENTS, "each": EACH, "steps": STEPS, "plain": PLAIN, "stream": STREAM}
    with serving(models, found) as server:
        job |= {"http": server.http, "grpc": server.grpc, "folder": str(folder)}
        client = [str(TRITON / "bin" / "python"), str(ROOT / "tests" / "triton_client.py"), json.dumps(job)]
        ran = subprocess.run(client, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, f"{ran.stderr}\n{server.log.read_text(errors='replace')[-5000:]}"
        with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=30) as page:
            metrics = _metrics(page.read().decode())
    answers = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    with np.load(folder / "samples.npz") as samples:
        return Asked(bundle, answers, dict(samples), metrics)


def _metrics(page: str) -> dict[tuple[str, str], float]:
    found = {}
    for line in page.splitlines():
        if match := re.fullmatch(r"(omnifx_\w+)\{(.*)\} (\S+)", line):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
            if labels["model"] == PLAIN:
                found[match[1], labels.get("graph", labels["instance"])] = float(match[3])
    return found


def test_eight_clients_at_once_get_what_each_gets_alone(asked: Asked) -> None:
    for n in NUMBERS:
        np.testing.assert_allclose(asked.samples[f"crowd_{n}"], asked.samples[f"lone_{n}"], rtol=0, atol=1e-5)
    lone = [asked.samples[f"lone_{n}"] for n in NUMBERS]
    assert min(float(np.abs(a - b).max()) for a in lone for b in lone if a is not b) > 0.1, "all samples differ"


def test_the_server_samples_as_the_bundle_does_elsewhere(asked: Asked) -> None:
    runner = omnifx.load_bundle(asked.bundle)
    plain = sample_dit(runner, seeds=range(100, 104), labels=LABELS, steps=STEPS, cfg=SCALE)

    assert asked.samples["lone_0"].dtype == np.float32
    for n in (0, 1, 2):  # 3 is guided otherwise
        np.testing.assert_allclose(asked.samples[f"lone_{n}"], plain[n : n + 1].numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(asked.samples["rows"][:2], plain[1:3].numpy(), rtol=0, atol=1e-5)
    assert float(np.abs(asked.samples["lone_3"] - plain[3:].numpy()).max()) > 1e-2


def test_what_it_generates_are_the_digits_that_were_asked_for(asked: Asked) -> None:
    images = torch.cat([torch.from_numpy(asked.samples[f"crowd_{n}"]) for n in NUMBERS])
    labels = torch.tensor([n % 10 for n in NUMBERS])
    with torch.no_grad():
        right: Tensor = load_classifier()(images).argmax(1) == labels
    assert float(right.float().mean()) > 0.9


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", r"\[400\].*missing required input\(s\) \['class_labels'\]"),
        ("shape", r"INVALID_ARGUMENT.*unexpected shape for input 'class_labels' .* Expected \[-1,1\], got \[1,3\]"),
        ("rows", r"INVALID_ARGUMENT.*batch size does not match other inputs"),
        ("too many", r"\[400\].*batch-size must be <= 4"),
        ("type", r"\[400\].*data-type is 'FP32', but model 'digits' expects 'INT64'"),
        ("label", r"\[500\] sampling: the sampler failed with .*out of data bounds, idx=99"),
        ("unknown", r"INVALID_ARGUMENT.*unexpected inference input 'prompt'"),
        ("steps", r"\[400\] steps is 13, but the bundle was made for 12: .* Leave steps out"),
        ("scale", r"INVALID_ARGUMENT\] the parameter guidance_scale must be a finite number, got 'much'"),
        ("streaming", r"\[400\] stream_every is for models that stream\. Write this one with stream=True"),
        ("alone", r"doesn't support models with decoupled transaction policy"),
    ],
)
def test_bad_requests_are_refused(asked: Asked, what: str, message: str) -> None:
    assert re.search(message, asked.answers["bad"][what]), asked.answers["bad"][what]


def test_after_bad_requests_the_server_goes_on(asked: Asked) -> None:
    np.testing.assert_array_equal(asked.samples["after"], asked.samples["lone_1"])


def test_streams_give_the_steps_on_the_way(asked: Asked) -> None:
    assert asked.answers["every"] == [[[step]] for step in range(2, STEPS + 1, 2)]
    assert asked.answers["last"] == [[[STEPS]]]
    last = asked.samples[f"every_{STEPS // 2 - 1}"]
    np.testing.assert_allclose(last, asked.samples["lone_1"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(asked.samples["last_0"], asked.samples["lone_1"], rtol=0, atol=1e-5)
    away = [float(np.abs(asked.samples[f"every_{k}"] - last).max()) for k in range(STEPS // 2)]
    assert away == sorted(away, reverse=True)
    assert away[0] > 0.5
    assert re.search(r"stream_every must be a number of steps >= 0, got -1", asked.answers["wrong"][0])


def test_metrics_count_graphs_samples_and_bytes(asked: Asked) -> None:
    one = f"{PLAIN}_0_0"
    samples, runs = asked.metrics["omnifx_samples_total", one], asked.metrics["omnifx_generations_total", one]
    lone, rest = len(NUMBERS), 2  # the one request after the bad ones, and the one of three rows

    assert samples == 2 * len(NUMBERS) + 4
    assert lone + rest + len(NUMBERS) / SAMPLES <= runs <= lone + rest + len(NUMBERS) / 2, "few requests shared runs"
    assert asked.metrics["omnifx_empty_places_total", one] == SAMPLES * runs - samples
    more = {"full": 1, "reuse": 1, "reuse.conditions": 1}  # what the check at the start ran
    for graph, steps in (("full", "F"), ("reuse", "r"), ("reuse.conditions", "r")):
        expected = PATTERN.count(steps) * runs + more[graph]
        assert asked.metrics["omnifx_graph_runs_total", graph] == expected
    assert asked.metrics["omnifx_cache_bytes", one] == 0, "nothing is held between generations"
    assert asked.metrics["omnifx_weights_bytes", one] == (asked.bundle / "weights.bin").stat().st_size
