import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from examples.digits.data import load_digits
from examples.digits.models import CHECKPOINTS, load_class_tokens, load_classifier, load_dit, load_flow
from examples.digits.quality import class_consistency, evaluate, frechet
from examples.digits.sampling import sample_dit, sample_flow
from examples.digits.train import main, train

LOADERS = {"dit": load_dit, "flow": load_flow, "classifier": load_classifier}
SAMPLERS = {"dit": (load_dit, sample_dit), "flow": (load_flow, sample_flow)}


def balanced_labels(num):
    return torch.arange(num) % 10


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of float sums depends on it
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def dit_samples():
    return sample_dit(load_dit(), seeds=range(100), labels=balanced_labels(100), steps=20)


@pytest.fixture(scope="module")
def flow_samples():
    return sample_flow(load_flow(), seeds=range(100), labels=balanced_labels(100), steps=10, cfg=2.0)


def test_the_data_is_split_once_and_for_all():
    train_set, held_out = load_digits()

    assert train_set.images.shape == (1297, 1, 8, 8)
    assert held_out.images.shape == (500, 1, 8, 8)
    assert (train_set.images.min(), train_set.images.max()) == (-1, 1)
    assert held_out.labels[:8].tolist() == [3, 0, 7, 1, 3, 8, 3, 4]


@pytest.mark.parametrize("name", LOADERS)
def test_a_shipped_checkpoint_is_small_and_says_how_it_was_made(name):
    path = CHECKPOINTS / f"{name}.safetensors"

    model = LOADERS[name]()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()

    assert path.stat().st_size < 2_000_000
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert metadata["command"].startswith(f"python -m examples.digits.train {name} --steps ")
    assert {"seed", "steps", "torch", "diffusers", "final_loss"} <= set(metadata)


def test_the_classifier_knows_digits_it_never_saw():
    _, held_out = load_digits()

    assert class_consistency(held_out.images, held_out.labels, load_classifier()) >= 0.97


def test_the_flow_model_is_sampled_at_other_sizes():
    images = sample_flow(load_flow(), seeds=range(2), labels=balanced_labels(2), steps=4, size=12)

    assert images.shape == (2, 1, 12, 12)
    assert images.isfinite().all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_depends_on_its_own_seed_and_not_on_its_batch(name):
    load, sample = SAMPLERS[name]
    model, labels = load(), balanced_labels(3)

    together = sample(model, seeds=range(3), labels=labels, steps=4)
    again = sample(model, seeds=range(3), labels=labels, steps=4)
    apart = torch.cat([sample(model, seeds=[seed], labels=labels[seed : seed + 1], steps=4) for seed in range(3)])

    assert together.equal(again)
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=0)  # matrix products round with the batch size
    assert not torch.allclose(together[0], together[1])


