"""Tiny random models of every supported family, built from configs: offline, on CPU, a few milliseconds each.

LoRA's B is random instead of zero, so that switching a site off changes the logits by far more than rounding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

VOCABULARY = 64
HIDDEN = 32
INNER = 48
DROPOUT = 0.2
"""Of OPT, BART, T5 and Whisper, so that what measures them with dropout on is seen; the others have none."""
_HEADS = 4

CAUSAL = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3", "gpt2", "opt")
CLASSIFIERS = ("bert", "deberta-v2")
SEQ2SEQ = ("bart", "t5", "whisper")
FAMILIES = CAUSAL + CLASSIFIERS + SEQ2SEQ

_LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_BART_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
_TARGETS = {
    "llama": _LLAMA_TARGETS,
    "mistral": _LLAMA_TARGETS,
    "qwen2": _LLAMA_TARGETS,
    "qwen3": _LLAMA_TARGETS,
    "gemma3": _LLAMA_TARGETS,
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "opt": _BART_TARGETS,
    "bert": ["query", "key", "value", "output.dense", "intermediate.dense"],  # not pooler.dense
    "deberta-v2": ["query_proj", "key_proj", "value_proj", "output.dense", "intermediate.dense"],
    "bart": _BART_TARGETS,
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "whisper": _BART_TARGETS,
}
# The lists of layers of a family, in the order in which they run; the last one is the one a boundary runs through.
STACKS = {
    **dict.fromkeys(CAUSAL, ("model.layers",)),
    "gpt2": ("transformer.h",),
    "opt": ("model.decoder.layers",),
    "bert": ("bert.encoder.layer",),
    "deberta-v2": ("deberta.encoder.layer",),
    "bart": ("model.encoder.layers", "model.decoder.layers"),
    "t5": ("encoder.block", "decoder.block"),
    "whisper": ("model.encoder.layers", "model.decoder.layers"),
}
_TASKS = {
    **dict.fromkeys(CAUSAL, "CAUSAL_LM"),
    **dict.fromkeys(CLASSIFIERS, "SEQ_CLS"),
    **dict.fromkeys(SEQ2SEQ, "SEQ_2_SEQ_LM"),
    "whisper": None,  # PEFT's sequence-to-sequence wrapper insists on input_ids
}


def lora_targets(family: str) -> list[str]:
    """`target_modules` for all linear projections in the layers of a family, and nothing outside them."""
    return list(_TARGETS[family])


def lora_config(family: str, rank: int = 4, **lora_kwargs: Any) -> LoraConfig:
    """LoRA on every projection of the layers, alpha = 2 r; `lora_kwargs` replace any setting."""
    settings = {
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": lora_targets(family),
        "task_type": _TASKS[family],
        "fan_in_fan_out": family == "gpt2",  # its projections are Conv1D
    }
    return LoraConfig(**{**settings, **lora_kwargs})


def tiny_model(family: str, n_layers: int = 3, seed: int = 0) -> PreTrainedModel:
    """A random model of a family, in eval mode: `n_layers` layers per stack, special tokens 0 to 2."""
    model_class, config = _BUILDERS[family](n_layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    return model.eval()


def tiny_peft_model(family: str, n_layers: int = 3, rank: int = 4, *, seed: int = 0, **lora_kwargs: Any) -> PeftModel:
    """`tiny_model` with LoRA on every projection of the layers and a random B; `lora_kwargs` go to LoraConfig."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        model = get_peft_model(tiny_model(family, n_layers, seed), lora_config(family, rank, **lora_kwargs))
    randomise_b_(model, seed=seed + 2)
    return model.eval()  # pyright: ignore[reportReturnType]


def randomise_b_(model: nn.Module, adapter: str = "default", seed: int = 0, size: float = 0.2) -> None:
    """Fill what starts at zero, B or an embedding's A, with normal numbers of standard deviation `size`."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        if adapter in module.lora_B:
            weight = module.lora_B[adapter].weight
        elif adapter in module.lora_embedding_A:
            weight = module.lora_embedding_A[adapter]
        else:
            continue
        with torch.no_grad():
            weight.copy_(size * torch.randn(weight.shape, generator=generator))


def tiny_inputs(family: str, rows: int = 3, tokens: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments for a forward pass: random tokens 3..63, shape (rows, tokens), nothing masked.

    Encoder-decoders get `tokens` decoder tokens as well; Whisper hears (rows, 8 mel bins, 32 frames) instead of tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    if family == "whisper":
        return {"input_features": torch.randn(rows, 8, 32, generator=generator), "decoder_input_ids": token_ids}
    inputs = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}
    if family in SEQ2SEQ:
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    return inputs


def starting_with(token: int) -> Callable[[Tensor], Tensor]:
    """What most decoders read to predict an answer: one token, then the answer; padding is 0."""
    return lambda targets: nn.functional.pad(targets[:, :-1].clamp(min=0), (1, 0), value=token)


def write_adapter_folder(
    path: Path,
    shapes: Mapping[str, tuple[int, int, int]],
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write an adapter folder by hand, with random A and B.

    Args:
        path: the folder, made where missing.
        shapes: (rank, inputs, outputs) of every site by its name in the base model.
        dtype: of all tensors.
        seed: of the random numbers.
        config: settings of adapter_config.json beside r = lora_alpha = the first site's rank.
    Returns:
        `path`.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rank, n_inputs, n_outputs) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, n_inputs, generator=generator).to(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(n_outputs, rank, generator=generator).to(dtype)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    rank = next(iter(shapes.values()))[0]
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(shapes), **config}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path


_SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _llama_like(name: str, **extra: Any) -> Callable[[int], tuple[Any, Any]]:
    """Builder for the families that share Llama's setting names."""

    def build(n_layers: int) -> tuple[Any, Any]:
        config_class = getattr(transformers, f"{name}Config")
        config = config_class(
            **_SPECIAL,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_hidden_layers=n_layers,
            num_attention_heads=_HEADS,
            num_key_value_heads=2,
            max_position_embeddings=64,
            **extra,
        )
        return getattr(transformers, f"{name}ForCausalLM"), config

    return build


