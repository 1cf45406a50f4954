"""Sampling with a bundle: seeds and rows of their own, guidance, schedulers set up again, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from omnifx.bundle import Manifest, SchedulerInfo
from omnifx.bundle_runner import BundleRunner
from omnifx.errors import BundleError, ConfigError
from omnifx.sampling import Sampler, SampleRequest, load_function, sample
from omnifx.sampling_setup import Sampling, sampling_of
from omnifx.schedulers import make_scheduler, scheduler_info
from tests.sampled import BATCH, LABELS, NEGATIVES, TEXTS, made, model, runner, sampler
from tests.toys import distance, noise


def run(found: Sampler, rows: list[int], *, scale: float = 2.0) -> Tensor:
    """Samples of some rows of the labels and texts, each with a seed of its own."""
    negative = {"text": NEGATIVES[rows], "y": torch.full((len(rows),), 9)}
    return found.run(
        seeds=[10 + row for row in rows],
        inputs={"y": LABELS[rows], "text": TEXTS[rows]},
        negative={name: negative[name] for name in found.sampling.negative},
        guidance_scale=torch.full((len(rows),), scale),
    )


# -- the loop ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "guidance"),
    [
        ("DDIMScheduler", "none"),
        ("DDPMScheduler", "one-call"),  # fresh noise in each step
        ("DPMSolverMultistepScheduler", "two-calls"),  # remembers steps
        ("EulerDiscreteScheduler", "none"),  # scales what the model sees, and starts from louder noise
    ],
)
def test_a_sample_does_not_depend_on_its_company(scheduler: str, guidance: str) -> None:
    found = sampler(scheduler, guidance=guidance)
    rows = list(range(found.num_samples))

    together = run(found, rows)

    for row in rows:
        assert distance(run(found, [row]), together[row : row + 1]) < 1e-5
    assert distance(together[:1], together[1:2]) > 0.1
    assert found.runner.stats.held_bytes == 0


@torch.no_grad()
def by_hand(rows: list[int], scale: float) -> Tensor:
    """The loop as a pipeline of diffusers writes it, around the model itself, one sample at a time."""
    finals = []
    for row in rows:
        scheduler = made("DDIMScheduler")
        x = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(10 + row))
        for t in scheduler.timesteps:
            call = [model()(x, t.reshape(1), LABELS[[row]], text[[row]]) for text in (NEGATIVES, TEXTS)]
            x = scheduler.step(call[0] + scale * (call[1] - call[0]), t, x, return_dict=False)[0]
        finals.append(x)
    return torch.cat(finals)


@pytest.mark.parametrize("guidance", ["one-call", "two-calls"])
def test_in_full_steps_it_is_the_loop_of_a_pipeline(guidance: str) -> None:
    found = sampler(pattern="FFFF", guidance=guidance, negative={"text": None})

    assert distance(run(found, [0, 1], scale=3.0), by_hand([0, 1], 3.0)) < 1e-5
    assert found.num_samples == {"one-call": 2, "two-calls": 4}[guidance]


def test_both_ways_of_guidance_agree_where_steps_reuse() -> None:
    one, two = sampler(guidance="one-call"), sampler(guidance="two-calls")

    assert one.sampling.negative == ("y", "text")
    assert distance(run(one, [1, 3]), run(two, [1, 3])) < 1e-5
    assert distance(run(one, [1, 3]), run(sampler(guidance="none"), [1, 3])) > 1e-2
    assert distance(run(one, [1, 3], scale=1.0), run(sampler(guidance="none"), [1, 3])) < 1e-5


def test_stored_values_are_those_of_every_request(tmp_path: Path) -> None:
    fixed = sampling_of(
        runner().manifest,
        scheduler=made("DDIMScheduler"),
        guidance="one-call",
        fixed={"y": torch.full((BATCH,), 5)},
        negative={"text": NEGATIVES[:1]},
    )
    fixed.save(tmp_path)
    loaded = Sampling.load(tmp_path)

    assert loaded.model_dump() == fixed.model_dump()
    assert loaded.inputs == ("text",)
    found = Sampler(runner(), loaded)
    row = loaded.tensors["negative.text"].expand(1, 5, 8)
    got = found.run(seeds=[3], inputs={"text": TEXTS[:1]}, negative={"text": row}, guidance_scale=torch.full((1,), 2.0))
    other = sampler(guidance="one-call").run(
        seeds=[3],
        inputs={"text": TEXTS[:1], "y": torch.tensor([5])},
        negative={"text": NEGATIVES[:1], "y": torch.tensor([5])},
        guidance_scale=torch.full((1,), 2.0),
    )
    assert distance(got, other) < 1e-5


def test_progress_is_told_after_each_step() -> None:
    seen: list[tuple[int, tuple[int, ...]]] = []
    sampler().run(
        seeds=[1, 2],
        inputs={"y": LABELS[:2], "text": TEXTS[:2]},
        negative={},
        guidance_scale=torch.ones(2),
        progress=lambda step, latents: seen.append((step, tuple(latents.shape))),
    )
    assert seen == [(step, (2, 4, 8, 8)) for step in (1, 2, 3, 4)]


def test_a_learned_variance_is_left_out() -> None:
    class Both(BundleRunner):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return (torch.cat([super().__call__(*args, **kwargs), torch.ones(BATCH, 4, 8, 8)], dim=1),)

    found = sampler()
    both = Both(runner().manifest, runner().engine, runner()._constants)
    assert distance(run(Sampler(both, found.sampling), [0]), run(found, [0])) == 0


# -- a sampler of one's own --------------------------------------------------------------------------------------------


def test_a_sampler_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from omnifx.sampling import sample as usual\n"
        "def sample(runner, request):\n"
        "    return 2 * usual(runner, request)\n"
    )
    plain = sampler()
    doubled = Sampler(runner(), plain.sampling, load_function(path))

    assert distance(run(doubled, [0, 2]), 2 * run(plain, [0, 2])) < 1e-6
    path.write_text("sample = 3\n")
    with pytest.raises(ConfigError, match=r"mine.py has no function sample\(runner, request\)"):
        load_function(path)
    with pytest.raises(ConfigError, match="there is no Python file"):
        load_function(tmp_path / "none.py")


def test_a_sampler_that_fails_says_how_and_holds_nothing() -> None:
    def broken(found: BundleRunner, request: SampleRequest) -> Tensor:
        def stop(step: int, latents: Tensor) -> None:
            raise ZeroDivisionError("in the middle")

        return sample(found, SampleRequest(**{**request.__dict__, "progress": stop}))

    def short(found: BundleRunner, request: SampleRequest) -> Tensor:
        return torch.ones(1)

    plain = sampler().sampling
    with pytest.raises(BundleError, match="the sampler failed with ZeroDivisionError: in the middle"):
        run(Sampler(runner(), plain, broken), [0])
    assert runner().stats.held_bytes == 0
    with pytest.raises(BundleError, match=r"the sampler returned \[1\], expected a tensor \[4, ...\]"):
        run(Sampler(runner(), plain, short), [0])
    with pytest.raises(ConfigError, match="a run makes 1 to 4 samples, not 5"):
        run(Sampler(runner(), plain), [0, 1, 2, 3, 0])


# -- schedulers --------------------------------------------------------------------------------------------------------


def shifted(name: str) -> Any:
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if "Uni" in name else {}
    scheduler = getattr(diffusers, name)(use_dynamic_shifting=True, **flow)
    scheduler.set_timesteps(4, mu=0.7)
    return scheduler


def with_sigmas() -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)  # type: ignore[no-untyped-call]
    scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.5, 0.1])
    return scheduler


@pytest.mark.parametrize(
    "make",
    [
        partial(made, "DDIMScheduler", timestep_spacing="trailing"),
        partial(made, "DPMSolverMultistepScheduler", use_karras_sigmas=True),
        partial(made, "HeunDiscreteScheduler"),
        with_sigmas,
        partial(shifted, "FlowMatchEulerDiscreteScheduler"),
        partial(shifted, "UniPCMultistepScheduler"),
    ],
)
@pytest.mark.parametrize("factor", [1.0, 0.001])
def test_a_scheduler_is_set_up_again_as_it_was(make: Callable[[], Any], factor: float) -> None:
    scheduler = make()
    seen = [float(t) * factor for t in scheduler.timesteps]

    info = SchedulerInfo.model_validate_json(scheduler_info(scheduler, seen).model_dump_json())
    again = make_scheduler(info)

    x, y = noise(1, 4, 4, 4, seed=1), noise(1, 4, 4, 4, seed=1)
    for k, (t, u) in enumerate(zip(scheduler.timesteps, again.timesteps, strict=True)):
        predicted = noise(1, 4, 4, 4, seed=2 + k)
        x = scheduler.step(predicted, t, x, return_dict=False)[0]
        y = again.step(predicted, u, y, return_dict=False)[0]
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_schedulers_that_do_not_fit_are_refused() -> None:
    times = [float(t) for t in made("DDIMScheduler").timesteps]

    def info(scheduler: Any, timesteps: list[float] = times) -> SchedulerInfo:
        return scheduler_info(scheduler, timesteps)

    with pytest.raises(BundleError, match="does not say what scheduler"):
        make_scheduler(info(None))
    for name in ("UNet2DModel", "os", "NoScheduler"):
        with pytest.raises(BundleError, match=f"has no scheduler '{name}'"):
            make_scheduler(info(made("DDIMScheduler")).model_copy(update={"name": name}))
    with pytest.raises(BundleError, match=r"DDIMScheduler has 4 timesteps \[750, .*but the bundle's steps are at 2"):
        make_scheduler(info(made("DDIMScheduler"), times[:2]))
    with pytest.raises(BundleError, match="set_timesteps called"):
        make_scheduler(info(made("DDIMScheduler"), [1000.0 - t for t in times]))
    dynamic: Any = diffusers.FlowMatchEulerDiscreteScheduler
    with pytest.raises(BundleError, match="cannot be set up from what the bundle says"):
        make_scheduler(info(dynamic(use_dynamic_shifting=True)))


# -- what does not fit a bundle ----------------------------------------------------------------------------------------


def edited(inputs: Mapping[str, Mapping[str, Any]]) -> Manifest:
    """The toy's manifest with some arguments changed."""
    manifest = runner().manifest
    changed = {name: info.model_copy(update=dict(inputs.get(name, {}))) for name, info in manifest.call.inputs.items()}
    return manifest.model_copy(update={"call": manifest.call.model_copy(update={"inputs": changed})})


