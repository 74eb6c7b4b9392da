"""A head that the base model does not bring is trained whole, by no LoRA, and all of it comes back with stock PEFT."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    set_seed,
)

from lorazor.adapter.quantization import keep_packing_
from lorazor.errors import SelectionError
from lorazor.selection import SelectedSite, Selection
from lorazor.settings import FitSettings, LoraSettings, ModelSettings, TrainSettings
from lorazor.workflow import training as workflow
from lorazor.workflow.train import train_adapter
from tests.data.test_batches import byte_tokenizer
from tests.workflow.test_train_tasks import ASKING, CLASSIFYING

BERT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
T5 = {"vocab_size": 320, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2, "eos_token_id": 2}
T5["decoder_start_token_id"] = 0
BART: dict[str, Any] = {
    "vocab_size": 320,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
XLNET = {"vocab_size": 320, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 16, "pad_token_id": 0}
XLM = {"vocab_size": 320, "emb_dim": 16, "n_layers": 2, "n_heads": 2, "pad_index": 0}
DISTILBERT = {"vocab_size": 320, "dim": 16, "hidden_dim": 16, "n_layers": 2, "n_heads": 2}
SLOW = pytest.mark.slow
CLASSIFY, ASK = "classification", "question answering"
CASES = [
    (CLASSIFY, "distilbert", DISTILBERT, {"pre_classifier", "classifier"}),
    (ASK, "bert", BERT, {"qa_outputs"}),
    pytest.param(CLASSIFY, "bert", BERT, {"classifier"}, marks=SLOW),
    pytest.param(CLASSIFY, "roberta", BERT, {"classifier"}, marks=SLOW),
    pytest.param(CLASSIFY, "deberta-v2", BERT, {"pooler", "classifier"}, marks=SLOW),
    pytest.param(CLASSIFY, "modernbert", BERT, {"head", "classifier"}, marks=SLOW),
    pytest.param(CLASSIFY, "llama", BERT, {"score"}, marks=SLOW),
    pytest.param(CLASSIFY, "bart", BART, {"classification_head"}, marks=SLOW),
    pytest.param(CLASSIFY, "xlnet", XLNET, {"sequence_summary", "logits_proj"}, marks=SLOW),
    pytest.param(CLASSIFY, "xlm", XLM, {"sequence_summary"}, marks=SLOW),
    pytest.param(ASK, "roberta", BERT, {"qa_outputs"}, marks=SLOW),
    pytest.param(ASK, "llama", BERT, {"qa_outputs"}, marks=SLOW),
    pytest.param(ASK, "t5", T5, {"qa_outputs"}, marks=SLOW),
    pytest.param(ASK, "big_bird", BERT | {"attention_type": "original_full"}, {"qa_classifier"}, marks=SLOW),
]
CLASSES = {CLASSIFY: AutoModelForSequenceClassification, ASK: AutoModelForQuestionAnswering}


def without_dropout(model_type: str, sizes: dict[str, Any]) -> Any:
    config = AutoConfig.for_model(model_type, **sizes)
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def settings_of(base: Any, **method: Any) -> TrainSettings:
    return TrainSettings(
        model=ModelSettings(str(base)),
        batch_size=4,
        lora=LoraSettings(rank=2, alpha=4),  # on all linear layers, which is the default
        fit=FitSettings(steps=3, learning_rate=0.05, rise_steps=0),
        **method,
    )


def write_base_and_data(folder: Any, task: str, model_type: str, sizes: dict[str, Any]) -> tuple[Any, Any]:
    set_seed(0)
    base, data = folder / "base", folder / "data.jsonl"
    AutoModel.from_config(without_dropout(model_type, sizes)).save_pretrained(base)
    byte_tokenizer(None, "<bos> $A <eos>").save_pretrained(base)  # BART reads its class off the last token
    data.write_text("".join(json.dumps(row) + "\n" for row in (CLASSIFYING if task == CLASSIFY else ASKING)))
    return base, data


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize(("task", "model_type", "sizes", "head"), CASES)
def test_the_head_is_trained_whole_and_comes_back(tmp_path, monkeypatch, task, model_type, sizes, head, quantization):
    base, data = write_base_and_data(tmp_path, task, model_type, sizes)
    trained: list[PeftModel] = []
    fit = workflow.fit
    monkeypatch.setattr(workflow, "fit", lambda model, *args: trained.append(model) or fit(model, *args))
    model = ModelSettings(str(base), quantization=quantization)
    train_adapter(str(data), out=tmp_path / "run", settings=dataclasses.replace(settings_of(base), model=model))
    options: dict[str, Any] = {"num_labels": 3} if task == CLASSIFY else {}
    if quantization:
        options["quantization_config"] = trained[0].config.quantization_config
    set_seed(1)  # what is not in the adapter's folder is other than it was in the training
    reloaded = PeftModel.from_pretrained(CLASSES[task].from_pretrained(base, **options), tmp_path / "run")
    keep_packing_(reloaded)  # bitsandbytes breaks on layers as narrow as these
    tokens = torch.cat([torch.randint(3, 300, (3, 7)), torch.full((3, 1), 2)], dim=1)
    with torch.no_grad():
        expected, found = (model.eval()(input_ids=tokens) for model in (trained[0], reloaded))
    for name in ("logits", "start_logits", "end_logits"):
        if name in expected:
            torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=0)
    tensors = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert {name.split(".")[2] for name in tensors if "lora_" not in name} == head
    assert not head & {name.split(".")[2] for name in tensors if "lora_" in name}


def test_a_selection_that_names_a_part_of_the_head_is_refused(tmp_path):
    base, data = write_base_and_data(tmp_path, CLASSIFY, "distilbert", DISTILBERT)
    site = SelectedSite("pre_classifier", layer=None, stack=None, kind="pre_classifier", rank=2, keep=True)
    Selection((site,), "by hand", {}).save(tmp_path / "selection.json")
    with pytest.raises(SelectionError, match="'pre_classifier' is in the head, which is trained whole"):
        chosen = settings_of(base, selection=tmp_path / "selection.json")
        train_adapter(str(data), out=tmp_path / "run", settings=chosen)
