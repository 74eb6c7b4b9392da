"""A tiny random model of any family that transformers knows: its own default config, with every size made small.

Sizes are found by the names that configs share (`hidden_size`, `n_embd`, `d_model`, ...), in nested configs too.
`OVERRIDES` holds what a family needs beside that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.architectures.overrides import OVERRIDES

VOCABULARY = 64
N_LABELS = 3
N_LAYERS = 3
# Models that look at images and read text, which is all that is put into them here.
IMAGE_TEXT = (
    "aya_vision", "cohere2_vision", "deepseek_vl", "gemma3", "idefics2", "idefics3", "internvl", "lfm2_vl", "llama4",
    "llava", "llava_next", "mistral3", "mllama", "ovis2", "paligemma", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_vl",
    "smolvlm",
)  # fmt: skip
# Mixtures whose experts are one parameter (experts, d_out, d_in) per matrix, as transformers 5 has them.
EXPERTS = (
    "afmoe", "aria_text", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3",
    "deepseek_v32", "deepseek_v4", "dots1", "dots3_note_text", "ernie4_5_moe", "exaone_moe", "flex_olmo", "flint",
    "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid",
    "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4", "inkling2_text", "inkling_text", "jamba", "jetmoe",
    "kimi_linear", "kolibri1", "laguna", "lfm2_moe", "llama4_text", "longcat_flash", "mellum", "mimo_v2_flash",
    "minimax", "minimax_m2", "minimax_m3_vl_text", "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe",
    "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen4_exp_text", "solar_open", "zaya",
)  # fmt: skip
TASKS = {
    "causal": (AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "seq2seq": (AutoModelForSeq2SeqLM, modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "classification": (
        AutoModelForSequenceClassification,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "image-text": (AutoModelForImageTextToText, IMAGE_TEXT),
    "experts": (AutoModelForCausalLM, EXPERTS),
}
FAMILIES = [(task, family) for task, (_, families) in TASKS.items() for family in families]

# The first pattern that matches the whole name of a setting gives its size; larger numbers are lowered to it.
_SIZES: dict[str, int] = {
    r"(\w+_)?vocab_size(_\w+)?": VOCABULARY,
    r"(\w+_)?(n_layers?|hidden_layers|num_layers|depth|encoder_layers|decoder_layers|adapter_layers)": N_LAYERS,
    r"(\w+_)?(key_value_heads|kv_heads|head_kv|global_kv_heads)": 2,
    r"(\w+_)?(n_head|n_heads|num_heads|attention_heads|key_heads|value_heads|attn_heads)": 4,
    r"(\w+_)?(head_dim|attention_head_size|d_kv|d_head|dim_head)": 8,
    r"(\w+_)?(intermediate_size|ffn_dim|d_ff|dim_ff|dff|n_inner|inner_dim|ffn_hidden_size|feed_forward_size)": 48,
    r"(\w+_)?(hidden_size|hidden_dim|n_embd|d_model|embed_dim|embedding_size|hidden_size_global)": 32,
    r"(\w+_)?(dim|lora_rank|width|output_dim)": 32,
    r"(\w+_)?(position_embeddings|n_positions|n_ctx|max_seq_len|position_embedding_size|context_length)": 64,
    r"max_\w+_positions": 64,
    r"(\w+_)?(num_experts|routed_experts|local_experts)": 4,
    r"(num_experts_per_tok|moe_k|top_k_experts|moe_topk)": 2,
    r"(\w+_)?(d_state|state_size)": 8,
    r"(\w+_)?chunk_size": 8,
    r"(first_k_dense_replace|n_groups?|topk_group|num_expert_group)": 1,
    r"sliding_window": 6,  # shorter than the inputs, so that sliding layers differ from full ones
}
_SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tiny_config(task: str, family: str) -> PreTrainedConfig:
    """The default config of a family, shrunk."""
    config_class = CONFIG_MAPPING[family]
    settings = _shrunk(config_class, {}) | _SPECIAL_TOKENS
    if task == "classification":
        settings["num_labels"] = N_LABELS
    for key in (family, f"{task}/{family}"):
        settings = _merged(settings, OVERRIDES.get(key, {}))
    return config_class(**settings)


def tiny_model(task: str, family: str) -> PreTrainedModel:
    """A random model of a family in evaluation mode; the same one every time."""
    config = tiny_config(task, family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TASKS[task][0].from_config(config).float().eval()
    if task == "seq2seq" and decoder_start(model) is None:
        model.generation_config.decoder_start_token_id = 2  # where checkpoints have it
    return model


def decoder_start(model: PreTrainedModel) -> int | None:
    """The first token that a decoder is given, from the model's own config or else that of its generation."""
    start = getattr(model.config, "decoder_start_token_id", None)
    return model.generation_config.decoder_start_token_id if start is None else start


def _shrunk(config_class: type[PreTrainedConfig], given: Mapping[str, Any]) -> dict[str, Any]:
    """What a config class must be given so that its model is tiny; every other setting keeps its default."""
    default = config_class(**given)
    n_layers = getattr(default, "num_hidden_layers", None)
    settings = dict(given) | (_SPECIAL_TOKENS if hasattr(default, "vocab_size") else {})
    for name in config_class.__dataclass_fields__:  # what __init__ derives from these follows
        value = vars(default).get(name)
        if isinstance(value, PreTrainedConfig):
            settings[name] = {**_shrunk(type(value), {}), "model_type": value.model_type}
        elif isinstance(value, int) and not isinstance(value, bool):
            if (size := _size_of(name)) is not None and value > size:
                settings[name] = size
        elif isinstance(value, list | tuple) and len(value) == n_layers:
            settings[name] = _representatives(value)
        elif name == "initializer_range" and isinstance(value, float):
            settings[name] = 0.2  # with the usual 0.02, small models shrink every difference to nothing
    return settings


def _size_of(name: str) -> int | None:
    return next((size for pattern, size in _SIZES.items() if re.fullmatch(pattern, name)), None)


def _representatives(values: list | tuple) -> list:
    """`N_LAYERS` of the settings of single layers, every kind among them if possible, in their order."""
    kinds = [index for index, value in enumerate(values) if values.index(value) == index][:N_LAYERS]
    rest = [index for index in range(len(values)) if index not in kinds]
    return [values[index] for index in sorted([*kinds, *rest[: N_LAYERS - len(kinds)]])]


def _merged(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for name, value in overrides.items():
        before = merged.get(name)
        merged[name] = _merged(before, value) if isinstance(value, Mapping) and isinstance(before, Mapping) else value
    return merged