@pytest.mark.parametrize(
    ("manifest", "options", "message"),
    [
        ({}, {"guidance": "twice"}, r"guidance must be one of \['none', 'one-call', 'two-calls'\], got 'twice'"),
        ({"x": {"shape": (3, 4, 8, 8)}}, {"guidance": "one-call"}, "takes an even batch, but .* has a batch of 3"),
        ({"text": {"shape": (7, 8)}}, {}, r"text of ToyDiT has no row for each sample.*fixed=\{'text': tensor\}"),
        ({"text": {"role": "varying"}}, {}, "text of ToyDiT changes from step to step.*a sampler of your own"),
        ({}, {"fixed": {"z": torch.ones(1)}}, r"fixed \['z'\] are none of the arguments \['y', 'text'\]"),
        ({}, {"fixed": {"y": torch.ones(3)}}, r"y has the shape \[3\], expected \[4\]"),
        ({}, {"guidance": "one-call", "negative": {"z": None}}, r"negative \['z'\] are none of the arguments"),
        ({}, {"guidance": "one-call", "negative": {}}, "at least one argument that differs"),
        (
            {},
            {"guidance": "one-call", "negative": {"text": torch.ones(3)}},
            r"text has the shape \[3\], expected \[5, 8\]",
        ),
    ],
)
def test_what_does_not_fit_the_bundle_is_refused(manifest: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sampling_of(edited(manifest), scheduler=made("DDIMScheduler"), **options)


def test_files_that_are_not_ours_are_refused(tmp_path: Path) -> None:
    sampler().sampling.save(tmp_path)
    path = tmp_path / "sampling.json"
    text = path.read_text()
    path.write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(BundleError, match="has format 2, but this omnifx reads format 1"):
        Sampling.load(tmp_path)
    path.write_text(text[:50])
    with pytest.raises(BundleError, match=r"cannot be read: .* Write it anew with `omnifx triton`"):
        Sampling.load(tmp_path)
