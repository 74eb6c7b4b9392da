"""A PEFT model in memory, such as one that was just trained: its adapter as a folder, and the same beside it.

The model itself is only read: what is done happens to a twin on the same base weights.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lorazor.adapter.decoding import prepare_decoder_
from lorazor.adapter.folder import AdapterFolder, read_adapter
from lorazor.adapter.load import Loaded, load_tokenizer, pad_as_, swap
from lorazor.adapter.sites import find_sites
from lorazor.adapter.tasks import task_of_adapter
from lorazor.adapter.twin import twin_of
from lorazor.errors import SettingsError
from lorazor.settings import ModelSettings


def save_live(model: PeftModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> AdapterFolder:
    """Write the active adapter of a model.

    Args:
        model: with one active adapter, not merged.
        folder: where to; it exists, and is empty.
        tokenizer: written beside it, if one is given.
    Raises:
        AdapterError, UnsupportedAdapterError: see `find_sites`.
    """
    name = find_sites(model)[0].adapter
    model.save_pretrained(str(folder), selected_adapters=[name])
    place = folder if name == "default" else folder / name  # as PEFT has it
    if tokenizer is not None:
        tokenizer.save_pretrained(str(place))
    return read_adapter(place)


def load_beside(
    model: PeftModel, folder: AdapterFolder, tokenizer: PreTrainedTokenizerBase | None, settings: ModelSettings
) -> Loaded:
    """The adapter of a folder on the base weights of a model in memory, which takes the memory of an adapter.

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
    base: Any = twin.unload()
    vars(base).pop("peft_config", None)
    task = task_of_adapter(folder.config, base.config) if settings.task == "auto" else settings.task
    if tokenizer is None:
        name = folder.config.get("base_model_name_or_path") or base.config.name_or_path
        if not name:
            raise SettingsError("The adapter names no base model to take the tokenizer of. Pass tokenizer=.")
        tokenizer = load_tokenizer(None, name, ModelSettings())
    else:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    pad_as_(base, tokenizer, task)
    if task == "seq2seq":
        prepare_decoder_(base, tokenizer)
    return swap(Loaded(base, tokenizer, task, []), folder)
