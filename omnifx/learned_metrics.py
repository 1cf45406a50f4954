"""Metrics that look through a trained network of the user's choice: LPIPS, and features for the Frechet distance.

omnifx ships no such network and downloads none. What a network is called by, here and on the command line, is a
callable or its address "module:function".
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnifx.errors import ConfigError
from omnifx.metrics import check_pair

Extractor = Callable[[Tensor], Tensor]  # images or videos [B, ...] -> features [B, D]
Judge = Callable[[Tensor, Tensor], Tensor]  # two batches of images [B, 3, H, W] in [-1, 1] -> B distances

# LPIPS' own backbones: the class in torchvision.models that holds the address of the weights
BACKBONES = {"alex": "AlexNet_Weights", "vgg": "VGG16_Weights", "squeeze": "SqueezeNet1_1_Weights"}


@torch.no_grad()
def features_of(extractor: Extractor | str, samples: Tensor, *, batch: int = 64) -> Tensor:
    """Features of samples, for `omnifx.metrics.frechet_distance`.

    Args:
        extractor: Turns a batch of samples into features [B, D] (or [B, D, 1, 1], as pooling layers leave them): a
            callable, such as a model without its last layer, or the address "module:function" of one. It gets the
            samples as they are: scaling and resizing are its own matter.
        samples: [N, ...], images or videos.
        batch: Samples of one call, >= 1; bounds the memory.

    Returns: [N, D], on the CPU.
    Raises: ConfigError if there is no such extractor, there are no samples, or what it returns are not features.
    """
    if batch < 1:
        raise ConfigError(f"features_of: batch must be >= 1, got {batch!r}.")
    if samples.ndim < 2 or not len(samples):
        raise ConfigError(f"features_of: expected samples [N, ...], got shape {list(samples.shape)}.")
    extract = named("features_of", extractor)
    return torch.cat([_features("features_of", extract, part) for part in samples.split(batch)])


@torch.no_grad()
def lpips(samples: Tensor, reference: Tensor, *, network: Judge | str, batch: int = 16) -> Tensor:
    """Learned perceptual image patch similarity of samples to their references: 0 for equal images, higher is worse.

    Args:
        samples: [B, C, H, W] in [-1, 1] with C of 1 or 3; grey is repeated, values beyond the range are clamped, all
            in float32. Videos: fold them with `omnifx.video_metrics.frames_of`.
        reference: Same shape: the uncached samples of the same seeds.
        network: "alex", "vgg" or "squeeze" for LPIPS' own networks as torchmetrics has them: this needs torchvision
            (`pip install 'omnifx[lpips]'`) and the backbone's weights where torch.hub keeps them; none are downloaded.
            Or any callable of two batches, such as `lpips.LPIPS(net="alex")`, or the address "module:function" of one.
        batch: Images of one call, >= 1; bounds the memory.

    Returns: [B] float32, on the CPU.
    Raises: ConfigError if the shapes do not fit, or the network or its weights are not on this machine, saying what to
        do.
    Source: LPIPS, arXiv:1801.03924. The networks have lower limits for H and W: 32 pixels or so.
    """
    check_pair("lpips", samples, reference, data_range=2.0)
    if batch < 1:
        raise ConfigError(f"lpips: batch must be >= 1, got {batch!r}.")
    if samples.ndim != 4 or samples.shape[1] not in (1, 3):
        raise ConfigError(
            f"lpips: expected images [B, C, H, W] with C of 1 or 3, got shape {list(samples.shape)}. Fold video frames "
            "into the batch (omnifx.video_metrics.frames_of), and judge images, not latents."
        )
    judge = _own_network(network) if isinstance(network, str) and network in BACKBONES else named("lpips", network)
    pairs = zip(samples.split(batch), reference.split(batch), strict=True)
    return torch.cat([_distances(judge, _coloured(a), _coloured(b)) for a, b in pairs])


def named(who: str, function: Callable[..., Any] | str) -> Callable[..., Any]:
    """The callable that `function` is, or is the address "module:function" of.

    Raises: ConfigError, in the name of `who`, if there is none.
    """
    if callable(function):
        return function
    module, colon, name = str(function).partition(":")
    if not (isinstance(function, str) and module and colon and name):
        raise ConfigError(f"{who}: expected a callable or an address 'module:function', got {function!r}.")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{who}: cannot find {function!r}: {error}. Python looks for the module where it looks for all of them: "
            "install it, or set PYTHONPATH to its folder."
        ) from error
    if not callable(found):
        raise ConfigError(f"{who}: {function!r} is a {type(found).__name__}, and must be callable.")
    result: Callable[..., Any] = found
    return result


def _features(who: str, extract: Extractor, samples: Tensor) -> Tensor:
    features = extract(samples)
    if isinstance(features, Tensor) and features.ndim > 2 and features.shape[2:].numel() == 1:
        features = features.flatten(1)
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(samples):
        found = f"shape {list(features.shape)}" if isinstance(features, Tensor) else f"a {type(features).__name__}"
        raise ConfigError(
            f"{who}: the extractor must turn {len(samples)} samples into features [{len(samples)}, D], got {found}. "
            "Wrap it in a function that picks the layer and pools over space and time."
        )
    return features.cpu()


def _own_network(name: str) -> Judge:
    """One of LPIPS' networks through torchmetrics, if all of it is here: it would start a download otherwise."""
    if find_spec("torchvision") is None:
        raise ConfigError(
            f"lpips: network {name!r} needs torchvision, which is not installed: pip install 'omnifx[lpips]'. Or give "
            "a network of your own: a callable, or 'module:function'."
        )
    models: Any = import_module("torchvision.models")
    url = getattr(models, BACKBONES[name]).DEFAULT.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if not path.is_file():
        raise ConfigError(
            f"lpips: the weights of {name!r} are not on this machine, and omnifx downloads none. Put {url} at {path} "
            "(TORCH_HOME moves that folder), or give a network of your own: a callable, or 'module:function'."
        )
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    backbones: Any = LearnedPerceptualImagePatchSimilarity
    metric = backbones(net_type=name, reduction="none")
    return lambda a, b: metric.to(a.device)(a, b)


def _distances(judge: Judge, samples: Tensor, reference: Tensor) -> Tensor:
    distances = judge(samples, reference)
    if not isinstance(distances, Tensor) or distances.numel() != len(samples):
        found = f"shape {list(distances.shape)}" if isinstance(distances, Tensor) else f"a {type(distances).__name__}"
        raise ConfigError(
            f"lpips: the network must return one distance for each of {len(samples)} pairs, got {found}. Turn its own "
            "reduction off."
        )
    return distances.flatten().float().cpu()


def _coloured(images_BCHW: Tensor) -> Tensor:
    return images_BCHW.float().clamp(-1, 1).expand(-1, 3, -1, -1)
