"""The model that Triton's Python backend runs: requests in, runs of a bundle, samples out.

`write_triton` writes a repository whose `model.py` makes a `BundleModel` for each instance of Triton's, in a process of
its own, and calls it with all requests that Triton has gathered.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from omnifx.bundle_loading import load_bundle
from omnifx.bundle_runner import BundleRunner
from omnifx.errors import BundleError, ConfigError, OmnifxError
from omnifx.export_capture import TOLERANCE
from omnifx.sampling import Sampler, load_function
from omnifx.sampling_setup import Sampling
from omnifx.triton_repository import BUNDLE, LATENTS, SAMPLER, SEED, STEP

STEPS, SCALE, EVERY = "steps", "guidance_scale", "stream_every"
"""Parameters of a request; no tensors, because Triton gathers only requests with the same tensors into a run."""


class Cancelled(OmnifxError):
    """Nobody waits for any sample of a run any more."""


@dataclass
class Order:
    """One request: some samples."""

    request: Any
    seeds: list[int]
    inputs: dict[str, Tensor]
    negative: dict[str, Tensor]
    scale: Tensor
    every: int = 0
    """Steps from one response to the next; 0: only the last."""
    sent: int = 0
    """The last step of which a response was sent."""


class BundleModel:
    """A bundle behind Triton's Python backend; it is loaded, and its reference replayed.

    Args:
        args: What the backend tells of an instance.

    Raises: BundleError, ConfigError: Triton then serves no such model, and shows the message.
    """

    def __init__(self, args: Mapping[str, str]) -> None:
        import triton_python_backend_utils as pb  # only the server has it

        self._pb = pb
        config = json.loads(args["model_config"])
        self._streams = bool(config.get("model_transaction_policy", {}).get("decoupled", False))
        parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
        folder = Path(args["model_repository"]) / args["model_version"]
        gpu = args["model_instance_kind"] == "GPU"
        started = time.monotonic()
        runtime, threads = parameters.get("runtime", "onnxruntime"), int(parameters.get("threads", "0"))
        runner = load_bundle(
            folder / BUNDLE,
            runtime=cast(Any, runtime),
            device=f"cuda:{args['model_instance_device_id']}" if gpu else "cpu",
            **_limited(runtime, threads),
        )
        function = load_function(folder / SAMPLER) if (folder / SAMPLER).is_file() else None
        self._sampler = Sampler(runner, Sampling.load(folder), function)
        if parameters.get("check", "true") == "true" and runner.manifest.reference is not None:
            _check(runner)
        self._metrics = Metrics.made(pb, args, runner)
        pb.Logger.log_info(
            f"omnifx: {args['model_instance_name']} serves {runner.manifest.model.name} on {runner.device}, "
            f"{self._sampler.num_samples} samples a run; loaded in {time.monotonic() - started:.1f} s"
        )

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        """Answer requests; a bad one gets an error, and the others their samples."""
        answers: dict[int, Any] = {}
        orders: list[Order] = []
        for request in requests:
            try:
                orders.append(self._order(request))
            except ConfigError as refusal:
                error = self._pb.TritonError(str(refusal), self._pb.TritonError.INVALID_ARG)
                self._answer(answers, request, self._pb.InferenceResponse(error=error))
        for group in _grouped(orders, self._sampler.num_samples):
            for order, response in zip(group, self._responses(group), strict=True):
                self._answer(answers, order.request, response)
        return None if self._streams else [answers[id(request)] for request in requests]

    # -- a request -----------------------------------------------------------------------------------------------------

    def _order(self, request: Any) -> Order:
        """What a request asks for.

        Raises: ConfigError if it asks for what the bundle cannot.
        """
        sampling, manifest = self._sampler.sampling, self._sampler.runner.manifest
        seeds = [int(seed) for seed in self._needed(request, SEED).reshape(-1)]
        n, options = len(seeds), self._options(request)
        shapes = {name: info.shape[1:] for name, info in manifest.call.inputs.items()}
        dtypes = {name: getattr(torch, info.dtype) for name, info in manifest.call.inputs.items()}
        inputs = {
            name: self._needed(request, name).reshape(n, *shapes[name]).to(dtypes[name]) for name in sampling.inputs
        }
        negative = {}
        for name in sampling.negative:
            given, stored = self._tensor(request, f"negative_{name}"), sampling.tensors.get(f"negative.{name}")
            if given is None and stored is None:
                raise ConfigError(f"negative_{name} is missing; guidance needs it.")
            row = (
                given.reshape(n, *shapes[name]) if given is not None else cast(Tensor, stored).expand(n, *shapes[name])
            )
            negative[name] = row.to(dtypes[name])
        scale = torch.full((n,), options.get(SCALE, sampling.guidance_scale))
        return Order(request, seeds, inputs, negative, scale, int(options.get(EVERY, 0)))

    def _options(self, request: Any) -> dict[str, float]:
        """The parameters of a request that concern its samples."""
        raw = request.parameters()
        given: dict[str, Any] = json.loads(raw) if isinstance(raw, str) else raw or {}
        options = {name: _number(name, given[name]) for name in (STEPS, SCALE, EVERY) if name in given}
        steps, every = self._sampler.num_steps, options.get(EVERY, 0.0)
        if options.get(STEPS, steps) != steps:
            raise ConfigError(
                f"steps is {options[STEPS]:g}, but the bundle was made for {steps}: its plan says what each of these "
                "does. Leave steps out, or export a bundle for that number."
            )
        if SCALE in options and self._sampler.sampling.guidance == "none":
            raise ConfigError(
                "guidance_scale is for models that are guided; this one was written with guidance 'none'."
            )
        if every < 0 or every != int(every):
            raise ConfigError(f"{EVERY} must be a number of steps >= 0, got {every:g}.")
        if every and not self._streams:
            raise ConfigError(f"{EVERY} is for models that stream. Write this one with stream=True, or leave it out.")
        return options

    def _needed(self, request: Any, name: str) -> Tensor:
        found = self._tensor(request, name)
        if found is None:
            raise ConfigError(f"{name} is missing.")
        return found

    def _tensor(self, request: Any, name: str) -> Tensor | None:
        found = self._pb.get_input_tensor_by_name(request, name)
        if found is None:
            return None
        # DLPack: older stubs read and write wrong sizes through NumPy 2. A copy: the memory is the server's.
        return torch.from_dlpack(found.to_dlpack()).clone()

    # -- a run ---------------------------------------------------------------------------------------------------------

    def _responses(self, orders: Sequence[Order]) -> Iterator[Any]:
        """Make the samples of some orders in one run; a response for each.

        Where a run of several fails, each gets a run of its own, since one may hold what the graphs refuse (a label
        that there is not).
        """
        pb = self._pb
        bounds = [0, *itertools.accumulate(len(order.seeds) for order in orders)]
        try:
            made = self._run(orders, bounds)
        except Cancelled:
            error = pb.TritonError("cancelled before its last step", pb.TritonError.CANCELLED)
            yield from (pb.InferenceResponse(error=error) for _ in orders)
        except OmnifxError as refusal:
            if len(orders) > 1:
                for order in orders:
                    yield from self._responses([order])
                return
            pb.Logger.log_error(f"omnifx: {refusal}")
            yield pb.InferenceResponse(error=pb.TritonError(str(refusal)))
        else:
            for start, stop in itertools.pairwise(bounds):
                yield self._response(made[start:stop], len(self._sampler.runner.manifest.steps))

    def _run(self, orders: Sequence[Order], bounds: Sequence[int]) -> Tensor:
        """The samples of some orders, one below the other."""
        names, negatives = orders[0].inputs, orders[0].negative
        finished = 0
        try:
            made = self._sampler.run(
                seeds=[seed for order in orders for seed in order.seeds],
                inputs={name: torch.cat([order.inputs[name] for order in orders]) for name in names},
                negative={name: torch.cat([order.negative[name] for order in orders]) for name in negatives},
                guidance_scale=torch.cat([order.scale for order in orders]),
                progress=lambda step, latents: self._after_step(orders, bounds, step, latents),
            )
            finished = bounds[-1]
        finally:
            self._metrics.count(finished, self._sampler.num_samples)
        return made

    def _after_step(self, orders: Sequence[Order], bounds: Sequence[int], step: int, latents: Tensor) -> None:
        """What is due between two steps: responses to those who look on, and an end if nobody waits."""
        if step == 1:
            self._metrics.hold()
        if step == len(self._sampler.runner.manifest.steps):
            return
        for order, (start, stop) in zip(orders, itertools.pairwise(bounds), strict=True):
            due = order.every and step % order.every == 0 and step > order.sent
            if due and not order.request.is_cancelled():
                order.request.get_response_sender().send(self._response(latents[start:stop], step))
                order.sent = step
        if all(order.request.is_cancelled() for order in orders):
            raise Cancelled("every request of the run was cancelled")

    def _response(self, latents: Tensor, step: int) -> Any:
        tensors = {LATENTS: latents.detach().float().cpu().reshape(latents.shape[0], *(latents.shape[1:] or (1,)))}
        if self._streams:
            tensors[STEP] = torch.full((latents.shape[0], 1), step, dtype=torch.int32)
        make = self._pb.Tensor.from_dlpack
        return self._pb.InferenceResponse([make(name, value.contiguous()) for name, value in tensors.items()])

    def _answer(self, answers: dict[int, Any], request: Any, response: Any) -> None:
        """The last response to a request."""
        if self._streams:
            request.get_response_sender().send(response, flags=self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        else:
            answers[id(request)] = response


class Metrics:
    """What Triton shows at its metrics port, for one instance: graphs run, samples made, bytes held."""

    def __init__(self, pb: Any, labels: Mapping[str, str], runner: BundleRunner) -> None:
        self._runner, self._seen = runner, Counter[str]()
        counter, gauge = pb.MetricFamily.COUNTER, pb.MetricFamily.GAUGE
        # A family must outlive its metrics.
        self._families = {
            name: pb.MetricFamily(name=f"omnifx_{name}", description=about, kind=kind)
            for name, about, kind in (
                ("graph_runs_total", "Runs of a bundle's graphs", counter),
                ("generations_total", "Runs of a whole schedule, each of a batch of samples", counter),
                ("samples_total", "Samples made", counter),
                ("empty_places_total", "Places of a batch that no request had filled", counter),
                ("cache_bytes", "Bytes of the caches of the generation under way", gauge),
                ("weights_bytes", "Bytes of the file of weights that all graphs share", gauge),
            )
        }
        self._metrics = {
            name: family.Metric(labels=labels) for name, family in self._families.items() if name != "graph_runs_total"
        }
        graphs = self._families["graph_runs_total"]
        self._graphs = {name: graphs.Metric(labels={**labels, "graph": name}) for name in runner.manifest.variants}
        self._metrics["weights_bytes"].set(runner.manifest.weights.bytes)

    @classmethod
    def made(cls, pb: Any, args: Mapping[str, str], runner: BundleRunner) -> Metrics | NoMetrics:
        """The metrics of an instance, if the server has any."""
        labels = {
            "model": args["model_name"],
            "version": args["model_version"],
            "instance": args["model_instance_name"],
        }
        try:
            return cls(pb, labels, runner)
        except pb.TritonModelException as error:
            pb.Logger.log_warn(f"omnifx: this server takes no metrics: {error}")
            return NoMetrics()

    def hold(self) -> None:
        """A run is under way: note what its caches take."""
        self._metrics["cache_bytes"].set(self._runner.stats.held_bytes)

    def count(self, samples: int, places: int) -> None:
        """A run is over; `samples` is 0 if it failed."""
        stats = self._runner.stats
        for name, number in (stats.runs - self._seen).items():
            self._graphs[name].increment(number)
        self._seen = stats.runs
        self._metrics["cache_bytes"].set(stats.held_bytes)
        if samples:
            self._metrics["generations_total"].increment(1)
            self._metrics["samples_total"].increment(samples)
            self._metrics["empty_places_total"].increment(places - samples)


class NoMetrics:
    """Stands for them where the server has none."""

    def hold(self) -> None:
        """Nothing."""

    def count(self, samples: int, places: int) -> None:
        """Nothing."""


def _number(name: str, value: object) -> float:
    """A parameter as a number; servers that know no floats take it as a string.

    Raises: ConfigError.
    """
    try:
        number = float(cast(Any, value))
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise ConfigError(f"the parameter {name} must be a finite number, got {value!r}.")
    return number


def _grouped(orders: Sequence[Order], places: int) -> Iterator[list[Order]]:
    """Orders, in turn, in runs of so many samples at most."""
    group: list[Order] = []
    for order in orders:
        if group and sum(len(each.seeds) for each in (*group, order)) > places:
            yield group
            group = []
        group.append(order)
    if group:
        yield group


def _limited(runtime: str, threads: int) -> dict[str, Any]:
    """Options of `load_bundle` for a number of threads; 0: as many as the runtime wants."""
    if not threads:
        return {}
    torch.set_num_threads(threads)
    if runtime != "onnxruntime":
        return {}
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return {"options": options}


def _check(runner: BundleRunner) -> None:
    """Replay the reference of a bundle: a warm-up, and a look at what this machine computes."""
    error, allowed = runner.check(), TOLERANCE[runner.dtype]
    if not (math.isfinite(error) and error <= allowed):
        raise BundleError(
            f"the bundle's reference differs here by {error:.1e} of an output's norm (allowed: {allowed:g}). Update "
            "the runtime, or export the bundle anew."
        )


__all__ = ["BundleModel"]
