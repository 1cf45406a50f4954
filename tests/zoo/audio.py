"""Audio transformers. Configurations are those of the public tests of diffusers, or as small."""

from __future__ import annotations

import torch

from tests.reuse import noise
from tests.zoo.entry import Entry

# A configuration is a paragraph, not a line for each argument.
# fmt: off
AUDIO = (
    Entry(
        name="AceStepTransformer1DModel",
        config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "in_channels": 24, "audio_acoustic_hidden_dim": 8,
            "patch_size": 2, "rope_theta": 10000.0, "rms_norm_eps": 1e-06, "sliding_window": 16,
        },
        inputs=lambda: {
            "hidden_states": noise(2, 8, 8), "timestep": torch.full((2,), 0.75), "timestep_r": torch.full((2,), 0.75),
            "encoder_hidden_states": noise(2, 10, 32, seed=1), "context_latents": noise(2, 8, 16, seed=2),
            "return_dict": False,
        },
        times=("timestep", "timestep_r"),
        branches="2 cross_attention, 2 mlp, 2 self_attention", dependence="6 latent", left=0.233,
    ),
    Entry(
        name="LongCatAudioDiTTransformer",
        config={
            "dit_dim": 64, "dit_depth": 2, "dit_heads": 4, "dit_text_dim": 32, "latent_dim": 8, "text_conv": False,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 16, 8), "encoder_hidden_states": noise(1, 10, 32, seed=1),
            "encoder_attention_mask": torch.full((1, 10), True), "attention_mask": torch.full((1, 16), True),
            "timestep": torch.full((1,), 1.0), "return_dict": False,
        },
        branches="2 cross_attention, 2 mlp, 2 self_attention", dependence="6 latent", left=0.085,
    ),
    Entry(
        name="MiniMaxMusic3Transformer1DModel",
        config={
            "in_channels": 8, "condition_dim": 16, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8,
            "ff_inner_dim": 32, "rotary_dim": 4, "fourier_embedding_dim": 8,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 8, 24), "encoder_hidden_states": noise(1, 24, 16, seed=1),
            "timestep": torch.full((1,), 0.5), "return_dict": False,
        },
        modules=r"transformer_blocks\.\d+\.(?:attn|ff_out)",
        branches="2 conv, 2 mlp, 2 self_attention", dependence="6 latent", left_alone=2, left=0.198,
        note="The 1x1 convolutions at both ends of the trunk are affine maps, neither attention nor MLP: "
        "computed each step.",
    ),
    Entry(
        name="StableAudio3DiTModel",
        config={
            "io_channels": 8, "patch_size": 1, "embed_dim": 32, "depth": 2, "num_heads": 4, "cond_token_dim": 16,
            "global_cond_dim": 12, "local_add_cond_dim": 5, "timestep_features_dim": 16, "ff_mult": 2,
            "num_memory_tokens": 3, "use_differential_attention": False,
        },
        inputs=lambda: {
            "hidden_states": noise(2, 8, 16), "timestep": torch.full((2,), 0.7),
            "encoder_hidden_states": noise(2, 4, 16, seed=1), "global_hidden_states": noise(2, 12, seed=2),
            "return_dict": False,
        },
        branches="2 conv, 2 cross_attention, 2 mlp, 2 self_attention", dependence="8 latent", left_alone=2,
        left=0.036,
        note="The 1x1 convolutions at both ends of the trunk are affine maps, neither attention nor MLP: "
        "computed each step.",
    ),
    Entry(
        name="StableAudioDiTModel",
        config={
            "sample_size": 4, "in_channels": 3, "num_layers": 2, "attention_head_dim": 8,
            "num_key_value_attention_heads": 2, "num_attention_heads": 4, "out_channels": 3, "cross_attention_dim": 8,
            "time_proj_dim": 8, "global_states_input_dim": 8, "cross_attention_input_dim": 8,
        },
        inputs=lambda: {
            "hidden_states": noise(2, 3, 16), "timestep": torch.full((2,), 50),
            "encoder_hidden_states": noise(2, 6, 8, seed=1), "global_hidden_states": noise(2, 1, 8, seed=2),
            "rotary_embedding": (noise(17, 4, seed=3), noise(17, 4, seed=4)), "return_dict": False,
        },
        branches="2 conv, 2 cross_attention, 2 mlp, 2 self_attention", dependence="8 latent", left_alone=2,
        left=0.009,
        note="The 1x1 convolutions at both ends of the trunk are affine maps, neither attention nor MLP: "
        "computed each step.",
    ),
    Entry(
        name="T5FilmDecoder",
        config={
            "input_dims": 8, "targets_length": 16, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8,
            "d_ff": 32,
        },
        inputs=lambda: {
            "encodings_and_masks": [(noise(1, 6, 16), torch.ones(1, 6))],
            "decoder_input_tokens": noise(1, 16, 8, seed=1), "decoder_noise_time": torch.full((1,), 0.5),
        },
        latents=("decoder_input_tokens",),
        times=("decoder_noise_time",),
        modules=r"decoders\.\d+\.layer\.\d+\.(?:attention|DenseReluDense)",
        branches="2 cross_attention, 2 mlp, 2 self_attention", dependence="6 latent", left=0.028,
    ),
)
