"""What a tiny model of a family needs beside small sizes; a nested dictionary belongs to a nested config."""

from __future__ import annotations

from typing import Any

_AS_MANY_KEYS = {"num_key_value_heads": 4}  # as queries; others have half as many
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2}
_SHARED_KEYS = {"num_kv_shared_layers": 1, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
_QWEN4 = {
    "heads_per_ngram": 2,
    "hc_lowrank": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 1,
    "indexer_head_dim": 8,
    "indexer_kv_heads": 1,
    "indexer_n_heads": 2,
    "ngram_vocab_size_base": 64,
    "ple_embed_dim": 16,
    "split_ngram_parts": 8,
}
_REFORMER = {
    "axial_pos_shape": [8, 8],
    "axial_pos_embds_dim": [16, 16],
    "attn_layers": ["local", "lsh", "local"],
    "local_attn_chunk_length": 4,
    "lsh_attn_chunk_length": 4,
    "num_buckets": 2,
    "hash_seed": 0,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl"),
        {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}},
    ),
    **dict.fromkeys(
        ["axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3", "youtu", "esmc"],
        _AS_MANY_KEYS,
    ),
    "bailing_hybrid": {**_AS_MANY_KEYS, "num_experts_per_tok": 2},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "blenderbot": {"encoder_layers": 3},
    "blt": {"num_hidden_layers": 3, "encoder_hash_byte_group_vocab": 64},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8}},
    "deepseek_v2": {**_AS_MANY_KEYS, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"text_config": _AS_MANY_KEYS, "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32}},
    "dots3_note_text": _AS_MANY_KEYS,
    "esm": {"vocab_size": 64, "mask_token_id": 3},
    "fsmt": {"use_cache": False},  # with its cache, it looks ahead
    "gemma3n_text": _SHARED_KEYS,
    "gemma4_text": _SHARED_KEYS,
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**_AS_MANY_KEYS, "num_experts_per_tok": 2},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "led": {"attention_window": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "lilt": {"hidden_size": 48},
    "longcat_flash": {**_AS_MANY_KEYS, "head_dim": 8, "qk_head_dim": 16},
    "longformer": {"attention_window": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "marian": {"decoder_start_token_id": 2},
    "ministral": {"head_dim": 8},
    "mistral4": _AS_MANY_KEYS,
    "mobilebert": {"embedding_size": 32, "intra_bottleneck_size": 16, "hidden_size": 32},
    "nemotron": _AS_MANY_KEYS,
    "nemo_speechlm": {"word_timestamp_config": {"blank_token_id": 1}},
    "perceiver": {"num_latents": 8, "d_latents": 32, "num_self_attends_per_block": 3},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": _REFORMER,
    "causal/reformer": {"is_decoder": True},
    "classification/t5": {"decoder_start_token_id": 0},
    "rwkv": {"use_cache": False},  # its cache has no gradients
    "vibevoice_asr": {
        "acoustic_tokenizer_chunk_size": 1440000,
        "acoustic_tokenizer_encoder_config": {"num_filters": 2},
        "semantic_tokenizer_encoder_config": {"num_filters": 2},
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "use_cache": False},  # its cache has no gradients
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "attention_hidden_size": 64},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
}

# Families that transformers lists for a task and that cannot be put on trial.
NOT_BUILT: dict[str, str] = {
    "gemma3n": "it needs the package timm",
    "gemma4_assistant": "it drafts for another model, whose keys it reads",
    "gemma4_unified_assistant": "it drafts for another model, whose keys it reads",
    "layoutlmv2": "it needs the package detectron2",
    "musicgen": "its class takes another config than the family has",
    "musicgen_melody": "its class takes another config than the family has",
    "voxtral_realtime": "it wants sound beside text",
}
