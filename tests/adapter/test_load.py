"""Adapters that load as stock PEFT loads them, or not at all; and what a model is for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import lorazor
from lorazor.adapter.folder import read_adapter
from lorazor.adapter.load import load, swap
from lorazor.adapter.prune import select_boundary, write_pruned
from lorazor.adapter.sites import choose_stack
from lorazor.adapter.tasks import task_of_adapter, task_of_base
from lorazor.errors import AdapterError, BaseModelError, LorazorError, UnsupportedAdapterError
from lorazor.settings import EvalSettings, ModelSettings
from tests.adapter.test_classifiers import save_adapter, save_base
from tests.architectures.checks import StockFails, check_that_stock_reloads
from tests.architectures.subjects import make_subject, tiny_examples, tiny_tokenizer
from tests.architectures.tiny_configs import tiny_model as image_text_model
from tests.tiny_folders import TinyFolders, make_folders
from tests.tiny_models import randomise_b_, tiny_model, tiny_peft_model

PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> TinyFolders:
    return make_folders(tmp_path_factory.mktemp("folders"))


def copied(
    folders: TinyFolders,
    target: Path,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda tensors: tensors,
    **config: Any,
) -> Path:
    """The adapter with other tensors, or other settings in its config."""
    shutil.copytree(folders.adapter, target)
    weights, settings = target / "adapter_model.safetensors", target / "adapter_config.json"
    save_file(change(load_file(weights)), weights)
    settings.write_text(json.dumps(json.loads(settings.read_text()) | config))
    return target


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7]])).logits


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_keys_that_peft_does_not_know_are_refused(folders, tmp_path):
    """Stock PEFT warns, loads none of them, and computes the base model."""
    bare = copied(folders, tmp_path / "bare", lambda tensors: {k.removeprefix(PREFIX): v for k, v in tensors.items()})
    base = AutoModelForCausalLM.from_pretrained(folders.base)
    expected = logits(base)
    assert torch.equal(logits(PeftModel.from_pretrained(base, bare)), expected)
    with pytest.raises(AdapterError, match=r"56 of 56 tensors, such as 'model\.layers.*base_model\.model\..*save_peft"):
        read_adapter(bare)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("targets", [["q_proj"], r".*"], ids=["too few", "too many"])
def test_weights_and_target_modules_must_be_of_the_same_modules(targets, folders, tmp_path):
    """Stock PEFT drops the weights of modules that are not named, and starts named ones without weights at zero."""
    if targets == ".*":
        odd = copied(folders, tmp_path / "odd", lambda tensors: {k: v for k, v in tensors.items() if "q_proj" in k})
        what = r"24 modules, such as .*down_proj', have an entry but no weights .* name the 4 modules with weights"
    else:
        odd = copied(folders, tmp_path / "odd", target_modules=targets)
        what = r"24 modules, such as .*down_proj', have weights but no entry .* name the 28 modules with weights"
    with pytest.raises(AdapterError, match=what):
        load(odd)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_weights_whose_names_peft_takes_for_others_are_refused(tmp_path):
    """Stock PEFT renames Laguna's shared experts in the file that it wrote itself, and starts them at zero."""
    subject = make_subject("causal", "laguna", tmp_path)
    with pytest.raises(StockFails, match="it loads another adapter"):
        check_that_stock_reloads(subject)
    with pytest.raises(AdapterError, match=r"does not load the weights of 6 modules .*, such as .*shared_experts"):
        load(subject.adapter_folder, ModelSettings(model=str(subject.base_folder)))


def test_a_base_model_of_another_task_is_named_so(folders, tmp_path):
    base = save_base(tmp_path / "base", "bert")
    with pytest.raises(BaseModelError, match=r"no form that AutoModelForSeq2SeqLM loads: .*--task") as caught:
        load(None, ModelSettings(model=str(base)), task="seq2seq")
    assert len(str(caught.value)) < 300


def test_a_head_that_the_model_has_no_place_for_is_refused(folders, tmp_path):
    odd = copied(folders, tmp_path / "odd", lambda tensors: tensors | {f"{PREFIX}score.weight": torch.ones(3, 32)})
    with pytest.raises(
        BaseModelError, match=r"1 trained weights .* 'score\.weight', are not in LlamaForCausalLM.*--task"
    ):
        load(odd)


MASKED, TAGGER, CAUSAL = "BertForMaskedLM", "BertForTokenClassification", "LlamaForCausalLM"
CLASSIFIER, ANSWERER = "LlamaForSequenceClassification", "XLMForQuestionAnsweringSimple"


def config_of(architecture: str | None, is_encoder_decoder: bool = False) -> Any:
    architectures = None if architecture is None else [architecture]
    return AutoConfig.for_model("bert", architectures=architectures, is_encoder_decoder=is_encoder_decoder)


