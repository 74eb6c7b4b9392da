"""Tiny models with sites that cannot be taken apart, and what tests of gates ask of any model."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lorazor.adapter.sites import find_sites
from tests.tiny_models import randomise_b_, tiny_inputs, tiny_peft_model


class Convolutions(nn.Module):
    """Two convolutions: the kind of site that cannot be taken apart, with four axes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(2, 5, 3), nn.Conv2d(5, 4, 3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](x).relu())


def convolutions(**lora_kwargs: Any):
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["layers.0", "layers.1"], **lora_kwargs)
    model = get_peft_model(Convolutions(), config).eval()  # pyright: ignore[reportArgumentType]
    randomise_b_(model)
    return model, {"x": torch.randn(3, 2, 7, 7)}


def embeddings(**lora_kwargs: Any):
    model = tiny_peft_model("llama", 1, target_modules=["q_proj", "embed_tokens", "lm_head"], **lora_kwargs)
    torch.manual_seed(0)
    (embedding,) = (site for site in find_sites(model) if "embed" in site.name)
    nn.init.normal_(embedding.module.lora_embedding_A["default"], std=0.2)  # PEFT starts it at zero
    return model, tiny_inputs("llama")


def biases():
    """OPT's MLP sees (rows * tokens, d)."""
    return tiny_peft_model("opt", 1, lora_bias=True, target_modules=["q_proj", "fc1"]), tiny_inputs("opt")


WHOLE = {
    "embedding": embeddings,
    "rsLoRA": lambda: embeddings(use_rslora=True, alpha_pattern={"q_proj": 3}),
    "convolution": convolutions,
    "convolution with a bias of B": lambda: convolutions(lora_bias=True),
    "bias of B": biases,
}
"""Models with sites that cannot be taken apart, and inputs of three rows."""


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        output = model(**inputs)
    return output if isinstance(output, torch.Tensor) else output.logits


def n_gates(sites) -> int:
    return sum(site.n_gates for site in sites)


def random_gates(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)).round(decimals=2)


def with_scales(model, values) -> None:
    """PEFT's own gate of a site."""
    for site, value in zip(find_sites(model), values, strict=True):
        site.module.set_scale("default", float(value))


def total(model, inputs) -> torch.Tensor:
    output = model(**inputs)
    return (output if isinstance(output, torch.Tensor) else output.logits).square().sum()
