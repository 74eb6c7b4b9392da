"""The two-phase run for classifiers, encoder-decoders and question answering: what is trained, and on what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from lorazor.adapter.sites import find_sites
from lorazor.selection import Selection
from lorazor.settings import (
    BudgetSettings,
    ChoosingSettings,
    FitSettings,
    LoraSettings,
    ModelSettings,
    TrainSettings,
)
from lorazor.train.answers import PadRight
from lorazor.workflow.evaluate import evaluate
from lorazor.workflow.train import train_adapter
from tests.data.test_batches import byte_tokenizer

SIZES = {"vocab_size": 320, "pad_token_id": 0, "eos_token_id": 2}
CLASSIFYING = [{"text": "abc"[n % 3] * (3 + n % 2), "label": n % 3} for n in range(12)]
ANSWERING = [{"prompt": f"after {n}", "completion": f"{n + 1}"} for n in range(12)]
ASKING = [
    {"question": "which?" + "?" * (n % 4), "context": f"it is {n}.", "answers": {"text": [str(n)], "answer_start": [6]}}
    for n in range(12)
]


def bert() -> BertModel:
    """An encoder without a head, as sentence transformers come."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertModel(BertConfig(**sizes, **dropout, **SIZES))


def t5() -> T5ForConditionalGeneration:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
    sizes |= {"dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes, **SIZES))


CASES = {
    "classification": (bert, CLASSIFYING, "query,key,value", AutoModelForSequenceClassification, "classifier"),
    "question-answering": (bert, ASKING, "query,key,value", AutoModelForQuestionAnswering, "qa_outputs"),
    "seq2seq": (t5, ANSWERING, "q,v", AutoModelForSeq2SeqLM, None),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", CASES)
def test_a_two_phase_run_of_every_task(tmp_path, task):
    make, rows, targets, kind, head = CASES[task]
    set_seed(0)
    base, data, out = tmp_path / "base", tmp_path / "data.jsonl", tmp_path / "run"
    make().save_pretrained(base)
    tokenizer = byte_tokenizer(None)
    tokenizer.padding_side = "left"  # as many have it; positions of answers must not move
    tokenizer.save_pretrained(base)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = TrainSettings(
        model=ModelSettings(str(base)),
        batch_size=4,
        lora=LoraSettings(rank=2, alpha=4, target_modules=targets),
        fit=FitSettings(steps=30, learning_rate=0.05, rise_steps=2),
        method="weightlora",
        budget=BudgetSettings(keep=3),
        choosing=ChoosingSettings(select_steps=8),
    )
    result = train_adapter(str(data), out=out, settings=settings)
    losses = [entry["loss"] for entry in result.log]
    assert sum(losses[-3:]) < sum(losses[:3])  # it has learned
    options = {"num_labels": 3} if task == "classification" else {}
    model = PeftModel.from_pretrained(kind.from_pretrained(base, **options), out)
    kept = {site.name for site in Selection.load(out / "selection.json").kept}
    assert {site.name for site in find_sites(model)} == kept and len(kept) == 3
    weights = load_file(out / "adapter_model.safetensors")
    heads = {key.split(".")[2] for key in weights if "lora_" not in key}
    assert heads == ({head} if head else set())
    n_head = sum(tensor.numel() for key, tensor in weights.items() if "lora_" not in key)
    assert result.n_parameters == n_head + sum(site.n_parameters for site in find_sites(model))
    (measured,) = evaluate([out], str(data), out=tmp_path / "evaluation").results
    assert measured.value < losses[0]


@pytest.mark.slow
def test_the_head_is_trained_in_both_runs(tmp_path):
    """The warm start takes the head along: a head that began anew would not be what the first run left."""
    set_seed(0)
    base, data = tmp_path / "base", tmp_path / "data.jsonl"
    bert().save_pretrained(base)
    byte_tokenizer(None).save_pretrained(base)
    data.write_text("".join(json.dumps(row) + "\n" for row in CLASSIFYING))

    def head_after(steps: int, folder: Path) -> torch.Tensor:
        settings = TrainSettings(
            model=ModelSettings(str(base)),
            batch_size=4,
            lora=LoraSettings(rank=2, alpha=4, target_modules="query"),
            fit=FitSettings(steps=steps, learning_rate=0.05, rise_steps=0),
            method="weightlora",
            budget=BudgetSettings(keep=1),
            choosing=ChoosingSettings(select_steps=6),
        )
        train_adapter(str(data), out=folder, settings=settings)
        return load_file(folder / "adapter_model.safetensors")["base_model.model.classifier.weight"]

    set_seed(0)
    fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).classifier.weight
    short = head_after(7, tmp_path / "short")
    # one step of 0.05 / 7 moves a weight by less than 0.01; the six before it moved many further
    assert (short - fresh).abs().max() > 0.05


def test_positions_of_answers_survive_padding():
    tokenizer = byte_tokenizer(None)
    tokenizer.padding_side = "left"
    texts = ["yes", "it is so, they say"]
    rows = [{"input_ids": tokenizer(text)["input_ids"], "start_positions": 1} for text in texts]
    batch = PadRight(tokenizer)(rows)
    found = [int(ids[start]) for ids, start in zip(batch["input_ids"], batch["start_positions"], strict=True)]
    assert found == [row["input_ids"][1] for row in rows]
    assert tokenizer.padding_side == "left"  # what is saved with the adapter stays as it was
