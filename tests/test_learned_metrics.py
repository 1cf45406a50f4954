import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from omnifx import learned_metrics
from omnifx.errors import ConfigError
from omnifx.learned_metrics import features_of, lpips
from omnifx.metrics import frechet_distance


def images(batch=5, channels=3, size=8, seed=0):
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def channel_means(samples):
    return samples.flatten(2).mean(dim=2)


def squared_distance(a, b):
    return (a - b).square().mean(dim=(1, 2, 3), keepdim=True)  # [B, 1, 1, 1], as the lpips package returns


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_features_do_not_depend_on_the_batch(batch):
    sizes = []

    def extractor(samples):
        sizes.append(len(samples))
        return channel_means(samples)

    features = features_of(extractor, images(), batch=batch)

    assert features.equal(channel_means(images()))
    assert max(sizes) <= batch
    assert sum(sizes) == 5


def test_features_come_from_a_network_that_pools_without_flattening_and_leave_no_graph():
    network = nn.Sequential(nn.Conv2d(3, 7, 3), nn.AdaptiveAvgPool2d(1))

    features = features_of(network, images())

    assert features.shape == (5, 7)
    assert not features.requires_grad


def test_a_named_extractor_serves_the_frechet_distance(tmp_path, monkeypatch):
    (tmp_path / "my_features_of_a_test.py").write_text("def means(videos):\n    return videos.mean(dim=(2, 3, 4))\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    videos = torch.randn(20, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    a = features_of("my_features_of_a_test:means", videos)
    b = features_of("my_features_of_a_test:means", videos + 2)

    assert frechet_distance(a, b) == pytest.approx(2 * 2**2, rel=1e-4)


def test_lpips_asks_the_network_given_pair_by_pair():
    reference = images()
    samples = reference.clone()
    samples[2] = -samples[2]

    distances = lpips(samples, reference, network=squared_distance, batch=2)

    assert distances.shape == (5,)
    assert distances[[0, 1, 3, 4]].tolist() == [0.0] * 4
    assert distances[2].item() == pytest.approx(4 * reference[2].square().mean().item())


def test_lpips_gives_the_network_coloured_images_within_its_range():
    seen = []

    def network(a, b):
        seen.extend([a, b])
        return squared_distance(a, b)

    lpips(3 * images(channels=1).double(), images(channels=1).double(), network=network)

    for batch in seen:
        assert batch.shape == (5, 3, 8, 8)
        assert batch.dtype == torch.float32
        assert batch.abs().max() <= 1
        assert batch[:, 0].equal(batch[:, 2])


def test_lpips_own_networks_are_refused_without_torchvision(monkeypatch):
    monkeypatch.setattr(learned_metrics, "find_spec", lambda name: None)

    with pytest.raises(ConfigError, match=r"'alex' needs torchvision, .* pip install 'omnifx\[lpips\]'"):
        lpips(images(), images(), network="alex")


def test_lpips_never_downloads_weights(monkeypatch, tmp_path):
    weights = SimpleNamespace(DEFAULT=SimpleNamespace(url="https://example.org/models/vgg16-1234.pth"))
    models = ModuleType("torchvision.models")
    models.VGG16_Weights = weights
    monkeypatch.setattr(learned_metrics, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    with pytest.raises(ConfigError, match=r"'vgg' are not on this machine.* Put https://example.org/models/vgg16-1234"):
        lpips(images(), images(), network="vgg")


@pytest.mark.parametrize("name", ["alex", "squeeze"])
def test_lpips_own_networks_work_where_their_weights_are(name, monkeypatch, tmp_path):
    models = pytest.importorskip("torchvision.models", exc_type=ImportError)  # the extra `lpips`
    build = {"alex": models.alexnet, "squeeze": models.squeezenet1_1}[name]
    path = tmp_path / "checkpoints" / getattr(models, learned_metrics.BACKBONES[name]).DEFAULT.url.rpartition("/")[2]
    path.parent.mkdir()
    torch.manual_seed(0)
    torch.save(build(weights=None).state_dict(), path)  # random: equal images are still at 0, others are not
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    reference = images(batch=3, size=64)
    samples = torch.cat([reference[:1], -reference[1:]])

    distances = lpips(samples, reference, network=name, batch=2)

    assert distances[0].item() == pytest.approx(0, abs=1e-6)
    assert (distances[1:] > 1e-4).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: features_of("no_colon", images()),
            r"features_of: expected a callable or an address 'module:function'",
        ),
        (lambda: features_of("no_such_module:f", images()), r"features_of: cannot find 'no_such_module:f'.*PYTHONPATH"),
        (lambda: features_of("math:no_such_name", images()), r"cannot find 'math:no_such_name'"),
        (lambda: features_of("math:pi", images()), r"'math:pi' is a float, and must be callable"),
        (lambda: features_of(channel_means, images(), batch=0), r"batch must be >= 1, got 0"),
        (lambda: features_of(channel_means, images()[:0]), r"expected samples \[N, \.\.\.\], got shape \[0, 3, 8, 8\]"),
        (lambda: features_of(lambda x: x, images()), r"features \[5, D\], got shape \[5, 3, 8, 8\]"),
        (lambda: features_of(lambda x: x.flatten(1)[:1], images()), r"got shape \[1, 192\]"),
        (lambda: features_of(lambda x: (x,), images()), r"got a tuple"),
        (lambda: lpips(images(4), images(3), network=squared_distance), r"lpips: .*same shape"),
        (lambda: lpips(images(channels=4), images(channels=4), network=squared_distance), r"C of 1 or 3, .* latents"),
        (lambda: lpips(images(), images(), network=squared_distance, batch=0), r"batch must be >= 1"),
        (lambda: lpips(images(), images(), network=lambda a, b: (a - b).mean()), r"one distance for each of 5 pairs"),
        (lambda: lpips(images(), images(), network=lambda a, b: 0.0), r"got a float"),
        (lambda: lpips(images(), images(), network="resnet"), r"lpips: expected a callable or an address"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
