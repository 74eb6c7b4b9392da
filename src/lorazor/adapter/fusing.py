"""Adapters of transformers 4 on mixtures, with LoRA on every expert by itself, as PEFT fuses them when it loads them.

transformers 5 has the experts in one parameter. PEFT's own functions fuse LoRA on them; only the names in the file are
mended, since PEFT loses gate and up where there is no down.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from safetensors.torch import save_file
from transformers import PreTrainedModel

from lorazor.adapter.experts import keys_from_outside, names_of_parameters
from lorazor.adapter.folder import (
    BASE_PREFIX,
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterFolder,
    load_tensors,
    read_adapter,
    split_key,
)
from lorazor.adapter.prune import carry_over
from lorazor.errors import AdapterError

_ONE_EXPERT = re.compile(r".+\.experts\.\d+\.[^.]+")
_ADVICE = "Pass it to the transformers that it was trained with, or train it again."


def has_single_experts(folder: AdapterFolder) -> bool:
    """Whether an adapter has LoRA on experts one by one."""
    return any(_ONE_EXPERT.fullmatch(site.name) for site in folder.sites)


def fused(folder: AdapterFolder, base: PreTrainedModel, place: Path) -> AdapterFolder:
    """The same adapter with its experts fused, or itself where the base model has them one by one.

    Args:
        folder: see `has_single_experts`.
        base: the base model; its weights are not looked at.
        place: an empty folder for the fused one.
    Raises:
        AdapterError: stock PEFT cannot fuse it: some experts only, gate without up, or a family that it does not know.
    """
    modules = {name for name, _ in base.named_modules()}
    if all(site.name in modules for site in folder.sites):
        return folder
    where = f"{str(folder.path)!r} has LoRA on experts one by one, which this base model holds in one parameter"
    config: Any = PeftConfig.from_pretrained(str(folder.path))
    try:
        convert_peft_config_for_transformers(config, base, conversions=None)
        tensors = convert_peft_adapter_state_dict_for_transformers(base, config, load_tensors(folder))
    except (ValueError, RuntimeError) as error:  # PEFT on gates without up, torch on ranks that differ
        raise AdapterError(f"{where}, and PEFT cannot fuse it: {str(error).splitlines()[0]} {_ADVICE}") from error
    if any(_ONE_EXPERT.fullmatch(split[0]) for key in tensors if (split := split_key(key))):
        raise AdapterError(f"{where}, and PEFT does not fuse experts of {base.config.model_type!r}. {_ADVICE}")
    settings = folder.config | {
        "target_modules": sorted(config.target_modules),
        "target_parameters": sorted(config.target_parameters),
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
    }
    by_key = {key: split for key in tensors if (split := split_key(key))}
    parameters = names_of_parameters(settings, {module for module, _ in by_key.values()})
    settings["target_parameters"] = sorted(parameters.values())  # not those of layers without LoRA
    places = keys_from_outside(parameters.values())
    new_keys = {
        key: f"{BASE_PREFIX}{places[parameters[module]]}.{part}"
        for key, (module, part) in by_key.items()
        if module in parameters
    }
    carry_over(folder.path, place)
    (place / CONFIG_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
    written = {new_keys.get(key, key): tensor.contiguous() for key, tensor in tensors.items()}
    save_file(written, place / WEIGHTS_FILE, metadata={"format": "pt"})
    found = read_adapter(place)
    sizes = {name: len(one) for name, one in base.named_parameters()}
    for site in found.sites:
        if site.is_on_parameter and site.n_experts != sizes.get(site.name):
            raise AdapterError(
                f"{where}, and it has {site.n_experts} of the {sizes.get(site.name)} experts of {site.name}: PEFT does "
                f"not load some of them only. {_ADVICE}"
            )
    return found
