"""Base models in 4 and 8 bits compute what stock PEFT and bitsandbytes compute; it is said where forms differ."""

from __future__ import annotations

import json
import shutil
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import lorazor
from lorazor.adapter.fingerprint import base_fingerprint
from lorazor.adapter.folder import read_adapter
from lorazor.adapter.gates import silenced
from lorazor.adapter.live import twin_of
from lorazor.adapter.load import load
from lorazor.adapter.quantization import form_of, keep_packing_, other_form
from lorazor.adapter.tasks import AUTO_CLASSES
from lorazor.data.batches import make_batches
from lorazor.data.examples import read_examples
from lorazor.errors import BaseModelError, SettingsError
from lorazor.measure.gradients import gram_matrices
from lorazor.measure.losses import row_losses
from lorazor.settings import ModelSettings
from tests.data.test_batches import byte_tokenizer
from tests.tiny_folders import write_rows
from tests.tiny_models import FAMILIES, tiny_inputs, tiny_model, tiny_peft_model

FORMS = ("nf4", "fp4", "int8")
TEXT = "after 3 comes: 4, then 5"


def stock_base(folder, form):
    kind = {"load_in_8bit": True} if form == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": form}
    config = BitsAndBytesConfig(**kind, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_use_double_quant=form != "int8")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    keep_packing_(model)  # bitsandbytes breaks on layers as narrow as these where it packs anew
    return model.eval()


def logits(model, folder):
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]])
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture(scope="module")
def quantised(tiny, tmp_path_factory):
    """The base model as a folder that is in nf4 already."""
    folder = tmp_path_factory.mktemp("forms") / "base-bnb-4bit"
    stock_base(tiny.base, "nf4").save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny.base).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_computes_what_stock_peft_computes(tiny, form):
    loaded = load(tiny.adapter, ModelSettings(quantization=form))
    assert form_of(loaded.model.config) == form
    base = logits(stock_base(tiny.base, form), tiny.base)
    full = logits(PeftModel.from_pretrained(stock_base(tiny.base, form), tiny.adapter), tiny.base)
    torch.testing.assert_close(logits(loaded.model, tiny.base), full)
    assert (base - full).abs().max() > 0.1
    with silenced(loaded.sites):
        torch.testing.assert_close(logits(loaded.model, tiny.base), base)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["nf4", "int8"])
@pytest.mark.parametrize("family", [one for one in FAMILIES if one != "whisper"])
def test_every_family(tmp_path, family, form):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_model(family).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    tiny_peft_model(family).save_pretrained(adapter)
    loaded = load(adapter, ModelSettings(str(base), quantization=form))
    kind: Any = AUTO_CLASSES[loaded.task]
    stock = kind.from_pretrained(base, quantization_config=loaded.model.config.quantization_config, dtype=torch.float32)
    keep_packing_(stock)
    full = PeftModel.from_pretrained(stock, adapter).eval()
    inputs = tiny_inputs(family)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(**inputs).logits, full(**inputs).logits)
    assert any(type(site.module).__module__ == "peft.tuners.lora.bnb" for site in loaded.sites)


def test_a_folder_that_is_quantised_already(tiny, quantised):
    expected = logits(PeftModel.from_pretrained(stock_base(tiny.base, "nf4"), tiny.adapter), tiny.base)
    for form in (None, "nf4"):
        loaded = load(tiny.adapter, ModelSettings(str(quantised), quantization=form))
        assert form_of(loaded.model.config) == "nf4"
        torch.testing.assert_close(logits(loaded.model, tiny.base), expected)
    with pytest.raises(BaseModelError, match=r"stored in nf4, so it cannot be loaded in int8"):
        load(tiny.adapter, ModelSettings(str(quantised), quantization="int8"))


def test_gradients_pass_after_a_pass_without(tiny):
    """On processors with bfloat16 units bitsandbytes repacks weights in the first, and gradients end there."""
    loaded = load(tiny.adapter, ModelSettings(quantization="nf4"))
    plain = load(tiny.adapter)
    own = dict(plain.model.named_modules())
    for name, module in loaded.model.named_modules():
        if type(module).__name__ == "Linear4bit" and name.endswith("base_layer"):
            weight = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
            own[name].weight.data.copy_(weight)
    examples = read_examples(tiny.validation)
    grams = []
    for one in (loaded, plain):
        batches = list(make_batches(examples, one.tokenizer, "causal", 4).batches)
        losses = torch.cat([row_losses(one.model, batch).nll_nats for batch in batches])
        grams.append((losses, gram_matrices(one.model, one.sites, batches)))
    torch.testing.assert_close(grams[0][0], grams[1][0], rtol=1e-5, atol=1e-5)
    for name, pair in grams[1][1].items():
        for here, there in zip(grams[0][1][name], pair, strict=True):
            assert there.abs().max() > 0
            torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_a_twin_shares_the_weights_and_the_fingerprint(tiny, form):
    model = load(tiny.adapter, ModelSettings(quantization=form)).peft_model
    before, expected = base_fingerprint(model), logits(model, tiny.base)
    twin = twin_of(model)
    torch.testing.assert_close(logits(twin, tiny.base), expected)
    assert base_fingerprint(twin) == base_fingerprint(model) == before
    for (name, mine), (_, other) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert (mine.data_ptr() == other.data_ptr()) == ("lora_" not in name)
    for name, module in model.named_modules():
        if form != "int8" and name.endswith("base_layer"):
            assert twin.get_submodule(name).weight.quant_state is module.weight.quant_state


