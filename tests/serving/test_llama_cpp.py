"""GGUF adapters in llama.cpp, on SmolLM2-135M as it is packed, against stock PEFT on the same weights."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

import lorazor
from tests.serving.running import SMOLLM2, largest_difference, log_probabilities, run_in, smollm2, smollm2_in_float32

pytestmark = pytest.mark.serving
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXTS = [
    f"The {what} of the {whose} is"
    for what in ("name", "colour", "end", "king", "price", "sound")
    for whose in ("sea", "house", "game", "story")
]


@pytest.mark.parametrize("form", ["rsLoRA", "mixed ranks", "few sites"])
def test_a_gguf_adapter_computes_what_peft_computes(tmp_path, form):
    """As near as llama.cpp comes to the base model, of which it rounds what goes into its matrices of 4 bits."""
    base, tokenizer = smollm2_in_float32()
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    before = log_probabilities(base, None, prompts)
    ranks = {r"layers\.[159]\..*": 3} if form == "mixed ranks" else {}
    targets = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(20)] if form == "few sites" else KINDS
    config = LoraConfig(r=8, lora_alpha=16, use_rslora=form == "rsLoRA", target_modules=targets, rank_pattern=ranks)
    torch.manual_seed(0)
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(1)
    size = 0.8 if form == "few sites" else 0.05  # an adapter that does more than the rounding of the base
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(size * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    expected = log_probabilities(model, None, prompts)
    model_settings = lorazor.ModelSettings(str(smollm2()), gguf_file=SMOLLM2)
    lorazor.export(tmp_path / "adapter", "llama.cpp", out=tmp_path / "out", verify=False, model=model_settings)
    job = {"base": str(smollm2() / SMOLLM2), "prompts": prompts, "top": 5}
    found = {
        name: run_in("LLAMA_CPP", "in_llama_cpp.py", {**job, "adapter": path}, tmp_path / f"{name}.json")
        for name, path in (("base", None), ("adapter", str(tmp_path / "out" / "adapter.gguf")))
    }
    of_base = largest_difference(found["base"], before)
    of_adapter = largest_difference(found["adapter"], expected)
    without = largest_difference(found["base"], expected)  # had the server left it out
    assert of_adapter < 2 * of_base and of_adapter < without / 3, (of_base, of_adapter, without)