STOCHASTIC = {
    "ddim, eta 1": ("dit", {"eta": 1.0}),
    "ddpm": ("dit", {"solver": "ddpm"}),
    "sde, dit": ("dit", {"solver": "sde-dpmsolver++"}),
    "sde, flow": ("flow", {"solver": "sde-dpmsolver++"}),
    "euler": ("flow", {"solver": "stochastic-euler"}),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_fresh_noise_depends_on_the_seed_and_not_on_the_batch(name):
    model_name, options = STOCHASTIC[name]
    load, sample = SAMPLERS[model_name]
    model, labels = load(), balanced_labels(3)

    together = sample(model, seeds=range(3), labels=labels, steps=4, **options)
    apart = torch.cat(
        [sample(model, seeds=[seed], labels=labels[seed : seed + 1], steps=4, **options) for seed in range(3)]
    )

    torch.testing.assert_close(together, apart, atol=1e-4, rtol=0)
    plain = sample(model, seeds=range(3), labels=labels, steps=4)
    assert (together - plain).abs().max() > 0.1


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_samples_are_of_the_class_asked_for(name):
    model_name, options = STOCHASTIC[name]
    load, sample = SAMPLERS[model_name]

    samples = sample(load(), seeds=range(50), labels=balanced_labels(50), steps=20, **options)

    assert class_consistency(samples, balanced_labels(50), load_classifier()) >= 0.9


def test_dit_samples_are_of_the_class_asked_for(dit_samples):
    assert class_consistency(dit_samples, balanced_labels(100), load_classifier()) >= 0.9


def test_flow_samples_with_guidance_are_of_the_class_asked_for(flow_samples):
    assert class_consistency(flow_samples, balanced_labels(100), load_classifier()) >= 0.9


def test_guidance_in_one_call_or_in_two_gives_the_same_samples():
    model, labels = load_flow(), balanced_labels(4)

    one = sample_flow(model, seeds=range(4), labels=labels, steps=4, cfg=2.0)
    two = sample_flow(model, seeds=range(4), labels=labels, steps=4, cfg=2.0, two_calls=True)

    torch.testing.assert_close(one, two, atol=1e-4, rtol=0)


def test_flow_sampling_is_plain_euler():
    model, labels, steps = load_flow(), balanced_labels(2), 5
    noise = torch.cat([torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (7, 8)])

    expected = noise
    with torch.no_grad():
        for step in range(steps):
            velocity = model(
                hidden_states=expected,
                encoder_hidden_states=load_class_tokens()[labels],
                timestep=torch.full((2,), 1000 * (1 - step / steps)),
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
                return_dict=False,
            )[0]
            expected = expected - velocity / steps

    sampled = sample_flow(model, seeds=[7, 8], labels=labels, steps=steps, cfg=1.0)
    torch.testing.assert_close(sampled, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_every_call_of_the_model_looks_the_same_to_a_compiler(name, cfg):
    load, sample = SAMPLERS[name]
    model, signatures, ticks = load(), [], []

    def spy(*args, **kwargs):
        assert not args
        shapes = {key: (v.shape, v.dtype, v.stride()) for key, v in kwargs.items() if isinstance(v, torch.Tensor)}
        signatures.append(shapes)
        return model(**kwargs)

    sample(spy, seeds=[0, 1], labels=balanced_labels(2), steps=3, cfg=cfg, progress=lambda *tick: ticks.append(tick))

    batch = 2 if cfg == 1.0 else 4
    assert len(signatures) == 3
    assert all(signature == signatures[0] for signature in signatures)
    assert signatures[0]["timestep"][0] == (batch,)
    assert ticks == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("solver", ["dpmsolver++", "unipc"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_second_order_solvers_sample_as_well_in_few_steps(name, solver):
    load, sample = SAMPLERS[name]

    samples = sample(load(), seeds=range(50), labels=balanced_labels(50), steps=8, solver=solver)

    assert class_consistency(samples, balanced_labels(50), load_classifier()) >= 0.9


def test_evaluate_tells_good_samples_from_noise(dit_samples):
    _, held_out = load_digits()
    labels, classifier = balanced_labels(100), load_classifier()
    noise = torch.randn(dit_samples.shape, generator=torch.Generator().manual_seed(0))

    near = evaluate(dit_samples + 0.01 * noise, dit_samples, labels, classifier, held_out.images)
    far = evaluate(noise, dit_samples, labels, classifier, held_out.images)

    assert near.psnr == pytest.approx(46.0, abs=0.3)
    assert near.psnr_p10 < near.psnr
    assert near.ssim > 0.99 > far.ssim
    assert near.consistency >= 0.9 > far.consistency
    assert near.frechet < 10 < far.frechet
    assert near.frechet == pytest.approx(frechet(dit_samples, held_out.images, classifier), rel=0.1)


def test_wrong_requests_are_refused():
    with pytest.raises(ValueError, match="one label per seed, got 3 seeds"):
        sample_dit(load_dit(), seeds=range(3), labels=balanced_labels(2))
    with pytest.raises(ValueError, match="steps must be >= 1"):
        sample_flow(load_flow(), seeds=[0], labels=balanced_labels(1), steps=0)
    with pytest.raises(ValueError, match=r"sample_dit: solver must be one of \['ddim', .*got 'heun'"):
        sample_dit(load_dit(), seeds=[0], labels=balanced_labels(1), solver="heun")
    with pytest.raises(ValueError, match=r"eta must be in \[0, 1\], and 0 for solvers but 'ddim', got 0.5 with 'ddpm'"):
        sample_dit(load_dit(), seeds=[0], labels=balanced_labels(1), solver="ddpm", eta=0.5)
    with pytest.raises(ValueError, match="sample_flow: solver must be one of"):
        sample_flow(load_flow(), seeds=[0], labels=balanced_labels(1), solver="heun")
    with pytest.raises(ValueError, match="num_steps must be >= 1"):
        train("dit", num_steps=0)


@pytest.mark.parametrize("name", LOADERS)
def test_training_writes_a_checkpoint_that_loads_and_repeats(name, tmp_path):
    losses = []

    first = train(name, num_steps=3, seed=1, directory=tmp_path / "a", progress=lambda *tick: losses.append(tick))
    second = train(name, num_steps=3, seed=1, directory=tmp_path / "b")

    LOADERS[name](first)
    assert all(tensor.equal(load_file(second)[key]) for key, tensor in load_file(first).items())
    assert [(done, total) for done, total, _ in losses] == [(1, 3), (2, 3), (3, 3)]


def test_training_from_the_command_line(tmp_path, capsys):
    main(["classifier", "--steps", "3", "--seed", "2", "--out", str(tmp_path)])

    with safe_open(tmp_path / "classifier.safetensors", framework="pt") as file:
        assert file.metadata()["command"] == "python -m examples.digits.train classifier --steps 3 --seed 2"
    assert "classifier.safetensors" in capsys.readouterr().out
