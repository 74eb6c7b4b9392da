"""Classifiers and encoder-decoders take the same road as causal models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from lorazor.cli.boundary import print_result
from lorazor.errors import SettingsError
from lorazor.settings import BoundarySettings, DataSettings, GenerationSettings, PruneSettings
from lorazor.workflow.boundary import find_boundary
from lorazor.workflow.evaluate import evaluate
from lorazor.workflow.prune import prune
from tests.data.test_batches import byte_tokenizer
from tests.tiny_models import randomise_b_

SIZES = {"vocab_size": 320, "pad_token_id": 0, "eos_token_id": 2}


def save(root: Path, model: Any, rows: list[dict[str, Any]], **lora: Any) -> tuple[Path, Path]:
    """A base model with tokenizer, an adapter on it, and a data file."""
    byte_tokenizer(None).save_pretrained(root / "base")
    model.save_pretrained(root / "base")
    reloaded = type(model).from_pretrained(root / "base")
    peft_model = get_peft_model(reloaded, LoraConfig(r=2, lora_alpha=8, **lora))
    randomise_b_(peft_model)
    peft_model.save_pretrained(root / "adapter")
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / "adapter", root / "data.jsonl"


@pytest.fixture
def classifier(tmp_path) -> tuple[Path, Path]:
    set_seed(0)
    config = BertConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, num_labels=3, **SIZES
    )
    rows = [{"text": f"number {n}", "label": n % 3} for n in range(7)]
    return save(
        tmp_path, BertForSequenceClassification(config), rows, target_modules=["query", "value"], task_type="SEQ_CLS"
    )


def test_a_classifier_keeps_its_head_and_is_chosen_by_accuracy(classifier, tmp_path):
    adapter, data = classifier
    settings = BoundarySettings(select_by="accuracy", rule="manual", boundary=1)
    result = find_boundary(adapter, str(data), out=tmp_path / "run", settings=settings)
    assert result.choice.metric == "accuracy" and 0 <= result.choice.chosen.value <= 1
    small = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3),
        tmp_path / "run" / "adapter",
    ).eval()
    tokens = byte_tokenizer(None)("number 4", return_tensors="pt")
    with torch.no_grad():
        nll = -small(input_ids=tokens["input_ids"]).logits.log_softmax(-1)[0, 1].item()
    rows = [json.loads(line) for line in (tmp_path / "run" / "losses.jsonl").read_text().splitlines()]
    measured = next(row["nll_nats"] for row in rows if row["example"] == 4 and row["adapter"] == "boundary 1")
    assert measured == pytest.approx(nll, abs=1e-4)


def test_boundary_zero_of_a_classifier_says_what_becomes_of_the_trained_head(classifier, tmp_path, capsys):
    """What it names is what was measured: stock PEFT's `unload()` keeps the head, the base model alone has another."""
    adapter, data = classifier
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.classifier.bias"] += torch.tensor([0.0, 3.0, 1.0])  # the base's own head is another
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = BoundarySettings(select_by="accuracy", rule="manual", boundary=0)
    result = find_boundary(adapter, str(data), out=tmp_path / "run", settings=settings)
    print_result(result)
    printed = capsys.readouterr().out
    assert "the base model with the adapter's own classifier, which no adapter without LoRA can carry" in printed
    assert f"PeftModel.from_pretrained(base_model, {str(adapter)!r}).unload()" in printed
    with pytest.raises(SettingsError, match="the adapter's own classifier.*unload"):
        prune(adapter, out=tmp_path / "none", settings=PruneSettings(boundary=0))

    def base() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)

    tokens = byte_tokenizer(None)("number 4", return_tensors="pt")["input_ids"]
    with_adapter: Any = PeftModel.from_pretrained(base(), adapter)
    with torch.no_grad():
        alone, with_head = (
            -model.eval()(input_ids=tokens).logits.log_softmax(-1)[0, 1].item()
            for model in (base(), with_adapter.unload())
        )
    rows = [json.loads(line) for line in (tmp_path / "run" / "losses.jsonl").read_text().splitlines()]
    measured = next(row["nll_nats"] for row in rows if row["example"] == 4 and row["adapter"] == "boundary 0")
    assert measured == pytest.approx(with_head, abs=1e-4) and abs(measured - alone) > 0.1


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_an_encoder_decoder_has_a_boundary_per_stack(tmp_path, stack):
    set_seed(0)
    config = T5Config(
        d_model=16, d_kv=8, d_ff=16, num_layers=3, num_decoder_layers=3, num_heads=2, decoder_start_token_id=0, **SIZES
    )
    rows = [{"prompt": f"after {n}", "completion": f"{n + 1}"} for n in range(4)]
    adapter, data = save(
        tmp_path, T5ForConditionalGeneration(config), rows, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"
    )
    settings = BoundarySettings(
        stack=stack,
        select_by="chrf",
        rule="manual",
        boundary=1,
        generation=GenerationSettings(max_new_tokens=4, shortlist=2),
        reading=DataSettings(batch_size=3),
    )
    result = find_boundary(adapter, str(data), out=tmp_path / "run", settings=settings)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert any("engine one-pass" in note for note in run["notes"])
    assert result.pruned is not None
    # encoder: q, v per layer; decoder: those and cross-attention's
    assert result.pruned.n_sites_kept == (1 * 2 + 3 * 4 if stack == "encoder" else 3 * 2 + 1 * 4)
    (evaluated,) = evaluate([tmp_path / "run" / "adapter"], str(data), out=tmp_path / "evaluation").results
    rows = [json.loads(line) for line in (tmp_path / "run" / "losses.jsonl").read_text().splitlines()]
    at_one = [row for row in rows if row["adapter"] == "boundary 1"]
    loss = sum(row["nll_nats"] for row in at_one) / sum(row["n_tokens"] for row in at_one)
    assert evaluated.value == pytest.approx(loss, abs=1e-4)
