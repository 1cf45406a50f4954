"""`omnifx bench` on pipelines of diffusers, saved and loaded again: tiny ones, with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from typer.testing import CliRunner

from omnifx.bench_targets import _samples_of, as_samples, load_pipeline, pipeline_target, read_prompts
from omnifx.cli import app
from omnifx.errors import ConfigError
from omnifx.results import Results
from tests.pipelines import save_class_pipeline, save_prompt_pipeline

FEW = ("--samples", 2, "--runs", 1, "--repeats", 1, "--speedups", 2, "--steps", 6, "--lowering", "eager")


@pytest.fixture(scope="module")
def of_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_class_pipeline(tmp_path_factory.mktemp("classes") / "tiny")


@pytest.fixture(scope="module")
def of_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers", reason="the pipeline reads its prompts with a T5")
    return save_prompt_pipeline(tmp_path_factory.mktemp("prompts") / "tiny")


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    assert result.exit_code == status, (result.output, result.exception)
    return " ".join(result.output.split())


def test_a_pipeline_of_classes_is_measured(of_classes: Path, tmp_path: Path) -> None:
    given = ("--class-labels", "1,2,3", "--guidance", 2, "--scheduler", "DPMSolverMultistepScheduler")

    shown = run(of_classes, "--out", tmp_path / "out", *given, *FEW, "--batch", 2, "--policies", "auto")

    (case,) = Results.load(tmp_path / "out").cases
    assert [(row.method, row.setting) for row in case.rows] == [
        ("uncached", ""),
        ("auto", "speedup=2"),
        ("fewer steps", "3 of 6 steps"),
    ]
    assert (case.model, case.steps, case.lowest, case.data_range) == ("DiTTransformer2DModel", 6, 0.0, 1.0)
    assert case.sampler == "DPMSolverMultistepScheduler, guidance 2"
    assert case.rows[0].timeline is not None
    assert case.rows[0].timeline.notes == ("pipe.transformer is compiled", "class_labels: 3 in turn")
    assert case.rows[1].compute < 0.51
    assert len(case.rows[1].drift) == 5  # the images are no latents, so the last step cannot be told
    samples = Results.load(tmp_path / "out").samples_of(tmp_path / "out", case)["uncached"]
    assert samples.shape == (2, 3, 8, 8)
    assert samples.min() >= 0
    assert samples.max() <= 1
    assert "DPMSolverMultistepScheduler" in shown


def test_a_pipeline_of_prompts_takes_them_in_turn(of_prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red fox\n\nblue sea at night\n")
    given = ("--prompts", tmp_path / "prompts.txt", "--size", 8, "--arguments", '{"use_resolution_binning": false}')

    run(of_prompts, "--out", tmp_path / "out", *given, *FEW, "--policies", "auto")

    (case,) = Results.load(tmp_path / "out").cases
    assert [row.method for row in case.rows] == ["uncached", "auto", "fewer steps"]
    assert case.refused == {}
    assert "psnr" in case.rows[1].metrics
    told = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert json.loads(told["conditions"]) == {"prompt": ["a red fox", "blue sea at night"]}


def test_samples_have_the_noise_of_their_number_and_the_condition_of_their_turn(of_classes: Path) -> None:
    pipe = load_pipeline(of_classes)
    two = pipeline_target(pipe, class_labels=[1, 2, 3], batch=2, steps=4)
    one = pipeline_target(pipe, class_labels=[1, 2, 3], batch=1, steps=4)

    pair, _ = as_samples(two.generate(two.model, 1, None))
    single = [as_samples(one.generate(one.model, seed, None))[0] for seed in (2, 3)]

    assert pair.shape == (2, 3, 8, 8)
    torch.testing.assert_close(pair, torch.cat(single), atol=1e-4, rtol=0.0)
    assert not torch.allclose(pair[:1], pair[1:], atol=1e-2)
    assert pipe.transformer is two.model  # put back


def test_a_pipeline_that_has_no_denoiser_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"SimpleNamespace has no denoiser: neither transformer nor unet .*\['vae'\]"):
        pipeline_target(SimpleNamespace(components={"vae": torch.nn.Linear(1, 1), "scheduler": 3}))


def test_an_unconditional_pipeline_needs_no_prompts() -> None:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    target = pipeline_target(DDPMPipeline(unet, DDPMScheduler()), batch=2, steps=2)

    samples, _ = as_samples(target.generate(target.model, 0, None))

    assert samples.shape == (2, 3, 8, 8)
    assert target.notes == ("pipe.unet is compiled",)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "is conditioned on class_labels: give --class-labels 1,2,3"),
        (("--class-labels", "1;2"), "--class-labels must be numbers"),
        (("--class-labels", "1", "--frames", 3), "DiTPipeline takes no argument num_frames"),
        (("--class-labels", "1", "--size", "8by8"), "--size must be pixels"),
        (("--class-labels", "1", "--batch", "0"), "batch must be >= 1"),
        (("--class-labels", "1", "--arguments", "[1]"), "--arguments must be an object"),
        (("--class-labels", "1", "--arguments", "{"), "--arguments is not JSON"),
        (("--class-labels", "1", "--scheduler", "Euler"), "has no scheduler 'Euler'; it has "),
        (("--class-labels", "1", "--dtype", "int8"), "dtype must be one of"),
        (("--class-labels", "1", "--range", "0,1"), "--range is for scripts"),
        (("--prompts", "nowhere.txt"), "the prompts nowhere.txt cannot be read"),
    ],
)
def test_arguments_that_do_not_fit_the_pipeline_are_refused(
    of_classes: Path, tmp_path: Path, given: tuple[str, ...], said: str
) -> None:
    assert said in run(of_classes, "--out", tmp_path / "out", *given, status=2)


def test_folders_that_are_no_pipelines_are_refused(tmp_path: Path) -> None:
    assert "there is no folder" in run(tmp_path / "nowhere", "--out", tmp_path / "out", status=2)
    assert "it has no model_index.json" in run(tmp_path, "--out", tmp_path / "out", status=2)
    (tmp_path / "model_index.json").write_text('{"_class_name": "DiTPipeline", "vae": ["diffusers", "AutoencoderKL"]}')
    assert "cannot be loaded" in run(tmp_path, "--out", tmp_path / "out", status=2)
    (tmp_path / "prompts.txt").write_text(" \n")
    with pytest.raises(ConfigError, match="holds no prompts"):
        read_prompts(tmp_path / "prompts.txt")


def test_images_and_videos_of_all_forms_become_samples() -> None:
    torch.manual_seed(0)
    frames = torch.rand(2, 3, 5, 4, 6)  # [N, C, T, H, W]
    pixels = (frames * 255).round().to(torch.uint8)
    pictures = [[Image.fromarray(x.movedim(0, -1).numpy()) for x in video.unbind(1)] for video in pixels]

    def got(output: Any) -> torch.Tensor:
        return as_samples(_samples_of(output))[0]

    torch.testing.assert_close(got(SimpleNamespace(frames=frames.transpose(1, 2))), frames)
    torch.testing.assert_close(got(SimpleNamespace(frames=np.moveaxis(frames.numpy(), 1, -1))), frames)
    torch.testing.assert_close(got(SimpleNamespace(frames=pictures)), frames, atol=0.003, rtol=0.0)
    first = frames[:, :, 0]
    torch.testing.assert_close(got(SimpleNamespace(images=first)), first)
    torch.testing.assert_close(got((first.movedim(1, -1).numpy(),)), first)
    images, are_images = as_samples([video[0] for video in pictures])
    torch.testing.assert_close(images, first, atol=0.003, rtol=0.0)
    assert are_images
    grey, _ = as_samples([Image.fromarray(pixels[0, 0, 0].numpy())])
    assert grey.shape == (1, 1, 4, 6)
