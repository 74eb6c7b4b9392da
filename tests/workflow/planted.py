"""Adapters of which it is known what in them is useful, on disk, with answers that they make likely."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Planted:
    """Where things are: an adapter, and examples on which it gains."""

    adapter: Path
    data: str
    held_out: str


def change(adapter: Path, to: Path, edit: Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Path:
    """A copy of an adapter in which A and B of every site are `edit(site, A, B)`."""
    shutil.copytree(adapter, to)
    tensors = load_file(to / WEIGHTS)
    for key in [key for key in tensors if key.endswith("lora_A.weight")]:
        other = key.replace("lora_A", "lora_B")
        site = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        tensors[key], tensors[other] = (one.contiguous() for one in edit(site, tensors[key], tensors[other]))
    save_file(tensors, to / WEIGHTS, metadata={"format": "pt"})
    return to


def answers_of(base: Path, adapter: Path, prompts: list[str], is_seq2seq: bool = False) -> list[str]:
    """Six letters each, every one that which the adapter, in stock PEFT, makes likelier by most: on them it gains."""
    kind: Any = AutoModelForSeq2SeqLM if is_seq2seq else AutoModelForCausalLM
    model: Any = PeftModel.from_pretrained(kind.from_pretrained(base), adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    letters = {letter: tokenizer(letter)["input_ids"][0] for letter in "abcdefghijklmnopqrstuvwxyz"}
    answers = []
    for prompt in prompts:
        answer, source = "", tokenizer(prompt)["input_ids"]
        for _ in range(6):
            given = [letters[letter] for letter in answer]
            inputs = {"input_ids": torch.tensor([source if is_seq2seq else source + given])}
            if is_seq2seq:
                inputs["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id, *given]])
            with torch.no_grad(), model.disable_adapter():
                without = model(**inputs).logits[0, -1].log_softmax(-1)
            with torch.no_grad():
                gains = model(**inputs).logits[0, -1].log_softmax(-1) - without
            answer += max(letters, key=lambda letter: float(gains[letters[letter]]))
        answers.append(answer)
    return answers


def write_pairs(path: Path, prompts: list[str], answers: list[str]) -> str:
    pairs = zip(prompts, answers, strict=True)
    path.write_text("".join(json.dumps({"prompt": p, "completion": a}) + "\n" for p, a in pairs), encoding="utf-8")
    return str(path)


def plant(base: Path, adapter: Path, root: Path, is_seq2seq: bool = False) -> Planted:
    """Examples whose answers are those of the adapter."""
    sets = [[f"after {number} comes" for number in numbers] for numbers in (range(8), range(20, 28))]
    files = [
        write_pairs(root / name, prompts, answers_of(base, adapter, prompts, is_seq2seq))
        for name, prompts in zip(("val.jsonl", "test.jsonl"), sets, strict=True)
    ]
    return Planted(adapter, *files)
