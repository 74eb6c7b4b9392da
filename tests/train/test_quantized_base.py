"""The callback on a base model in 4 bits: the training is that on the numbers which the 4 bits stand for."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lorazor.adapter.quantization import keep_packing_
from lorazor.train.callback import WeightLora
from tests.tiny_models import tiny_model
from tests.train.tiny_training import N_LAYERS, make_trainer


@pytest.mark.parametrize("grow", [pytest.param(None, marks=pytest.mark.slow), "served"])
def test_a_base_in_nf4_is_trained_like_the_numbers_it_stands_for(tmp_path, grow):
    tiny_model("llama", N_LAYERS).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, dtype=torch.float32)
    keep_packing_(packed)  # bitsandbytes breaks on layers as narrow as these where it packs anew
    plain = tiny_model("llama", N_LAYERS)
    own = dict(plain.named_modules())
    n_packed = 0
    with torch.no_grad():
        for name, module in packed.named_modules():
            if type(module).__name__ == "Linear4bit":
                own[name].weight.copy_(bnb.dequantize_4bit(module.weight.data, module.weight.quant_state))
                n_packed += 1
    assert n_packed >= 7 * N_LAYERS
    ends, choices = [], []
    for name, base in (("packed", packed), ("plain", plain)):
        torch.manual_seed(0)
        lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(base, lora)
        callback = WeightLora(4, 3, dense_steps=1, grow=grow)
        trainer = make_trainer(tmp_path / name, model, callback, steps=5)
        trainer.train()
        trainer.save_model(str(tmp_path / name / "end"))
        ends.append(load_file(tmp_path / name / "end" / "adapter_model.safetensors"))
        choices.append([(site.name, site.rank, site.keep) for site in callback.selection.sites])
    assert choices[0] == choices[1] and sum(keep for _, _, keep in choices[0]) == 4
    assert ends[0].keys() == ends[1].keys()
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], atol=1e-4, rtol=1e-3)
