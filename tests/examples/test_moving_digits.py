from itertools import pairwise

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import omnifx
from examples.moving_digits.data import BLACK, NUM_FRAMES, ROOM, STRIDE, bounce, make_videos
from examples.moving_digits.models import CHECKPOINTS, load_class_tokens, load_classifier, load_latte
from examples.moving_digits.quality import class_consistency, evaluate, frechet, neighbourly_moves
from examples.moving_digits.sampling import make_scheduler, sample_latte
from examples.moving_digits.train import main, train
from omnifx.metrics import psnr

LOADERS = {"latte": load_latte, "classifier": load_classifier}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def balanced_labels(num):
    return torch.arange(num) % 10


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of float sums depends on it
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def held_out():
    return make_videos(500, generator=generator(), split="held out")


@pytest.fixture(scope="module")
def samples():
    return sample_latte(load_latte(), seeds=range(50), labels=balanced_labels(50), steps=10)


def test_a_digit_moves_over_the_canvas_without_losing_a_pixel():
    data = make_videos(200, generator=generator())

    ink = (data.videos - BLACK).sum(dim=(1, 3, 4))

    assert data.videos.shape == (200, 1, 8, 16, 16)
    assert (data.videos.min(), data.videos.max()) == (-1, 1)
    torch.testing.assert_close(ink, ink[:, :1].expand(-1, NUM_FRAMES), atol=1e-3, rtol=0)
    assert set(data.labels.tolist()) == set(range(10))


def test_a_digit_moves_one_stride_a_frame_along_the_axes_it_moves_along():
    data = make_videos(100, generator=generator())
    ink = (data.videos[:, 0] - BLACK).double()
    total = ink.sum(dim=(2, 3))
    places = torch.arange(16.0, dtype=torch.float64)
    centres = torch.stack([(ink.sum(dim=3) * places).sum(2) / total, (ink.sum(dim=2) * places).sum(2) / total], dim=2)

    moved = centres.diff(dim=1).abs()

    torch.testing.assert_close(moved, STRIDE * data.motions[:, None].expand_as(moved).double(), atol=1e-6, rtol=0)
    assert data.motions.any(dim=1).all()


def test_a_digit_turns_at_the_edges():
    assert bounce(torch.arange(0, 25, STRIDE)).tolist() == [0, 2, 4, 6, 8, 6, 4, 2, 0, 2, 4, 6, 8]
    assert bounce(torch.arange(4, -17, -STRIDE)).tolist() == [4, 2, 0, 2, 4, 6, 8, 6, 4, 2, 0]
    assert bounce(torch.arange(-50, 50)).unique().tolist() == list(range(ROOM + 1))


def test_the_same_seed_makes_the_same_videos_and_the_splits_share_none():
    first, again = (make_videos(300, generator=generator(3)) for _ in range(2))
    other = make_videos(300, generator=generator(3), split="held out")

    def scans(videos):  # what is left of a video when its place is forgotten
        return {tuple(sorted(frame.flatten().tolist())) for frame in videos[:, 0, 0]}

    assert first.videos.equal(again.videos)
    assert first.motions.equal(again.motions)
    assert not scans(first.videos) & scans(other.videos)


@pytest.mark.parametrize("name", LOADERS)
def test_a_shipped_checkpoint_is_small_and_says_how_it_was_made(name):
    path = CHECKPOINTS / f"{name}.safetensors"

    model = LOADERS[name]()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()

    assert path.stat().st_size < 2_000_000
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert metadata["command"].startswith(f"python -m examples.moving_digits.train {name} --steps ")
    assert {"seed", "steps", "torch", "diffusers", "final_loss"} <= set(metadata)


def test_the_classifier_knows_digits_it_never_saw_and_how_they_move(held_out):
    classifier = load_classifier()

    with torch.no_grad():
        moves = classifier.motions(held_out.videos) > 0

    assert class_consistency(held_out.videos, held_out.labels, classifier) >= 0.95
    assert (moves == held_out.motions.bool()).double().mean() >= 0.98


