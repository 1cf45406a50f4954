"""The digits models: a DiT that predicts noise, a PixArt that predicts a flow, and a classifier to judge both.

Both transformers are the classes of diffusers, unchanged; only the sizes are small. 64 tokens of width 64, 8 blocks.
"""

from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from examples.digits.data import IMAGE_SIZE, NUM_CLASSES

CHECKPOINTS = Path(__file__).parent / "checkpoints"
NULL_CLASS = NUM_CLASSES  # the label that stands for "no label": the unconditional branch of guidance
NUM_CLASS_TOKENS = 4  # what the flow model cross-attends to, per class
NUM_FEATURES = 32  # the classifier's penultimate layer
WIDTH = 64
EMBEDDING_STD = 0.5  # with the usual .02 the classes are learned far too slowly in so short a training


def dit_config() -> dict[str, Any]:
    """Arguments of `DiTTransformer2DModel`: patch 1 on 8x8 (64 tokens), width 64, 8 blocks; 0.78 M parameters."""
    return {
        "num_attention_heads": 4,
        "attention_head_dim": WIDTH // 4,
        "in_channels": 1,
        "out_channels": 1,
        "num_layers": 8,
        "sample_size": IMAGE_SIZE,
        "patch_size": 1,
        "num_embeds_ada_norm": NUM_CLASSES,
    }


def flow_config() -> dict[str, Any]:
    """Arguments of `PixArtTransformer2DModel`: the sizes of the DiT, plus cross-attention; 0.58 M parameters."""
    return {
        "num_attention_heads": 4,
        "attention_head_dim": WIDTH // 4,
        "in_channels": 1,
        "out_channels": 1,
        "num_layers": 8,
        "sample_size": IMAGE_SIZE,
        "patch_size": 1,
        "cross_attention_dim": WIDTH,
        "use_additional_conditions": False,
    }


class FlowModel(nn.Module):
    """A PixArt and the table of class tokens [11, 4, 64] it attends to; row 10 is the null class. Trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer: Any = _make(PixArtTransformer2DModel, flow_config())
        self.class_tokens = nn.Parameter(EMBEDDING_STD * torch.randn(NUM_CLASSES + 1, NUM_CLASS_TOKENS, WIDTH))


class Classifier(nn.Module):
    """A small CNN: images [B, 1, 8, 8] in [-1, 1] -> logits [B, 10]; `features` gives the layer before, [B, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * (IMAGE_SIZE // 4) ** 2, NUM_FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def features(self, images_BCHW: Tensor) -> Tensor:
        features: Tensor = self.body(images_BCHW)
        return features

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images_BCHW))
        return logits


def make_dit() -> Any:
    """An untrained `DiTTransformer2DModel` whose blocks drop no labels on their own: the trainer does, once."""
    model = _make(DiTTransformer2DModel, dit_config())
    for block in model.transformer_blocks:
        embedder = block.norm1.emb.class_embedder
        embedder.dropout_prob = 0.0
        nn.init.normal_(embedder.embedding_table.weight, std=EMBEDDING_STD)
    return model


def load_dit(path: Path = CHECKPOINTS / "dit.safetensors") -> DiTTransformer2DModel:
    """Load the trained DiT, in float32 and eval mode.

    Call it as `model(hidden_states=x, timestep=t, class_labels=y, return_dict=False)[0]`: x [B, 1, 8, 8], t [B] int64
    in 0..999, y [B] int64 in 0..10; it returns the noise [B, 1, 8, 8].
    """
    model = make_dit()
    model.load_state_dict(load_float32(path))
    return cast(DiTTransformer2DModel, model.eval())


def load_flow(path: Path = CHECKPOINTS / "flow.safetensors") -> PixArtTransformer2DModel:
    """Load the trained flow model, in float32 and eval mode; its class tokens come from `load_class_tokens`.

    Call it with hidden_states [B, 1, 8, 8], encoder_hidden_states [B, 4, 64], timestep [B] float32 in 0..1000 (1000 t),
    added_cond_kwargs={"resolution": None, "aspect_ratio": None}; it returns the velocity noise - image, [B, 1, 8, 8].
    """
    model = FlowModel()
    model.load_state_dict(load_float32(path))
    return cast(PixArtTransformer2DModel, model.transformer.eval())


@cache
def load_class_tokens(path: Path = CHECKPOINTS / "flow.safetensors") -> Tensor:
    """Load the flow model's class tokens, [11, 4, 64] float32; row 10 is the null class."""
    return load_float32(path)["class_tokens"]


def load_classifier(path: Path = CHECKPOINTS / "classifier.safetensors") -> Classifier:
    """Load the trained classifier, in float32 and eval mode."""
    model = Classifier()
    model.load_state_dict(load_float32(path))
    return model.eval()


def load_float32(path: Path) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in load_file(path).items()}


def _make(model_class: Any, config: dict[str, Any]) -> Any:  # Any: to a type checker, classes of diffusers are untyped
    return model_class(**config)
