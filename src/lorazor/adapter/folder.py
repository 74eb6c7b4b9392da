"""Adapter folders: what `save_pretrained` of PEFT wrote, read without the base model."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorazor.adapter.adalora import SCALES, is_adalora, plain_config, plain_keys, plain_tensor
from lorazor.adapter.experts import names_of_parameters
from lorazor.adapter.origins import (
    CONFIG_FILE,
    PICKLE_FILE,
    WEIGHTS_FILE,
    about_ranks,
    check_is_of_peft,
    unwrapped,
)
from lorazor.adapter.sites import DORA_OF_EMBEDDING, Site, check_is_plain_lora, in_order, locate
from lorazor.errors import AdapterError, UnsupportedAdapterError

BASE_PREFIX = "base_model.model."  # PeftModel.base_model.model is the base model
_LORA_KEY = re.compile(r"(?P<name>.+)\.(?P<part>lora_[AB]\.(?:weight|bias)|lora_embedding_[AB]|lora_magnitude_vector)")
LINEAR_PARTS = ("lora_A.weight", "lora_B.weight")
MAGNITUDES = "lora_magnitude_vector"
_PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
_PEFT_DEFAULT = 8  # of both settings in peft.LoraConfig, for configs that leave them out


@dataclass(frozen=True)
class AdapterFolder:
    """A LoRA adapter on disk.

    Attributes:
        path: the folder.
        config: the contents of its `adapter_config.json`, as they are; of AdaLoRA those of the same as plain LoRA.
        sites: every LoRA site by stack, layer and name, see `in_order`; those outside stacks last.
        weights: the file with the tensors, `adapter_model.safetensors` or the older `adapter_model.bin`.
        shapes: shape of every tensor in that file, by its key there, less the names of wrappers (torch.compile).
        keys: the keys of each site's tensors, by site and part: `{"model.layers.0.q_proj": {"lora_A.weight": ...}}`.
        wrapped: the keys that are other in the file, by those of `shapes`. PEFT reads such a file as if it were empty.
        adalora: the config of an AdaLoRA; its tensors are rewritten to plain LoRA when they are loaded.
        origin: the user's folder, where this is another form of it in a folder that goes away.
    """

    path: Path
    config: dict[str, Any]
    sites: tuple[Site, ...]
    weights: Path
    shapes: Mapping[str, tuple[int, ...]]
    keys: Mapping[str, Mapping[str, str]]
    wrapped: Mapping[str, str] = field(default_factory=dict)
    adalora: Mapping[str, Any] | None = None
    origin: Path | None = None

    @property
    def place(self) -> Path:
        """The user's folder."""
        return self.origin or self.path

    @property
    def name(self) -> str:
        """The user's folder, for messages."""
        return str(self.place)


def read_adapter(path: str | Path) -> AdapterFolder:
    """Read what is in an adapter folder, from its config and the header of its weights.

    Args:
        path: folder with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).
    Returns:
        The folder's sites, with ranks from the tensors and scalings from the config, as PEFT would compute them.
    Raises:
        AdapterError: no folder, config or weights there, either of them broken, or the two disagree.
        UnsupportedAdapterError: the adapter is not plain LoRA.
    """
    path = Path(path)
    if not path.is_dir():
        raise AdapterError(f"There is no adapter folder {str(path)!r}. Pass a local folder with an {CONFIG_FILE}.")
    check_is_of_peft(path)
    config = _read_config(path / CONFIG_FILE)
    adalora = config if is_adalora(config) else None
    check_is_plain_lora(config if adalora is None else {**config, "peft_type": "LORA"}, str(path))
    weights = next((path / name for name in (WEIGHTS_FILE, PICKLE_FILE) if (path / name).is_file()), None)
    if weights is None:  # looked for in PEFT's order of preference
        shards = sorted(found.name for found in path.glob("adapter_model-*-of-*"))
        advice = (
            f"PEFT reads no parts, such as {shards[0]!r}: join them in one file" if shards else "Copy the weights there"
        )
        raise AdapterError(f"{str(path)!r} has neither {WEIGHTS_FILE} nor {PICKLE_FILE}. {advice}.")
    stored = _read_shapes(weights)
    keys = {unwrapped(key): key for key in stored}
    if len(keys) < len(stored):
        raise AdapterError(
            f"{str(weights)!r} has tensors with and without the names of wrappers. Save the adapter again."
        )
    if adalora is not None:
        of_file = {key: stored[name] for key, name in keys.items()}
        plain, scales = plain_keys(of_file), [key for key in of_file if key.endswith(SCALES)]
        names = {key.removeprefix(BASE_PREFIX).removesuffix(SCALES): 0 not in of_file[key] for key in scales}
        config, keys = plain_config(config, names), {key: keys[old] for key, old in plain.items()}
    shapes = {key: stored[keys[key]] for key in sorted(keys)}
    wrapped = {key: name for key, name in keys.items() if key != name}
    by_module = _keys_by_module(shapes, bool(config.get("use_dora")), str(weights))
    of_parameters = names_of_parameters(config, by_module)
    by_site = {of_parameters.get(module, module): own for module, own in by_module.items()}
    parameters = {*of_parameters.values()}
    sites = [
        _read_site(name, {part: shapes[key] for part, key in own.items()}, config, str(weights), name in parameters)
        for name, own in by_site.items()
    ]
    return AdapterFolder(path, config, tuple(in_order(sites)), weights, shapes, by_site, wrapped, adalora)


