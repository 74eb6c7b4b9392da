"""The base model of an adapter without its weights: names and shapes of its modules, from its config alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorazor.adapter.base import without_weights
from lorazor.adapter.find import base_of
from lorazor.adapter.folder import AdapterFolder
from lorazor.adapter.sites import Site, locate
from lorazor.errors import BaseModelError
from lorazor.settings import ModelSettings

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Modules that servers put into one matrix, by the names that Llama and most models after it have for them."""


@dataclass(frozen=True)
class BaseOutline:
    """What a base model consists of.

    Attributes:
        name: as `--model` or the adapter names it.
        architecture: name of its class, `LlamaForCausalLM`.
        linear: inputs and outputs of every linear map, by module name.
        embeddings: rows and width of every table, by module name.
        is_tied: whether output layer and embedding are one matrix.
        n_layers: number of layers, by stack.
        n_bytes: bytes of a number, as the weights are stored.
        parameters: shape of every parameter, by name.
        n_heads: heads of attention, and those of keys and values; (0, 0) of a model that has other names for them.
    """

    name: str
    architecture: str
    linear: Mapping[str, tuple[int, int]]
    embeddings: Mapping[str, tuple[int, int]]
    is_tied: bool
    n_layers: Mapping[str, int] = field(default_factory=dict)
    n_heads: tuple[int, int] = (0, 0)
    n_bytes: int = 4
    parameters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def outline_base(folder: AdapterFolder, settings: ModelSettings) -> BaseOutline:
    """Outline the base model of an adapter; no weights are read.

    Args:
        folder: the adapter, which names its base model.
        settings: another base model than that.
    Raises:
        BaseModelError, SettingsError: no config of a base model is to be had.
    """
    model, name = without_weights(folder, settings), base_of(folder, settings)
    linear, embeddings = {}, {}
    for module_name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            linear[module_name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            linear[module_name] = tuple(module.weight.shape)
        elif isinstance(module, nn.Embedding):
            embeddings[module_name] = (module.num_embeddings, module.embedding_dim)
    n_layers: dict[str, int] = {}
    for module_name in linear:
        stack, layer, _ = locate(module_name)
        if stack is not None and layer is not None:
            n_layers[stack] = max(n_layers.get(stack, 0), layer + 1)
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0) or 0
    return BaseOutline(
        name=name,
        architecture=type(model).__name__,
        linear=linear,
        embeddings=embeddings,
        is_tied=bool(getattr(config, "tie_word_embeddings", False)),
        n_layers=n_layers,
        n_bytes=(getattr(model.config, "dtype", None) or torch.float32).itemsize,
        parameters={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        n_heads=(heads, getattr(config, "num_key_value_heads", None) or heads),
    )


def base_on_this_machine(folder: AdapterFolder) -> str | None:
    """A folder with the config of the base model that an adapter names, if there is one here; nothing is downloaded."""
    source = folder.config.get("base_model_name_or_path")
    if not isinstance(source, str) or not source:
        return None
    beside = next((place for place in (folder.path / source, Path(source)) if (place / "config.json").is_file()), None)
    if beside is not None:
        return str(beside)
    try:
        cached = try_to_load_from_cache(source, "config.json")
    except HFValidationError:  # a path that is not here
        return None
    return str(Path(cached).parent) if isinstance(cached, str) else None


def strangers(folder: AdapterFolder, base: BaseOutline) -> list[Site]:
    """The sites of an adapter that its base model has no module for, or one of another shape."""
    return [site for site in folder.sites if not _fits(site, folder.keys[site.name], folder, base)]


def check_fits(folder: AdapterFolder, base: BaseOutline) -> None:
    """Refuse an adapter of another base model, which most servers load without a word.

    Raises:
        BaseModelError: a site is on no module of the base model, or on one of another shape.
    """
    found = strangers(folder, base)
    if not found:
        return
    what = "none" if len(found) == len(folder.sites) else f"{len(folder.sites) - len(found)}"
    raise BaseModelError(
        f"{what} of the {len(folder.sites)} sites of {folder.name!r} fit {base.name!r} ({base.architecture}): "
        f"{found[0].name!r} is not there, or has another shape. Pass the base model that it was trained on (--model)."
    )


def group_of(name: str) -> tuple[str, ...]:
    """The modules that a server may put into one matrix with this one, itself among them; none where it stands alone.

    Args:
        name: full module name, `model.layers.0.self_attn.k_proj`.
    Returns:
        Full names, in the order of the matrix: those of q, k and v.
    """
    parent, _, last = name.rpartition(".")
    group = next((group for group in GROUPS if last in group), ())
    return tuple(f"{parent}.{one}" if parent else one for one in group)


def absent_from_groups(names: Collection[str], first: str, whenever: Collection[str]) -> tuple[str, ...]:
    """Modules of one name that are not there, though others of their group are.

    Args:
        names: full module names of the sites that are there.
        first: last part of the names to look for, `v_proj`.
        whenever: the others, of which one is enough: `("q_proj",)`.
    """
    parents = dict.fromkeys(name.rpartition(".")[0] for name in names if name.rpartition(".")[2] in whenever)
    wanted = (f"{parent}.{first}" if parent else first for parent in parents)
    return tuple(name for name in wanted if name not in names)


def _fits(site: Site, keys: Mapping[str, str], folder: AdapterFolder, base: BaseOutline) -> bool:
    shapes = {part: folder.shapes[key] for part, key in keys.items()}
    if "lora_embedding_A" in shapes:
        rows, width = shapes["lora_embedding_A"][1], shapes["lora_embedding_B"][0]
        found = base.embeddings.get(site.name)
        return found is not None and found[1] == width and rows >= found[0]  # rows of new tokens may have come since
    if len(shapes["lora_A.weight"]) != 2 or len(shapes["lora_B.weight"]) != 2:
        return True  # a convolution, whose shape says little
    if site.is_on_parameter:
        own = base.parameters.get(site.name, ())
        widths = (shapes["lora_A.weight"][1], shapes["lora_B.weight"][0])
        return sorted(own[-2:]) == sorted(widths) and (len(own) < 3 or own[0] == site.n_experts)
    inputs, outputs = shapes["lora_A.weight"][1], shapes["lora_B.weight"][0]
    found = base.linear.get(site.name)
    return found is not None and found[0] == inputs and (found[1] == outputs or (site.stack is None))
