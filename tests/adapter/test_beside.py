"""Embeddings and tokens that an adapter brings along, and a base model that was saved before there were as many."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, IBertConfig, IBertForMaskedLM

import lorazor
from lorazor.adapter.beside import fit_vocabulary_
from lorazor.adapter.folder import BASE_PREFIX, AdapterFolder, read_adapter
from lorazor.adapter.load import load, swap
from lorazor.adapter.prune import write_pruned
from lorazor.errors import AdapterError, BaseModelError
from lorazor.selection import Selection
from tests.data.test_batches import byte_tokenizer
from tests.tiny_folders import write_rows
from tests.tiny_models import randomise_b_, tiny_model

pytestmark = [  # PEFT, of what it does itself
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]

N_OWN, N_NEW = 288, 3
NEW = list(range(N_OWN, N_OWN + N_NEW))
KINDS = {
    "both saved": (N_NEW, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "saved by PEFT": (N_NEW, {}),
    "one saved": (N_NEW, {"modules_to_save": ["embed_tokens"]}),
    "old tokens": (0, {"trainable_token_indices": [1, 2, 3]}),
    "new tokens": (N_NEW, {"trainable_token_indices": NEW}),
    "new tokens of both": (N_NEW, {"trainable_token_indices": {"embed_tokens": NEW, "lm_head": NEW}}),
    "LoRA on both": (N_NEW, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
}


def resized(base, n_new, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    assert model.get_input_embeddings().weight.shape[0] == N_OWN
    if n_new:
        model.resize_token_embeddings(N_OWN + n_new)
    return model


def write_adapter(tiny, out, kind, **saving):
    n_new, settings = KINDS[kind]
    tokenizer = AutoTokenizer.from_pretrained(tiny.base)
    tokenizer.add_tokens([f"<new{place}>" for place in range(n_new)])
    settings = {"target_modules": ["q_proj", "up_proj"], **settings}
    model = get_peft_model(resized(tiny.base, n_new), LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    model.save_pretrained(out, **saving)
    tokenizer.save_pretrained(out)
    return out


def logits(model, n_tokens=N_OWN):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[5, 2, 7, n_tokens - 1]])).logits


def by_stock(tiny, adapter, kind):
    """On a base that was resized by hand, with other numbers in the new rows."""
    return PeftModel.from_pretrained(resized(tiny.base, KINDS[kind][0], seed=1), adapter)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_stock_peft_makes_of_it(tiny, tmp_path, kind):
    adapter, n_tokens = write_adapter(tiny, tmp_path / "adapter", kind), N_OWN + KINDS[kind][0]
    expected = logits(by_stock(tiny, adapter, kind), n_tokens)
    torch.testing.assert_close(logits(load(adapter).model, n_tokens), expected)
    entries = tuple(site.entry(True) for site in read_adapter(adapter).sites)
    write_pruned(adapter, Selection(entries, "all", {}), tmp_path / "out")
    torch.testing.assert_close(logits(by_stock(tiny, tmp_path / "out", kind), n_tokens), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_with_other_tokens_take_turns(tiny, tmp_path, kind):
    adapter, n_tokens = write_adapter(tiny, tmp_path / "adapter", kind), N_OWN + KINDS[kind][0]
    alone, plain = logits(load(adapter).model, n_tokens), logits(load(tiny.adapter).model)
    loaded = load(adapter)
    for _ in range(2):
        loaded = swap(loaded, read_adapter(tiny.adapter))
        torch.testing.assert_close(logits(loaded.model), plain)
        loaded = swap(loaded, read_adapter(adapter))
        torch.testing.assert_close(logits(loaded.model, n_tokens), alone)


def test_rows_that_no_one_trained_are_refused(tiny, tmp_path):
    adapter = write_adapter(tiny, tmp_path / "adapter", "new tokens", save_embedding_layers=False)
    with pytest.raises(BaseModelError, match=r"with 291 tokens, 3 more .* no rows of 'lm_head' for them"):
        load(adapter)


@pytest.mark.parametrize("kind", ["both saved", "new tokens"])
def test_shrunk_and_healed(tiny, tmp_path, kind):
    adapter = write_adapter(tiny, tmp_path / "adapter", kind)
    heal = write_rows(tmp_path / "heal.jsonl", range(30, 36))
    result = lorazor.shrink(
        adapter, tiny.validation, out=tmp_path / "run", heal=str(heal), heal_steps=2, params_fraction=0.5,
        reading=lorazor.DataSettings(batch_size=2),
    )  # fmt: skip
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, result.pruned.path))
    beside = {key for key in before if "lora_" not in key}
    assert beside and all(torch.equal(before[key], after[key]) for key in beside)
    n_tokens = N_OWN + N_NEW
    torch.testing.assert_close(logits(load(result.pruned.path).model, n_tokens),
                               logits(by_stock(tiny, result.pruned.path, kind), n_tokens))  # fmt: skip


@pytest.mark.parametrize(("kind", "copies"), [("both saved", 3), ("saved by PEFT", 1), ("one saved", None)])
def test_inspect_says_what_it_takes(tiny, tmp_path, kind, copies):
    adapter = write_adapter(tiny, tmp_path / "adapter", kind)
    found = lorazor.inspect(adapter)
    one = 4 * (N_OWN + N_NEW) * 32
    expected = {"lm_head": one * (copies or 1), "model.embed_tokens": one * (copies or 3)}
    assert found.n_bytes_beside == expected
    assert found.n_bytes == pytest.approx(sum(expected.values()) + 4 * found.n_parameters, rel=0.05)
    assert lorazor.inspect(tiny.adapter).n_bytes_beside == {}


@pytest.mark.parametrize("kind", ["both saved", "saved by PEFT", "old tokens", "new tokens"])
def test_adapters_with_other_tokens_are_evaluated_together(tiny, tmp_path, kind):
    adapter = write_adapter(tiny, tmp_path / "adapter", kind)
    reading = lorazor.DataSettings(batch_size=3)
    both = lorazor.evaluate([adapter, tiny.adapter], tiny.validation, base=True, reading=reading)
    for place, one in enumerate((adapter, tiny.adapter)):
        alone = lorazor.evaluate([one], tiny.validation, reading=reading)
        assert both.results[place].value == pytest.approx(alone.results[0].value, abs=1e-6)


def tied(tiny, out):
    model = AutoModelForCausalLM.from_pretrained(tiny.base, tie_word_embeddings=True)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(tiny.base).save_pretrained(out)
    return dataclasses.replace(tiny, base=out)


def test_tied_embeddings_are_tied_again(tiny, tmp_path):
    on_tied = tied(tiny, tmp_path / "base")
    first = write_adapter(on_tied, tmp_path / "first", "one saved")
    second = write_adapter(on_tied, tmp_path / "second", "saved by PEFT")
    expected = logits(load(second).model, N_OWN + N_NEW)
    swapped = swap(load(first), read_adapter(second)).model
    assert swapped.get_output_embeddings().weight is swapped.get_input_embeddings().weight
    torch.testing.assert_close(logits(swapped, N_OWN + N_NEW), expected)
    torch.testing.assert_close(expected, logits(by_stock(on_tied, second, "saved by PEFT"), N_OWN + N_NEW))
    lone = write_adapter(on_tied, tmp_path / "lone", "one saved", save_embedding_layers=False)
    with pytest.raises(
        BaseModelError, match="drawn at random"
    ):  # those of the output layer, which stays tied to others
        load(lone)


def test_a_list_of_tokens_is_of_the_embedding_whatever_it_is_called(tmp_path):
    base, adapter, ids = tmp_path / "base", tmp_path / "adapter", torch.tensor([[5, 6, 66]])
    tiny_model("gpt2").save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(67)
    config = LoraConfig(
        r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM", trainable_token_indices=[64, 65, 66]
    )
    model = get_peft_model(model, config).eval()
    randomise_b_(model)
    model.save_pretrained(adapter, save_embedding_layers=False)
    with torch.no_grad():
        torch.testing.assert_close(load(adapter).model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("tokens", [[[1]], ["a"], {"embed_tokens": [-1]}, {"embed_tokens": None}])
def test_tokens_that_are_none_are_refused(tiny, tmp_path, tokens):
    adapter = tmp_path / "adapter"
    shutil.copytree(tiny.adapter, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"trainable_token_indices": tokens}))
    with pytest.raises(AdapterError, match="must list numbers of tokens"):
        load(adapter)


def test_lora_on_the_output_layer_is_scored_in_batches(tiny, tmp_path):
    """Its gates are those of rows, so that the answers of a row have to stay together on their way through it."""
    config = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny.base), config)
    randomise_b_(model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    AutoTokenizer.from_pretrained(tiny.base).save_pretrained(tmp_path / "adapter")
    said: list[str] = []
    lorazor.shrink(
        tmp_path / "adapter", tiny.validation, out=tmp_path / "run", score="credit", params_fraction=0.5,
        reading=lorazor.DataSettings(batch_size=3), say=said.append,
    )  # fmt: skip
    assert said and not [line for line in said if "taken apart" in line]


def test_tokens_without_rows_are_refused(tiny, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(tiny.adapter, adapter)
    tokenizer = AutoTokenizer.from_pretrained(tiny.base)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(adapter)
    for go in (lambda: load(adapter), lambda: swap(load(tiny.adapter), read_adapter(adapter))):
        with pytest.raises(BaseModelError, match="has 289 tokens, but the embedding has 288 rows"):
            go()
    base = tmp_path / "base"  # whose own tokenizer has one more, as Gemma 3's
    AutoModelForCausalLM.from_pretrained(tiny.base).save_pretrained(base)
    tokenizer.save_pretrained(base)
    assert load(adapter, lorazor.ModelSettings(model=str(base))).sites


def test_an_adapter_without_a_tokenizer_gets_that_of_the_base(tiny, tmp_path):
    first, second = write_adapter(tiny, tmp_path / "first", "both saved"), tmp_path / "second"
    shutil.copytree(tiny.adapter, second)
    for file in second.iterdir():
        if not file.name.startswith("adapter_"):
            file.unlink()
    loaded = load(first)
    assert loaded.tokenizer("<new0>")["input_ids"][0] == N_OWN
    swapped = swap(loaded, read_adapter(second))
    expected = AutoTokenizer.from_pretrained(tiny.base)("<new0>")["input_ids"]
    assert swapped.tokenizer("<new0>")["input_ids"] == expected
    assert swap(swapped, read_adapter(second)).tokenizer is swapped.tokenizer


def test_a_model_that_cannot_have_more_tokens_is_named():
    """I-BERT: transformers' own method raises NotImplementedError, whatever it is given."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = IBertForMaskedLM(IBertConfig(vocab_size=64, **sizes))
    with pytest.raises(NotImplementedError):
        model.resize_token_embeddings(65)
    names = ("ibert.embeddings.word_embeddings", "lm_head.decoder")
    shapes = {f"{BASE_PREFIX}{name}.weight": (65, 32) for name in names}
    folder = AdapterFolder(Path("adapter"), {}, (), Path("adapter.safetensors"), shapes, {})
    with pytest.raises(BaseModelError, match="1 more than the base model has, and transformers cannot give a IBertFor"):
        fit_vocabulary_(model, folder, 64)
