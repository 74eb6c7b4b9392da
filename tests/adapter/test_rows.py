"""Whole embeddings stored as the rows that changed, in stock PEFT, bit for bit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM

import lorazor
from lorazor.adapter.load import load
from lorazor.errors import BaseModelError, SettingsError, UnsupportedAdapterError
from tests.data.test_batches import byte_tokenizer
from tests.tiny_models import VOCABULARY, tiny_model

pytestmark = [  # PEFT, of what it does itself
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]
CHANGED, N_TOKENS = [3, 17, 40], VOCABULARY
BOTH = {"modules_to_save": ["embed_tokens", "lm_head"]}


def save_base(folder, family="llama", tied=False, sharded=False):
    model = tiny_model(family, 1)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    elif family != "llama":
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder, max_shard_size="20KB" if sharded else "5GB")
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_adapter(base, out, change, n_new=0, **settings):
    """`change` gets the tables of embedding and output layer, as they are trained."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_pretrained(base)
    if n_new:
        model.resize_token_embeddings(N_TOKENS + n_new, mean_resizing=False)
    settings = {"r": 2, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], **settings}
    model = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
        base_model = model.get_base_model()
        change(*map(trained, (base_model.get_input_embeddings(), base_model.get_output_embeddings())))
    model.save_pretrained(out, save_embedding_layers=settings.get("modules_to_save") is None)
    return out


def trained(module):
    """The copy that PEFT trains, or the module itself."""
    return module.modules_to_save["default"] if hasattr(module, "modules_to_save") else module


def rows_of_both(first, last):
    first.weight[CHANGED] += 1.0
    if last.weight is not first.weight:
        last.weight[CHANGED[:2]] -= 0.5


def rows_of_first(first, last):
    first.weight[CHANGED] += 1.0


def equal_rows(first, last):
    first.weight[CHANGED] += 1.0
    last.weight.copy_(first.weight)


