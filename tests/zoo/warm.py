"""What every examination needs, done once: the server that forks a process for each model imports this module."""

from __future__ import annotations

import torch
from torch import nn

from tests.reuse import EAGER
from tests.zoo.models import transformer_classes


def warm_up() -> None:
    """Import all transformers, and what a first capture imports."""
    transformer_classes()
    torch.set_num_threads(1)
    with torch.no_grad():
        torch.compile(nn.Linear(2, 2), backend="omnicache", options={**EAGER, "policy": "full"})(torch.ones(1, 2))
    torch._dynamo.reset()


warm_up()
