"""Copies of what the suites name: tiny random models of the same classes, and rows in the schemas of the hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel, set_seed

from lorazor.bench.suite import Task
from tests.data.test_batches import byte_tokenizer
from tests.workflow.test_pairs import pair_tokenizer

HIDDEN = 16
_SPECIAL = {"vocab_size": 320, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LAYERS = {"hidden_size": HIDDEN, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_ENCODER = {**_SPECIAL, **_LAYERS, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_STACKS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
_V3 = {
    "relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "pos_att_type": "p2c|c2p", "type_vocab_size": 0, "position_biased_input": False, "max_relative_positions": -1,
}  # fmt: skip  # of deberta-v3-base


def make_model(name: str) -> PreTrainedModel:
    """A tiny random model of the class that a suite's model has on the hub."""
    kinds: dict[str, tuple[str, str, dict[str, Any]]] = {
        "deberta-v3": ("DebertaV2Model", "DebertaV2Config", {**_ENCODER, **_V3}),
        "bertfor": ("BertModel", "BertConfig", _ENCODER),
        "minilm": ("BertModel", "BertConfig", _ENCODER),
        "bart": (
            "BartModel",  # as the hub has bart-large
            "BartConfig",
            {**_SPECIAL, **_STACKS, "d_model": HIDDEN, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
             "decoder_start_token_id": 2, "max_position_embeddings": 1024},
        ),
        "llama": ("LlamaForCausalLM", "LlamaConfig", {**_SPECIAL, **_LAYERS, "num_key_value_heads": 1}),
        "smollm": ("LlamaForCausalLM", "LlamaConfig", {**_SPECIAL, **_LAYERS, "num_key_value_heads": 1}),
        "qwen": ("Qwen2ForCausalLM", "Qwen2Config", {**_SPECIAL, **_LAYERS, "num_key_value_heads": 1}),
        "phi": ("Phi3ForCausalLM", "Phi3Config", {**_SPECIAL, **_LAYERS, "num_key_value_heads": 2}),
    }  # fmt: skip
    kind, config, sizes = next(one for part, one in kinds.items() if part in name.lower())
    set_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**sizes))


_PAIRS: dict[str, Callable[[int], dict[str, Any]]] = {
    "cola": lambda n: {"sentence": f"text {n}", "label": n % 2, "idx": n},
    "sst2": lambda n: {"sentence": f"text {n}", "label": n % 2, "idx": n},
    "mrpc": lambda n: {"sentence1": f"text {n}", "sentence2": "b", "label": n % 2, "idx": n},
    "qqp": lambda n: {"question1": f"text {n}", "question2": "b", "label": n % 2, "idx": n},
    "stsb": lambda n: {"sentence1": f"text {n}", "sentence2": "b", "label": n % 6 + 0.5, "idx": n},
    "mnli": lambda n: {"premise": f"text {n}", "hypothesis": "b", "label": n % 3, "idx": n},
    "qnli": lambda n: {"question": f"text {n}", "sentence": "b", "label": n % 2, "idx": n},
    "rte": lambda n: {"sentence1": f"text {n}", "sentence2": "b", "label": n % 2, "idx": n},
}
_OTHERS: dict[str, Callable[[int], dict[str, Any]]] = {
    "rajpurkar/squad": lambda n: _question(n, [f"{n}"], [6]),
    "rajpurkar/squad_v2": lambda n: _question(n, *([[f"{n}"], [6]] if n % 2 else [[], []])),
    "EdinburghNLP/xsum": lambda n: {"document": f"text {n}", "summary": f"sum {n}", "id": str(n)},
    "abisee/cnn_dailymail:3.0.0": lambda n: {"article": f"text {n}", "highlights": f"a {n}\nb", "id": str(n)},
    "knkarthick/samsum": lambda n: {"id": str(n), "dialogue": f"A: {n}", "summary": f"sum {n}"},
    "GEM/e2e_nlg": lambda n: {"meaning_representation": f"name[{n}]", "target": f"is {n}", "references": [f"is {n}"]},
    "GEM/dart": lambda n: {"tripleset": [["a", "b", str(n)]], "target": f"is {n}", "references": [f"is {n}"]},
    "GEM/web_nlg:en": lambda n: {"input": [f"a | b | {n}"], "target": f"is {n}", "references": [f"is {n}", "is"]},
    "openai/gsm8k:main": lambda n: {"question": f"what is {n}?", "answer": f"it is\n#### {n}"},
}


def _question(n: int, texts: list[str], starts: list[int]) -> dict[str, Any]:
    answers = {"text": texts, "answer_start": starts}
    return {"id": str(n), "title": "t", "context": f"it is {n}.", "question": f"which {n}?", "answers": answers}


def make_copies(root: Path, tasks: list[Task], n_rows: int = 24) -> Path:
    """A folder for `--copies` with the models and the splits that some tasks name; no two splits share a prompt."""
    for task in tasks:
        place = root / task.model
        if not place.exists():
            tokenizer = pair_tokenizer() if "bert" in task.model.lower() else byte_tokenizer(None)
            tokenizer.model_max_length = 128
            tokenizer.save_pretrained(place)
            make_model(task.model).save_pretrained(place)
        row = _PAIRS[task.data.partition(":")[2]] if "glue" in task.data else _OTHERS[task.data]
        for number, split in enumerate(dict.fromkeys((task.train, task.validation, task.test))):
            file = root / task.data.replace(":", "/") / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            first = 1000 * (1 + number)
            file.write_text("".join(json.dumps(row(first + n)) + "\n" for n in range(n_rows)))
    return root
