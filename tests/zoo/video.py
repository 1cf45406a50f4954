"""Video transformers, some with sound. Configurations are those of the public tests of diffusers, or as small."""

from __future__ import annotations

import torch

from tests.reuse import noise
from tests.zoo.entry import USUAL, Entry

# A configuration is a paragraph, not a line for each argument.
# fmt: off
VIDEO = (
    Entry(
        name="AllegroTransformer3DModel",
        config={
            "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2,
            "cross_attention_dim": 16, "sample_width": 8, "sample_height": 8, "sample_frames": 8,
            "caption_channels": 8,
        },
        inputs=lambda: {
            "hidden_states": noise(2, 4, 2, 8, 8), "encoder_hidden_states": noise(2, 16, 8, seed=1),
            "timestep": torch.full((2,), 44), "return_dict": False,
        },
        branches="2 cross_attention, 2 mlp, 2 self_attention", dependence="6 latent", left=0.06,
    ),
    Entry(
        name="AnyFlowTransformer3DModel",
        config={
            "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
            "out_channels": 4, "text_dim": 16, "freq_dim": 256, "ffn_dim": 32, "num_layers": 2,
            "cross_attn_norm": True, "rope_max_seq_len": 32, "gate_value": 0.25, "deltatime_type": "r",
        },
        inputs=lambda: {
            "hidden_states": noise(1, 2, 4, 16, 16), "timestep": torch.full((1, 2), 500.0),
            "r_timestep": torch.full((1, 2), 250.0), "encoder_hidden_states": noise(1, 12, 16, seed=1),
            "return_dict": False,
        },
        times=("timestep", "r_timestep"),
        branches="2 cross_attention, 2 mlp, 2 self_attention", dependence="6 latent", left=0.042,
    ),
    Entry(
        name="AnyFlowFARTransformer3DModel",
        config={
            "patch_size": (1, 2, 2), "compressed_patch_size": (1, 4, 4), "full_chunk_limit": 3,
            "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
            "freq_dim": 256, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True, "rope_max_seq_len": 32,
            "gate_value": 0.25, "deltatime_type": "r",
        },
        inputs=lambda: {
            "hidden_states": noise(1, 4, 4, 16, 16), "timestep": torch.full((1, 4), 500.0),
            "r_timestep": torch.full((1, 4), 250.0), "encoder_hidden_states": noise(1, 12, 16, seed=1),
            "chunk_partition": [2, 2], "return_dict": False,
        },
        times=("timestep", "r_timestep"),
        branches="2 cross_attention, 2 mlp, 2 self_attention", dependence="6 latent", left=0.023,
    ),
    Entry(
        name="ChronoEditTransformer3DModel",
        config={
            "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 16,
            "out_channels": 16, "text_dim": 32, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2,
            "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-06, "image_dim": None,
            "added_kv_proj_dim": None, "rope_max_seq_len": 64, "pos_embed_seq_len": None, "rope_temporal_skip_len": 8,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 16, 2, 8, 8), "timestep": torch.full((1,), 44),
            "encoder_hidden_states": noise(1, 12, 32, seed=1), "encoder_hidden_states_image": None,
            "return_dict": False,
        },
        branches="2 cross_attention, 2 mlp, 2 self_attention", dependence="6 latent", left=0.196,
    ),
    Entry(
        name="CogVideoXTransformer3DModel",
        config={
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
            "time_embed_dim": 8, "text_embed_dim": 24, "num_layers": 2, "sample_width": 8, "sample_height": 8,
            "sample_frames": 5, "patch_size": 2, "max_text_seq_length": 6,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 2, 4, 8, 8), "encoder_hidden_states": noise(1, 6, 24, seed=1),
            "timestep": torch.tensor([500.0]), "return_dict": False,
        },
        branches="2 joint_attention, 2 mlp", dependence="4 latent", left=0.038,
    ),
    Entry(
        name="CogVideoXTransformer3DModel/1.5",
        config={
            "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4,
            "time_embed_dim": 2, "text_embed_dim": 8, "num_layers": 2, "sample_width": 8, "sample_height": 8,
            "sample_frames": 8, "patch_size": 2, "patch_size_t": 2, "temporal_compression_ratio": 4,
            "max_text_seq_length": 8, "use_rotary_positional_embeddings": True,
        },
        inputs=lambda: {
            "hidden_states": noise(2, 2, 4, 8, 8), "encoder_hidden_states": noise(2, 8, 8, seed=1),
            "timestep": torch.full((2,), 44), "return_dict": False,
        },
        branches="2 joint_attention, 2 mlp", dependence="4 latent", left=0.09,
    ),
    Entry(
        name="ConsisIDTransformer3DModel",
        config={
            "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4,
            "time_embed_dim": 2, "text_embed_dim": 8, "num_layers": 2, "sample_width": 8, "sample_height": 8,
            "sample_frames": 8, "patch_size": 2, "temporal_compression_ratio": 4, "max_text_seq_length": 8,
            "cross_attn_interval": 1, "is_kps": False, "is_train_face": True, "cross_attn_dim_head": 1,
            "cross_attn_num_heads": 1, "LFE_id_dim": 2, "LFE_vit_dim": 2, "LFE_depth": 5, "LFE_dim_head": 8,
            "LFE_num_heads": 2, "LFE_num_id_token": 1, "LFE_num_querie": 1, "LFE_output_dim": 10, "LFE_ff_mult": 1,
            "LFE_num_scale": 1,
        },
        inputs=lambda: {
            "hidden_states": noise(2, 1, 4, 8, 8), "encoder_hidden_states": noise(2, 8, 8, seed=1),
            "timestep": torch.full((2,), 44), "id_vit_hidden": [noise(2, 2, 2, seed=2)],
            "id_cond": noise(2, 2, seed=3), "return_dict": False,
        },
        modules=USUAL + r"|perceiver_cross_attention\.\d+",
        branches="2 joint_attention, 9 mlp, 4 self_attention", dependence="6 latent, 9 timestep", left_alone=9,
        left=0.051,
        note="The face extractor sees `id_cond`, which has a timestep's shape: 9 branches are computed each step.",
    ),
    Entry(
        name="Cosmos3OmniTransformer",
        config={
            "head_dim": 6, "hidden_act": "relu2", "hidden_size": 12, "intermediate_size": 24, "latent_channel": 2,
            "latent_patch_size": 1, "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 1,
            "patch_latent_dim": 2, "qk_norm_for_text": False, "rms_norm_eps": 1e-05, "rope_axes_dim": [1, 1, 1],
            "rope_theta": 100000000.0, "vocab_size": 32,
        },
        inputs=lambda: {
            "input_ids": torch.tensor([1, 2]), "text_indexes": torch.tensor([0, 1]),
            "position_ids": torch.full((3, 3), 0), "und_len": 2, "sequence_length": 3,
            "vision_tokens": [noise(1, 2, 1, 1, 1)], "vision_token_shapes": [(1, 1, 1)],
            "vision_sequence_indexes": torch.full((1,), 2), "vision_mse_loss_indexes": torch.full((1,), 2),
            "vision_timesteps": torch.full((1,), 1.0), "vision_noisy_frame_indexes": [torch.full((1,), 0)],
            "return_dict": False,
        },
        latents=("vision_tokens",),
        times=("vision_timesteps",),
        branches="4 mlp, 4 self_attention", dependence="8 latent", left=0.325,
    ),
    Entry(
        name="EasyAnimateTransformer3DModel",
        config={
            "attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 4, "mmdit_layers": 2, "num_layers": 2,
            "out_channels": 4, "patch_size": 2, "sample_height": 60, "sample_width": 90, "text_embed_dim": 16,
            "time_embed_dim": 8, "time_position_encoding_type": "3d_rope", "timestep_activation_fn": "silu",
        },
        inputs=lambda: {
            "hidden_states": noise(2, 4, 2, 16, 16), "timestep": torch.full((2,), 44), "timestep_cond": None,
            "encoder_hidden_states": noise(2, 16, 16, seed=1), "encoder_hidden_states_t5": None,
            "inpaint_latents": None, "control_latents": None, "return_dict": False,
        },
        branches="1 joint_attention, 3 mlp, 1 self_attention", dependence="5 latent", left=0.022,
        note="The last block's text output is not used: its feed-forward is no branch.",
    ),
    Entry(
        name="HeliosTransformer3DModel",
        config={
            "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
            "out_channels": 4, "text_dim": 16, "freq_dim": 256, "ffn_dim": 32, "num_layers": 2,
            "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_dim": (4, 4, 4),
            "has_multi_term_memory_patch": True, "guidance_cross_attn": True, "zero_history_timestep": True,
            "is_amplify_history": False,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 4, 2, 16, 16), "timestep": torch.full((1,), 44),
            "encoder_hidden_states": noise(1, 12, 16, seed=1), "indices_hidden_states": torch.ones(1, 2),
            "indices_latents_history_short": torch.ones(1, 1), "indices_latents_history_mid": torch.ones(1, 1),
            "indices_latents_history_long": torch.ones(1, 4), "latents_history_short": noise(1, 4, 1, 16, 16, seed=2),
            "latents_history_mid": noise(1, 4, 1, 16, 16, seed=3),
            "latents_history_long": noise(1, 4, 4, 16, 16, seed=4), "return_dict": False,
        },
        branches="2 cross_attention, 2 mlp, 2 self_attention", dependence="6 latent", left=0.043,
    ),
    Entry(
        name="HunyuanVideo15Transformer3DModel",
        config={
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
            "num_refiner_layers": 1, "mlp_ratio": 2.0, "patch_size": 1, "patch_size_t": 1, "text_embed_dim": 16,
            "text_embed_2_dim": 8, "image_embed_dim": 12, "rope_axes_dim": (2, 2, 4), "target_size": 16,
            "task_type": "t2v",
        },
        inputs=lambda: {
            "hidden_states": noise(1, 4, 1, 8, 8), "timestep": torch.full((1,), 1.0),
            "encoder_hidden_states": noise(1, 6, 16, seed=1), "encoder_hidden_states_2": noise(1, 4, 8, seed=2),
            "encoder_attention_mask": torch.ones(1, 6), "encoder_attention_mask_2": torch.ones(1, 4),
            "image_embeds": noise(1, 3, 12, seed=3), "return_dict": False,
        },
        graphs=3, branches="2 joint_attention, 5 mlp, 1 self_attention", dependence="8 latent", left=0.96,
        note="Graph breaks: text tokens are picked by a mask.",
    ),
    Entry(
        name="HunyuanVideoTransformer3DModel",
        config={
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 2,
            "num_single_layers": 2, "num_refiner_layers": 1, "patch_size": 1, "patch_size_t": 1,
            "guidance_embeds": True, "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4),
            "image_condition_type": None,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 4, 1, 16, 16), "timestep": torch.full((1,), 44.0),
            "encoder_hidden_states": noise(1, 12, 16, seed=1), "pooled_projections": noise(1, 8, seed=2),
            "encoder_attention_mask": torch.ones(1, 12), "guidance": torch.full((1,), 44.0), "return_dict": False,
        },
        branches="2 joint_attention, 5 mlp, 2 parallel, 1 self_attention", dependence="8 latent, 2 timestep",
        left_alone=4, left=0.013,
        note="The text's token refiner sees the timestep: 2 branches are computed each step. The text's 2 "
        "feed-forwards cost under 2% of the median branch: computed each step.",
    ),
    Entry(
        name="HunyuanVideoTransformer3DModel/i2v",
        config={
            "in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 2,
            "num_single_layers": 2, "num_refiner_layers": 1, "patch_size": 1, "patch_size_t": 1,
            "guidance_embeds": False, "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4),
            "image_condition_type": "latent_concat",
        },
        inputs=lambda: {
            "hidden_states": noise(1, 9, 1, 16, 16), "timestep": torch.full((1,), 44),
            "encoder_hidden_states": noise(1, 12, 16, seed=1), "pooled_projections": noise(1, 8, seed=2),
            "encoder_attention_mask": torch.ones(1, 12), "return_dict": False,
        },
        branches="2 joint_attention, 5 mlp, 2 parallel, 1 self_attention", dependence="8 latent, 2 timestep",
        left_alone=4, left=0.014,
        note="The text's token refiner sees the timestep: 2 branches are computed each step. The text's 2 "
        "feed-forwards cost under 2% of the median branch: computed each step.",
    ),
    Entry(
        name="HunyuanVideoTransformer3DModel/token-replace",
        config={
            "in_channels": 2, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 2,
            "num_single_layers": 2, "num_refiner_layers": 1, "patch_size": 1, "patch_size_t": 1,
            "guidance_embeds": True, "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4),
            "image_condition_type": "token_replace",
        },
        inputs=lambda: {
            "hidden_states": noise(1, 2, 1, 16, 16), "timestep": torch.full((1,), 44),
            "encoder_hidden_states": noise(1, 12, 16, seed=1), "pooled_projections": noise(1, 8, seed=2),
            "encoder_attention_mask": torch.ones(1, 12), "guidance": torch.full((1,), 44.0), "return_dict": False,
        },
        branches="2 joint_attention, 5 mlp, 2 parallel, 1 self_attention", dependence="8 latent, 2 timestep",
        left_alone=4, left=0.013,
        note="The text's token refiner sees the timestep: 2 branches are computed each step. The text's 2 "
        "feed-forwards cost under 2% of the median branch: computed each step.",
    ),
    Entry(
        name="HunyuanVideoFramepackTransformer3DModel",
        config={
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 2,
            "num_single_layers": 2, "num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1,
            "guidance_embeds": True, "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4),
            "image_condition_type": None, "has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 4, 3, 4, 4), "timestep": torch.full((1,), 44),
            "encoder_hidden_states": noise(1, 12, 16, seed=1), "pooled_projections": noise(1, 8, seed=2),
            "encoder_attention_mask": torch.ones(1, 12), "guidance": torch.full((1,), 44),
            "image_embeds": noise(1, 12, 16, seed=3), "indices_latents": torch.ones(3),
            "latents_clean": noise(1, 4, 2, 4, 4, seed=4), "indices_latents_clean": torch.ones(2),
            "latents_history_2x": noise(1, 4, 2, 4, 4, seed=5), "indices_latents_history_2x": torch.ones(2),
            "latents_history_4x": noise(1, 4, 8, 4, 4, seed=6), "indices_latents_history_4x": torch.ones(8),
            "return_dict": False,
        },
        graphs=4, branches="2 joint_attention, 5 mlp, 2 parallel, 1 self_attention", dependence="10 latent",
        left=0.078,
        note="Graph breaks: text tokens are picked by a mask.",
    ),
    Entry(
        name="JoyImageEditTransformer3DModel",
        config={
            "patch_size": [1, 2, 2], "in_channels": 16, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 16,
            "num_layers": 2, "rope_dim_list": [4, 6, 6], "theta": 256,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 16, 1, 4, 4), "encoder_hidden_states": noise(1, 12, 16, seed=1),
            "timestep": torch.full((1,), 1.0), "return_dict": False,
        },
        branches="1 joint_attention, 3 mlp, 1 self_attention", dependence="5 latent", left=0.087,
        note="The last block's text output is not used: its feed-forward is no branch.",
    ),
    Entry(
        name="JoyImageEditPlusTransformer3DModel",
        config={
            "patch_size": [1, 2, 2], "in_channels": 16, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 16,
            "num_layers": 2, "rope_dim_list": [4, 6, 6], "theta": 256,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 2, 16, 1, 2, 2), "encoder_hidden_states": noise(1, 12, 16, seed=1),
            "timestep": torch.full((1,), 1.0), "shape_list": [[(1, 1, 1), (1, 1, 1)]], "return_dict": False,
        },
        branches="1 joint_attention, 3 mlp, 1 self_attention", dependence="5 latent", left=0.078,
        note="The last block's text output is not used: its feed-forward is no branch.",
    ),
    Entry(
        name="LatteTransformer3DModel",
        config={
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2,
            "cross_attention_dim": 32, "attention_bias": True, "sample_size": 8, "patch_size": 2,
            "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False, "norm_eps": 1e-06, "caption_channels": 24, "video_length": 2,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 4, 2, 8, 8), "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": noise(1, 6, 24, seed=1), "return_dict": False,
        },
        branches="2 cross_attention, 4 mlp, 4 self_attention", dependence="10 latent", left=0.033,
    ),
    Entry(
        name="LTXVideoTransformer3DModel",
        config={
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8,
            "cross_attention_dim": 16, "num_layers": 2, "qk_norm": "rms_norm_across_heads", "caption_channels": 16,
        },
        inputs=lambda: {
            "hidden_states": noise(2, 512, 4), "encoder_hidden_states": noise(2, 16, 16, seed=1),
            "timestep": torch.full((2,), 44), "encoder_attention_mask": torch.full((2, 16), True), "num_frames": 2,
            "height": 16, "width": 16, "return_dict": False,
        },
        branches="2 cross_attention, 2 mlp, 2 self_attention", dependence="6 latent", left=0.003,
    ),
    Entry(
        name="LTX2VideoTransformer3DModel",
        config={
            "in_channels": 4, "out_channels": 4, "patch_size": 1, "patch_size_t": 1, "num_attention_heads": 2,
            "attention_head_dim": 8, "cross_attention_dim": 16, "audio_in_channels": 4, "audio_out_channels": 4,
            "audio_num_attention_heads": 2, "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8,
            "num_layers": 2, "qk_norm": "rms_norm_across_heads", "caption_channels": 16,
            "rope_double_precision": False,
        },
        inputs=lambda: {
            "hidden_states": noise(2, 512, 4), "audio_hidden_states": noise(2, 9, 4, seed=1),
            "encoder_hidden_states": noise(2, 16, 16, seed=2), "audio_encoder_hidden_states": noise(2, 16, 16, seed=3),
            "timestep": torch.full((2,), 500.0), "encoder_attention_mask": torch.full((2, 16), True), "num_frames": 2,
            "height": 16, "width": 16, "audio_num_frames": 9, "fps": 25.0, "return_dict": False,
        },
        latents=("hidden_states", "audio_hidden_states"),
        branches="8 cross_attention, 4 mlp, 4 self_attention", dependence="16 latent", left=0.004,
    ),
    Entry(
        name="MiniMaxH3Transformer3DModel",
        config={
            "num_attention_heads": 2, "attention_head_dim": 16, "hidden_size": 24, "num_layers": 2,
            "num_refiner_layers": 2, "ffn_dim": 32, "in_channels": 4, "audio_in_channels": 6, "patch_size": (1, 2, 2),
            "text_dim": 8, "freq_dim": 8, "time_embed_hidden_dim": 24, "time_embed_dim": 16, "rope_freq_dim": 2,
        },
        inputs=lambda: {
            "hidden_states": noise(2, 8, 16), "audio_hidden_states": noise(2, 6, 6, seed=1),
            "encoder_hidden_states": noise(2, 4, 8, seed=2), "timestep": torch.tensor([0.7, 0.3]),
            "timestep_indices": torch.tensor([0] * 4 + [1] * 6 + [0] * 8),
            "token_tags": torch.tensor([1] * 4 + [2] * 6 + [0] * 8),
            "position_ids": torch.arange(18.0)[:, None] * torch.tensor([1.0, 0.0, 0.0]),
            "video_indices": torch.arange(10, 18), "audio_indices": torch.arange(4, 10),
            "text_indices": torch.arange(4), "return_dict": False,
        },
        latents=("hidden_states", "audio_hidden_states"),
        branches="4 mlp, 4 self_attention", dependence="4 invariant, 4 latent", left=0.095,
    ),
    Entry(
        name="MochiTransformer3DModel",
        config={
            "patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
            "pooled_projection_dim": 16, "in_channels": 4, "out_channels": None, "qk_norm": "rms_norm",
            "text_embed_dim": 16, "time_embed_dim": 4, "activation_fn": "swiglu", "max_sequence_length": 16,
        },
        inputs=lambda: {
            "hidden_states": noise(2, 4, 2, 16, 16), "encoder_hidden_states": noise(2, 16, 16, seed=1),
            "timestep": torch.full((2,), 44), "encoder_attention_mask": torch.full((2, 16), True),
            "return_dict": False,
        },
        branches="1 joint_attention, 3 mlp, 1 self_attention", dependence="5 latent", left=0.024,
        note="One graph where Dynamo may capture sizes that depend on values.",
    ),
    Entry(
        name="MotifVideoTransformer3DModel",
        config={
            "in_channels": 33, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
            "num_single_layers": 2, "num_decoder_layers": 0, "mlp_ratio": 4.0, "patch_size": 1, "patch_size_t": 1,
            "qk_norm": "rms_norm", "norm_type": "layer_norm", "text_embed_dim": 32, "image_embed_dim": 4,
            "rope_theta": 256.0, "rope_axes_dim": (4, 4, 4), "enable_text_cross_attention_dual": False,
            "enable_text_cross_attention_single": False,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 33, 9, 16, 16), "encoder_hidden_states": noise(1, 12, 32, seed=1),
            "timestep": torch.full((1,), 44), "return_dict": False,
        },
        branches="2 joint_attention, 4 mlp, 2 parallel", dependence="8 latent", left_alone=2, left=0.003,
        note="The text's 2 feed-forwards cost under 2% of the median branch: computed each step.",
    ),
    Entry(
        name="SanaVideoTransformer3DModel",
        config={
            "in_channels": 16, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
            "num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24,
            "caption_channels": 16, "mlp_ratio": 2.5, "dropout": 0.0, "attention_bias": False, "sample_size": 8,
            "patch_size": (1, 2, 2), "norm_elementwise_affine": False, "norm_eps": 1e-06,
            "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 16, 2, 16, 16), "encoder_hidden_states": noise(1, 12, 16, seed=1),
            "timestep": torch.full((1,), 44), "return_dict": False,
        },
        branches="2 conv, 2 cross_attention, 2 self_attention", dependence="6 latent", left=0.117,
    ),
    Entry(
        name="SkyReelsV2Transformer3DModel",
        config={
            "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
            "out_channels": 4, "text_dim": 16, "freq_dim": 256, "ffn_dim": 32, "num_layers": 2,
            "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 4, 2, 16, 16), "encoder_hidden_states": noise(1, 12, 16, seed=1),
            "timestep": torch.full((1,), 44), "return_dict": False,
        },
        branches="2 cross_attention, 2 mlp, 2 self_attention", dependence="6 latent", left=0.034,
    ),
    Entry(
        name="TransformerTemporalModel",
        config={
            "num_attention_heads": 8, "attention_head_dim": 4, "in_channels": 4, "num_layers": 2, "norm_num_groups": 1,
        },
        inputs=lambda: {
            "hidden_states": noise(2, 4, 32, 32), "timestep": torch.full((2,), 44), "return_dict": False,
        },
        branches="2 mlp, 4 self_attention", dependence="6 latent", left=0.006,
        in_full="No timestep reaches the graph, so its steps cannot be told apart.",
    ),
    Entry(
        name="WanTransformer3DModel",
        config={
            "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 24,
            "freq_dim": 32, "ffn_dim": 48, "num_layers": 2, "rope_max_seq_len": 32,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 4, 2, 8, 8), "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": noise(1, 6, 24, seed=1), "return_dict": False,
        },
        branches="2 cross_attention, 2 mlp, 2 self_attention", dependence="6 latent", left=0.055,
    ),
    Entry(
        name="WanAnimateTransformer3DModel",
        config={
            "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 12,
            "latent_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 256, "ffn_dim": 32, "num_layers": 2,
            "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "image_dim": 16, "rope_max_seq_len": 32,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16}, "motion_encoder_size": 16,
            "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 12, 21, 16, 16), "timestep": torch.full((1,), 44),
            "encoder_hidden_states": noise(1, 12, 16, seed=1), "encoder_hidden_states_image": noise(1, 12, 16, seed=2),
            "pose_hidden_states": noise(1, 4, 20, 16, 16, seed=3),
            "face_pixel_values": noise(1, 3, 77, 16, 16, seed=4), "return_dict": False,
        },
        modules=USUAL + r"|face_adapter\.\d+",
        branches="3 cross_attention, 2 mlp, 2 self_attention", dependence="7 latent", left=0.009,
    ),
    Entry(
        name="WanVACETransformer3DModel",
        config={
            "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16,
            "out_channels": 16, "text_dim": 32, "freq_dim": 256, "ffn_dim": 32, "num_layers": 4,
            "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32, "vace_layers": [0, 2],
            "vace_in_channels": 48,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 16, 2, 16, 16), "encoder_hidden_states": noise(1, 12, 32, seed=1),
            "control_hidden_states": noise(1, 48, 2, 16, 16, seed=2), "timestep": torch.full((1,), 44),
            "return_dict": False,
        },
        branches="6 cross_attention, 6 mlp, 6 self_attention", dependence="18 latent", left=0.118,
    ),
    Entry(
        name="Kandinsky5Transformer3DModel",
        config={
            "in_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8, "time_dim": 32, "out_visual_dim": 4,
            "patch_size": (1, 2, 2), "model_dim": 48, "ff_dim": 96, "num_text_blocks": 1, "num_visual_blocks": 2,
            "axes_dims": (8, 8, 8),
        },
        inputs=lambda: {
            "hidden_states": noise(1, 2, 16, 16, 4), "encoder_hidden_states": noise(1, 8, 16, seed=1),
            "timestep": torch.full((1,), 500.0), "pooled_projections": noise(1, 8, seed=2),
            "visual_rope_pos": [torch.arange(2), torch.arange(8), torch.arange(8)], "text_rope_pos": torch.arange(8),
            "return_dict": False,
        },
        branches="2 cross_attention, 3 mlp, 3 self_attention", dependence="6 latent, 2 timestep", left_alone=2,
        left=0.024,
        note="The text block sees the timestep: 2 branches are computed each step.",
    ),
    Entry(
        name="CosmosTransformer3DModel",
        config={
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
            "mlp_ratio": 2, "text_embed_dim": 16, "adaln_lora_dim": 4, "max_size": (4, 32, 32),
            "patch_size": (1, 2, 2), "rope_scale": (2.0, 1.0, 1.0), "concat_padding_mask": False,
            "extra_pos_embed_type": "learnable",
        },
        inputs=lambda: {
            "hidden_states": noise(1, 4, 1, 16, 16), "timestep": torch.full((1,), 500),
            "encoder_hidden_states": noise(1, 12, 16, seed=1), "fps": 30, "return_dict": False,
        },
        branches="2 cross_attention, 2 mlp, 2 self_attention", dependence="6 latent", left=0.042,
    ),
    Entry(
        name="Kandinsky6Transformer3DModel",
        config={
            "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8, "time_dim": 32,
            "model_dim": 48, "ff_dim": 96, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (8, 8, 8),
            "visual_cond": False, "in_audio_dim": 6, "out_audio_dim": 6,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 2, 16, 16, 4), "encoder_hidden_states": noise(1, 8, 16, seed=1),
            "pooled_projections": noise(1, 8, seed=2), "timestep": torch.full((1,), 500.0),
            "audio_hidden_states": noise(1, 12, 6, seed=3), "return_dict": False,
        },
        latents=("hidden_states", "audio_hidden_states"),
        branches="8 cross_attention, 6 mlp, 6 self_attention", dependence="16 latent, 4 timestep", left_alone=4,
        left=0.021,
        note="The text blocks see the timestep: 4 branches are computed each step.",
    ),
    Entry(
        name="Kandinsky6SRTransformer3DModel",
        config={
            "in_visual_dim": 4, "out_visual_dim": 4, "time_dim": 32, "model_dim": 48, "ff_dim": 96,
            "num_visual_blocks": 2, "axes_dims": (8, 8, 8),
        },
        inputs=lambda: {
            "hidden_states": noise(1, 2, 8, 8, 9), "timestep": torch.full((1,), 500.0), "return_dict": False,
        },
        branches="2 mlp, 2 self_attention", dependence="4 latent", left=0.013,
    ),
    Entry(
        name="SanaWMTransformer3DModel",
        config={
            "in_channels": 8, "num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "linear_head_dim": 8,
            "softmax_every_n": 2, "image_size": 32, "caption_channels": 16, "use_chunk_plucker_post_attn": False,
            "chunk_plucker_channels": 4, "chunk_plucker_post_attn_blocks": 0, "mixed_precision": "no",
        },
        inputs=lambda: {
            "hidden_states": noise(1, 8, 2, 8, 8), "timestep": torch.full((1, 1, 2), 500.0),
            "encoder_hidden_states": noise(1, 1, 6, 16, seed=1), "mask": torch.ones(1, 6), "return_dict": False,
        },
        branches="2 conv, 2 cross_attention, 2 self_attention", dependence="6 latent", left=0.02,
    ),
)
