"""The base model of an adapter, and its tokenizer: from a folder or a hub, in the form that the settings ask for."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lorazor.adapter.find import base_of
from lorazor.adapter.folder import AdapterFolder
from lorazor.adapter.quantization import FULL, form_of, keep_packing_, quantizing
from lorazor.adapter.tasks import AUTO_CLASSES, Task, class_for, modules_to_train, task_of_adapter, task_of_base
from lorazor.errors import BaseModelError
from lorazor.settings import ModelSettings


def load_config(source: str, settings: ModelSettings, **options: Any) -> PreTrainedConfig:
    """The config of a base model.

    Raises:
        BaseModelError: it cannot be loaded.
    """
    return _from_hub(AutoConfig, source, settings, **options)


def load_base(
    kind: Any, source: str, config: PreTrainedConfig, task: Task, settings: ModelSettings, n_classes: int | None
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The base model, and the names of its parameters that the checkpoint does not have at this size.

    Args:
        kind: what loads it; see `class_for`.
        source: folder or hub id.
        config: its config.
        task: what it is for.
        settings: of which the form, the place and the precision matter.
        n_classes: of its head; None for the head that it has.
    Raises:
        BaseModelError: it cannot be loaded, or not in that form.
    """
    options: dict[str, Any] = {}
    if n_classes is not None:
        options = {"num_labels": n_classes, "ignore_mismatched_sizes": True}
    device_map = settings.device_map or ("cuda" if torch.cuda.is_available() else None)
    on_cpu = device_map in (None, "cpu")
    dtype = ("float32" if on_cpu else "auto") if settings.dtype == "auto" else settings.dtype
    if device_map == "cuda" and "LOCAL_RANK" in os.environ:  # one process per GPU under accelerate launch
        device_map = f"cuda:{os.environ['LOCAL_RANK']}"
    if settings.gguf_file:
        options["quantization_config"] = GgufConfig(dequantize=True)  # plain tensors, which can be trained on
    elif settings.quantization or form_of(config) != FULL:
        options |= quantizing(config, settings.quantization, source, dtype, _head_of(config, task))
    options |= {"dtype": dtype, "device_map": device_map, "output_loading_info": True}
    model, found = _from_hub(kind, source, settings, **options)
    keep_packing_(model)
    return model, (*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"]))


def without_weights(folder: AdapterFolder, settings: ModelSettings, **options: Any) -> PreTrainedModel:
    """The base model of an adapter without its weights, to look up what it is made of.

    Args:
        folder: the adapter.
        settings: of the base model.
        options: of `from_pretrained`, such as `local_files_only`.
    Raises:
        SettingsError, BaseModelError: no base model is named, or its config cannot be loaded.
    """
    config = load_config(base_of(folder, settings), settings, **options)
    task = task_of_adapter(folder.config, config) if settings.task == "auto" else settings.task
    kind = class_for(task, config, [site.name for site in folder.sites])
    with torch.device("meta"):
        return kind.from_config(config)


def task_of_model(settings: ModelSettings) -> Task:
    """What a base model is for, by its config alone.

    Raises:
        BaseModelError: the config cannot be loaded, or its model is for none of the tasks.
    """
    return task_of_base(load_config(base_of(None, settings), settings))


def load_tokenizer(source: str, settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model or of an adapter folder; it can pad."""
    tokenizer = _from_hub(AutoTokenizer, source, settings)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _head_of(config: PreTrainedConfig, task: Task) -> list[str]:
    """Modules of the head that a task puts on a base model: they are trained, which numbers of 4 bits cannot be."""
    if task not in ("classification", "question-answering"):
        return []
    with torch.device("meta"):
        return modules_to_train(AUTO_CLASSES[task].from_config(config), task, ())


def _from_hub(kind: Any, source: str, settings: ModelSettings, **options: Any) -> Any:
    if settings.gguf_file:
        options["gguf_file"] = settings.gguf_file
    try:
        return kind.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError, RuntimeError, AssertionError) as error:  # the last: no such device
        reason = str(error).strip().splitlines()[0]
        if reason.startswith("Unrecognized configuration class"):  # and then all those that it knows
            raise BaseModelError(
                f"The base model {source!r} has no form that {kind.__name__} loads: it has another task (--task), or "
                f"reads more than text. Pass another base model."
            ) from error
        advice = "" if isinstance(error, ImportError) else " Pass a hub id or a folder."  # it says what is to do
        raise BaseModelError(f"Cannot load the base model {source!r}: {reason}{advice}") from error