@pytest.mark.parametrize(
    ("task_type", "architecture", "expected"),
    [
        ("CAUSAL_LM", CAUSAL, "causal"),
        (None, CAUSAL, "causal"),
        (None, None, "causal"),
        (None, CLASSIFIER, "classification"),
        ("CAUSAL_LM", CLASSIFIER, "classification"),  # the two disagree: the base decides
        ("QUESTION_ANS", CLASSIFIER, "classification"),
        ("SEQ_CLS", CAUSAL, "classification"),  # a head on what heads are put on
        ("SEQ_CLS", MASKED, "classification"),
        ("QUESTION_ANS", "BertModel", "question-answering"),
        (None, ANSWERER, "question-answering"),
        ("SEQ_CLS", "T5ForConditionalGeneration", "classification"),
        ("CAUSAL_LM", "T5ForConditionalGeneration", "seq2seq"),
        ("SEQ_2_SEQ_LM", CAUSAL, "causal"),
        (None, "BartForSequenceClassification", "classification"),
    ],
)
def test_the_task_is_told_from_base_and_adapter(task_type, architecture, expected):
    config = config_of(architecture, is_encoder_decoder=str(architecture).startswith(("T5", "Bart")))
    assert task_of_adapter({"task_type": task_type}, config) == expected


@pytest.mark.parametrize(
    ("task_type", "architecture", "message"),
    [
        ("TOKEN_CLS", TAGGER, "task_type='TOKEN_CLS'; lorazor measures CAUSAL_LM, .*--task"),
        ("TOKEN_CLS", CAUSAL, "task_type='TOKEN_CLS'"),
        ("FEATURE_EXTRACTION", "BertModel", "task_type='FEATURE_EXTRACTION'"),
        ("TOMORROW", CAUSAL, "task_type='TOMORROW'"),
        (None, TAGGER, "BertForTokenClassification, which is for none of lorazor's tasks.*--task"),
        ("CAUSAL_LM", TAGGER, "BertForTokenClassification"),
        (None, MASKED, "BertForMaskedLM"),
    ],
)
def test_other_tasks_are_refused(task_type, architecture, message):
    with pytest.raises(LorazorError, match=message):
        task_of_adapter({"task_type": task_type}, config_of(architecture))


def test_a_tagging_base_is_for_no_task():
    with pytest.raises(BaseModelError, match="BertForTokenClassification"):
        task_of_base(config_of(TAGGER))


def test_a_tagging_adapter_is_refused_and_the_settings_overrule(folders, tmp_path):
    odd = copied(folders, tmp_path / "odd", task_type="TOKEN_CLS")
    with pytest.raises(UnsupportedAdapterError, match="TOKEN_CLS"):
        load(odd)
    loaded = load(odd, ModelSettings(task="causal"))
    assert loaded.task == "causal"
    assert torch.equal(logits(loaded.model), logits(load(folders.adapter).model))


@pytest.mark.parametrize("declared", ["CAUSAL_LM", "SEQ_2_SEQ_LM", None])
def test_the_base_decides_where_the_adapter_says_something_else(declared, tmp_path):
    base = save_base(tmp_path / "base", "bert", headless=False, num_labels=3)
    model = save_adapter(tmp_path / "adapter", base, "bert")
    settings = tmp_path / "adapter/adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"task_type": declared}))
    loaded = load(tmp_path / "adapter")
    assert loaded.task == "classification"
    assert torch.equal(logits(loaded.model), logits(model))


