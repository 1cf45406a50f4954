"""What a client of a Triton server does, run by tests/test_triton.py in an environment that has tritonclient and NumPy.

Run: python tests/triton_client.py JSON; answers go to the folder that it names, as `answers.json` and `samples.npz`.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

JOB: dict[str, Any] = json.loads(sys.argv[1])
CLIENTS, EACH, STEPS, PLAIN, STREAM = (JOB[key] for key in ("clients", "each", "steps", "plain", "stream"))


def tensors(kind: Any, values: dict[str, Any]) -> list[Any]:
    """Inputs of a request, by name; of arrays with a row for each sample."""
    made = []
    for name, value in values.items():
        types = {"i8": "INT64", "i4": "INT32", "f4": "FP32"}
        made.append(kind.InferInput(name, list(value.shape), types[value.dtype.str[1:]]))
        made[-1].set_data_from_numpy(value)
    return made


def wish(number: int) -> dict[str, Any]:
    """One of 32 requests: a digit, from a seed."""
    return {"seed": np.array([[100 + number]], np.int64), "class_labels": np.array([[number % 10]], np.int64)}


def options(number: int) -> dict[str, Any]:
    """What else it asks for: some are guided more or less than others."""
    scales = {"guidance_scale": 1.5} if number % 8 == 3 else {"guidance_scale": "3"} if number % 8 == 5 else {}
    return scales | ({"steps": STEPS} if number % 5 == 0 else {})


def both(at_http: str, at_grpc: str) -> tuple[Any, Any]:
    return tritonclient.http.InferenceServerClient(at_http), tritonclient.grpc.InferenceServerClient(at_grpc)


def ask(kind: Any, client: Any, number: int) -> Any:
    return client.infer(PLAIN, tensors(kind, wish(number)), parameters=options(number)).as_numpy("latents")


def refusal(kind: Any, client: Any, values: dict[str, Any], model: str = PLAIN, **options: Any) -> str:
    try:
        client.infer(model, tensors(kind, values), **options)
    except InferenceServerException as error:
        return str(error)
    return "none"


def crowd(at_http: str, at_grpc: str) -> list[Any]:
    """All requests from eight clients at once, half of them over HTTP."""

    def one_client(place: int) -> list[Any]:
        kind = tritonclient.http if place % 2 else tritonclient.grpc
        client = both(at_http, at_grpc)[0 if place % 2 else 1]
        ready.wait()
        numbers = range(place * EACH, (place + 1) * EACH)
        return [ask(kind, client, number) for number in numbers]

    ready = threading.Barrier(CLIENTS)
    with ThreadPoolExecutor(CLIENTS) as pool:
        return [sample for samples in pool.map(one_client, range(CLIENTS)) for sample in samples]


def stream(at_grpc: str, values: dict[str, Any], **asked: Any) -> list[tuple[Any, Any]]:
    """All responses to one request: steps done and latents, or an error's text."""
    answers: Any = queue.Queue()
    with tritonclient.grpc.InferenceServerClient(at_grpc) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer(
            STREAM, tensors(tritonclient.grpc, values), enable_empty_final_response=True, parameters=asked
        )
        found: list[tuple[Any, Any]] = []
        while True:
            result, error = answers.get(timeout=120)
            if error is not None:
                return [*found, (str(error), None)]
            if result.as_numpy("latents") is not None:
                found.append((result.as_numpy("step").tolist(), result.as_numpy("latents")))
            if result.get_response().parameters["triton_final_response"].bool_param:
                return found


def main(at_http: str, at_grpc: str, folder: Path) -> None:
    http, grpc = both(at_http, at_grpc)
    h, g = tritonclient.http, tritonclient.grpc
    good = wish(1)
    answers: dict[str, Any] = {}
    samples = {f"lone_{n}": ask(h, http, n) for n in range(CLIENTS * EACH)}
    samples |= {f"crowd_{n}": value for n, value in enumerate(crowd(at_http, at_grpc))}

    without = {key: value for key, value in good.items() if key != "class_labels"}
    answers["bad"] = {
        "missing": refusal(h, http, without),
        "shape": refusal(g, grpc, {**good, "class_labels": np.zeros((1, 3), np.int64)}),
        "rows": refusal(g, grpc, {**good, "class_labels": np.zeros((2, 1), np.int64)}),
        "too many": refusal(h, http, {key: np.repeat(value, 5, axis=0) for key, value in good.items()}),
        "type": refusal(h, http, {**good, "class_labels": np.zeros((1, 1), np.float32)}),
        "label": refusal(h, http, {**good, "class_labels": np.array([[99]])}),
        "unknown": refusal(g, grpc, {**good, "prompt": np.zeros((1, 1), np.int64)}),
        "steps": refusal(h, http, good, parameters={"steps": STEPS + 1}),
        "scale": refusal(g, grpc, good, parameters={"guidance_scale": "much"}),
        "streaming": refusal(h, http, good, parameters={"stream_every": 2}),
        "alone": refusal(g, grpc, good, model=STREAM),
    }
    samples["after"] = http.infer(PLAIN, tensors(h, good)).as_numpy("latents")
    rows = [wish(n) for n in (1, 2, 4)]
    together = {name: np.concatenate([row[name] for row in rows]) for name in good}
    samples["rows"] = grpc.infer(PLAIN, tensors(g, together)).as_numpy("latents")

    for name, asked in (("every", {"stream_every": 2}), ("last", {}), ("wrong", {"stream_every": -1})):
        found = stream(at_grpc, good, **asked)
        answers[name] = [steps for steps, _ in found]
        samples |= {f"{name}_{k}": latents for k, (_, latents) in enumerate(found) if latents is not None}
    (folder / "answers.json").write_text(json.dumps(answers), encoding="utf-8")
    np.savez(folder / "samples.npz", **samples)


if __name__ == "__main__":
    main(JOB["http"], JOB["grpc"], Path(JOB["folder"]))
