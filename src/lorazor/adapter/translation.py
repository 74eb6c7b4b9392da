"""Adapters of other versions of transformers, under the names that their base models have today.

Of experts with a LoRA each (transformers 4), which today are one parameter; of image-text models from before 4.52. PEFT
translates both when it loads them, and its own functions do it here; only what it loses on the way is mended: gate and
up of experts without down, and names in `target_modules`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from safetensors.torch import save_file
from torch import Tensor
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
from lorazor.naming import exact_targets

_OTHER_NAMES = re.compile(r".+\.experts\.\d+\.[^.]+|language_model\.model\..+")
_ADVICE = "Use it with the transformers that it was trained with, or train it again."


def is_of_other_version(folder: AdapterFolder) -> bool:
    """Whether an adapter has names that base models had in other versions of transformers; some have them still."""
    return any(_OTHER_NAMES.fullmatch(site.name) for site in folder.sites)


def translated(folder: AdapterFolder, base: PreTrainedModel, place: Path) -> AdapterFolder:
    """The same adapter under today's names, or itself where they are those of the base model.

    Args:
        folder: see `is_of_other_version`.
        base: the base model; its weights are not looked at.
        place: an empty folder for the translated one.
    Raises:
        AdapterError: stock PEFT cannot load it: some experts only, gate without up, or a family that it does not know.
    """
    modules = {name for name, _ in base.named_modules()}
    strangers = [site.name for site in folder.sites if site.name not in modules and not site.is_on_parameter]
    if not strangers:
        return folder
    where = f"{str(folder.path)!r} has names of another version of transformers, such as {strangers[0]!r}"
    config: Any = PeftConfig.from_pretrained(str(folder.path))
    try:
        convert_peft_config_for_transformers(config, base, conversions=None)
        tensors = convert_peft_adapter_state_dict_for_transformers(base, config, load_tensors(folder))
    except (ValueError, RuntimeError) as error:  # PEFT on gates without up, torch on ranks that differ
        raise AdapterError(f"{where}, and PEFT cannot translate it: {str(error).splitlines()[0]} {_ADVICE}") from error
    carry_over(folder.path, place)
    _write(folder.config, config, tensors, place)
    today = read_adapter(place)
    places = modules | {name for name, _ in base.named_parameters()}
    if strangers := [site.name for site in today.sites if site.name not in places]:
        raise AdapterError(
            f"{where}, and PEFT does not translate {strangers[0]!r} for a {base.config.model_type}. {_ADVICE}"
        )
    _check_experts(today, base, where)
    return today


def _write(before: Mapping[str, Any], config: Any, tensors: Mapping[str, Tensor], place: Path) -> None:
    """The translated adapter, with the names of all of its modules and parameters in its config."""
    of_parameters = {"target_modules": config.target_modules, "target_parameters": config.target_parameters}
    by_key = {key: split for key in tensors if (split := split_key(key))}
    names = {module for module, _ in by_key.values()}
    parameters = names_of_parameters(of_parameters, names)
    modules = sorted(names - parameters.keys())
    settings = {key: value for key, value in before.items() if key not in ("layers_to_transform", "layers_pattern")} | {
        "target_modules": exact_targets(modules, names),
        "target_parameters": sorted(parameters.values()) or None,  # not those of layers without LoRA
        "rank_pattern": dict(config.rank_pattern or {}),
        "alpha_pattern": dict(config.alpha_pattern or {}),
    }
    places = keys_from_outside(parameters.values())
    written = {}
    for key, tensor in tensors.items():
        module, part = by_key.get(key, ("", ""))
        new = f"{BASE_PREFIX}{places[parameters[module]]}.{part}" if module in parameters else key
        written[new] = tensor.contiguous()
    (place / CONFIG_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
    save_file(written, place / WEIGHTS_FILE, metadata={"format": "pt"})


def _check_experts(today: AdapterFolder, base: PreTrainedModel, where: str) -> None:
    """Refuse LoRA on some of the experts of a parameter."""
    sizes = {name: len(one) if one.ndim == 3 else 1 for name, one in base.named_parameters()}
    for site in today.sites:
        if site.is_on_parameter and site.n_experts != sizes[site.name]:
            raise AdapterError(
                f"{where}, for {site.n_experts} of the {sizes[site.name]} experts of {site.name}: PEFT does not load "
                f"some of them only. {_ADVICE}"
            )
