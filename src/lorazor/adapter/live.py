"""Models in memory: the adapter of one that was just trained, a twin on the same base weights, and a fingerprint.

The model itself is only read: what is done happens to its twin.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, TypeVar

from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedTokenizerBase

from lorazor.adapter.base import load_tokenizer
from lorazor.adapter.beside import n_rows
from lorazor.adapter.experts import orders_in_wrappers, orders_of_parameters, restore_orders_
from lorazor.adapter.fingerprint import OF_ADAPTERS, base_fingerprint
from lorazor.adapter.folder import AdapterFolder, read_adapter
from lorazor.adapter.head import note_head
from lorazor.adapter.load import Loaded
from lorazor.adapter.quantization import note_form, shared_states
from lorazor.adapter.sites import find_sites, site_parameters
from lorazor.adapter.tasks import TASK_TYPES, prepare_, task_of_adapter
from lorazor.errors import AdapterError, SettingsError
from lorazor.settings import ModelSettings

Module = TypeVar("Module", bound=nn.Module)


def save_live(model: PeftModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> AdapterFolder:
    """Write the active adapter of a model.

    Args:
        model: with one active adapter, not merged.
        folder: where to; it exists, and is empty.
        tokenizer: written beside it, if one is given.
    Raises:
        AdapterError: a site is switched off, or scaled in a way that is not saved, or its numbers are offloaded; see
            also `find_sites`.
    """
    sites = find_sites(model)
    name = sites[0].adapter
    for site in sites:
        if site.module.disable_adapters:
            raise AdapterError(f"{site.name} is switched off. Call enable_adapter_layers() on the model first.")
        if any(one.is_meta for one in site_parameters(site.module, name)):
            raise AdapterError(
                f"A and B of {site.name} are offloaded (accelerate), so that PEFT cannot save them. Load the model on "
                "devices that hold it, or save the adapter before, and pass its folder with device_map=."
            )
        if not math.isclose(site.module.scaling[name], site.scaling, rel_tol=1e-6):
            raise AdapterError(
                f"{site.name} is scaled by {site.module.scaling[name]:g} in memory, by {site.scaling:g} as it is "
                "saved. Undo it (unscale_layer), or write it into the adapter's config."
            )
    model.save_pretrained(str(folder), selected_adapters=[name])
    place = folder if name == "default" else folder / name  # as PEFT has it
    config = getattr(model, "config", None)
    note_form(place, config)
    if model.peft_config[name].task_type == TASK_TYPES["classification"]:
        note_head(place, config)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(place))
    return read_adapter(place)


def base_beside(
    model: PeftModel, folder: AdapterFolder, tokenizer: PreTrainedTokenizerBase | None, settings: ModelSettings
) -> Loaded:
    """The base model of a model in memory, without its adapter, on the same weights: it takes no memory for them.

    Args:
        model: stays as it is.
        folder: from `save_live`.
        tokenizer: of the model; if left out, that of the base model that the adapter names.
        settings: what the model is for, where its config does not say it.
    Raises:
        SettingsError: the adapter names no base model, and no tokenizer was given.
        BaseModelError: no tokenizer is found under the base model's name.
    """
    twin = twin_of(model)
    for module in twin.modules():  # `unload` would leave the adapter's heads on the base
        if isinstance(module, ModulesToSaveWrapper):
            for name in module.modules_to_save:
                module.modules_to_save[name] = module.original_module
    orders = orders_in_wrappers(find_sites(twin))
    base: Any = twin.unload()
    vars(base).pop("peft_config", None)
    restore_orders_(base, orders)
    task = task_of_adapter(folder.config, base.config) if settings.task == "auto" else settings.task
    if tokenizer is None:
        name = folder.config.get("base_model_name_or_path") or base.config.name_or_path
        if not name:
            raise SettingsError("The adapter names no base model to take the tokenizer of. Pass tokenizer=.")
        tokenizer = load_tokenizer(name, ModelSettings())
    else:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prepare_(base, tokenizer, task)
    return Loaded(
        base.eval(), tokenizer, lambda: tokenizer, task, [], n_tokens=n_rows(base), fingerprint=base_fingerprint(base),
        orders=orders_of_parameters(base),
    )  # fmt: skip


def twin_of(model: Module) -> Module:
    """Copy a model, but for the numbers of its frozen base weights: these stay the same memory, so that it costs none.

    What is done to the modules of one is not seen by the other: adapters, hooks, modes, configs, which parameters are
    trained. The precision that a Trainer has run the model in is not the twin's. Weights of quantised layers are the
    same objects, since their class may hold more than numbers.

    Args:
        model: a transformers model, inside PEFT or not.
    """
    memo: dict[int, object] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not (parameter.requires_grad or any(part in name for part in OF_ADAPTERS)):
            is_plain = type(parameter) is nn.Parameter
            memo[id(parameter)] = nn.Parameter(parameter.data, requires_grad=False) if is_plain else parameter
    memo |= {id(state): state for state in shared_states(model)}
    twin = copy.deepcopy(model, memo)
    # what a Trainer has made of the model for its own precision: that of the twin would think it done
    twin.__dict__.pop("_is_accelerate_prepared", None)
    if (forward := twin.__dict__.pop("_original_forward", None)) is not None:
        twin.forward = forward
    return twin
