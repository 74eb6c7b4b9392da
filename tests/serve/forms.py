"""Adapters of every form that servers make something of, as stock PEFT writes them, and what PEFT adds to the base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.tiny_models import randomise_b_

N_LAYERS = 4
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PARENTS = {name: "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn" for name in ALL}


def full(layer: int, *lasts: str) -> list[str]:
    """Full names of modules of a layer."""
    return [f"model.layers.{layer}.{_PARENTS[last]}.{last}" for last in lasts]


def everywhere(*lasts: str, layers: int = N_LAYERS) -> list[str]:
    """Full names of modules of the first layers."""
    return [name for layer in range(layers) for name in full(layer, *lasts)]


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank 4": {"r": 4},
    "rsLoRA": {"use_rslora": True},
    "alpha_pattern": {"alpha_pattern": {r"layers\.1\..*q_proj": 4}},
    "mixed ranks": {"rank_pattern": {r"layers\.2\..*": 3}},
    "mixed ranks in a group": {"rank_pattern": {r"layers\.2\..*v_proj": 3}},
    "two layers": {"target_modules": everywhere(*ALL, layers=2)},
    "one kind": {"target_modules": ["o_proj"]},
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "q alone": {"target_modules": [*everywhere("o_proj"), *full(1, "q_proj")]},
    "q and k": {"target_modules": [*everywhere("o_proj"), *full(1, "q_proj", "k_proj")]},
    "k alone": {"target_modules": [*everywhere("o_proj"), *full(1, "k_proj")]},
    "v alone": {"target_modules": ["v_proj"]},
    "gate alone": {"target_modules": ["gate_proj", "o_proj"]},
    "up alone": {"target_modules": ["up_proj", "o_proj"]},
    "expression": {"target_modules": r".*\.(q_proj|v_proj)"},
    "output layer": {"target_modules": [*ALL, "lm_head"]},
    "embedding": {"target_modules": [*ALL, "embed_tokens"]},
    "saved output layer": {"modules_to_save": ["lm_head"]},
    "saved norm": {"modules_to_save": ["norm"]},
    "saved norms of layers": {"modules_to_save": ["input_layernorm"]},
    "trained tokens": {"trainable_token_indices": {"embed_tokens": [1, 2]}},
    "bias of B": {"lora_bias": True},
    "DoRA": {"use_dora": True},
}
"""What differs from LoRA of rank 8 on all linear maps of the layers, alpha 12."""


@dataclass(frozen=True)
class FormedAdapter:
    """An adapter of a form.

    Attributes:
        path: the folder.
        deltas: what it adds to the parameters of the base model, by name; nothing where it adds nothing.
    """

    path: Path
    deltas: dict[str, Tensor]


def write_form(base: Path, form: str, path: Path) -> FormedAdapter:
    """Let PEFT make and save an adapter of a form; its numbers are random."""
    model = AutoModelForCausalLM.from_pretrained(base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = {"r": 8, "lora_alpha": 12, "target_modules": list(ALL), "task_type": "CAUSAL_LM", **FORMS[form]}
    peft_model = get_peft_model(model, LoraConfig(**settings))
    randomise_b_(peft_model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if any(part in name for part in ("modules_to_save", "trainable_tokens_delta", "magnitude_vector")) or (
                name.endswith("lora_B.default.bias")
            ):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    peft_model.save_pretrained(str(path), save_embedding_layers=form in ("output layer", "embedding"))
    return FormedAdapter(path, {**_deltas_of_sites(peft_model), **_deltas_beside(peft_model, before)})


def forms_once(base: Path, root: Path) -> Callable[[str], FormedAdapter]:
    """Adapters of every form by its name, each written once."""
    return cache(lambda form: write_form(base, form, root / form.replace(" ", "-")))


def _deltas_of_sites(model: Any) -> dict[str, Tensor]:
    found = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            get_delta: Callable[[str], Tensor] = module.get_delta_weight  # pyright: ignore[reportAttributeAccessIssue]
            delta = get_delta("default").detach()
            if magnitudes := module.lora_magnitude_vector:  # arXiv:2402.09353, eq. 5
                weight = module.get_base_layer().weight.detach()
                m = magnitudes["default"].weight.detach()[:, None]
                delta = m * (weight + delta) / (weight + delta).norm(dim=1, keepdim=True) - weight
            found[f"{name}.weight"] = delta
            if module.lora_bias.get("default"):
                found[f"{name}.bias"] = module.lora_B["default"].bias.detach() * module.scaling["default"]
    return found


def _deltas_beside(model: Any, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """What PEFT has in the place of whole parameters, and of rows of the embedding."""
    found = {}
    for name, parameter in model.get_base_model().named_parameters():
        if ".modules_to_save.default." in name:
            own = name.replace(".modules_to_save.default.", ".")
            found[own] = parameter.detach() - before[own]
        if name.endswith("trainable_tokens_delta.default"):
            own = name.partition(".token_adapter")[0] + ".weight"
            found[own] = torch.zeros_like(before[own])
            found[own][[1, 2]] = parameter.detach() - before[own][[1, 2]]
    return found


def is_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """Whether the same is added to every parameter, up to the rounding of another order of factors."""
    for name in found.keys() | wanted.keys():
        one, other = found.get(name), wanted.get(name)
        if one is None or other is None:
            only = other if one is None else one
            assert only is not None
            if float(only.abs().max()) > 1e-6:
                return False
        elif not torch.allclose(one, other, rtol=1e-5, atol=1e-6):
            return False
    return True