def test_forms_have_fingerprints_of_their_own(tiny):
    forms = {form: base_fingerprint(load(tiny.adapter, ModelSettings(quantization=form)).model) for form in FORMS}
    model = load(tiny.adapter, ModelSettings(quantization="nf4")).model
    assert base_fingerprint(model) == forms["nf4"]
    assert len({*forms.values(), base_fingerprint(load(tiny.adapter).model)}) == 4
    model.model.layers[0].mlp.up_proj.weight.quant_state.absmax.add_(3)  # the same codes, but other weights
    assert base_fingerprint(model) != forms["nf4"]


def card(folder, *lines):
    (folder / "README.md").write_text("\n".join(["---", "library_name: peft", "---", "", *lines, ""]))


@pytest.mark.parametrize(
    ("lines", "name", "on_full", "on_nf4"),
    [
        ([], None, None, "nothing beside"),
        (["- load_in_4bit: True", "- bnb_4bit_quant_type: nf4"], None, "pass --quantization nf4", None),
        (["- load_in_8bit: True", "- load_in_4bit: False"], None, "pass --quantization int8", "--quantization int8"),
        (["- quant_method: gptq", "- bits: 4"], None, "trained on a base model in gptq", "in gptq"),
        ([], "someone/llama-bnb-4bit", "trained on a base model in 4-bit", None),
        (["- load_in_8bit: false", "- load_in_4bit: true", "- bnb_4bit_quant_type: fp4"], None, "fp4", "fp4"),
        ([], "the full one", None, "nothing beside"),
        ([], "the quantised one", "pass --quantization nf4", None),
    ],
)
def test_a_word_where_forms_differ(tiny, quantised, tmp_path, lines, name, on_full, on_nf4):
    folder = tmp_path / "adapter"
    shutil.copytree(tiny.adapter, folder)
    card(folder, *lines)
    config = json.loads((folder / "adapter_config.json").read_text())
    named = {"the full one": str(tiny.base), "the quantised one": str(quantised), None: "someone/llama"}
    config["base_model_name_or_path"] = named.get(name, name)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for base, expected in ((tiny.base, on_full), (quantised, on_nf4)):
        warning = load(folder, ModelSettings(str(base))).warning
        assert (expected is None) == (warning is None)
        assert expected is None or expected in warning


def test_trained_shrunk_healed_and_said(tiny, tmp_path):
    said: list[str] = []
    trained = tmp_path / "trained"
    lorazor.train_adapter(tiny.validation, out=trained, model=ModelSettings(str(tiny.base), quantization="nf4"),
                  fit=lorazor.FitSettings(steps=3, learning_rate=0.05), batch_size=2)  # fmt: skip
    assert other_form(read_adapter(trained), stock_base(tiny.base, "nf4").config) is None
    run, heal = tmp_path / "run", write_rows(tmp_path / "heal.jsonl", range(30, 36))
    result = lorazor.shrink(
        trained, tiny.validation, out=run, heal=str(heal), heal_steps=2, params_fraction=0.5,
        reading=lorazor.DataSettings(batch_size=2), model=ModelSettings(quantization="nf4"), say=said.append,
    )  # fmt: skip
    assert not [line for line in said if "form" in line or "trained on a base" in line]
    smaller = read_adapter(result.pruned.path)
    assert "pass --quantization nf4" in (
        other_form(smaller, AutoModelForCausalLM.from_pretrained(tiny.base).config) or ""
    )
    stock = PeftModel.from_pretrained(stock_base(tiny.base, "nf4"), result.pruned.path)
    mine = load(result.pruned.path, ModelSettings(quantization="nf4"))
    torch.testing.assert_close(logits(mine.model, tiny.base), logits(stock, tiny.base))
    lorazor.evaluate([result.pruned.path], tiny.held_out, out=tmp_path / "eval", say=said.append)
    assert "pass --quantization nf4" in said[-1] or any("pass --quantization nf4" in line for line in said)


def test_refusals(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "strange"
    shutil.copytree(tiny.base, folder)
    config = json.loads((folder / "config.json").read_text())
    for method, said in (("strange", "quantised by 'strange'"), ("gptq", "requires optimum")):
        settings = {"quant_method": method, "bits": 4, "group_size": 32}
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
        with pytest.raises(BaseModelError, match=said):
            load(tiny.adapter, ModelSettings(str(folder)))
    with pytest.raises(SettingsError, match=r"GGUF"):
        ModelSettings(quantization="nf4", gguf_file="a.gguf")
    monkeypatch.setattr("lorazor.settings.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"pip install 'lorazor\[quantized\]'"):
        ModelSettings(quantization="nf4")


def test_a_named_adapter_in_memory(tiny):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(stock_base(tiny.base, "nf4"), config, adapter_name="mine")
    assert len(lorazor.inspect(model).sites) == 4
    plain = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    assert len(lorazor.inspect(plain).sites) == 1