def test_samples_are_of_the_class_asked_for(samples):
    assert class_consistency(samples, balanced_labels(50), load_classifier()) >= 0.9


def test_samples_move_as_much_as_real_videos_do(samples, held_out):
    changes, real = samples.diff(dim=2).abs().mean(), held_out.videos.diff(dim=2).abs().mean()

    assert 0.7 < changes / real < 1.3


def test_moves_of_samples_are_told_from_chance(samples, held_out):
    by_chance = held_out.videos.flatten(0, 2)[torch.randperm(500 * 8, generator=generator())].reshape(500, 1, 8, 16, 16)

    assert neighbourly_moves(held_out.videos) == 1.0
    assert 0.2 < neighbourly_moves(by_chance) < 0.35
    assert neighbourly_moves(samples) > 0.85


def test_a_sample_depends_on_its_own_seed_and_not_on_its_batch():
    model, labels = load_latte(), balanced_labels(3)

    together = sample_latte(model, seeds=range(3), labels=labels, steps=3)
    again = sample_latte(model, seeds=range(3), labels=labels, steps=3)
    apart = torch.cat([sample_latte(model, seeds=[seed], labels=labels[seed : seed + 1], steps=3) for seed in range(3)])

    assert together.equal(again)
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=0)  # matrix products round with the batch size
    assert not torch.allclose(together[0], together[1])


