"""Tiny random models whose modules or layers do what most do not: route tokens, put time before rows, share, skip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from tests.tiny_models import HIDDEN, INNER, VOCABULARY, randomise_b_

_HEADS = 4
_SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_CAUSAL = {
    **_SPECIAL,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 3,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_SEQ2SEQ = {
    **_SPECIAL,
    "d_model": HIDDEN,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": _HEADS,
    "decoder_attention_heads": _HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
}
_ENCODER = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 3,
    "num_attention_heads": _HEADS,
    "max_position_embeddings": 64,
    "num_labels": 3,
    "initializer_range": 0.2,
}
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def odd_peft_model(family: str, targets: Sequence[str] | str | None = None, rank: int = 2, seed: int = 0) -> PeftModel:
    """A tiny random model in evaluation mode, with LoRA on `targets` (the family's own if left out), B random."""
    model_class, config, own_targets = _BUILDERS[family]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets or own_targets)
        model = get_peft_model(getattr(transformers, model_class)(config).eval(), lora)
    randomise_b_(model, seed=seed + 2)
    return model.eval()  # pyright: ignore[reportReturnType]


def odd_inputs(family: str, rows: int = 3, tokens: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens, nothing masked; encoder-decoders get `tokens` decoder tokens as well."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)

    inputs = {"input_ids": draw()}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if family in SEQ2SEQ:
        inputs["decoder_input_ids"] = draw()
    return inputs


def _switch() -> tuple[str, Any, list[str]]:
    config = transformers.SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
        d_model=HIDDEN,
        d_kv=8,
        d_ff=INNER,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=_HEADS,
        num_experts=3,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        router_jitter_noise=0.0,
    )
    return "SwitchTransformersForConditionalGeneration", config, ["q", "wi", "wo"]


def _nllb_moe() -> tuple[str, Any, list[str]]:
    config = transformers.NllbMoeConfig(
        **_SEQ2SEQ, num_experts=2, encoder_sparse_step=1, decoder_sparse_step=1, expert_capacity=64, max_length=20
    )
    return "NllbMoeForConditionalGeneration", config, ["q_proj", "fc1", "fc2"]


def _fsmt() -> tuple[str, Any, list[str]]:
    settings = {name: value for name, value in _SEQ2SEQ.items() if name != "vocab_size"}
    config = transformers.FSMTConfig(
        langs=["en", "de"], src_vocab_size=VOCABULARY, tgt_vocab_size=VOCABULARY, **settings
    )
    return "FSMTForConditionalGeneration", config, ["q_proj", "v_proj", "fc1"]


def _gemma3n() -> tuple[str, Any, list[str]]:
    config = transformers.Gemma3nTextConfig(
        **{**_CAUSAL, "num_hidden_layers": 4, "intermediate_size": [INNER] * 4},
        head_dim=8,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        altup_num_inputs=2,
        sliding_window=4,
        num_kv_shared_layers=2,
        activation_sparsity_pattern=[0.0] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    return "Gemma3nForCausalLM", config, _ATTENTION


def _gemma4() -> tuple[str, Any, list[str]]:
    config = transformers.Gemma4TextConfig(
        **{**_CAUSAL, "num_hidden_layers": 4},
        head_dim=8,
        global_head_dim=8,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        sliding_window=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    return "Gemma4ForCausalLM", config, _ATTENTION


def _mllama() -> tuple[str, Any, list[str]]:
    """Layer 1 looks at pictures, and is not called where there are none."""
    config = transformers.models.mllama.configuration_mllama.MllamaTextConfig(
        **_CAUSAL, cross_attention_layers=[1], rope_parameters={"rope_type": "default", "rope_theta": 10000.0}
    )
    return "MllamaForCausalLM", config, _ATTENTION


def _mixtral() -> tuple[str, Any, list[str]]:
    config = transformers.Qwen2MoeConfig(
        **_CAUSAL, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2
    )
    return "Qwen2MoeForCausalLM", config, ["q_proj", "up_proj", "down_proj"]


def _encoder(name: str, targets: list[str], **extra: Any) -> Callable[[], tuple[str, Any, list[str]]]:
    def build() -> tuple[str, Any, list[str]]:
        config = getattr(transformers, f"{name}Config")(**{**_ENCODER, **extra})
        return f"{name}ForSequenceClassification", config, targets

    return build


def _funnel() -> tuple[str, Any, list[str]]:
    config = transformers.FunnelConfig(
        vocab_size=VOCABULARY,
        block_sizes=[2, 2],
        d_model=HIDDEN,
        n_head=_HEADS,
        d_head=8,
        d_inner=INNER,
        num_labels=3,
        num_decoder_layers=1,
        initializer_std=0.2,
    )
    return "FunnelForSequenceClassification", config, ["q_head", "linear_1"]


def _xlnet() -> tuple[str, Any, list[str]]:
    config = transformers.XLNetConfig(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        n_layer=2,
        n_head=_HEADS,
        d_inner=INNER,
        num_labels=3,
        initializer_range=0.2,
    )
    return "XLNetForSequenceClassification", config, ["layer_1", "layer_2"]


_BUILDERS: dict[str, Callable[[], tuple[str, Any, list[str]]]] = {
    "switch": _switch,
    "nllb-moe": _nllb_moe,
    "fsmt": _fsmt,
    "gemma3n": _gemma3n,
    "gemma4": _gemma4,
    "mllama": _mllama,
    "qwen2-moe": _mixtral,
    "albert": _encoder("Albert", ["query", "value", "ffn", "pooler"], embedding_size=16),
    "longformer": _encoder("Longformer", ["query", "value", "output.dense"], attention_window=4),
    "funnel": _funnel,
    "xlnet": _xlnet,
}
SEQ2SEQ = ("switch", "nllb-moe", "fsmt")
CLASSIFIERS = ("albert", "longformer", "funnel", "xlnet")
