"""A fingerprint of a base model, to tell whether two runs had the same one without reading all of its weights twice."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

_N_SAMPLED = 16
_NOT_OF_THE_BASE = ("lora_", "modules_to_save", "original_module")


@torch.no_grad()
def base_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names, shapes and a few numbers of every weight of the base model.

    Numbers are rounded to bfloat16 first, so that the same model loaded in another format has the same fingerprint.
    What an adapter brings along (LoRA, trained heads) is left out. Two models that differ only in numbers that are not
    looked at share a fingerprint; fine-tuned ones do not.

    Args:
        model: a transformers model, with or without an adapter on it.
    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    weights = {name.replace(".base_layer.", "."): one for name, one in model.named_parameters()}
    for name in sorted(weights):
        if any(part in name for part in _NOT_OF_THE_BASE):
            continue
        flat = weights[name].detach().flatten()
        picked = flat[torch.tensor(sampled_positions(len(flat)), device=flat.device)]
        numbers = picked.to("cpu", torch.bfloat16).view(torch.int16).tolist()
        digest.update(f"{name} {tuple(weights[name].shape)} {numbers}\n".encode())
    return digest.hexdigest()


def sampled_positions(n_numbers: int) -> list[int]:
    """Positions spread over 0..n_numbers - 1, both ends among them; in whole numbers, as float32 is too coarse."""
    n_sampled = min(_N_SAMPLED, n_numbers)
    return [index * (n_numbers - 1) // max(1, n_sampled - 1) for index in range(n_sampled)]
