"""Classifiers of every kind of head, against stock transformers and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, set_seed

from lorazor.adapter.load import load
from lorazor.data.batches import Batch
from lorazor.data.examples import Example
from lorazor.errors import BaseModelError, DataError
from lorazor.measure.engines import naive_losses, on_model, one_pass_losses
from lorazor.measure.measured import for_head
from lorazor.settings import LoraSettings, ModelSettings
from lorazor.train.start import Start
from tests.data.test_batches import byte_tokenizer
from tests.tiny_models import randomise_b_

N_CLASSES = 3
SIZES: dict[str, Any] = {"vocab_size": 320, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
DISTILBERT = {"dim": 16, "hidden_dim": 16, "n_layers": 2, "n_heads": 2}
XLM = {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "pad_index": 0, "bos_index": 1, "eos_index": 2}
BART = {
    **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2},
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
GEMMA = {**BERT, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 320, "pad_token_id": 0}
LLAMA = {**BERT, "num_key_value_heads": 2, "pad_token_id": None}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "pad_token_id": None}
# family: sizes, modules to adapt, modules of the head beside those that PEFT saves for every classifier
FAMILIES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "distilbert": (DISTILBERT, ["q_lin", "v_lin"], []),
    "bert": (BERT, ["query", "value"], []),
    "deberta-v2": (BERT, ["query_proj", "value_proj"], ["pooler"]),
    "bart": (BART, ["q_proj", "v_proj"], ["classification_head"]),
    "xlnet": (
        {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 16},
        ["layer_1"],
        ["logits_proj", "sequence_summary"],
    ),
    "xlm": (XLM, ["q_lin", "v_lin"], ["sequence_summary"]),
    "flaubert": (XLM, ["q_lin", "v_lin"], ["sequence_summary"]),
    "funnel": ({"block_sizes": [1, 1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 16}, ["v_head"], []),
    "mt5": (T5, ["q", "v"], ["classification_head"]),
    "umt5": (T5, ["q", "v"], ["classification_head"]),
    "t5gemma": ({"encoder": GEMMA, "decoder": {**GEMMA, "cross_attention_hidden_size": 16}}, ["q_proj"], []),
    "llama": (LLAMA, ["q_proj", "v_proj"], []),
    "gpt2": (GPT2, ["c_attn"], []),
    "qwen2": (LLAMA, ["q_proj", "v_proj"], []),
}
FAST = ("distilbert", "bart", "xlnet", "llama")
EACH_FAMILY = [family if family in FAST else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]


def tokens(rows: list[list[int]]) -> dict[str, Tensor]:
    """Rows padded on the right as lorazor pads them."""
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }


def save_base(folder: Path, family: str, headless: bool = True, **settings: Any) -> Path:
    """A base model without a trained head, or a classifier, with its tokenizer."""
    set_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family][0], **settings})
    model: Any = AutoModelForSequenceClassification.from_config(config)
    if headless:
        model = getattr(model, model.base_model_prefix)
    model.save_pretrained(folder)
    byte_tokenizer(None).save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, family: str, **options: Any) -> PreTrainedModel:
    """An adapter with a head that is not the base's, written by stock PEFT; returns the live model."""
    _, targets, head = FAMILIES[family]
    options = {"num_labels": N_CLASSES, **options}
    model = AutoModelForSequenceClassification.from_pretrained(base, ignore_mismatched_sizes=True, **options)
    config = LoraConfig(
        r=2,
        lora_alpha=8,
        target_modules=targets,
        task_type="SEQ_CLS",
        modules_to_save=head,
        fan_in_fan_out=family == "gpt2",  # its projections are Conv1D
    )
    peft_model = get_peft_model(model.float(), config)
    randomise_b_(peft_model)
    for name, parameter in peft_model.named_parameters():
        if "modules_to_save" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    peft_model.save_pretrained(folder)
    return model.eval()


@pytest.mark.filterwarnings("ignore:.*newly initialized")
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_the_head_of_every_family_is_read(family, tmp_path):
    base = save_base(tmp_path / "base", family)
    model = save_adapter(tmp_path / "adapter", base, family)
    inputs = tokens([[5, 6, 7, 2]])
    with torch.no_grad():
        expected = model(**inputs).logits
        loaded = load(tmp_path / "adapter")
        found = loaded.model(**inputs).logits
    assert expected.shape == (1, N_CLASSES) and expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", ["llama", *(pytest.param(one, marks=pytest.mark.slow) for one in ("gpt2", "qwen2"))])
@pytest.mark.parametrize("pad_token", [None, 7])  # of the config; the tokenizer pads with 0
def test_decoders_without_a_pad_token_read_the_last_token_of_each_row(family, pad_token, tmp_path):
    base = save_base(tmp_path / "base", family, pad_token_id=pad_token)
    model = save_adapter(tmp_path / "adapter", base, family)
    model.config.pad_token_id = None  # then it takes the last token, and allows a single row only
    rows = [[5, 6, 7], [8, 9, 7, 11, 12], [13]]
    with torch.no_grad():
        alone = torch.cat([model(**tokens([row])).logits for row in rows])
        together = load(tmp_path / "adapter").model(**tokens(rows)).logits
    torch.testing.assert_close(together, alone)


