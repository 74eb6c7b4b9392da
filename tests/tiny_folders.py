"""A tiny base model, an adapter and data sets on disk, as a user has them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from tests.data.test_batches import byte_tokenizer
from tests.tiny_models import randomise_b_

N_LAYERS = 4


@dataclass(frozen=True)
class TinyFolders:
    """Where things are."""

    base: Path
    adapter: Path
    validation: Path
    held_out: Path


def make_folders(root: Path, **lora_kwargs: Any) -> TinyFolders:
    """Save a random four-layer Llama, a LoRA on it whose B is not zero, and two small data sets."""
    tokenizer = byte_tokenizer()
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=N_LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    base, adapter = root / "base", root / "adapter"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora_kwargs}
    peft_model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(**settings))
    randomise_b_(peft_model)
    peft_model.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    return TinyFolders(
        base, adapter, write_rows(root / "val.jsonl", range(6)), write_rows(root / "test.jsonl", range(10, 16))
    )


def write_rows(path: Path, numbers: range) -> Path:
    """Write one prompt-completion row per number."""
    rows = [{"prompt": f"after {n} comes:", "completion": f" {n + 1}, then {n + 2}"} for n in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
