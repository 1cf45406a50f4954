"""A pipeline of diffusers, and what the command `omnifx` asks of you to deploy it: docs/deploy.md goes the whole way.

For a pipeline of your own, write `pipeline` and `run`; the rest stays as it is. The one here makes digits: it has a
transformer and a scheduler, and neither text encoder nor VAE, which would stay with the caller.

    omnifx calibrate examples.deploy:measured --out digits.safetensors
    omnifx export examples.deploy:exported --plan plan.json --out digits
    python -m examples.deploy --bundle digits --seed 7 --label 3     (the pipeline, with the bundle as its transformer)
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor

import omnifx
from examples.digits.models import load_classifier, load_dit
from examples.digits.sampling import NOISE_SCHEDULE
from examples.export_tensorrt import first_call
from omnifx.metrics import psnr

STEPS, BATCH = 20, 4  # a bundle has one number of steps, and one batch


class Digits(DiffusionPipeline):  # type: ignore[misc]  # to a type checker, classes of diffusers are untyped
    """Digits by their labels, with the trained DiT."""

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, labels: Sequence[int], *, seeds: Sequence[int], num_inference_steps: int = STEPS) -> Tensor:
        """Sample B labels with B seeds: [B, 1, 8, 8] float32 in about [-1, 1]."""
        self.scheduler.set_timesteps(num_inference_steps)
        noise = [torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        latents, classes = torch.stack(noise), torch.tensor(labels)
        for t in self.scheduler.timesteps:
            timestep = t.expand(len(latents))
            predicted = self.transformer(
                hidden_states=latents, timestep=timestep, class_labels=classes, return_dict=False
            )[0]
            latents = self.scheduler.step(predicted, t, latents, return_dict=False)[0]
        return latents


def pipeline() -> Any:
    """The pipeline as it is without omnifx; one of your own comes from `from_pretrained`."""
    return Digits(load_dit(), DDIMScheduler(clip_sample=True, **NOISE_SCHEDULE))


def run(pipe: Any, seed: int) -> Any:
    """One ordinary generation, of as many samples as the bundle shall make at once."""
    return pipe([(seed + k) % 10 for k in range(BATCH)], seeds=range(BATCH * seed, BATCH * (seed + 1)))


def measured() -> tuple[Any, Callable[[Any, int], Any]]:
    """What `omnifx calibrate` asks for: a model, and how to generate with what stands in its place."""
    pipe = pipeline()
    return pipe.transformer, _with_model(pipe)


def exported() -> tuple[Any, dict[str, Any], Any]:
    """What `omnifx export` asks for: a model, one call's arguments, and the scheduler as that call found it."""
    pipe = pipeline()
    model = pipe.transformer
    return model, first_call(model, _with_model(pipe)), pipe.scheduler


def _with_model(pipe: Any) -> Callable[[Any, int], Any]:
    def generate(model: Any, seed: int) -> Any:
        pipe.transformer = model
        return run(pipe, seed)

    return generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="what `omnifx export` wrote; without it, the plain pipeline runs")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--label", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="few steps, of the plain pipeline")
    arguments = parser.parse_args()
    steps = 6 if arguments.smoke else STEPS

    pipe, seeds, labels = pipeline(), [arguments.seed] * BATCH, [arguments.label] * BATCH
    sample = plain = pipe(labels, seeds=seeds, num_inference_steps=steps)[0]
    if arguments.bundle is not None:
        pipe.transformer = omnifx.load_bundle(arguments.bundle)
        sample = pipe(labels, seeds=seeds)[0]
        print(f"the bundle: {float(psnr(sample[None], plain[None])):.1f} dB to the plain pipeline's sample")
    print(f"asked for a {arguments.label}; the classifier sees a {int(load_classifier()(sample[None]).argmax())}")


if __name__ == "__main__":
    main()
