"""Train the moving digits models: `python -m examples.moving_digits.train all` writes the checkpoints shipped here.

Training runs by steps and seed, on one thread, so that the same command on the same machine gives the same weights.
Videos are drawn anew for every step; labels are dropped once per video for guidance.

Sources: Latte, arXiv:2401.03048; rectified flow, arXiv:2209.03003; times shifted towards noise, arXiv:2403.03206.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional

from examples.moving_digits.data import make_videos
from examples.moving_digits.models import CHECKPOINTS, NULL_CLASS, TIME_SHIFT, VideoClassifier, VideoModel
from examples.training import Recipe, Report, command_line, train_one

NUM_TRAIN_TIMESTEPS = 1000
LABEL_DROPOUT = 0.1  # share of videos whose label becomes NULL_CLASS
NOISE_FOR_CLASSIFIER = 0.1  # a sample is judged by its shape and motion, not by its grain
BATCH_SIZE = 16  # videos of 128 tokens for the transformer
CLASSIFIER_BATCH_SIZE = 32


def latte_loss(model: Any, generator: Generator) -> Tensor:
    """Squared error of the predicted velocity noise - video, at x_t = (1 - t) video + t noise, t shifted as sampled."""
    data = make_videos(BATCH_SIZE, generator=generator)
    dropped = torch.rand(BATCH_SIZE, generator=generator) < LABEL_DROPOUT
    labels = data.labels.masked_fill(dropped, NULL_CLASS)
    even = torch.rand(BATCH_SIZE, generator=generator)
    times = TIME_SHIFT * even / (1 + (TIME_SHIFT - 1) * even)
    noise = torch.randn(data.videos.shape, generator=generator)
    predicted = model.transformer(
        hidden_states=torch.lerp(data.videos, noise, times[:, None, None, None, None]),
        encoder_hidden_states=model.class_tokens[labels],
        timestep=NUM_TRAIN_TIMESTEPS * times,
        return_dict=False,
    )[0]
    return functional.mse_loss(predicted, noise - data.videos)


def classifier_loss(model: Any, generator: Generator) -> Tensor:
    """Cross-entropy of the digit and of its motion along y and x, on videos with a little noise.

    Labels are smoothed for the reason that `examples.digits.train.classifier_loss` gives.
    """
    data = make_videos(CLASSIFIER_BATCH_SIZE, generator=generator)
    noisy = data.videos + NOISE_FOR_CLASSIFIER * torch.randn(data.videos.shape, generator=generator)
    features = model.features(noisy)
    digit = functional.cross_entropy(model.digit(features), data.labels, label_smoothing=0.1)
    motion = functional.binary_cross_entropy_with_logits(model.motion(features), smooth(data.motions))
    return digit + motion


def smooth(motions: Tensor) -> Tensor:
    return 0.05 + 0.9 * motions  # as much as label_smoothing=0.1 does to two classes


RECIPES = {
    "latte": Recipe(make=VideoModel, loss=latte_loss, num_steps=20_000, cooldown=0.25),
    "classifier": Recipe(make=VideoClassifier, loss=classifier_loss, num_steps=3000),
}


def train(
    name: str,
    *,
    num_steps: int | None = None,
    seed: int = 0,
    directory: Path = CHECKPOINTS,
    progress: Report | None = None,
) -> Path:
    """Train "latte" or "classifier", and write `directory / f"{name}.safetensors"`; the rest as `train_one`."""
    path = directory / f"{name}.safetensors"
    return train_one(
        RECIPES[name], path, module="examples.moving_digits.train", num_steps=num_steps, seed=seed, progress=progress
    )


def main(arguments: list[str] | None = None) -> None:
    command_line(RECIPES, train, description=__doc__, directory=CHECKPOINTS, arguments=arguments)


if __name__ == "__main__":
    main()