def test_sampling_is_euler_in_shifted_times():
    model, labels, steps = load_latte(), balanced_labels(2), 5
    even = torch.linspace(1, 0, steps + 1)
    times = 3 * even / (1 + 2 * even)

    expected = torch.cat([torch.randn(1, 1, 8, 16, 16, generator=generator(seed)) for seed in (7, 8)])
    with torch.no_grad():
        for now, then in pairwise(times):
            velocity = model(
                hidden_states=expected,
                encoder_hidden_states=load_class_tokens()[labels],
                timestep=1000 * now.repeat(2),
                return_dict=False,
            )[0]
            expected = expected + (then - now) * velocity

    sampled = sample_latte(model, seeds=[7, 8], labels=labels, steps=steps, cfg=1.0)
    torch.testing.assert_close(sampled, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("solver", ["euler", "dpmsolver++"])
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_every_call_of_the_model_looks_the_same_to_a_compiler(cfg, solver):
    model, signatures, ticks = load_latte(), [], []

    def spy(*args, **kwargs):
        assert not args
        shapes = {key: (v.shape, v.dtype, v.stride()) for key, v in kwargs.items() if isinstance(v, torch.Tensor)}
        signatures.append(shapes)
        return model(**kwargs)

    def tick(*done):
        ticks.append(done)

    sample_latte(spy, seeds=[0, 1], labels=balanced_labels(2), steps=3, cfg=cfg, solver=solver, progress=tick)

    batch = 2 if cfg == 1.0 else 4
    assert len(signatures) == 3
    assert all(signature == signatures[0] for signature in signatures)
    assert signatures[0]["timestep"][0] == (batch,)
    assert ticks == [(1, 3), (2, 3), (3, 3)]


def test_the_second_order_solver_samples_as_well_in_few_steps():
    samples = sample_latte(load_latte(), seeds=range(30), labels=balanced_labels(30), steps=6, solver="dpmsolver++")

    assert class_consistency(samples, balanced_labels(30), load_classifier()) >= 0.9


def test_evaluate_tells_good_samples_from_noise(samples, held_out):
    labels, classifier = balanced_labels(50), load_classifier()
    noise = torch.randn(samples.shape, generator=generator())

    near = evaluate(samples + 0.01 * noise, samples, labels, classifier, held_out.videos)
    far = evaluate(noise, samples, labels, classifier, held_out.videos)

    assert near.psnr == pytest.approx(46.0, abs=0.3)
    assert near.psnr_p10 < near.psnr
    assert near.worst_frame < near.psnr
    assert near.change_psnr == pytest.approx(43.0, abs=0.3)  # independent noise: 3 dB less
    assert near.ssim > 0.95 > far.ssim
    assert near.flickering == pytest.approx(1.0, abs=0.1)
    assert far.flickering > 2
    assert near.consistency >= 0.9 > far.consistency
    assert near.frechet == pytest.approx(frechet(samples, held_out.videos, classifier), rel=0.1)
    assert near.frechet < far.frechet / 3


def test_omnifx_finds_attention_over_space_and_over_time():
    labels = balanced_labels(2)
    inputs = {
        "hidden_states": torch.zeros(2, 1, 8, 16, 16),
        "encoder_hidden_states": load_class_tokens()[labels],
        "timestep": torch.full((2,), 500.0),
        "return_dict": False,
    }

    report = omnifx.explain(load_latte(), **inputs)

    found = {(branch.module_path, branch.kind) for branch in report.branches if branch.cacheable}
    for block in range(4):
        assert (f"transformer_blocks.{block}.attn1", "self_attention") in found
        assert (f"transformer_blocks.{block}.attn2", "cross_attention") in found
        assert (f"transformer_blocks.{block}.ff", "mlp") in found
        assert (f"temporal_transformer_blocks.{block}.attn1", "self_attention") in found
        assert (f"temporal_transformer_blocks.{block}.ff", "mlp") in found
    assert len(found) == 4 * 5


def test_wrong_requests_are_refused():
    with pytest.raises(ValueError, match="one label per seed, got 3 seeds"):
        sample_latte(load_latte(), seeds=range(3), labels=balanced_labels(2))
    with pytest.raises(ValueError, match="steps must be >= 1"):
        sample_latte(load_latte(), seeds=[0], labels=balanced_labels(1), steps=0)
    with pytest.raises(ValueError, match="solver must be 'euler'"):
        make_scheduler("heun", 10)
    with pytest.raises(ValueError, match="num must be >= 1"):
        make_videos(0, generator=generator())
    with pytest.raises(ValueError, match="split must be 'train'"):
        make_videos(1, generator=generator(), split="test")
    with pytest.raises(ValueError, match="num_steps must be >= 1"):
        train("latte", num_steps=0)


@pytest.mark.parametrize("name", LOADERS)
def test_training_writes_a_checkpoint_that_loads_and_repeats(name, tmp_path):
    losses = []

    first = train(name, num_steps=2, seed=1, directory=tmp_path / "a", progress=lambda *tick: losses.append(tick))
    second = train(name, num_steps=2, seed=1, directory=tmp_path / "b")

    LOADERS[name](first)
    assert all(tensor.equal(load_file(second)[key]) for key, tensor in load_file(first).items())
    assert [(done, total) for done, total, _ in losses] == [(1, 2), (2, 2)]


def test_training_from_the_command_line(tmp_path, capsys):
    main(["classifier", "--steps", "2", "--seed", "2", "--out", str(tmp_path)])

    with safe_open(tmp_path / "classifier.safetensors", framework="pt") as file:
        assert file.metadata()["command"] == "python -m examples.moving_digits.train classifier --steps 2 --seed 2"
    assert "classifier.safetensors" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_half_the_compute_gives_nearly_the_same_videos(cfg):
    model = load_latte()
    options = {"lowering": "eager", "speedup": 2.0, "steps": 20, "profile_cache": False}
    compiled = torch.compile(model, backend="omnicache", options=options)
    labels = balanced_labels(8)
    sample_latte(compiled, seeds=range(1000, 1008), labels=labels, steps=20, cfg=cfg)  # calibrates

    planned = sample_latte(compiled, seeds=range(8), labels=labels, steps=20, cfg=cfg)
    uncached = sample_latte(model, seeds=range(8), labels=labels, steps=20, cfg=cfg)

    assert omnifx.stats(compiled).generations[-1].reasons == {}
    assert psnr(planned, uncached).mean() > 40