def _gemma3(n_layers: int) -> tuple[Any, Any]:
    config = transformers.Gemma3TextConfig(
        **_SPECIAL,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=n_layers,
        num_attention_heads=_HEADS,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        max_position_embeddings=64,
        sliding_window=4,  # shorter than the inputs, so that sliding layers differ from full ones
        layer_types=["full_attention" if layer % 2 else "sliding_attention" for layer in range(n_layers)],
    )
    return transformers.Gemma3ForCausalLM, config


def _gpt2(n_layers: int) -> tuple[Any, Any]:
    config = transformers.GPT2Config(
        **_SPECIAL,
        n_embd=HIDDEN,
        n_inner=INNER,
        n_layer=n_layers,
        n_head=_HEADS,
        n_positions=64,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
    )
    return transformers.GPT2LMHeadModel, config


def _opt(n_layers: int) -> tuple[Any, Any]:
    config = transformers.OPTConfig(
        **_SPECIAL,
        hidden_size=HIDDEN,
        ffn_dim=INNER,
        num_hidden_layers=n_layers,
        num_attention_heads=_HEADS,
        word_embed_proj_dim=HIDDEN,
        max_position_embeddings=64,
        dropout=DROPOUT,
        attention_dropout=DROPOUT,
    )
    return transformers.OPTForCausalLM, config


def _bert_like(name: str, **extra: Any) -> Callable[[int], tuple[Any, Any]]:
    """Builder for the encoders with a classifier on top; three labels."""

    def build(n_layers: int) -> tuple[Any, Any]:
        config = getattr(transformers, f"{name}Config")(
            vocab_size=VOCABULARY,
            pad_token_id=0,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_hidden_layers=n_layers,
            num_attention_heads=_HEADS,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=3,
            initializer_range=0.2,  # with the usual 0.02 pooler and classifier shrink every difference to 1e-3
            **extra,
        )
        return getattr(transformers, f"{name}ForSequenceClassification"), config

    return build


def _bart(n_layers: int) -> tuple[Any, Any]:
    config = transformers.BartConfig(
        **_SPECIAL,
        d_model=HIDDEN,
        encoder_layers=n_layers,
        decoder_layers=n_layers,
        encoder_attention_heads=_HEADS,
        decoder_attention_heads=_HEADS,
        encoder_ffn_dim=INNER,
        decoder_ffn_dim=INNER,
        max_position_embeddings=64,
        dropout=DROPOUT,
        activation_dropout=DROPOUT,
        encoder_layerdrop=DROPOUT,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
    )
    return transformers.BartForConditionalGeneration, config


def _t5(n_layers: int) -> tuple[Any, Any]:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
        d_model=HIDDEN,
        d_kv=8,
        d_ff=INNER,
        num_layers=n_layers,
        num_decoder_layers=n_layers,
        num_heads=_HEADS,
        dropout_rate=DROPOUT,
    )
    return transformers.T5ForConditionalGeneration, config


def _whisper(n_layers: int) -> tuple[Any, Any]:
    config = transformers.WhisperConfig(
        **_SPECIAL,
        d_model=HIDDEN,
        encoder_layers=n_layers,
        decoder_layers=n_layers,
        encoder_attention_heads=_HEADS,
        decoder_attention_heads=_HEADS,
        encoder_ffn_dim=INNER,
        decoder_ffn_dim=INNER,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=64,
        dropout=DROPOUT,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return transformers.WhisperForConditionalGeneration, config


_BUILDERS: dict[str, Callable[[int], tuple[Any, Any]]] = {
    "llama": _llama_like("Llama"),
    "mistral": _llama_like("Mistral", sliding_window=4),
    "qwen2": _llama_like("Qwen2"),
    "qwen3": _llama_like("Qwen3", head_dim=8),
    "phi3": _llama_like("Phi3"),
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "opt": _opt,
    "bert": _bert_like("Bert"),
    "deberta-v2": _bert_like("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8),
    "bart": _bart,
    "t5": _t5,
    "whisper": _whisper,
}
