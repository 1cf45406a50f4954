"""Train the digits models: `python -m examples.digits.train all` writes the checkpoints that this folder ships.

Training runs by steps and seed, on one thread, so that the same command on the same machine gives the same weights.

Recipe: AdamW with a cosine schedule, EMA of the weights, labels dropped once per image for guidance.
Sources: DiT, arXiv:2212.09748 (noise prediction); rectified flow, arXiv:2209.03003; PixArt-alpha, arXiv:2310.00426;
squaredcos_cap_v2 is the cosine schedule of improved DDPM, arXiv:2102.09672.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import DDPMScheduler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.nn import functional

from examples.digits.data import load_digits
from examples.digits.models import CHECKPOINTS, NULL_CLASS, Classifier, FlowModel, make_dit

NUM_TRAIN_TIMESTEPS = 1000
NOISE_SCHEDULE = cast(Any, DDPMScheduler)(num_train_timesteps=NUM_TRAIN_TIMESTEPS, beta_schedule="squaredcos_cap_v2")
MAX_LOSS_WEIGHT = 10.0  # 1 / alpha_bar grows without end as the image drowns in noise

# (model, images [B, 1, 8, 8], labels [B] with the dropped ones at NULL_CLASS, generator) -> loss
Loss = Callable[[Any, Tensor, Tensor, Generator], Tensor]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one model is trained."""

    make: Callable[[], Any]
    loss: Loss
    num_steps: int
    batch_size: int = 32
    learning_rate: float = 2e-3
    ema_decay: float = 0.995  # per step
    label_dropout: float = 0.1  # share of images whose label becomes NULL_CLASS


def dit_loss(model: Any, images_BCHW: Tensor, labels: Tensor, generator: Generator) -> Tensor:
    """Squared error of the predicted noise, weighted by 1 / alpha_bar (at most 10) so that the noisy steps, where the
    class is decided, count."""
    timesteps = torch.randint(NUM_TRAIN_TIMESTEPS, labels.shape, generator=generator)
    noise = torch.randn(images_BCHW.shape, generator=generator)
    noisy = NOISE_SCHEDULE.add_noise(images_BCHW, noise, timesteps)
    predicted = model(hidden_states=noisy, timestep=timesteps, class_labels=labels, return_dict=False)[0]
    weight = (1 / NOISE_SCHEDULE.alphas_cumprod[timesteps]).clamp(max=MAX_LOSS_WEIGHT)
    loss: Tensor = (weight * (predicted - noise).square().mean(dim=(1, 2, 3))).mean()
    return loss


def flow_loss(model: Any, images_BCHW: Tensor, labels: Tensor, generator: Generator) -> Tensor:
    """Squared error of the predicted velocity noise - image, at x_t = (1 - t) image + t noise, t uniform in [0, 1]."""
    times = torch.rand(labels.shape, generator=generator)
    noise = torch.randn(images_BCHW.shape, generator=generator)
    noisy = torch.lerp(images_BCHW, noise, times[:, None, None, None])
    predicted = model.transformer(
        hidden_states=noisy,
        encoder_hidden_states=model.class_tokens[labels],
        timestep=NUM_TRAIN_TIMESTEPS * times,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]
    return functional.mse_loss(predicted, noise - images_BCHW)


def classifier_loss(model: Any, images_BCHW: Tensor, labels: Tensor, generator: Generator) -> Tensor:
    """Cross-entropy on images with a little noise, so that a sample is judged by its shape and not by its grain.

    Without label smoothing the features of the training images grow without end, and the Frechet distance between
    training and held-out images is 7.2 and not 0.3.
    """
    noisy = images_BCHW + 0.1 * torch.randn(images_BCHW.shape, generator=generator)
    return functional.cross_entropy(model(noisy), labels, label_smoothing=0.1)


RECIPES = {
    "dit": Recipe(make=make_dit, loss=dit_loss, num_steps=4000),
    "flow": Recipe(make=FlowModel, loss=flow_loss, num_steps=5000),
    "classifier": Recipe(make=Classifier, loss=classifier_loss, num_steps=2000, label_dropout=0.0),
}


def train(
    name: str,
    *,
    num_steps: int | None = None,
    seed: int = 0,
    directory: Path = CHECKPOINTS,
    progress: Callable[[int, int, float], None] | None = None,
) -> Path:
    """Train one model and write its EMA weights as float16 safetensors.

    Args:
        name: "dit", "flow" or "classifier".
        num_steps: Optimiser steps; None takes the recipe's.
        seed: Seeds the weights, the order of the images, the noise and the dropped labels.
        directory: Made if missing; the file is `directory / f"{name}.safetensors"`.
        progress: Called after every step with (steps done, steps in all, running loss).

    Returns: The path written. Its header names the command, seed, steps, versions and final loss.
    """
    recipe = RECIPES[name]
    num_steps = recipe.num_steps if num_steps is None else num_steps
    if num_steps < 1:
        raise ValueError(f"train: num_steps must be >= 1, got {num_steps!r}.")
    data, _ = load_digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = recipe.make().train()
    generator = Generator().manual_seed(seed)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)

    running_loss = 0.0
    for step in range(num_steps):
        chosen = torch.randint(len(data.labels), (recipe.batch_size,), generator=generator)
        dropped = torch.rand(recipe.batch_size, generator=generator) < recipe.label_dropout
        labels = data.labels[chosen].masked_fill(dropped, NULL_CLASS)
        loss = recipe.loss(model, data.images[chosen], labels, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        decay = min(recipe.ema_decay, (1 + step) / (10 + step))  # early averages must forget the random start
        update_average(average, model, decay)
        running_loss += (loss.item() - running_loss) * max(0.01, 1 / (1 + step))
        if progress is not None:
            progress(step + 1, num_steps, running_loss)

    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.safetensors"
    metadata = {
        "format": "pt",
        "command": f"python -m examples.digits.train {name} --steps {num_steps} --seed {seed}",
        "seed": str(seed),
        "steps": str(num_steps),
        "torch": str(torch.__version__),
        "diffusers": diffusers.__version__,
        "final_loss": f"{running_loss:.5f}",
    }
    weights = {key: value.half().contiguous() for key, value in average.state_dict().items()}
    save_file(weights, path, metadata=metadata)
    return path


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)


def show(bars: Progress, bar: TaskID, done: int, total: int, loss: float) -> None:
    bars.update(bar, completed=done, total=total, loss=loss)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=[*RECIPES, "all"], nargs="?", default="all")
    parser.add_argument("--steps", type=int, help="optimiser steps (default: the recipe's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=CHECKPOINTS, help="folder for the checkpoints")
    parser.add_argument("--smoke", action="store_true", help="three steps of each model into a folder that is deleted")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the order of float sums, and so the weights, depends on the number of threads

    names = list(RECIPES) if options.model == "all" else [options.model]
    with (
        tempfile.TemporaryDirectory() as scratch,
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        ) as bars,
    ):
        for name in names:
            bar = bars.add_task(name, loss=float("nan"))
            path = train(
                name,
                num_steps=3 if options.smoke else options.steps,
                seed=options.seed,
                directory=Path(scratch) if options.smoke else options.out,
                progress=partial(show, bars, bar),
            )
            bars.console.print(f"{name}: {path} ({path.stat().st_size / 1e6:.2f} MB)", soft_wrap=True)


if __name__ == "__main__":
    main()