def stock(base, adapter, n_new=0, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if n_new:
        torch.manual_seed(99)
        model.resize_token_embeddings(N_TOKENS + n_new, mean_resizing=False)
    model = PeftModel.from_pretrained(model, adapter).eval()
    ids = torch.tensor([[3, 5, 17, 40, 41, N_TOKENS + n_new - 1]])
    with torch.no_grad():
        return model(input_ids=ids).logits


EXACT = {
    "both": ("llama", False, rows_of_both, 0, BOTH),
    "embedding alone": ("llama", False, rows_of_first, 0,
                        {"modules_to_save": ["embed_tokens"]}),
    "nothing changed": ("llama", False, lambda first, last: None, 0, BOTH),
    "new tokens": ("llama", False, rows_of_both, 3, BOTH),
    "saved by PEFT": ("llama", False, rows_of_both, 0, {}),
    "tied, saved by PEFT": ("llama", True, rows_of_both, 2, {}),
    "tied, two equal copies": ("llama", True, equal_rows, 0, BOTH),
    "scaled and tied": ("gemma3", True, equal_rows, 0, BOTH),
    "other names": ("gpt2", False, rows_of_both, 0, {"target_modules": ["c_attn"], "fan_in_fan_out": True,
                                                     "modules_to_save": ["wte", "lm_head"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", EXACT)
def test_stock_peft_computes_the_same_of_the_rows(tmp_path, case):
    family, tied, change, n_new, settings = EXACT[case]
    base = save_base(tmp_path / "base", family, tied)
    adapter = save_adapter(base, tmp_path / "adapter", change, n_new, **settings)
    result = lorazor.prune(adapter, out=tmp_path / "out", changed_rows_only=True)
    assert result.n_sites_kept == result.n_sites
    for dtype in (torch.float32, torch.bfloat16):
        expected = stock(base, adapter, n_new, dtype)
        assert torch.equal(stock(base, result.path, n_new, dtype), expected)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, result.path))
    whole = [key for key in after if "lora_" not in key and "trainable_tokens_delta" not in key]
    assert whole == [] and any("lora_" not in key for key in before)
    config = json.loads((result.path / "adapter_config.json").read_text())
    n_rows = sum(len(tokens) for tokens in (config["trainable_token_indices"] or {}).values())
    assert n_rows == sum(len(one) for key, one in after.items() if "lora_" not in key) <= 2 * (len(CHANGED) + n_new)
    saved = sum(one.nbytes for one in before.values()) - sum(one.nbytes for one in after.values())
    assert lorazor.inspect(adapter).n_bytes_unchanged == saved > 0
    with torch.no_grad():
        ids = torch.tensor([[3, 5, 17, 40, 41, N_TOKENS + n_new - 1]])
        torch.testing.assert_close(load(result.path).model(input_ids=ids).logits, stock(base, result.path, n_new))


def test_shards_of_the_base_and_a_boundary(tmp_path):
    base = save_base(tmp_path / "base", sharded=True)
    assert not (base / "model.safetensors").exists()
    adapter = save_adapter(
        base,
        tmp_path / "adapter",
        rows_of_both,
        **BOTH,
    )
    out = lorazor.prune(adapter, out=tmp_path / "out", boundary=1, changed_rows_only=True).path
    assert torch.equal(stock(base, out), stock(base, adapter))


def only_last(first, last):
    last.weight[CHANGED] += 1.0


def bigger(first, last):
    first.weight += 1.0
    last.weight -= 1.0


INEXACT = {
    "a tied head saved apart": (True, rows_of_both, BOTH, "ties model.embed_tokens and lm_head, and"),
    "a tied embedding saved alone": (True, rows_of_both, {"modules_to_save": ["embed_tokens"]}, "changes them apart"),
    "a tied head saved alone": (True, only_last, {"modules_to_save": ["lm_head"]}, "changes them apart"),
    "every row": (False, bigger, BOTH, "every row of its embeddings differs"),
    "no embedding": (False, lambda first, last: None, {"modules_to_save": ["norm"]}, "stores no whole embedding"),
    "rows already": (False, lambda first, last: None,
                     {"modules_to_save": ["lm_head"], "trainable_token_indices": [1]}, "some rows alone already"),
}  # fmt: skip


@pytest.mark.parametrize("case", INEXACT)
def test_what_is_not_exact_is_refused(tmp_path, case):
    tied, change, settings, message = INEXACT[case]
    base = save_base(tmp_path / "base", tied=tied)
    adapter = save_adapter(base, tmp_path / "adapter", change, **settings)
    with pytest.raises(UnsupportedAdapterError, match=message):
        lorazor.prune(adapter, out=tmp_path / "out", changed_rows_only=True)
    assert not (tmp_path / "out").exists() and lorazor.inspect(adapter).n_bytes_unchanged is None


def test_lora_on_the_embedding_as_well_is_refused(tmp_path):
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", lambda first, last: None,
                           target_modules=["q_proj", "embed_tokens"])  # fmt: skip
    with pytest.raises(UnsupportedAdapterError, match="has LoRA on model.embed_tokens as well"):
        lorazor.prune(adapter, out=tmp_path / "out", changed_rows_only=True)


def test_settings_and_bases_that_do_not_go_with_it(tmp_path):
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", rows_of_both, **BOTH)
    with pytest.raises(SettingsError, match="--model belongs to --changed-rows-only"):
        lorazor.prune(adapter, out=tmp_path / "out", boundary=1, model=str(base))
    with pytest.raises(SettingsError, match="Pass one of --selection"):
        lorazor.prune(adapter, out=tmp_path / "out")
    bare = tmp_path / "bare"
    shutil.copytree(base, bare)
    (bare / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match=r"have no 'model.embed_tokens.weight' in safetensors"):
        lorazor.prune(adapter, out=tmp_path / "out", changed_rows_only=True, model=str(bare))
    wider = tmp_path / "wider"
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(80)
    model.save_pretrained(wider)
    with pytest.raises(UnsupportedAdapterError, match=r"is \(64, 32\), that of the base model \(80, 32\)"):
        lorazor.prune(adapter, out=tmp_path / "out", changed_rows_only=True, model=str(wider))
    assert not (tmp_path / "out").exists()


def test_an_output_layer_with_a_bias_is_refused(tmp_path):
    """PEFT's layer of rows leaves the bias out."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = tmp_path / "base"
    PhiForCausalLM(PhiConfig(vocab_size=N_TOKENS, pad_token_id=0, **sizes)).save_pretrained(base)
    adapter = save_adapter(base, tmp_path / "adapter", rows_of_both, modules_to_save=["lm_head"])
    with pytest.raises(UnsupportedAdapterError, match="lm_head is more than a table of rows"):
        lorazor.prune(adapter, out=tmp_path / "out", changed_rows_only=True)
