"""Tiny pipelines of diffusers, made on the spot: random weights, no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)

from omnifx.example_inputs import lively

WORDS = ("a", "red", "fox", "blue", "house", "sea", "at", "night")


def tiny_vae() -> Any:
    """Latents [N, 4, 4, 4] -> images [N, 3, 8, 8]."""
    torch.manual_seed(1)
    return AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=1.0,
    )


def save_class_pipeline(folder: Path) -> Path:
    """A `DiTPipeline`, conditioned on classes."""
    model: Any = DiTTransformer2DModel(  # type: ignore[no-untyped-call]
        num_layers=2, num_attention_heads=2, attention_head_dim=8, out_channels=4, sample_size=4, patch_size=1
    )
    pipe: Any = DiTPipeline(lively(model), tiny_vae(), DDIMScheduler(clip_sample=False))  # type: ignore[no-untyped-call]
    pipe.save_pretrained(folder)
    return folder


def save_prompt_pipeline(folder: Path) -> Path:
    """A `PixArtAlphaPipeline`: a T5 of one layer reads the prompts, whose words are `WORDS`."""
    import transformers

    tokenizer = _tokenizer(transformers)
    config = transformers.T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    encoder = transformers.T5EncoderModel(config).eval()
    model: Any = PixArtTransformer2DModel(  # type: ignore[no-untyped-call]
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        sample_size=4,
        patch_size=1,
        cross_attention_dim=16,
        caption_channels=16,
        use_additional_conditions=False,
    )
    scheduler = DDIMScheduler(clip_sample=False)  # type: ignore[no-untyped-call]
    pipe: Any = PixArtAlphaPipeline(tokenizer, encoder, tiny_vae(), lively(model), scheduler)
    pipe.save_pretrained(folder)
    return folder


def _tokenizer(transformers: Any) -> Any:
    """Words of `WORDS`; all others are unknown."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    table = {word: number for number, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    made = Tokenizer(WordLevel(table, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=8
    )