def test_a_head_of_the_base_serves_an_adapter_without_one(tmp_path):
    base = save_base(tmp_path / "base", "bart", headless=False, num_labels=4)
    model = AutoModelForSequenceClassification.from_pretrained(base)
    peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS"))
    randomise_b_(peft_model)
    peft_model.save_pretrained(tmp_path / "adapter")
    inputs = tokens([[5, 6, 7, 2]])
    with torch.no_grad():
        found = load(tmp_path / "adapter").model(**inputs).logits
        torch.testing.assert_close(found, model.eval()(**inputs).logits)
    assert found.shape == (1, 4)


def test_a_head_of_another_size_than_that_of_the_base_is_the_adapters(tmp_path):
    base = save_base(tmp_path / "base", "distilbert", headless=False, num_labels=5)
    model = save_adapter(tmp_path / "adapter", base, "distilbert")
    inputs = tokens([[5, 6, 7, 2]])
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "adapter").model(**inputs).logits, model(**inputs).logits)


def test_a_head_that_no_one_trained_is_refused(tmp_path):
    """Stock PEFT draws another head at every load, and says so in a warning only."""
    base = save_base(tmp_path / "base", "bart")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS")).save_pretrained(tmp_path / "none")
    with pytest.raises(
        BaseModelError, match=r"Neither .*base.* nor .*none.* has .*classification_head.*modules_to_save"
    ):
        load(tmp_path / "none")


def labelled(*labels: int) -> list[Example]:
    return [Example(index, "abc", "", (), label) for index, label in enumerate(labels)]


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_outside_the_head_is_named(label, tmp_path):
    base = save_base(tmp_path / "base", "bert")
    save_adapter(tmp_path / "adapter", base, "bert")
    loaded = load(tmp_path / "adapter")
    for_head(loaded, labelled(0, 2, 1))
    with pytest.raises(DataError, match=rf"Example 1 has the label {label}, but .* 3 classes, 0\.\.2"):
        for_head(loaded, labelled(0, label))


def test_several_labels_at_once_are_refused(tmp_path):
    settings = {"num_labels": 3, "problem_type": "multi_label_classification"}
    base = save_base(tmp_path / "base", "bert", headless=False, **settings)
    save_adapter(tmp_path / "adapter", base, "bert", **settings)
    with pytest.raises(BaseModelError, match="one class of two or more"):
        load(tmp_path / "adapter")
    with pytest.raises(BaseModelError, match="one class of two or more"):
        load(None, ModelSettings(str(base)))


def test_a_head_with_one_output_is_for_numbers(tmp_path):
    base = save_base(tmp_path / "base", "bert", headless=False, num_labels=1)
    save_adapter(tmp_path / "adapter", base, "bert", num_labels=1)
    for loaded in (load(tmp_path / "adapter"), load(None, ModelSettings(str(base)))):
        assert loaded.n_classes == 1 and loaded.model.config.problem_type == "regression"
        for_head(loaded, [Example(0, "abc", "", (), 2.5)])
        with pytest.raises(DataError, match="label 0, a class, but the head of .* has one output"):
            for_head(loaded, labelled(0, 0))


def test_a_base_that_classifies_already_keeps_its_head_in_training(tmp_path):
    base = save_base(tmp_path / "base", "bert", headless=False, num_labels=4)
    own = transformers.BertForSequenceClassification.from_pretrained(base).classifier.weight
    head: Any = load(None, ModelSettings(str(base)), "classification", 2).model.classifier
    assert torch.equal(head.weight, own)
    head = load(None, ModelSettings(str(base)), "classification", 6).model.classifier
    assert head.weight.shape[0] == 6


def test_the_decoder_of_a_classifier_has_boundaries(tmp_path):
    base = save_base(tmp_path / "base", "bart")
    model = save_adapter(tmp_path / "adapter", base, "bart")
    loaded = load(tmp_path / "adapter")
    batch, stack = Batch((0,), tokens([[5, 6, 7, 2]]), torch.tensor([1])), "model.decoder.layers"
    ready = on_model(loaded.model, batch, stack)
    found = [measure(loaded.model, loaded.sites, ready, stack, [0, 1]) for measure in (naive_losses, one_pass_losses)]
    for boundary in (1, 0):
        for name, parameter in model.named_parameters():
            if boundary == 0 and "decoder.layers" in name and "lora_B" in name:
                parameter.data.zero_()
        with torch.no_grad():
            expected = -model(**batch.inputs).logits.log_softmax(-1)[0, 1].item()
        assert [float(one[boundary].nll_nats) for one in found] == pytest.approx([expected] * 2, abs=1e-4)


@pytest.mark.filterwarnings("ignore:.*newly initialized")
@pytest.mark.parametrize("family", ["bart", pytest.param("deberta-v2", marks=pytest.mark.slow)])
def test_a_head_that_training_starts_is_trained_and_saved(family, tmp_path):
    """PEFT saves heads of two names only: what BART calls its head, and DeBERTa's pooler, would be others each time."""
    base = save_base(tmp_path / "base", family)
    start = Start(ModelSettings(str(base)), LoraSettings(target_modules=FAMILIES[family][1][0]), 0, labelled(0, 2))
    loaded, model = start.on_all()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    model.save_pretrained(tmp_path / "adapter")
    inputs = tokens([[5, 6, 7, 2]])
    set_seed(1)
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "adapter").model(**inputs).logits, loaded.model(**inputs).logits)
