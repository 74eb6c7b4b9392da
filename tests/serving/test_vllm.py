"""Adapters of every form in vLLM 0.32.0, as they are and exported, against stock PEFT; and what its slots take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import lorazor
from tests.serve.forms import FORMS, N_LAYERS, write_form
from tests.serving.running import largest_difference, log_probabilities, run_in

pytestmark = [
    pytest.mark.serving,
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* LoRA tensor.* have invalid shape"),
]
PROMPTS = [[(7 * row + 11 * token) % 290 + 3 for token in range(4 + row % 5)] for row in range(24)]
CLASSES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}


@pytest.fixture(scope="module", params=CLASSES)
def base(request, tmp_path_factory) -> Path:
    """A tiny random model whose heads are as wide as vLLM's kernels want."""
    kind, model = CLASSES[request.param]
    torch.manual_seed(0)
    config = kind(
        vocab_size=300, hidden_size=128, intermediate_size=192, num_hidden_layers=N_LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1, tie_word_embeddings=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp(request.param) / "base"
    model(config).save_pretrained(path)
    return path


def test_every_form_as_the_table_says_and_exported_as_peft(base, tmp_path):
    """One server for all forms; vLLM's names for the settings that the table says are refused."""
    adapters = {form: write_form(base, form, tmp_path / "forms" / form.replace(" ", "-")).path for form in FORMS}
    outcomes = {
        form: lorazor.inspect(path, model=str(base)).judgement("vllm").outcome for form, path in adapters.items()
    }
    exported = {}
    for form, path in adapters.items():
        settings = lorazor.ExportSettings(drop_modules_to_save=True, verify=False)
        try:
            result = lorazor.export(path, "vllm", out=tmp_path / "exported" / path.name, settings=settings)
        except lorazor.LorazorError:
            assert outcomes[form] != "right"
            continue
        exported[f"exported {form}"] = result.path
    folders = {**adapters, **exported}
    job = {"base": str(base), "options": {"max_lora_rank": 8}, "adapters": {k: str(v) for k, v in folders.items()}}
    found = run_in("VLLM", "in_vllm.py", {**job, "prompts": PROMPTS, "top": 20}, tmp_path / "result.json")["results"]
    refused = {form for form, one in outcomes.items() if one == "refused"}
    assert {form for form in adapters if "error" in found[form]} == refused
    right = [form for form, one in outcomes.items() if one == "right"]
    for name in (*right, *exported):
        expected = log_probabilities(base, folders[name], PROMPTS)
        assert largest_difference(found[name]["logprobs"], expected) < 1e-3, name
        assert found[name]["tokens"] == [int(row.argmax()) for row in expected], name


@pytest.mark.parametrize("form", ["rank 1", "a tenth of the sites"])
def test_told_so_a_server_has_the_slots_that_are_printed(base, tmp_path, form):
    full = write_form(base, "plain", tmp_path / "full").path
    if form == "rank 1":
        result = lorazor.export(full, "vllm", out=tmp_path / "small", max_rank=1, verify=False)
    else:
        sites = lorazor.inspect(full).sites
        entries = tuple(one.site.entry(index % 10 == 0) for index, one in enumerate(sites))
        lorazor.prune(full, lorazor.Selection(entries, "test", {}), out=tmp_path / "few")
        result = lorazor.export(tmp_path / "few", "vllm", out=tmp_path / "small", verify=False)
    assert result.flags is not None
    told = {"max_lora_rank": result.flags.max_rank, "lora_target_modules": list(result.flags.targets)}
    job = {"base": str(base), "adapters": {"small": str(result.path)}, "prompts": PROMPTS, "top": 20}
    small = run_in("VLLM", "in_vllm.py", {**job, "options": told}, tmp_path / "told.json")
    assert small["slot_bytes"] == result.flags.slot_bytes
    expected = log_probabilities(base, result.path, PROMPTS)
    assert largest_difference(small["results"]["small"]["logprobs"], expected) < 1e-3
    large = run_in("VLLM", "in_vllm.py", {**job, "options": {"max_lora_rank": 16}}, tmp_path / "untold.json")
    assert large["slot_bytes"] == result.flags.slot_bytes_untold
    assert largest_difference(large["results"]["small"]["logprobs"], expected) < 1e-3
