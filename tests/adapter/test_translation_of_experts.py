"""Adapters with a LoRA for every expert that stock PEFT translates wrongly, against updates added by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import lorazor
from lorazor.adapter.load import load
from lorazor.errors import AdapterError, BaseModelError
from lorazor.settings import ModelSettings
from tests.data.test_batches import byte_tokenizer
from tests.tiny_mixtures import RANK, SIZES, logits

# PEFT 0.21 looks for patterns among modules alone; the ranks are those of the patterns nonetheless.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")

ALPHA, PREFIX = 5, "base_model.model."
TARGETS = ["q_proj", "gate_proj", "up_proj", "down_proj"]
MOE = {name: size for name, size in SIZES.items() if name != "num_local_experts"} | {
    "num_experts": 3,
    "moe_intermediate_size": 12,
}


def mixture(family: str):
    """The first layer of one is dense; the other has a shared expert beside the experts."""
    torch.manual_seed(0)
    if family == "qwen2_moe":
        return Qwen2MoeForCausalLM(Qwen2MoeConfig(**MOE, shared_expert_intermediate_size=20)).eval()
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**MOE, head_dim=8, mlp_only_layers=[0])).eval()


def linear_maps(model) -> dict[str, torch.Tensor]:
    """The weights of a model by the names of the linear maps that transformers 4 had, in place."""
    found = {}
    for name, weight in model.named_parameters():
        stem, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            halves = {"gate_proj": slice(0, weight.shape[1] // 2), "up_proj": slice(weight.shape[1] // 2, None)}
            found |= {
                f"{stem}.{i}.{one}": own.data[half] for i, own in enumerate(weight) for one, half in halves.items()
            }
        elif last == "down_proj":
            found |= {f"{stem}.{i}.{last}": own.data for i, own in enumerate(weight)}
        elif weight.ndim == 2:
            found[stem] = weight.data
    return found


def of_transformers_4(
    root: Path,
    family: str,
    targets: list[str],
    rank: Callable[[str], int] = lambda name: RANK,
    scaling: Callable[[str], float] = lambda name: ALPHA / RANK,
    **config: Any,
):
    """Write a base model and such an adapter of it; the base model with its updates in its weights."""
    model, generator, tensors = mixture(family), torch.Generator().manual_seed(1), {}
    model.save_pretrained(root / "base")
    byte_tokenizer().save_pretrained(root / "base")
    for name, weight in linear_maps(model).items():
        if name.rpartition(".")[2] not in targets:
            continue
        shapes = (rank(name), weight.shape[1]), (weight.shape[0], rank(name))
        A, B = (torch.randn(shape, generator=generator) / 3 for shape in shapes)
        tensors |= {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}
        weight += scaling(name) * B @ A
    (root / "adapter").mkdir(parents=True)
    save_file(tensors, root / "adapter" / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": targets,
    }
    settings |= {"base_model_name_or_path": str(root / "base"), **config}
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    byte_tokenizer().save_pretrained(root / "adapter")
    return model


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "with-router": {"targets": [*TARGETS, "gate"]},
    "router-alone": {"targets": ["q_proj", "gate"]},
    "rslora": {"use_rslora": True, "scaling": lambda name: ALPHA / RANK**0.5},
    "alphas": {
        "alpha_pattern": {"down_proj": 9, "gate_proj": 7, "up_proj": 7},
        "scaling": lambda name: {"down_proj": 9, "q_proj": ALPHA}.get(name.rpartition(".")[2], 7) / RANK,
    },
    "ranks": {
        "rank_pattern": {"gate_proj": 3, "up_proj": 3, "q_proj": 1},
        "rank": lambda name: {"down_proj": RANK, "q_proj": 1}.get(name.rpartition(".")[2], 3),
        "scaling": lambda name: ALPHA / {"down_proj": RANK, "q_proj": 1}.get(name.rpartition(".")[2], 3),
    },
    "dropout": {"lora_dropout": 0.1},
}


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_what_it_was_and_stock_peft_computes_what_is_written(tmp_path, family, case):
    expected = logits(of_transformers_4(tmp_path, family, **{"targets": TARGETS, **CASES[case]}))
    loaded = load(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded.model), expected, rtol=1e-4, atol=1e-4)
    lorazor.prune(tmp_path / "adapter", boundary=2, out=tmp_path / "same")
    stock = PeftModel.from_pretrained(mixture(family), tmp_path / "same").eval()
    torch.testing.assert_close(logits(stock), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"alpha_pattern": {"gate_proj": 7}}, r"scalings 2\.5, 3\.5 in what is one parameter today, \S+gate_up_proj"),
        ({"alpha_pattern": {"experts.1.down_proj": 7}}, r"scalings 2\.5, 3\.5 in .* \S+down_proj"),
        ({"lora_bias": True}, "with lora_bias, which PEFT has not for parameters"),
    ],
)
def test_what_parameters_have_not_is_refused_before_anything_is_written(tmp_path, config, message):
    of_transformers_4(tmp_path, "qwen3_moe", TARGETS, **config)
    with pytest.raises(AdapterError, match=message):
        load(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=message):
        lorazor.prune(tmp_path / "adapter", boundary=1, out=tmp_path / "small")
    assert not (tmp_path / "small").exists()


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")  # PEFT's LoRA on all experts instead
def test_lora_on_a_dense_layer_alone_is_refused_with_what_can_be_done(tmp_path):
    of_transformers_4(tmp_path, "qwen3_moe", TARGETS)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key: one for key, one in load_file(weights).items() if "layers.0.mlp." in key}, weights)
    with pytest.raises(AdapterError, match=r"on 3 modules .* such as '\S+layers\.0\.mlp\..*Merge the adapter"):
        load(tmp_path / "adapter")


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_on_a_quantised_base_a_dense_layer_cannot_be_a_parameter(tmp_path, form):
    of_transformers_4(tmp_path, "qwen3_moe", TARGETS)
    with pytest.raises(BaseModelError, match=rf"layers\.0\.mlp\.\w+_proj\.weight' .* is in {form}, where PEFT cannot"):
        load(tmp_path / "adapter", ModelSettings(quantization=form))
    of_transformers_4(tmp_path / "other", "qwen2_moe", [*TARGETS, "gate"])  # its experts and routers stay as they are
    assert len(load(tmp_path / "other" / "adapter", ModelSettings(quantization=form)).sites) == 14
