"""Adapters of other versions of transformers, under the names that their base models have today.

Of experts with a LoRA each (transformers 4), which today are one parameter; of image-text models from before 4.52. PEFT
translates both when it loads them, and its own functions do it here. Only what it loses on the way is mended: gate and
up of experts without down, LoRA on layers and shared experts that are linear maps still, ranks and scalings of single
modules, and the scaling of rsLoRA where two matrices are joined. On these PEFT is wrong without a word.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorazor.adapter.beside import parameter_of
from lorazor.adapter.experts import keys_from_outside, names_of_parameters
from lorazor.adapter.folder import (
    BASE_PREFIX,
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterFolder,
    load_tensors,
    read_adapter,
    setting_of,
    split_key,
)
from lorazor.adapter.prune import carry_over
from lorazor.adapter.sites import INSIDE, target_modules_of
from lorazor.errors import AdapterError
from lorazor.naming import exact_keys, exact_targets

_ON_PARAMETERS = re.compile(r".+\.experts\.\d+\.[^.]+|.+\.gate")
_OTHER_NAMES = re.compile(rf"{_ON_PARAMETERS.pattern}|language_model\.(?:model\..+|lm_head)")
_EXPERT = re.compile(r".+\.experts\.(\d+)\..+")
_ADVICE = "Use it with the transformers that it was trained with, or train it again."


@dataclass(frozen=True)
class _Joined:
    """What a site of today is made of.

    Attributes:
        n_experts: E; 1 where there are none.
        rank: of each expert.
        scalings: of the sites that it was.
    """

    n_experts: int
    rank: int
    scalings: tuple[float, ...]


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
        AdapterError: stock PEFT cannot load it: some experts only, gate without up, or a family that it does not know;
            or it has several scalings where there is one today.
    """
    modules = dict(base.named_modules())
    of_modules = [site.name for site in folder.sites if not site.is_on_parameter]
    strangers = [name for name in of_modules if not _is_here(name, modules)]
    if not strangers:
        return folder
    where = f"{folder.name!r} has names of another version of transformers, such as {strangers[0]!r}"
    lacking = [name for name in ("use_dora", "lora_bias") if folder.config.get(name)]
    if lacking and any(_ON_PARAMETERS.fullmatch(name) for name in strangers):
        raise AdapterError(f"{where}, with {lacking[0]}, which PEFT has not for parameters. {_ADVICE}")
    config: Any = PeftConfig.from_pretrained(str(folder.path))
    try:
        convert_peft_config_for_transformers(config, base, conversions=None)
        tensors, marks = (
            convert_peft_adapter_state_dict_for_transformers(base, config, given)
            for given in (load_tensors(folder), _marks(folder))
        )
    except (ValueError, RuntimeError) as error:  # PEFT on gates without up, torch on ranks that differ
        raise AdapterError(f"{where}, and PEFT cannot translate it: {str(error).splitlines()[0]} {_ADVICE}") from error
    unchanged = {*of_modules} - {*strangers}
    parameters = _parameters(config, tensors, unchanged)
    joined = _joined(marks, parameters)
    _check(joined, [parameter_of(key) for key in tensors if split_key(key) is None], base, where)
    carry_over(folder.path, place)
    _write(folder.config, joined, tensors, parameters, place)
    return dataclasses.replace(read_adapter(place), origin=folder.path)


