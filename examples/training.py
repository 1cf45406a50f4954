"""What the trainers of the examples share: one loop by steps and seed, checkpoints that say how they were made, a
command line.

Recipe: AdamW, EMA of the weights, and a learning rate that ends at zero: along a cosine, or constant with a linear
cooldown, whose run can be cut short (arXiv:2405.18392). On one thread the same command on the same machine gives the
same weights.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import diffusers
import torch
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
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

BatchLoss = Callable[[Any, Generator], Tensor]  # (model, generator) -> loss on a batch drawn with that generator


class Report(Protocol):
    """Called after every step."""

    def __call__(self, done: int, total: int, running_loss: float) -> None: ...


class Train(Protocol):
    """Train one model of a folder and write its checkpoint."""

    def __call__(
        self, name: str, *, num_steps: int | None, seed: int, directory: Path, progress: Report | None
    ) -> Path: ...


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one model is trained."""

    make: Callable[[], Any]
    loss: BatchLoss
    num_steps: int
    learning_rate: float = 2e-3
    ema_decay: float = 0.995  # per step
    cooldown: float | None = None  # share of the steps in which a constant rate falls to zero; None: a cosine instead


def train_one(
    recipe: Recipe,
    path: Path,
    *,
    module: str,
    num_steps: int | None = None,
    seed: int = 0,
    progress: Report | None = None,
) -> Path:
    """Train one model and write its EMA weights as float16 safetensors.

    Args:
        recipe: What to train, and how.
        path: The checkpoint; its folder is made if missing. Its stem is the model's name on the command line.
        module: Whose command line this is, for the header.
        num_steps: Optimiser steps; None takes the recipe's.
        seed: Seeds the weights and all that `recipe.loss` draws.
        progress: Called after every step with (steps done, steps in all, running loss).

    Returns: The path written. Its header names the command, seed, steps, versions and final loss.
    """
    num_steps = recipe.num_steps if num_steps is None else num_steps
    if num_steps < 1:
        raise ValueError(f"train: num_steps must be >= 1, got {num_steps!r}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = recipe.make().train()
    generator = Generator().manual_seed(seed)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate)
    schedule = _schedule(optimizer, num_steps, recipe.cooldown)

    running_loss = 0.0
    for step in range(num_steps):
        loss = recipe.loss(model, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        decay = min(recipe.ema_decay, (1 + step) / (10 + step))  # early averages must forget the random start
        update_average(average, model, decay)
        running_loss += (loss.item() - running_loss) * max(0.01, 1 / (1 + step))
        if progress is not None:
            progress(step + 1, num_steps, running_loss)

    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "format": "pt",
        "command": f"python -m {module} {path.stem} --steps {num_steps} --seed {seed}",
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


def command_line(
    recipes: Mapping[str, Recipe],
    train: Train,
    *,
    description: str | None,
    directory: Path,
    arguments: list[str] | None = None,
) -> None:
    """Train the models that the command line names, with a progress bar each."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=[*recipes, "all"], nargs="?", default="all")
    parser.add_argument("--steps", type=int, help="optimiser steps (default: the recipe's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=directory, help="folder for the checkpoints")
    parser.add_argument("--smoke", action="store_true", help="three steps of each model into a folder that is deleted")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the order of float sums, and so the weights, depends on the number of threads

    names = list(recipes) if options.model == "all" else [options.model]
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
                progress=partial(_show, bars, bar),
            )
            bars.console.print(f"{name}: {path} ({path.stat().st_size / 1e6:.2f} MB)", soft_wrap=True)


def _schedule(optimizer: Optimizer, num_steps: int, cooldown: float | None) -> LRScheduler:
    if cooldown is None:
        return CosineAnnealingLR(optimizer, num_steps)
    return LambdaLR(optimizer, lambda step: min(1.0, (num_steps - step) / (cooldown * num_steps)))


def _show(bars: Progress, bar: TaskID, done: int, total: int, running_loss: float) -> None:
    bars.update(bar, completed=done, total=total, loss=running_loss)
