"""Image transformers. Configurations are those of the public tests of diffusers, or as small."""

from __future__ import annotations

import torch

from tests.reuse import noise
from tests.zoo.entry import Entry, grid, text_ids

# A configuration is a paragraph, not a line for each argument.
# fmt: off
IMAGE = (
    Entry(
        name="DiTTransformer2DModel",
        config={
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "num_layers": 2, "sample_size": 8,
            "norm_num_groups": 8,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 4, 8, 8), "timestep": torch.tensor([500.0]), "class_labels": torch.tensor([3]),
            "return_dict": False,
        },
        branches="2 mlp, 2 self_attention", dependence="4 latent", left=0.121,
    ),
    Entry(
        name="PixArtTransformer2DModel",
        config={
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2,
            "norm_num_groups": 8, "cross_attention_dim": 32, "sample_size": 8, "caption_channels": 24,
            "use_additional_conditions": False,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 4, 8, 8), "encoder_hidden_states": noise(1, 6, 24, seed=1),
            "timestep": torch.tensor([500.0]), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "return_dict": False,
        },
        branches="2 cross_attention, 2 mlp, 2 self_attention", dependence="6 latent", left=0.069,
    ),
    Entry(
        name="AuraFlowTransformer2DModel",
        config={
            "sample_size": 32, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 2, "num_single_dit_layers": 2,
            "attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32, "joint_attention_dim": 32,
            "out_channels": 4, "pos_embed_max_size": 256,
        },
        inputs=lambda: {
            "hidden_states": noise(2, 4, 32, 32), "encoder_hidden_states": noise(2, 256, 32, seed=1),
            "timestep": torch.full((2,), 44), "return_dict": False,
        },
        branches="2 joint_attention, 6 mlp, 2 self_attention", dependence="10 latent", left=0.004,
    ),
    Entry(
        name="BriaTransformer2DModel",
        config={
            "patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8,
            "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": None,
            "axes_dims_rope": [0, 4, 4],
        },
        inputs=lambda: {
            "hidden_states": noise(1, 16, 4), "encoder_hidden_states": noise(1, 48, 32, seed=1), "img_ids": grid(4, 4),
            "txt_ids": torch.zeros(48, 3), "timestep": torch.full((1,), 1.0), "return_dict": False,
        },
        branches="2 joint_attention, 4 mlp, 2 parallel", dependence="8 latent", left=0.029,
    ),
    Entry(
        name="BriaFiboTransformer2DModel",
        config={
            "patch_size": 1, "in_channels": 48, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8,
            "num_attention_heads": 2, "joint_attention_dim": 64, "text_encoder_dim": 32, "pooled_projection_dim": None,
            "axes_dims_rope": [0, 4, 4],
        },
        inputs=lambda: {
            "hidden_states": noise(1, 256, 48), "encoder_hidden_states": noise(1, 32, 64, seed=1),
            "img_ids": grid(16, 16), "txt_ids": torch.zeros(32, 3), "timestep": torch.full((1,), 1.0),
            "text_encoder_layers": [noise(1, 32, 32, seed=seed) for seed in range(2, 6)], "return_dict": False,
        },
        branches="2 joint_attention, 4 mlp, 2 parallel", dependence="8 latent", left=0.032,
    ),
    Entry(
        name="ChromaTransformer2DModel",
        config={
            "patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": [4, 4, 8],
            "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 16, 4), "encoder_hidden_states": noise(1, 48, 32, seed=1), "img_ids": grid(4, 4),
            "txt_ids": torch.zeros(48, 3), "timestep": torch.full((1,), 1.0), "return_dict": False,
        },
        branches="2 joint_attention, 4 mlp, 2 parallel", dependence="8 latent", left=0.021,
    ),
    Entry(
        name="CogView3PlusTransformer2DModel",
        config={
            "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 2,
            "out_channels": 4, "text_embed_dim": 8, "time_embed_dim": 8, "condition_dim": 2, "pos_embed_max_size": 8,
            "sample_size": 8,
        },
        inputs=lambda: {
            "hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(2, 8, 8, seed=1),
            "original_size": torch.full((2, 2), 64), "target_size": torch.full((2, 2), 64),
            "crop_coords": torch.full((2, 2), 0), "timestep": torch.full((2,), 44), "return_dict": False,
        },
        branches="2 joint_attention, 2 mlp", dependence="4 latent", left=0.106,
    ),
    Entry(
        name="CogView4Transformer2DModel",
        config={
            "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 4,
            "out_channels": 4, "text_embed_dim": 8, "time_embed_dim": 8, "condition_dim": 4,
        },
        inputs=lambda: {
            "hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(2, 8, 8, seed=1),
            "timestep": torch.full((2,), 44), "original_size": torch.full((2, 2), 64),
            "target_size": torch.full((2, 2), 64), "crop_coords": torch.full((2, 2), 0), "return_dict": False,
        },
        branches="1 joint_attention, 3 mlp, 1 self_attention", dependence="5 latent", left=0.066,
        note="The last block's text output is not used: its feed-forward is no branch.",
    ),
    Entry(
        name="ErnieImageTransformer2DModel",
        config={
            "hidden_size": 16, "num_attention_heads": 1, "num_layers": 2, "ffn_hidden_size": 16, "in_channels": 16,
            "out_channels": 16, "patch_size": 1, "text_in_dim": 16, "rope_theta": 256, "rope_axes_dim": (8, 4, 4),
            "eps": 1e-06, "qk_layernorm": True,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 16, 16, 16), "timestep": torch.full((1,), 1.0),
            "text_bth": noise(1, 16, 16, seed=1), "text_lens": torch.full((1,), 16), "return_dict": False,
        },
        branches="2 mlp, 2 self_attention", dependence="4 latent", left=0.023,
    ),
    Entry(
        name="FluxTransformer2DModel",
        config={
            "patch_size": 1, "in_channels": 8, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 20,
            "axes_dims_rope": (4, 6, 6),
        },
        inputs=lambda: {
            "hidden_states": noise(1, 16, 8), "encoder_hidden_states": noise(1, 6, 24, seed=1),
            "pooled_projections": noise(1, 20, seed=2), "timestep": torch.tensor([0.5]), "img_ids": grid(4, 4),
            "txt_ids": torch.zeros(6, 3), "return_dict": False,
        },
        branches="1 joint_attention, 2 mlp, 2 parallel", dependence="5 latent", left=0.047,
    ),
    Entry(
        name="Flux2Transformer2DModel",
        config={
            "patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 32, "timestep_guidance_channels": 256,
            "axes_dims_rope": [4, 4, 4, 4],
        },
        inputs=lambda: {
            "hidden_states": noise(1, 16, 4), "encoder_hidden_states": noise(1, 48, 32, seed=1),
            "img_ids": grid(4, 4, 4)[None].long(), "txt_ids": text_ids(48)[None].long(),
            "timestep": torch.full((1,), 1.0), "guidance": torch.full((1,), 1.0), "return_dict": False,
        },
        branches="2 joint_attention, 4 mlp, 2 parallel", dependence="8 latent", left=0.02,
    ),
    Entry(
        name="GlmImageTransformer2DModel",
        config={
            "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
            "num_attention_heads": 2, "text_embed_dim": 32, "time_embed_dim": 16, "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": 64,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 4, 8, 8), "encoder_hidden_states": noise(1, 12, 32, seed=1),
            "prior_token_id": torch.full((1,), 44), "prior_token_drop": torch.full((1,), False),
            "timestep": torch.full((1,), 44), "target_size": torch.full((1, 2), 8.0), "crop_coords": torch.zeros(1, 2),
            "return_dict": False,
        },
        branches="1 joint_attention, 3 mlp, 1 self_attention", dependence="5 latent", left=0.069,
        note="The last block's text output is not used: its feed-forward is no branch.",
    ),
    Entry(
        name="HiDreamImageTransformer2DModel",
        config={
            "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2,
            "attention_head_dim": 8, "num_attention_heads": 4, "caption_channels": [8, 4], "text_emb_dim": 8,
            "num_routed_experts": 2, "num_activated_experts": 2, "axes_dims_rope": (4, 2, 2),
            "max_resolution": (32, 32), "llama_layers": (0, 1, 0, 1), "force_inference_output": True,
        },
        inputs=lambda: {
            "hidden_states": noise(2, 4, 32, 32), "encoder_hidden_states_t5": noise(2, 8, 8, seed=1),
            "encoder_hidden_states_llama3": noise(2, 2, 8, 4, seed=2), "pooled_embeds": noise(2, 8, seed=3),
            "timesteps": torch.full((2,), 44), "return_dict": False,
        },
        times=("timesteps",),
        branches="2 joint_attention, 6 mlp, 2 self_attention", dependence="10 latent", left=0.003,
        modules=r".*\.(?:attn1|ff_i|ff_t)",
        note="Experts get as many tokens as they are given: each mixture is kept whole, as one operator.",
    ),
    Entry(
        name="HunyuanDiT2DModel",
        config={
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
            "num_attention_heads": 2, "cross_attention_dim": 8, "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4, "hidden_size": 16, "text_len": 4, "text_len_t5": 4,
            "activation_fn": "gelu-approximate",
        },
        inputs=lambda: {
            "hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(2, 4, 8, seed=1),
            "text_embedding_mask": torch.ones(2, 4), "encoder_hidden_states_t5": noise(2, 4, 8, seed=2),
            "text_embedding_mask_t5": torch.ones(2, 4), "timestep": torch.full((2,), 44.0),
            "image_meta_size": torch.tensor([[1024.0, 1024.0, 16.0, 16.0, 0.0, 0.0]]).repeat(2, 1),
            "style": torch.full((2,), 0), "image_rotary_emb": [torch.ones(1, 8), torch.zeros(1, 8)],
            "return_dict": False,
        },
        branches="2 cross_attention, 2 mlp, 2 self_attention", dependence="6 latent", left=0.448,
    ),
    Entry(
        name="Ideogram4Transformer2DModel",
        config={
            "in_channels": 16, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4,
            "intermediate_size": 32, "adaln_dim": 16, "llm_features_dim": 24, "rope_theta": 10000,
            "mrope_section": (2, 1, 1), "norm_eps": 1e-05,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 8, 16), "encoder_hidden_states": noise(1, 8, 24, seed=1),
            "timestep": torch.full((1,), 0.5),
            "position_ids": torch.cat([torch.arange(4)[:, None].repeat(1, 3), 65536 + grid(2, 2).long()])[None],
            "segment_ids": torch.full((1, 8), 1), "indicator": torch.tensor([[3, 3, 3, 3, 2, 2, 2, 2]]),
            "return_dict": False,
        },
        branches="2 mlp, 2 self_attention", dependence="4 latent", left=0.149,
    ),
    Entry(
        name="Krea2Transformer2DModel",
        config={
            "in_channels": 16, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 32, "timestep_embed_dim": 8, "text_hidden_dim": 16,
            "num_text_layers": 3, "text_num_attention_heads": 2, "text_num_key_value_heads": 1,
            "text_intermediate_size": 16, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 2, 2), "rope_theta": 1000.0, "norm_eps": 1e-05,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 4, 16), "encoder_hidden_states": noise(1, 4, 3, 16, seed=1),
            "timestep": torch.full((1,), 0.5), "position_ids": torch.cat([torch.zeros(4, 3), grid(2, 2)]),
            "encoder_attention_mask": torch.tensor([[True, True, True, False]]), "return_dict": False,
        },
        branches="4 mlp, 4 self_attention", dependence="4 invariant, 4 latent", left=0.104,
    ),
    Entry(
        name="LongCatImageTransformer2DModel",
        config={
            "patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32,
            "axes_dims_rope": [4, 4, 8],
        },
        inputs=lambda: {
            "hidden_states": noise(1, 16, 4), "encoder_hidden_states": noise(1, 48, 32, seed=1), "img_ids": grid(4, 4),
            "txt_ids": torch.zeros(48, 3), "timestep": torch.full((1,), 1.0), "guidance": torch.full((1,), 3.5),
            "return_dict": False,
        },
        branches="2 joint_attention, 4 mlp, 2 parallel", dependence="8 latent", left=0.022,
    ),
    Entry(
        name="LuminaNextDiT2DModel",
        config={
            "sample_size": 16, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 2,
            "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 16, "ffn_dim_multiplier": None,
            "norm_eps": 1e-05, "learn_sigma": False, "qk_norm": True, "cross_attention_dim": 32, "scaling_factor": 1.0,
        },
        inputs=lambda: {
            "hidden_states": noise(2, 4, 16, 16), "encoder_hidden_states": noise(2, 16, 32, seed=1),
            "timestep": torch.full((2,), 0.5), "encoder_mask": torch.ones(2, 16),
            "image_rotary_emb": noise(384, 384, 4, seed=2), "cross_attention_kwargs": {}, "return_dict": False,
        },
        branches="2 cross_attention+self_attention, 2 mlp", dependence="4 latent", left=0.043,
    ),
    Entry(
        name="Lumina2Transformer2DModel",
        config={
            "sample_size": 16, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 2,
            "num_refiner_layers": 1, "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2,
            "ffn_dim_multiplier": None, "norm_eps": 1e-05, "scaling_factor": 1.0, "axes_dim_rope": (4, 2, 2),
            "axes_lens": (128, 128, 128), "cap_feat_dim": 32,
        },
        inputs=lambda: {
            "hidden_states": noise(2, 4, 16, 16), "encoder_hidden_states": noise(2, 16, 32, seed=1),
            "timestep": torch.full((2,), 0.5), "encoder_attention_mask": torch.full((2, 16), True),
            "return_dict": False,
        },
        graphs=4, branches="4 mlp, 4 self_attention", dependence="2 invariant, 6 latent", left=0.028,
        note="Graph breaks: text lengths are read as Python numbers.",
    ),
    Entry(
        name="NucleusMoEImageTransformer2DModel",
        config={
            "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 4, "joint_attention_dim": 16, "axes_dims_rope": (8, 4, 4), "moe_enabled": False,
            "capacity_factors": [8.0, 8.0],
        },
        inputs=lambda: {
            "hidden_states": noise(1, 16, 16), "encoder_hidden_states": noise(1, 8, 16, seed=1),
            "encoder_hidden_states_mask": torch.full((1, 8), 1), "timestep": torch.full((1,), 1.0),
            "img_shapes": [(1, 4, 4)], "return_dict": False,
        },
        branches="2 mlp, 2 self_attention", dependence="4 latent", left=0.064,
    ),
    Entry(
        name="OmniGenTransformer2DModel",
        config={
            "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 32,
            "num_layers": 3, "pad_token_id": 0, "vocab_size": 1000, "in_channels": 4, "time_step_dim": 4,
            "rope_scaling": {"long_factor": [1, 2], "short_factor": [1, 2]},
        },
        inputs=lambda: {
            "hidden_states": noise(2, 4, 8, 8), "timestep": torch.full((2,), 0.5),
            "input_ids": torch.arange(48).reshape(2, 24) % 10, "input_img_latents": [noise(1, 4, 8, 8, seed=1)],
            "input_image_sizes": {0: [[0, 16]]}, "attention_mask": torch.ones(2, 41, 41),
            "position_ids": torch.arange(41).repeat(2, 1), "return_dict": False,
        },
        graphs=4, branches="3 mlp, 3 self_attention", dependence="6 latent", left=0.023,
        note="Graph break: the code branches on tensor values.",
    ),
    Entry(
        name="OvisImageTransformer2DModel",
        config={
            "patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2,
            "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8),
        },
        inputs=lambda: {
            "hidden_states": noise(1, 16, 4), "encoder_hidden_states": noise(1, 48, 32, seed=1), "img_ids": grid(4, 4),
            "txt_ids": torch.zeros(48, 3), "timestep": torch.full((1,), 1.0), "return_dict": False,
        },
        branches="2 joint_attention, 4 mlp, 2 parallel", dependence="8 latent", left=0.018,
    ),
    Entry(
        name="PRXTransformer2DModel",
        config={
            "in_channels": 16, "patch_size": 2, "context_in_dim": 32, "hidden_size": 64, "mlp_ratio": 3.5,
            "num_heads": 2, "depth": 4, "axes_dim": [16, 16], "theta": 10000,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 16, 16, 16), "encoder_hidden_states": noise(1, 16, 32, seed=1),
            "timestep": torch.full((1,), 1.0), "return_dict": False,
        },
        modules=r"blocks\.\d+\.(?:attention|down_proj)",
        branches="4 mlp, 4 self_attention", dependence="8 latent", left=0.034,
    ),
    Entry(
        name="QwenImageTransformer2DModel",
        config={
            "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 4, "joint_attention_dim": 16, "guidance_embeds": False, "axes_dims_rope": (8, 4, 4),
        },
        inputs=lambda: {
            "hidden_states": noise(1, 16, 16), "encoder_hidden_states": noise(1, 8, 16, seed=1),
            "encoder_hidden_states_mask": torch.full((1, 8), 1), "timestep": torch.full((1,), 1.0),
            "img_shapes": [(1, 4, 4)], "return_dict": False,
        },
        branches="1 joint_attention, 3 mlp, 1 self_attention", dependence="5 latent", left=0.046,
        note="The last block's text output is not used: its feed-forward is no branch.",
    ),
    Entry(
        name="SanaTransformer2DModel",
        config={
            "patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 4,
            "num_attention_heads": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 4,
            "cross_attention_dim": 8, "caption_channels": 8, "sample_size": 32,
        },
        inputs=lambda: {
            "hidden_states": noise(2, 4, 32, 32), "encoder_hidden_states": noise(2, 8, 8, seed=1),
            "timestep": torch.full((2,), 44), "return_dict": False,
        },
        branches="2 conv, 2 cross_attention, 2 self_attention", dependence="6 latent", left=0.023,
    ),
    Entry(
        name="SD3Transformer2DModel",
        config={
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 24, "caption_projection_dim": 32,
            "pooled_projection_dim": 20, "out_channels": 4, "pos_embed_max_size": 8,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 4, 8, 8), "encoder_hidden_states": noise(1, 6, 24, seed=1),
            "pooled_projections": noise(1, 20, seed=2), "timestep": torch.tensor([500.0]), "return_dict": False,
        },
        branches="1 joint_attention, 3 mlp, 1 self_attention", dependence="5 latent", left=0.069,
    ),
    Entry(
        name="SD3Transformer2DModel/3.5",
        config={
            "sample_size": 32, "patch_size": 1, "in_channels": 4, "num_layers": 4, "attention_head_dim": 8,
            "num_attention_heads": 4, "caption_projection_dim": 32, "joint_attention_dim": 32,
            "pooled_projection_dim": 64, "out_channels": 4, "pos_embed_max_size": 96, "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        inputs=lambda: {
            "hidden_states": noise(2, 4, 32, 32), "encoder_hidden_states": noise(2, 154, 32, seed=1),
            "pooled_projections": noise(2, 64, seed=2), "timestep": torch.full((2,), 44), "return_dict": False,
        },
        branches="3 joint_attention, 7 mlp, 2 self_attention", dependence="12 latent", left=0.001,
    ),
    Entry(
        name="ZImageTransformer2DModel",
        config={
            "all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 16, "dim": 16, "n_layers": 2,
            "n_refiner_layers": 1, "n_heads": 1, "n_kv_heads": 2, "qk_norm": True, "cap_feat_dim": 32,
            "rope_theta": 256.0, "t_scale": 1000.0, "axes_dims": [8, 4, 4], "axes_lens": [256, 32, 32],
        },
        inputs=lambda: {
            "x": [noise(16, 1, 16, 16)], "cap_feats": [noise(160, 32, seed=1)], "t": torch.full((1,), 0.4),
            "return_dict": False,
        },
        latents=("x",),
        times=("t",),
        branches="4 mlp, 4 self_attention", dependence="2 invariant, 6 latent", left=0.096,
    ),
    Entry(
        name="HunyuanImageTransformer2DModel",
        config={
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
            "num_single_layers": 2, "num_refiner_layers": 1, "mlp_ratio": 2.0, "patch_size": (1, 1),
            "guidance_embeds": False, "text_embed_dim": 16, "text_embed_2_dim": 8, "rope_axes_dim": (8, 8),
        },
        inputs=lambda: {
            "hidden_states": noise(1, 4, 8, 8), "timestep": torch.full((1,), 500.0),
            "encoder_hidden_states": noise(1, 6, 16, seed=1),
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]]),
            "encoder_hidden_states_2": noise(1, 4, 8, seed=2),
            "encoder_attention_mask_2": torch.tensor([[1, 1, 1, 0]]), "return_dict": False,
        },
        graphs=9, branches="2 joint_attention, 5 mlp, 2 parallel, 1 self_attention", dependence="10 latent",
        left=0.815,
        note="Graph breaks: text tokens are picked by a mask.",
    ),
    Entry(
        name="Flux3Transformer2DModel",
        config={
            "in_channels": 8, "cond_in_channels": 8, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 24, "timestep_channels": 32,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        inputs=lambda: {
            "hidden_states": noise(1, 16, 8), "encoder_hidden_states": noise(1, 6, 24, seed=1),
            "timestep": torch.full((1,), 0.5), "img_ids": grid(4, 4, 4), "txt_ids": text_ids(6), "return_dict": False,
        },
        branches="6 parallel", dependence="2 invariant, 4 latent", left=0.097,
    ),
    Entry(
        name="Transformer2DModel",
        config={
            "in_channels": 32, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16,
            "cross_attention_dim": 16, "norm_num_groups": 8,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 32, 8, 8), "encoder_hidden_states": noise(1, 6, 16, seed=1),
            "return_dict": False,
        },
        times=(),
        branches="2 cross_attention, 2 mlp, 2 self_attention", dependence="6 latent", left=0.043,
        in_full="No timestep reaches the graph, so its steps cannot be told apart.",
    ),
    Entry(
        name="HunyuanDiT2DModel/skips",
        config={
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 6, "attention_head_dim": 8,
            "num_attention_heads": 2, "cross_attention_dim": 8, "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4, "hidden_size": 16, "text_len": 4, "text_len_t5": 4,
            "activation_fn": "gelu-approximate",
        },
        inputs=lambda: {
            "hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(2, 4, 8, seed=1),
            "text_embedding_mask": torch.ones(2, 4), "encoder_hidden_states_t5": noise(2, 4, 8, seed=2),
            "text_embedding_mask_t5": torch.ones(2, 4), "timestep": torch.full((2,), 44.0),
            "image_meta_size": torch.tensor([[1024.0, 1024.0, 16.0, 16.0, 0.0, 0.0]]).repeat(2, 1),
            "style": torch.full((2,), 0), "image_rotary_emb": [torch.ones(1, 8), torch.zeros(1, 8)],
            "return_dict": False,
        },
        branches="6 cross_attention, 6 mlp, 6 self_attention", dependence="18 latent", left=0.237,
    ),
    Entry(
        name="QwenImage21Transformer2DModel",
        config={
            "patch_size": 1, "in_channels": 16, "out_channels": 16, "num_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 2, "context_in_dim": 24, "axes_dims_rope": (4, 6, 6),
        },
        inputs=lambda: {
            "hidden_states": noise(1, 16, 16), "encoder_hidden_states": noise(1, 6, 24, seed=1),
            "timestep": torch.full((1,), 0.5), "img_shapes": [[(1, 4, 4)]],
            "img_mask": torch.tensor([[False] * 6 + [True] * 4]), "return_dict": False,
        },
        graphs=9, branches="2 mlp, 2 self_attention", dependence="4 latent", left=0.085,
        note="Graph breaks: token counts are read as Python numbers.",
    ),
    Entry(
        name="BriaFibo2Transformer2DModel",
        config={
            "in_channels": 4, "patch_size": 2, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2,
            "cap_feat_dim": 24, "injection_layer_ids": (1,), "perceiver_num_layers": 1, "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8, "gist_step": 2, "gist_min_text_len": 4, "gist_max_text_len": 16,
            "axes_dims": (4, 6, 6), "axes_lens": (64, 32, 32),
        },
        inputs=lambda: {
            "hidden_states": noise(1, 4, 16, 16), "timestep": torch.full((1,), 0.5),
            "encoder_hidden_states": noise(1, 2, 6, 24, seed=1), "return_dict": False,
        },
        branches="1 cross_attention, 4 mlp, 4 self_attention", dependence="2 invariant, 7 latent", left=0.179,
    ),
    Entry(
        name="PriorTransformer",
        config={
            "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "embedding_dim": 8,
            "num_embeddings": 7, "additional_embeddings": 4,
        },
        inputs=lambda: {
            "hidden_states": noise(2, 8), "timestep": torch.full((2,), 500), "proj_embedding": noise(2, 8, seed=1),
            "encoder_hidden_states": noise(2, 7, 8, seed=2), "return_dict": False,
        },
        branches="2 mlp, 2 self_attention", dependence="4 latent", left=0.023,
    ),
    Entry(
        name="DreamLiteTransformer2DModel",
        config={
            "in_channels": 32, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16,
            "cross_attention_dim": 16, "norm_num_groups": 8,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 32, 8, 8), "encoder_hidden_states": noise(1, 6, 16, seed=1),
            "return_dict": False,
        },
        times=(),
        branches="2 cross_attention, 2 mlp, 2 self_attention", dependence="6 latent", left=0.043,
        in_full="No timestep reaches the graph, so its steps cannot be told apart.",
    ),
)
