"""AdaLoRA files, read and written as the plain LoRA that they are, against stock PEFT's AdaLoRA."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import lorazor
from lorazor.adapter.folder import load_tensors, read_adapter
from lorazor.adapter.load import attach
from lorazor.adapter.prune import write_pruned
from lorazor.adapter.sites import find_sites
from lorazor.errors import AdapterError, UnsupportedAdapterError
from tests.adapter.test_prune import PREFIX, logits, selection_of
from tests.tiny_models import tiny_model

pytestmark = [  # PEFT, of its own masks, and of the rank 0 that it leaves to sites
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'.* invalid shape"),
]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def adalora(family="llama", masks=True, **settings):
    """A random AdaLoRA; with masks as its training leaves them: other ranks everywhere, none at one site."""
    torch.manual_seed(3)
    settings = {"init_r": 6, "target_r": 3, "lora_alpha": 8, "total_step": 10, "target_modules": TARGETS, **settings}
    model = get_peft_model(tiny_model(family, 2), AdaLoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.5)
    scales = {name.removeprefix(PREFIX): one for name, one in model.named_parameters() if "lora_E" in name}
    if masks:
        pattern = {name: [(place + row) % 3 != 0 for row in range(6)] for place, name in enumerate(scales)}
        pattern[next(iter(scales))] = [False] * 6
        with torch.no_grad():
            for name, mask in pattern.items():
                scales[name][~torch.tensor(mask)] = 0  # as PEFT masks them
        model.peft_config["default"].rank_pattern = pattern
    return model.eval()


@pytest.mark.parametrize(
    ("family", "masks", "settings"),
    [
        ("llama", False, {}),
        ("llama", True, {}),
        ("llama", True, {"lora_alpha": 0}),
        ("llama", True, {"use_rslora": True, "alpha_pattern": {"q_proj": 3}}),  # which PEFT does not read
        ("llama", False, {"layers_to_transform": [1], "modules_to_save": ["lm_head"]}),
        ("gpt2", True, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    ],
)
def test_it_is_what_stock_peft_makes_of_it(tmp_path, family, masks, settings):
    adalora(family, masks, **settings).save_pretrained(tmp_path / "full", save_embedding_layers=False)
    stock = PeftModel.from_pretrained(tiny_model(family, 2), tmp_path / "full").eval()
    expected = logits(stock, family)
    assert (expected - logits(tiny_model(family, 2), family)).abs().max() > 0.1
    folder = read_adapter(tmp_path / "full")
    live = attach(tiny_model(family, 2), folder)
    torch.testing.assert_close(logits(live, family), expected, rtol=0, atol=1e-5)
    assert [(site.name, site.rank) for site in find_sites(live)] == [(site.name, site.rank) for site in folder.sites]
    assert len(folder.sites) == sum("lora_E" in name for name, one in stock.named_parameters() if len(one))
    write_pruned(tmp_path / "full", selection_of(tmp_path / "full", lambda name: True), tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and "init_r" not in config
    again = PeftModel.from_pretrained(tiny_model(family, 2), tmp_path / "out").eval()
    torch.testing.assert_close(logits(again, family), expected, rtol=0, atol=1e-5)


def test_some_sites_and_directions_stay(tmp_path):
    model = adalora()
    model.save_pretrained(tmp_path / "full")
    dropped = {"model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"}
    write_pruned(tmp_path / "full", selection_of(tmp_path / "full", lambda name: name not in dropped), tmp_path / "out")
    stock = PeftModel.from_pretrained(tiny_model("llama", 2), tmp_path / "full").eval()
    for name in dropped:
        stock.get_submodule(PREFIX + name).enable_adapters(False)
    pruned = PeftModel.from_pretrained(tiny_model("llama", 2), tmp_path / "out").eval()
    torch.testing.assert_close(logits(pruned), logits(stock), rtol=0, atol=1e-5)
    result = lorazor.shrink(tmp_path / "full", out=tmp_path / "run", max_rank=2)
    kept = {site.name: site.rank for site in read_adapter(result.pruned.path).sites}
    ranks = {site.name: min(2, site.rank) for site in read_adapter(tmp_path / "full").sites}
    assert kept == ranks
    for name, rank in kept.items():  # the best of that rank, Eckart & Young
        module = stock.get_submodule(PREFIX + name)
        values = torch.linalg.svdvals(module.get_delta_weight("default"))
        live = PeftModel.from_pretrained(tiny_model("llama", 2), result.pruned.path).get_submodule(PREFIX + name)
        lost = module.get_delta_weight("default") - live.get_delta_weight("default")
        torch.testing.assert_close(lost.norm(), values[rank:].norm(), rtol=1e-4, atol=1e-5)


def test_half_precision_is_not_rounded_again(tmp_path):
    adalora().to(torch.bfloat16).save_pretrained(tmp_path)
    stored, loaded = load_file(tmp_path / "adapter_model.safetensors"), load_tensors(read_adapter(tmp_path))
    key = f"{PREFIX}model.layers.1.self_attn.v_proj"
    assert stored[f"{key}.lora_A"].dtype == torch.bfloat16
    exact = stored[f"{key}.lora_A"].double() * stored[f"{key}.lora_E"].double()
    assert torch.equal(loaded[f"{key}.lora_A.weight"].double(), exact)


def test_a_pickled_one_wrapped_while_it_was_trained(tmp_path):
    adalora().save_pretrained(tmp_path / "full")
    odd = tmp_path / "odd"
    shutil.copytree(tmp_path / "full", odd)
    (odd / "adapter_model.safetensors").unlink()
    tensors = load_file(tmp_path / "full" / "adapter_model.safetensors")
    torch.save({f"_orig_mod.{key}": one for key, one in tensors.items()}, odd / "adapter_model.bin")
    one, other = (load_tensors(read_adapter(tmp_path / name)) for name in ("full", "odd"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank_pattern": None}, r"has rank \d, but adapter_config.json says 6"),
        ({"rank_pattern": [1]}, "must have a list of true and false"),
        ({"rank_pattern": {"model.layers.1.self_attn.v_proj.lora_E": 3}}, "must have a list of true and false"),
        ({"init_r": 0}, "init_r of AdaLoRA is 0"),
        ({"lora_alpha": "8"}, "lora_alpha of AdaLoRA is '8'"),
        ({"bias": "all"}, "trains biases"),
    ],
)
def test_configs_that_are_none_are_refused(tmp_path, change, message):
    adalora().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path)


def test_a_missing_e_is_refused(tmp_path):
    adalora().save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    gone = f"{PREFIX}model.layers.1.self_attn.v_proj.lora_E"
    save_file({key: one for key, one in load_file(weights).items() if key != gone}, weights)
    with pytest.raises(AdapterError, match=r"v_proj has no lora_E"):
        read_adapter(tmp_path)


def test_of_a_model_in_memory_the_folder_is_asked_for():
    with pytest.raises(UnsupportedAdapterError, match="Save it, and pass the folder"):
        lorazor.inspect(adalora())
