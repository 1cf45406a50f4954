"""Hollow models: what is large is zero and never computed, what decides the way is computed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from omnifx.hollow import Hollowing, hollow_like


def test_what_is_large_is_zero_in_the_shape_it_would_have() -> None:
    x = hollow_like(torch.empty(512, 4096, dtype=torch.bfloat16))
    linear = nn.Linear(4096, 1024, dtype=torch.bfloat16)

    with torch.no_grad(), Hollowing():
        y = torch.nn.functional.silu(linear(x)).float()

    assert (y.shape, y.dtype, y.device) == (torch.Size([512, 1024]), torch.float32, torch.device("cpu"))
    assert not y.any()


def test_values_that_decide_are_computed() -> None:
    x = hollow_like(torch.empty(4096, 8))

    with torch.no_grad(), Hollowing():
        chosen = (x + 1).argmax(dim=-1)
        counts = chosen.bincount(minlength=8).tolist()
        small = torch.full((3,), 2.0).exp()

    assert counts == [4096, 0, 0, 0, 0, 0, 0, 0]
    assert torch.equal(small, torch.full((3,), 2.0).exp())


def test_views_and_writes_in_place_stay_what_they_are() -> None:
    x = hollow_like(torch.empty(4096, 8))

    with torch.no_grad(), Hollowing():
        view = x.view(8, 4096)
        written = x.add_(1)

    assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert written is x
    assert not x.any()


def test_a_size_that_depends_on_values_is_found() -> None:
    x = hollow_like(torch.empty(4096, 8))
    mask = torch.arange(4096) < 5

    with torch.no_grad(), Hollowing():
        kept: Tensor = x[mask]

    assert kept.shape == (5, 8)