@pytest.mark.parametrize("place", ["beside", "here"])
def test_a_relative_base_is_found(place, folders, tmp_path, monkeypatch):
    """As PEFT writes `base_model_name_or_path` when a model was loaded by a relative path."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copytree(folders.base, tmp_path / ("models/base" if place == "beside" else "here/models/base"))
    named = "../models/base" if place == "beside" else "./models/base"
    adapter = copied(folders, tmp_path / "adapter", base_model_name_or_path=named)
    assert torch.equal(logits(load(adapter).model), logits(load(folders.adapter).model))
    write_pruned(adapter, select_boundary(read_adapter(adapter).sites, 4), tmp_path / "elsewhere/deep/pruned")
    os.chdir(tmp_path / "here")
    assert torch.equal(logits(load(tmp_path / "elsewhere/deep/pruned").model), logits(load(folders.adapter).model))


@pytest.mark.parametrize("named", ["./nowhere", "../no/where", "/no/where/at/all"])
def test_a_base_folder_that_does_not_exist_is_named(named, folders, tmp_path):
    adapter = copied(folders, tmp_path / "adapter", base_model_name_or_path=named)
    with pytest.raises(BaseModelError, match=rf"There is no folder '{named}' that the adapter .* names\. .*--model"):
        load(adapter)
    with pytest.raises(BaseModelError, match=rf"There is no folder '{named}'\. .*--model"):
        load(folders.adapter, ModelSettings(named))


def stock_logits(folders: TinyFolders, adapter: Path) -> Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders.base), adapter).eval())


def other_adapter(folders: TinyFolders, path: Path, **settings: Any) -> Path:
    """An adapter on the same base model, written by stock PEFT, with all that it trains at random."""
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **settings})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folders.base), config)
    randomise_b_(model, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    model.save_pretrained(path)
    return path


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize(
    "settings",
    [{}, {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens", "norm"]}, {"use_rslora": True}],
    ids=lambda settings: "+".join(settings) or "plain",
)
def test_adapters_take_turns_on_one_base_model(settings, folders, tmp_path):
    """Stock PEFT leaves the head that an adapter trained on the model when the adapter goes."""
    other = other_adapter(folders, tmp_path / "other", **settings)
    expected = {path: stock_logits(folders, path) for path in (folders.adapter, other)}
    assert (expected[other] - expected[folders.adapter]).abs().max() > 1e-2
    loaded = load(folders.adapter)
    base = loaded.model
    for path in (other, folders.adapter, other):
        loaded = swap(loaded, read_adapter(path))
        assert loaded.model is base
        torch.testing.assert_close(logits(loaded.model), expected[path])
        assert {site.name for site in loaded.sites} == {site.name for site in read_adapter(path).sites}
        assert not any(parameter.requires_grad for parameter in base.parameters())


def test_heads_of_classifiers_take_turns(tmp_path):
    base = save_base(tmp_path / "base", "bert", headless=False, num_labels=3)
    models = {name: save_adapter(tmp_path / name, base, "bert") for name in ("one", "two")}
    with torch.no_grad():
        for name, parameter in models["two"].named_parameters():
            if "modules_to_save" in name:
                parameter.neg_()
    tensors = load_file(tmp_path / "two/adapter_model.safetensors")
    save_file(
        {key: -one if "classifier" in key else one for key, one in tensors.items()},
        tmp_path / "two/adapter_model.safetensors",
    )
    loaded = load(tmp_path / "one")
    for name in ("two", "one"):
        loaded = swap(loaded, read_adapter(tmp_path / name))
        torch.testing.assert_close(logits(loaded.model), logits(models[name]))
    assert (logits(models["one"]) - logits(models["two"])).abs().max() > 1e-2


@pytest.mark.parametrize("names_are_of", ["the whole", "the text model"])
@pytest.mark.parametrize("family", ["qwen3_5", "mllama"])
def test_adapters_of_models_that_look_at_images(tmp_path, family, names_are_of):
    """The base is saved whole; adapters name modules as in the model that they were trained on."""
    base = tmp_path / "base"
    image_text_model("image-text", family).save_pretrained(base)
    kind = AutoModelForImageTextToText if names_are_of == "the whole" else AutoModelForCausalLM
    targets = r".*(language_model|^model)\.layers.*(q_proj|down_proj)"
    model = get_peft_model(kind.from_pretrained(base), LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    randomise_b_(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    for folder in (base, tmp_path / "adapter"):
        tiny_tokenizer("causal").save_pretrained(folder)
    loaded, ids = load(tmp_path / "adapter", ModelSettings(str(base))), torch.tensor([[5, 6, 7, 8]])
    assert isinstance(loaded.model, type(model.get_base_model()))
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert choose_stack(loaded.sites).endswith("layers")
    if family == "mllama":  # the tokenizer class of the other is not that of this tokenizer
        settings = EvalSettings(base=True, model=ModelSettings(str(base)))
        assert len(lorazor.evaluate([tmp_path / "adapter"], tiny_examples("causal"), settings=settings).results) == 2


@pytest.mark.slow
def test_adapters_of_the_whole_and_of_its_text_model_are_evaluated_together(tmp_path):
    base, tokenizer = tmp_path / "base", tiny_tokenizer("causal")
    image_text_model("image-text", "mllama").save_pretrained(base)
    tokenizer.save_pretrained(base)
    adapters = [tmp_path / "whole", tmp_path / "text"]
    for seed, (kind, stack) in enumerate(
        [(AutoModelForImageTextToText, "model.language_model"), (AutoModelForCausalLM, "model")]
    ):
        config = LoraConfig(r=2, target_modules=rf"{stack}\.layers.*(q_proj|v_proj)", task_type="CAUSAL_LM")
        model = get_peft_model(kind.from_pretrained(base), config)
        randomise_b_(model, seed=seed)
        model.save_pretrained(adapters[seed])
        tokenizer.save_pretrained(adapters[seed])
    examples = tiny_examples("causal")
    alone = {one: lorazor.evaluate([one], examples).results[0].value for one in adapters}
    assert abs(alone[adapters[0]] - alone[adapters[1]]) > 1e-3
    for order in (adapters, adapters[::-1]):
        found = lorazor.evaluate(order, examples, base=True).results
        assert [one.value for one in found[:2]] == pytest.approx([alone[one] for one in order], abs=1e-6)


def test_a_model_that_hears_is_named_so(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_model("whisper").save_pretrained(base)
    tiny_peft_model("whisper").save_pretrained(adapter)
    with pytest.raises(BaseModelError, match="is a whisper, which turns speech into text") as caught:
        load(adapter, ModelSettings(str(base)))
    assert "shrink without --data" in str(caught.value)
    result = lorazor.shrink(adapter, out=tmp_path / "run", max_rank=2)
    assert max(site.rank for site in read_adapter(result.pruned.path).sites) == 2