def _is_here(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a module takes LoRA still; routers are parameters today, under the name that the linear map had."""
    return name in modules and (isinstance(modules[name], nn.Linear) or not name.endswith(".gate"))


def _marks(folder: AdapterFolder) -> dict[str, Tensor]:
    """In the place of A the number of the expert for each row, in that of B the scaling of the site for each column."""
    marks = {}
    for site in folder.sites:
        found = _EXPERT.fullmatch(site.name)
        for part, key in folder.keys[site.name].items():
            if part.endswith(("lora_A.weight", "lora_embedding_A")):
                marks[key] = torch.full((site.rank * site.n_experts, 1), int(found[1]) if found else 0)
            elif part.endswith(("lora_B.weight", "lora_embedding_B")):
                marks[key] = torch.full((1, site.rank * site.n_experts), site.scaling, dtype=torch.float64)
    return marks


def _parameters(config: Any, tensors: Mapping[str, Tensor], unchanged: Collection[str]) -> dict[str, str]:
    """See `names_of_parameters`; of linear maps that PEFT takes for experts by their names, the weight.

    It puts LoRA on no such map (a dense layer, a shared expert) as on a module, whatever the config says.
    """
    names = {split[0] for key in tensors if (split := split_key(key))}
    is_module = target_modules_of({"target_modules": config.target_modules})
    modules = {name for name in names if name in unchanged or (is_module(name) and not name.endswith(".gate"))}
    # where PEFT puts them, for every family
    ends = {f".experts{INSIDE}": "gate_up_proj", ".experts": "down_proj", ".gate": "gate.weight"}
    targets = {one for name in names - modules for end, one in ends.items() if name.endswith(end)}
    found = names_of_parameters(
        {
            "target_modules": exact_targets(sorted(modules), names),
            "target_parameters": sorted(targets | {*(config.target_parameters or ())}),
        },
        names,
    )
    return found | {name: f"{name}.weight" for name in modules if not is_module(name)}


def _joined(marks: Mapping[str, Tensor], parameters: Mapping[str, str]) -> dict[str, _Joined]:
    """What the sites of today are made of, by name."""
    experts, scalings = {}, {}
    for key, mark in marks.items():
        module, part = split_key(key) or ("", "")
        found = experts if "_A" in part else scalings
        found[parameters.get(module, module)] = mark
    return {
        name: _Joined(n_experts, len(mark) // n_experts, tuple(own[own != 0].unique().tolist()))
        for name, mark in experts.items()
        for n_experts, own in [(len(mark.unique()), scalings[name])]
    }


def _check(joined: Mapping[str, _Joined], beside: Collection[str], base: PreTrainedModel, where: str) -> None:
    """Refuse what the base model has no place for, some of the experts of a parameter, and scalings that differ."""
    sizes = {name: len(one) if one.ndim == 3 else 1 for name, one in base.named_parameters()}
    places = {name for name, _ in base.named_modules()} | base.state_dict().keys()
    if strangers := [name for name in (*joined, *beside) if name not in places]:
        raise AdapterError(
            f"{where}, and PEFT does not translate {strangers[0]!r} for a {base.config.model_type}. {_ADVICE}"
        )
    for name, one in joined.items():
        if one.n_experts != sizes.get(name, 1):
            raise AdapterError(
                f"{where}, for {one.n_experts} of the {sizes[name]} experts of {name}: PEFT does not load some of them "
                f"only. {_ADVICE}"
            )
        if len(one.scalings) > 1:
            raise AdapterError(
                f"{where}, with the scalings {', '.join(f'{scaling:g}' for scaling in one.scalings)} in what is one "
                f"parameter today, {name}, and has one of them. {_ADVICE}"
            )


def _write(
    before: Mapping[str, Any],
    joined: Mapping[str, _Joined],
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, str],
    place: Path,
) -> None:
    """The translated adapter, with the names of all of its modules and parameters in its config."""
    names, keys = {split[0] for key in tensors if (split := split_key(key))}, exact_keys(joined)
    roots = {name: one.rank**0.5 if before.get("use_rslora") else one.rank for name, one in joined.items()}
    alphas = {name: one.scalings[0] * roots[name] for name, one in joined.items()}
    rank, alpha = setting_of(before, "r"), setting_of(before, "lora_alpha")
    settings = {key: value for key, value in before.items() if key not in ("layers_to_transform", "layers_pattern")} | {
        "target_modules": exact_targets(sorted(names - parameters.keys()), names),
        "target_parameters": sorted(parameters.values()) or None,  # not those of layers without LoRA
        "lora_dropout": 0.0 if parameters else before.get("lora_dropout", 0.0),  # PEFT has none on parameters
        "rank_pattern": {keys[name]: one.rank for name, one in joined.items() if one.rank != rank},
        "alpha_pattern": {keys[name]: own for name, own in alphas.items() if not math.isclose(own, alpha)},
    }
    places = keys_from_outside(parameters.values())
    written = {}
    for key, tensor in tensors.items():
        module, part = split_key(key) or ("", "")
        new = f"{BASE_PREFIX}{places[parameters[module]]}.{part}" if module in parameters else key
        written[new] = tensor.contiguous()
    (place / CONFIG_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
    save_file(written, place / WEIGHTS_FILE, metadata={"format": "pt"})
