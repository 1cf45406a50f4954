"""Paths of samplers: guidance and the solver's step found by regression, whatever the batch looks like."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import omnifx
from omnifx.calibration import merge
from omnifx.errors import ProfileError
from omnifx.path import Path, guidance, path_of
from omnifx.profile import Profile
from omnifx.recording import MOST_CALLS, Recorder
from tests.paths import remembering
from tests.profiles import make_profile
from tests.toys import EAGER, generate, noise, toy

STEPS = 6


def walk(
    shares: tuple[float, ...], *, shape: tuple[int, ...] = (2, 3, 4, 4), memory: float = 0.0
) -> tuple[list[Tensor], list[Tensor]]:
    """Latents, and [p, *shape] outputs of p streams, of a sampler with x' = .9 x - .2 sum_p s_p o_p; the outputs before
    have `memory` times the weight of the present ones."""
    x, latents, outputs = noise(*shape), [], []
    for k in range(STEPS):
        parts = torch.stack([noise(*shape, seed=10 * k + p + 1) for p in range(len(shares))])
        latents.append(x)
        outputs.append(parts)
        used = parts + memory * outputs[max(0, k - 1)]
        x = 0.9 * x - 0.2 * torch.einsum("p,p...->...", torch.tensor(shares), used)
    return latents, outputs


def recorded(
    latents: list[Tensor], outputs: list[Tensor], *, batched: bool, budget: int = 2**30
) -> tuple[list[list[Tensor]], Recorder]:
    """What a recorder keeps of a walk, its streams in one batch or as calls of their own."""
    steps, recorder = [], None
    for x, parts in zip(latents, outputs, strict=True):
        calls = [(x.repeat(len(parts), 1, 1, 1), parts.flatten(0, 1))] if batched else [(x, part) for part in parts]
        recorder = recorder or Recorder(*calls[0], budget=budget, frame_axis=None)
        steps.append([recorder.keep(latent, output, 0.1 * output) for latent, output in calls])
    assert recorder is not None
    return steps, recorder


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("shares", [(1.0,), (-1.0, 2.0), (-3.5, 4.5), (-2.0, 1.0, 2.0)])
def test_the_guided_path_is_found_in_batches_and_in_calls(shares: tuple[float, ...], batched: bool) -> None:
    latents, outputs = walk(shares)
    gram = path_of(*recorded(latents, outputs, batched=batched))

    assert gram is not None
    assert gram.dtype == torch.float64
    mixed = [torch.einsum("p,p...->...", torch.tensor(shares), parts) for parts in outputs]
    flat = torch.stack([*latents, *mixed, *(0.1 * m for m in mixed)]).flatten(1).double()
    torch.testing.assert_close(gram.sum(0), flat @ flat.T, rtol=1e-4, atol=1e-3)
    path = Path.of(gram.sum(0), range(STEPS, 0, -1))
    np.testing.assert_allclose(path.a, 0.9, atol=1e-4)
    np.testing.assert_allclose(path.b, -0.2, atol=1e-4)
    assert path.residual.max() < 1e-3
    np.testing.assert_allclose(path.x @ path.o.T, (flat[:STEPS] @ flat[STEPS : 2 * STEPS].T).numpy(), atol=1e-3)


@pytest.mark.parametrize("shares", [(-1.0, 2.0), (-2.0, 1.0, 2.0)])
def test_guidance_is_found_where_the_solver_remembers(shares: tuple[float, ...]) -> None:
    latents, outputs = walk(shares, shape=(6, 3, 4, 4), memory=-0.5)

    found = guidance(torch.stack(latents).flatten(1), [parts.flatten(1) for parts in outputs])

    assert found.tolist() == pytest.approx(shares, abs=1e-4)


@pytest.mark.parametrize("past", [(), ((-0.2, 0.1),), ((-0.3, 0.1), (0.1, -0.05))])
def test_what_a_solver_remembers_is_found(past: tuple[tuple[float, float], ...]) -> None:
    x, o = remembering(12, past=past)

    path = Path.through(x, o, 0 * o, range(12, 0, -1))

    assert path.depth == len(past)
    assert path.residual.max() < 1e-6


def test_fresh_noise_is_no_memory_and_carries_no_drift() -> None:
    x, o = remembering(12, noise=0.5, size=4000)

    path = Path.through(x, o, 0 * o, range(12, 0, -1))

    assert path.depth == 0
    assert path.residual.min() > 0.5
    np.testing.assert_allclose(path.a, 0.95, atol=0.02)
    np.testing.assert_allclose(path.b, -0.2, atol=0.05)
    made = np.linalg.norm(0.95 * x[:-1] - 0.2 * o[:-1], axis=1) / np.linalg.norm(x[:-1], axis=1)
    np.testing.assert_allclose(path.growth[:-1], (made + 0.95) / 2, rtol=0.02)  # these outputs do not see the noise
    np.testing.assert_allclose(path.a + path.b * path.answer, path.growth, rtol=1e-9)


@pytest.mark.parametrize("answer", [0.0, 1.0, 2.5])
def test_what_a_step_leaves_of_the_noise_before_is_measured(answer: float) -> None:
    rng = np.random.default_rng(0)
    x, o, way = [rng.normal(size=4000)], [], rng.normal(size=4000)
    for k in range(9):
        o.append(answer * x[k] + np.sin(k) * way)
        x.append(x[k] - 0.2 * o[k] + 0.5 * rng.normal(size=4000))
    o.append(answer * x[9])

    path = Path.through(np.stack(x), np.stack(o), 0 * np.stack(x), range(10, 0, -1))

    made = np.linalg.norm(np.stack(x[:-1]) - 0.2 * np.stack(o[:-1]), axis=1) / np.linalg.norm(x[:-1], axis=1)
    assert path.is_noisy
    assert not path.is_clipped
    kept = np.minimum(1.0 - 0.2 * answer, made)
    np.testing.assert_allclose(path.growth[1:-1], (made[1:] + kept[1:]) / 2, rtol=0.05)
    np.testing.assert_allclose(path.a + path.b * path.answer, path.growth, rtol=1e-9)


def test_clips_are_told_from_fresh_noise() -> None:
    """What a clip takes away lasts from step to step, as what it clips moves slowly."""
    rng = np.random.default_rng(0)
    x, o, ways = [3 * rng.normal(size=4000)], [], rng.normal(size=(2, 4000))
    for k in range(12):
        o.append(ways[0] + k / 12 * ways[1])
        x.append(np.clip(x[k] - 0.1 * o[k], -1.0, 1.0) + 0.9 * o[k])

    path = Path.through(np.stack(x[:-1]), np.stack(o), 0 * np.stack(o), range(12, 0, -1))

    assert path.is_clipped
    assert not path.is_noisy
    assert path.projected(1e-3).is_clipped
    kept = np.linalg.norm(path.a[:, None] * path.x + path.b[:, None] * path.o, axis=1)
    np.testing.assert_allclose(path.growth[:-1], (kept / np.linalg.norm(path.x, axis=1))[:-1])


def test_an_amplified_path_grows_by_that_much_more() -> None:
    x, o = remembering(12)
    path = Path.through(x, o, 0 * o, range(12, 0, -1))

    grown = path.amplified(10.0)

    assert np.prod(grown.growth) == pytest.approx(10.0 * np.prod(path.growth))
    np.testing.assert_allclose(grown.a + grown.b * grown.answer, grown.growth, rtol=1e-9)
    assert path.amplified(1.0).growth.tolist() == path.growth.tolist()


def test_a_sketch_finds_nearly_the_same_path() -> None:
    latents, outputs = walk((-1.0, 2.0), shape=(1, 4, 64, 64))
    budget = MOST_CALLS * 3 * 4 * 8 * 1024

    steps, recorder = recorded(latents, outputs, batched=True, budget=budget)
    gram = path_of(steps, recorder)

    assert recorder.sketched
    assert gram is not None
    path = Path.of(gram.sum(0), range(STEPS, 0, -1))
    np.testing.assert_allclose(path.a, 0.9, atol=1e-4)  # regression in a sketch is exact where nothing is left over
    np.testing.assert_allclose(path.b, -0.2, atol=1e-4)


def test_a_batch_of_different_samples_is_one_part() -> None:
    latents, outputs = walk((1.0,), shape=(4, 3, 4, 4))
    gram = path_of(*recorded(latents, outputs, batched=True))

    assert gram is not None
    flat = torch.stack(latents).flatten(1).double()
    torch.testing.assert_close(gram.sum(0)[:STEPS, :STEPS], flat @ flat.T, rtol=1e-4, atol=1e-3)


def test_outputs_that_cannot_be_told_apart_share_equally() -> None:
    x = [noise(5, seed=k) for k in range(4)]
    same = [noise(5, seed=10 + k).expand(2, 5) for k in range(4)]
    latents = torch.stack([x[0], *(0.9 * a - 0.2 * b[0] for a, b in zip(x[:3], same[:3], strict=True))])

    assert guidance(latents, same).tolist() == pytest.approx([0.5, 0.5], abs=1e-3)
    still = torch.zeros(4, 5)
    assert guidance(still, [torch.zeros(2, 5)] * 4).tolist() == [0.5, 0.5]


def test_latents_unlike_the_output_have_no_path() -> None:
    recorder = Recorder(torch.zeros(1, 4, 8, 8), torch.zeros(1, 64, 4), budget=2**30, frame_axis=None)

    assert path_of([[torch.zeros(3, 256)]] * 4, recorder) is None


def test_a_profile_keeps_its_path(tmp_path: FilePath) -> None:
    path = torch.rand(2, 2, 12, 12, dtype=torch.float64)
    profile = replace(make_profile(4, runs=2), path=path)

    profile.save(tmp_path / "model.profile")
    loaded = Profile.load(tmp_path / "model.profile")

    assert loaded.path is not None
    assert torch.equal(loaded.path, path)
    assert Profile.load(_saved(make_profile(4), tmp_path / "old.profile")).path is None
    one = replace(make_profile(4), path=path[:1])
    assert torch.equal(merge([one, one]).path, path[[0, 0]])  # type: ignore[arg-type]
    assert merge([one, make_profile(4)]).path is None
    with pytest.raises(ProfileError, match=r"the path has shape \(1, 2, 9, 9\), expected \(1, 2, 12, 12\)"):
        replace(one, path=torch.zeros(1, 2, 9, 9))
    with pytest.raises(ProfileError, match="NaN or infinity"):
        replace(one, path=path[:1] * torch.nan)


def _saved(profile: Profile, path: FilePath) -> FilePath:
    profile.save(path)
    return path


@pytest.mark.parametrize("cfg", [None, 7])
def test_the_step_of_a_models_sampler_is_found(cfg: int | None) -> None:
    def run(model: Any, seed: int) -> Tensor:
        return generate(model, seed=seed, steps=STEPS, cfg=cfg)

    profile = omnifx.calibrate(toy(), run, runs=2, options=EAGER, progress=False)

    assert profile.path is not None
    assert profile.path.shape == (2, 2, 3 * STEPS, 3 * STEPS)
    path = Path.of(profile.path.sum((0, 1)), profile.meta.timesteps)
    np.testing.assert_allclose(path.a, 1.0, atol=1e-4)
    np.testing.assert_allclose(path.b, -1 / (4 * STEPS), atol=1e-4)
    assert path.residual.max() < 1e-3