def load_tensors(folder: AdapterFolder, keys: Collection[str] | None = None) -> dict[str, Tensor]:
    """Load the tensors of an adapter folder, on the CPU.

    Args:
        folder: what `read_adapter` returned.
        keys: which tensors to load; all of them if left out.
    Returns:
        The tensors by their keys in `shapes`, sorted, in the file's dtypes; no two share memory.
    Raises:
        AdapterError: the file cannot be read any more.
    """
    names = {key: folder.wrapped.get(key, key) for key in sorted(folder.shapes if keys is None else keys)}
    if folder.adalora is None:
        tensors = _stored(folder.weights, names.values())
        return {key: tensors[name] for key, name in names.items()}
    pairs = {key: name.rpartition(".") for key, name in names.items() if split_key(key) is not None}
    scales = {key: f"{site}{SCALES}" for key, (site, _, _) in pairs.items()}
    tensors = _stored(folder.weights, [*names.values(), *scales.values()])
    return {
        key: plain_tensor(folder.adalora, pairs[key][2], tensors[name], tensors[scales[key]])
        if key in pairs
        else tensors[name]
        for key, name in names.items()
    }


def lora_dtypes(folder: AdapterFolder) -> set[torch.dtype]:
    """Number formats of A and B in the file."""
    return {tensor.dtype for key, tensor in load_tensors(folder).items() if split_key(key) is not None}


def check_is_finite(folder: AdapterFolder) -> None:
    """Refuse an adapter with numbers that are none, before a base model is loaded for it.

    Raises:
        AdapterError: NaN or infinite numbers.
    """
    for key, tensor in load_tensors(folder).items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise AdapterError(
                f"{str(folder.weights)!r}: {key!r} holds NaN or infinite numbers. Take an earlier checkpoint, or train "
                "it again."
            )


def split_key(key: str) -> tuple[str, str] | None:
    """Module and part of a tensor's key, or None for tensors that are not LoRA (`modules_to_save`, embeddings).

    Args:
        key: `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`.
    Returns:
        ("model.layers.0.self_attn.q_proj", "lora_A.weight"); the part is one of lora_A.weight, lora_B.weight,
        lora_B.bias, lora_embedding_A, lora_embedding_B, lora_magnitude_vector.
    """
    match = _LORA_KEY.fullmatch(key)
    return None if match is None else (match["name"].removeprefix(BASE_PREFIX), match["part"])


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"{str(path.parent)!r} has no {CONFIG_FILE}, so it is not a PEFT adapter folder.") from error
    except OSError as error:
        raise AdapterError(f"Cannot read {str(path)!r}: {error.strerror}.") from error
    except ValueError as error:
        raise AdapterError(f"{str(path)!r} is not a JSON file ({error}). Save the adapter again.") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{str(path)!r} must hold a JSON object, not {type(config).__name__}.")
    return config


