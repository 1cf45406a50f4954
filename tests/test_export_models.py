"""Exports of real architectures: tiny models of the zoo, the trained digits models, and a pipeline of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import omnifx
from omnifx.bundle import Manifest
from omnifx.example_inputs import lively
from tests.exporting import needs_onnx, plan_by_hand, planned
from tests.reuse import distance
from tests.zoo.models import ZOO

needs_onnx()

TIMES = (800.0, 640.0, 512.0, 409.0)

MODELS = {
    "DiTTransformer2DModel": (),
    "PixArtTransformer2DModel": ("encoder_hidden_states",),
    "SD3Transformer2DModel": ("encoder_hidden_states",),
    "FluxTransformer2DModel": ("encoder_hidden_states",),
    "WanTransformer3DModel": ("encoder_hidden_states",),
    "CogVideoXTransformer3DModel": ("encoder_hidden_states",),
    "LatteTransformer3DModel": ("encoder_hidden_states",),
}
"""Models, and what only their prologue reads."""


def names_of(model: Any, inputs: dict[str, Any]) -> tuple[str, ...]:
    return tuple(branch.name for branch in omnifx.explain(model, **inputs).branches if branch.cacheable)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_tiny_model_runs_as_the_compiled_one(name: str, tmp_path: Path) -> None:
    tiny = ZOO[name].make()
    model: Any = tiny.model.eval()
    plan = plan_by_hand(model, names_of(model, tiny.inputs), "FrFr", TIMES)

    manifest = omnifx.export(model, tiny.inputs, plan, tmp_path / "b", progress=False)
    runner = omnifx.load_bundle(tmp_path / "b")

    assert runner.check() < 1e-5
    variants = manifest.variants
    assert variants["reuse"].flops < 0.2 * variants["full"].flops
    assert variants["reuse"].params_bytes < 0.5 * variants["full"].params_bytes
    for reader in ("full", "reuse"):
        assert set(MODELS[name]) <= set(variants[reader].dropped_inputs)
    for k, time in enumerate(TIMES):
        inputs = _step(tiny, k, time)
        got = runner(**inputs)[0]
        if k in (0, 2):
            with torch.no_grad():
                assert distance(got, model(**inputs)[0]) < 1e-5


def _step(tiny: Any, k: int, time: float) -> dict[str, Any]:
    inputs = dict(tiny.step(k))
    inputs["timestep"] = torch.full_like(inputs["timestep"], time)
    return inputs


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["auto", "omnicache", "fora", "taylorseer", "toca"])
@pytest.mark.parametrize("which", ["dit", "flow"])
def test_the_digits_models_sample_as_the_compiled_ones(which: str, policy: str, tmp_path: Path) -> None:
    from examples.digits.models import load_class_tokens, load_dit, load_flow
    from examples.digits.sampling import sample_dit, sample_flow

    labels = torch.arange(4)

    def generate(model: Any, seed: int) -> Tensor:
        seeds = range(4 * seed, 4 * seed + 4)
        if which == "dit":
            return sample_dit(model, seeds=seeds, labels=labels, steps=10)
        return sample_flow(model, seeds=seeds, labels=labels, steps=10, two_calls=True)

    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    example: dict[str, Any] = {"hidden_states": x, "timestep": torch.full((4,), 500), "class_labels": labels}
    if which == "flow":
        example = {
            "hidden_states": x,
            "encoder_hidden_states": load_class_tokens()[labels],
            "timestep": torch.full((4,), 500.0),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
    case = planned(load_dit() if which == "dit" else load_flow(), generate, policy)
    omnifx.export(case.model, example, case.plan, tmp_path / "b", profile=case.profile, progress=False)
    runner = omnifx.load_bundle(tmp_path / "b")
    compiled = case.compiled(tmp_path)

    true, got = generate(compiled, 3), generate(runner, 3)

    assert omnifx.stats(compiled).generations[-1].reasons == {}
    assert runner.check() < 1e-5
    assert float((got - true).abs().max()) < 1e-4, "ten steps, each within 1e-5"
    assert distance(true, generate(case.model, 3)) > 1e-4, "nothing was reused"


def test_half_precision_stays_within_its_tolerance(tmp_path: Path) -> None:
    tiny = ZOO["DiTTransformer2DModel"].make()
    model: Any = tiny.model.eval().half()
    inputs = {
        name: value.half() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in tiny.inputs.items()
    }
    plan = plan_by_hand(model, names_of(model, inputs), "Fr", TIMES[:2])

    manifest = omnifx.export(model, inputs, plan, tmp_path / "b", progress=False)
    runner = omnifx.load_bundle(tmp_path / "b")

    assert manifest.producer.dtype == "float16"
    assert runner.dtype is torch.float16
    assert runner.check() < 1e-2


def test_a_bundle_takes_the_transformer_s_place_in_a_pipeline(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    config = {**ZOO["DiTTransformer2DModel"].config, "out_channels": 4}
    model: Any = lively(DiTTransformer2DModel(**config)).eval()
    make_vae: Any = AutoencoderKL
    vae = make_vae(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, layers_per_block=1).eval()
    scheduler: Any = DDIMScheduler()
    scheduler.set_timesteps(4)
    example = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.full((2,), 500),
        "class_labels": torch.tensor([3, 1000]),
    }
    plan = plan_by_hand(model, names_of(model, example), "FrFr", [float(t) for t in scheduler.timesteps])
    omnifx.export(model, example, plan, tmp_path / "b", scheduler=scheduler, progress=False)
    pipe: Any = DiTPipeline(model, vae, scheduler)
    pipe.set_progress_bar_config(disable=True)

    runner = omnifx.load_bundle(tmp_path / "b")
    runner.expect(scheduler.timesteps)
    pipe.transformer = runner
    generator = torch.Generator().manual_seed(0)
    images = pipe(class_labels=[3], guidance_scale=2.0, num_inference_steps=4, generator=generator, output_type="np")

    assert images.images.shape[0] == 1
    assert dict(runner.stats.runs)["full"] == 2
    assert dict(runner.stats.runs)["reuse"] == 2
    assert Manifest.load(tmp_path / "b").scheduler.name == "DDIMScheduler"
    with pytest.raises(omnifx.BundleError, match="none of the bundle's 4"):
        pipe(class_labels=[3], guidance_scale=2.0, num_inference_steps=5, generator=generator, output_type="np")
