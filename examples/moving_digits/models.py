"""The moving digits models: a Latte that predicts a flow, and a classifier of videos to judge it.

The transformer is the class of diffusers, unchanged; only the sizes are small. 8 frames of 16 tokens of width 64, and 8
blocks: 4 over the tokens of a frame, with cross-attention to the class, each followed by one over the frames.
"""

from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import LatteTransformer3DModel
from torch import Tensor, nn

from examples.digits.models import load_float32
from examples.moving_digits.data import FRAME_SIZE, NUM_CLASSES, NUM_FRAMES

CHECKPOINTS = Path(__file__).parent / "checkpoints"
NULL_CLASS = NUM_CLASSES  # the label that stands for "no label": the unconditional branch of guidance
NUM_CLASS_TOKENS = 4  # what the transformer cross-attends to, per class
NUM_FEATURES = 32  # the classifier's penultimate layer
WIDTH = 64
TIME_SHIFT = 3.0  # towards noise, in training and in sampling: there, place and class of so many pixels are decided
EMBEDDING_STD = 0.5  # with the usual .02 the classes are learned far too slowly in so short a training


def latte_config() -> dict[str, Any]:
    """Arguments of `LatteTransformer3DModel`: patch 4 on 8 x 16 x 16 (128 tokens), width 64, 4 + 4 blocks."""
    return {
        "num_attention_heads": 4,
        "attention_head_dim": WIDTH // 4,
        "in_channels": 1,
        "out_channels": 1,
        "num_layers": 4,
        "cross_attention_dim": WIDTH,
        "attention_bias": True,
        "sample_size": FRAME_SIZE,
        "patch_size": 4,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "caption_channels": WIDTH,
        "video_length": NUM_FRAMES,
    }


class VideoModel(nn.Module):
    """A Latte and the table of class tokens [11, 4, 64] it attends to; row 10 is the null class. Trained together."""

    def __init__(self) -> None:
        super().__init__()
        make: Any = LatteTransformer3DModel  # to a type checker, classes of diffusers are untyped
        self.transformer: Any = make(**latte_config())
        self.class_tokens = nn.Parameter(EMBEDDING_STD * torch.randn(NUM_CLASSES + 1, NUM_CLASS_TOKENS, WIDTH))


class VideoClassifier(nn.Module):
    """A CNN on each frame and its change since the last one, then the mean over time.

    Videos [B, 1, 8, 16, 16] in [-1, 1] -> logits [B, 10] of the digit; `motions` gives logits [B, 2] of whether it
    moves along y and x; `features` the layer before both, [B, 32]: trained for both, they see shape and motion.
    """

    def __init__(self) -> None:
        super().__init__()
        self.frame = nn.Sequential(
            nn.Conv2d(2, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(1),  # a digit is the same digit wherever it is
            nn.Flatten(),
        )
        self.video = nn.Sequential(nn.Linear(64, NUM_FEATURES), nn.ReLU())
        self.digit = nn.Linear(NUM_FEATURES, NUM_CLASSES)
        self.motion = nn.Linear(NUM_FEATURES, 2)

    def features(self, videos_BCFHW: Tensor) -> Tensor:
        before = torch.cat([videos_BCFHW[:, :, :1], videos_BCFHW[:, :, :-1]], dim=2)
        frames = torch.cat([videos_BCFHW, videos_BCFHW - before], dim=1).transpose(1, 2)  # [B, F, 2, H, W]
        pooled = self.frame(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).mean(dim=1)
        features: Tensor = self.video(pooled)
        return features

    def motions(self, videos_BCFHW: Tensor) -> Tensor:
        logits: Tensor = self.motion(self.features(videos_BCFHW))
        return logits

    def forward(self, videos_BCFHW: Tensor) -> Tensor:
        logits: Tensor = self.digit(self.features(videos_BCFHW))
        return logits


def load_latte(path: Path = CHECKPOINTS / "latte.safetensors") -> LatteTransformer3DModel:
    """Load the trained transformer, in float32 and eval mode; its class tokens come from `load_class_tokens`.

    Call it with hidden_states [B, 1, 8, 16, 16], encoder_hidden_states [B, 4, 64] and timestep [B] float32 in 0..1000
    (1000 t); it returns the velocity noise - video, [B, 1, 8, 16, 16].
    """
    model = VideoModel()
    model.load_state_dict(load_float32(path))
    return cast(LatteTransformer3DModel, model.transformer.eval())


@cache
def load_class_tokens(path: Path = CHECKPOINTS / "latte.safetensors") -> Tensor:
    """Load the class tokens, [11, 4, 64] float32; row 10 is the null class."""
    return load_float32(path)["class_tokens"]


def load_classifier(path: Path = CHECKPOINTS / "classifier.safetensors") -> VideoClassifier:
    """Load the trained classifier, in float32 and eval mode."""
    model = VideoClassifier()
    model.load_state_dict(load_float32(path))
    return model.eval()
