"""Which base model it is: a fingerprint of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import torch
from torch import Tensor, nn

from lorazor.adapter.quantization import scales_of

OF_ADAPTERS = ("lora_", "modules_to_save", "original_module")
"""Parts of the names of parameters that PEFT adds, or that an adapter's own head may be written over."""
_N_SAMPLED = 16
"""Numbers of each weight that a fingerprint looks at."""


@torch.no_grad()
def base_fingerprint(model: nn.Module, untrained: Collection[str] = ()) -> str:
    """SHA-256 over the names, shapes and a few numbers of every weight of the base model.

    Numbers are rounded to bfloat16 first, so that the same model loaded in another format has the same fingerprint; a
    quantised one has another, to which its scales belong. What an adapter brings along (LoRA, trained heads) is left
    out. Two models that differ only in numbers that are not looked at share a fingerprint; fine-tuned ones do not. Of
    weights that are kept off the device until they are needed (accelerate's offloading), only name and shape are looked
    at.

    Args:
        model: a transformers model, with or without an adapter on it.
        untrained: parameters that no checkpoint has, which are others at every load.
    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    weights = {name.replace(".base_layer.", "."): one for name, one in model.named_parameters()}
    scales = {name.replace(".base_layer.", "."): one for name, one in scales_of(model).items()}
    for name in sorted(weights):
        if name in untrained or any(part in name for part in OF_ADAPTERS):
            continue
        flat = weights[name].detach().flatten()
        numbers = [] if flat.is_meta else _sampled(flat)
        digest.update(f"{name} {tuple(weights[name].shape)} {numbers}\n".encode())
        if name in scales:
            digest.update(f"{_sampled(scales[name].flatten())}\n".encode())
    return digest.hexdigest()


def _sampled(flat: Tensor) -> list[int]:
    """A few numbers as bfloat16, and these as whole numbers."""
    picked = flat[torch.tensor(sampled_positions(len(flat)), device=flat.device)]
    return picked.to("cpu", torch.bfloat16).view(torch.int16).tolist()


def sampled_positions(n_numbers: int) -> list[int]:
    """Positions spread over 0..n_numbers - 1, both ends among them; in whole numbers, as float32 is too coarse."""
    n_sampled = min(_N_SAMPLED, n_numbers)
    return [index * (n_numbers - 1) // max(1, n_sampled - 1) for index in range(n_sampled)]
