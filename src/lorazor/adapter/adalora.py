"""AdaLoRA files as the plain LoRA that they are: `h = W x + s B diag(E) A x`, with E in A and the rest of s in B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorazor.errors import AdapterError
from lorazor.naming import exact_keys, exact_targets

SCALES = ".lora_E"
"""What the keys of E end with: (r, 1), one number per direction."""

_PARTS = {".lora_A": ".lora_A.weight", ".lora_B": ".lora_B.weight"}
"""PEFT has the factors of AdaLoRA as parameters, those of LoRA as modules."""
_OWN_FIELDS = ("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")
_NARROWING = ("layers_to_transform", "layers_pattern", "exclude_modules")
_UNREAD = {"alpha_pattern": {}, "use_rslora": False, "init_lora_weights": True}
"""Fields of LoRA that an AdaLoRA config inherits and PEFT does not read there."""
_PEFT_DEFAULTS = {"init_r": 12, "lora_alpha": 8}
_ADDED = 1e-5  # by PEFT to the rank that it divides by


def is_adalora(config: Mapping[str, Any]) -> bool:
    """Whether a config is of AdaLoRA."""
    return config.get("peft_type") == "ADALORA"


def plain_keys(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The keys that plain LoRA has, and the tensors of an AdaLoRA file that stand for them.

    A site that was left no rank does nothing, and plain LoRA has none such.

    Raises:
        AdapterError: factors without their E, or other tensors of LoRA.
    """
    names = {}
    for key in shapes:
        site, _, part = key.rpartition(".")
        if f".{part}" in _PARTS and shapes.get(f"{site}{SCALES}", ())[1:] != (1,):
            raise AdapterError(f"{site} has no lora_E of one column, which AdaLoRA has. Save the adapter again.")
        if ".lora_" in key and f".{part}" not in (SCALES, *_PARTS):
            raise AdapterError(
                f"The tensor {key!r} does not belong to AdaLoRA, as the config says. Mend peft_type there."
            )
        if not key.endswith(SCALES):
            names[key] = site + _PARTS[f".{part}"] if f".{part}" in _PARTS else key
    return {new: key for key, new in names.items() if new == key or 0 not in shapes[key]}


def plain_config(config: Mapping[str, Any], sites: Mapping[str, bool]) -> dict[str, Any]:
    """The config of plain LoRA that computes what an AdaLoRA does, of the tensors that `plain_tensor` gives.

    Args:
        config: of the AdaLoRA.
        sites: names of all its sites, and whether they have any rank.
    Raises:
        AdapterError: numbers or ranks that are none, or no site with any rank.
    """
    kept = sorted(name for name, has_rank in sites.items() if has_rank)
    if not kept:
        raise AdapterError("The AdaLoRA has no site with a rank above 0: it is its base model.")
    ranks = {name: _rank(config, name) for name in kept}
    rank, keys = max(ranks.values()), exact_keys(ranks)
    plain = {key: value for key, value in config.items() if key not in (*_OWN_FIELDS, *_NARROWING)} | _UNREAD
    return plain | {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _alpha(config),
        "rank_pattern": {keys[name]: own for name, own in ranks.items() if own != rank},
        "target_modules": exact_targets(kept, sites),
    }


def plain_tensor(config: Mapping[str, Any], part: str, tensor: Tensor, scales: Tensor) -> Tensor:
    """A or B of a site as plain LoRA has it, in float32, which the product of two bfloat16 numbers fits into.

        A' = E A,   B' = (s r / alpha) B,   s = alpha / (r_0 + 1e-5)      alpha: the rank r, where it is not above 0

    with the rank r_0 that the training began with.

    Args:
        config: of the AdaLoRA.
        part: "lora_A" or "lora_B".
        tensor: A (r, d_in) or B (d_out, r).
        scales: E (r, 1).
    Source: peft.tuners.adalora.layer.SVDLinear.forward, PEFT 0.21.
    """
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    if part == "lora_A":
        return wide * scales.to(wide.dtype)
    rank, alpha = len(scales), _number(config, "lora_alpha")
    scaling = (alpha if alpha > 0 else rank) / (_number(config, "init_r") + _ADDED)
    return wide * (scaling * rank / _alpha(config))


def _alpha(config: Mapping[str, Any]) -> float:
    """The `lora_alpha` of the plain LoRA: the same, where there is one."""
    alpha = _number(config, "lora_alpha")
    return alpha if alpha > 0 else _number(config, "init_r")


def _rank(config: Mapping[str, Any], name: str) -> int:
    """What the config says of the rank of a site: the directions that its mask leaves, or all of the first ones."""
    masks = config.get("rank_pattern") or {}
    mask = masks.get(f"{name}{SCALES}", [True] * int(_number(config, "init_r"))) if isinstance(masks, dict) else None
    if not isinstance(mask, list) or not all(isinstance(one, bool) for one in mask):
        raise AdapterError(
            f"adapter_config.json: rank_pattern of AdaLoRA must have a list of true and false for {name}{SCALES}. "
            "Save the adapter again."
        )
    return sum(mask)


def _number(config: Mapping[str, Any], field: str) -> float:
    value = config.get(field, _PEFT_DEFAULTS[field])
    if isinstance(value, bool) or not isinstance(value, int | float) or (field == "init_r" and value < 1):
        raise AdapterError(f"adapter_config.json: {field} of AdaLoRA is {value!r}, but must be a number.")
    return value