def _stored(weights: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of a file by their keys there."""
    if weights.name == PICKLE_FILE:
        tensors = _load_pickle(weights)
        return {name: tensors[name].detach().contiguous().clone() for name in names}
    try:
        with safe_open(weights, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise _broken_weights(weights, error) from error


def _read_shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    if weights.name == PICKLE_FILE:
        return {key: tuple(tensor.shape) for key, tensor in sorted(_load_pickle(weights).items())}
    try:
        with safe_open(weights, framework="pt") as file:  # reads the header only
            return {key: tuple(file.get_slice(key).get_shape()) for key in sorted(file.keys())}
    except (SafetensorError, OSError) as error:
        raise _broken_weights(weights, error) from error


def _load_pickle(weights: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(weights, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise AdapterError(
            f"{str(weights)!r} is damaged or holds more than tensors, and loading it could run foreign code. "
            f"Convert it to {WEIGHTS_FILE} where you trust it."
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        raise _broken_weights(weights, error) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise AdapterError(f"{str(weights)!r} must hold a dictionary of tensors, not {type(tensors).__name__}.")
    return tensors


def _broken_weights(weights: Path, error: Exception) -> AdapterError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return AdapterError(f"Cannot read {str(weights)!r}: {reason}. The file is damaged or cut short; copy it again.")


def _keys_by_module(shapes: Collection[str], is_dora: bool, where: str) -> dict[str, dict[str, str]]:
    """The keys of the tensors of LoRA, by module and part."""
    if bare := [key for key in shapes if not key.startswith(BASE_PREFIX)]:
        raise AdapterError(
            f"{where}: {len(bare)} of {len(shapes)} tensors, such as {bare[0]!r}, have names without {BASE_PREFIX!r}, "
            f"and PEFT leaves them out. Save the adapter with PEFT, or with transformers and save_peft_format=True."
        )
    keys: dict[str, dict[str, str]] = {}
    for key in shapes:
        split = split_key(key)
        if split and (is_dora or split[1] != MAGNITUDES):
            keys.setdefault(split[0], {})[split[1]] = key
        elif any(segment.startswith("lora_") for segment in key.split(".")):
            raise UnsupportedAdapterError(f"{where}: the tensor {key!r} does not belong to plain LoRA.")
    if not keys:
        raise AdapterError(f"{where} has no LoRA tensors (lora_A, lora_B).")
    return keys


def _read_site(
    name: str, parts: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], where: str, is_on_parameter: bool
) -> Site:
    """One site from the shapes of its tensors.

    A is (rank, inputs) or (rank, channels, height, width), B is (outputs, rank) or (outputs, rank, 1, 1); of experts
    they have experts * rank instead of the rank. The magnitudes of DoRA are (outputs,) or (1, outputs, 1, 1).
    """
    pair = ("lora_embedding_A", "lora_embedding_B") if "lora_embedding_A" in parts else LINEAR_PARTS
    is_dora = bool(config.get("use_dora"))
    if is_dora and "lora_embedding_A" in parts:
        raise UnsupportedAdapterError(f"{where}: {name} {DORA_OF_EMBEDDING}")
    if missing := [part for part in (*pair, *([MAGNITUDES] if is_dora else [])) if part not in parts]:
        listed = ", ".join(sorted(parts))
        raise AdapterError(f"{where}: {name} has no {missing[0]}, only {listed}. Save the adapter again.")
    down, up = (parts[part] for part in pair)
    if len(down) < 2 or len(up) < 2 or down[0] != up[1] or 0 in down + up:
        raise AdapterError(f"{where}: the shapes of {name} disagree: A is {down}, B is {up}. Save the adapter again.")
    rank, expected = down[0], setting_of(config, "r", name)
    n_experts, n_over = divmod(rank, int(expected)) if is_on_parameter else (1, rank != expected)
    if n_over or n_experts < 1:
        raise AdapterError(
            f"{where}: {name} has rank {rank}, but {CONFIG_FILE} says {expected}. "
            f"{about_ranks(name, rank, expected, setting_of(config, 'lora_alpha', name))}"
        )
    rank //= n_experts
    stack, layer, kind = locate(name)
    return Site(
        name=name,
        stack=stack,
        layer=layer,
        kind=kind,
        rank=rank,
        scaling=setting_of(config, "lora_alpha", name) / (math.sqrt(rank) if config.get("use_rslora") else rank),
        n_parameters=sum(math.prod(shape) for shape in parts.values()),
        has_directions=set(parts) == set(LINEAR_PARTS) and len(down) == len(up) == 2,
        n_experts=n_experts,
        is_on_parameter=is_on_parameter,
        is_dora=is_dora,
    )


def setting_of(config: Mapping[str, Any], field: Literal["r", "lora_alpha"], site: str | None = None) -> float:
    """What PEFT would use for a site: the first matching entry of the pattern, or else the setting for all sites.

    Args:
        config: the contents of an `adapter_config.json`.
        field: which setting.
        site: its name; only the setting for all sites counts if left out.
    Raises:
        AdapterError: it is not a number, or 0, or the pattern is none.
    """
    value, where, pattern = config.get(field, _PEFT_DEFAULT), field, _PATTERNS[field]
    if site is not None:
        entries = config.get(pattern) or {}
        if not isinstance(entries, dict):
            raise AdapterError(f"{CONFIG_FILE}: {pattern} must be an object, not {type(entries).__name__}.")
        try:
            key = get_pattern_key(list(entries), site)
        except re.error as error:
            raise AdapterError(
                f"{CONFIG_FILE}: {pattern} has a key that is no regular expression ({error})."
            ) from error
        if key in entries:
            value, where = entries[key], f"{pattern}[{key!r}]"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value == 0:
        raise AdapterError(f"{CONFIG_FILE}: {where} is {value!r}, but must be a number other than 0.")
    return value
