"""Embeddings that an adapter stores whole, where only some of their rows are not the base model's.

PEFT can store such rows alone (`trainable_token_indices`): it puts them in the place of the base model's, so that the
two forms compute the same, where the base is the same. No model is loaded: its embeddings are read from its files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from lorazor.adapter.base import without_weights
from lorazor.adapter.beside import embeddings, parameter_of
from lorazor.adapter.folder import BASE_PREFIX, AdapterFolder, load_tensors, split_key
from lorazor.errors import BaseModelError, UnsupportedAdapterError
from lorazor.naming import is_named
from lorazor.settings import ModelSettings

_DELTA = "token_adapter.trainable_tokens_delta"


@dataclass(frozen=True, eq=False)
class ChangedRows:
    """Rows in the place of whole embeddings.

    Attributes:
        tokens: by embedding, the rows that differ from the base model's, rising; none of one that is the base model's.
        tensors: these rows, by their keys in the file, (n_tokens, d).
        replaced: keys of the tensors that they stand for.
        n_bytes: what the file has less.
    """

    tokens: Mapping[str, list[int]]
    tensors: Mapping[str, Tensor]
    replaced: frozenset[str]
    n_bytes: int

    def applied(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
        """Settings that change in the config, and the tensors, of an adapter that stores the rows alone."""
        kept = {key: tensor for key, tensor in tensors.items() if key not in self.replaced}
        whole = config.get("modules_to_save") or []
        saved = [name for name in whole if not any(is_named(own, name) for own in self.tokens)]
        indices = {name: own for name, own in self.tokens.items() if own}
        changes = {"modules_to_save": saved or None, "trainable_token_indices": indices or None}
        return changes, {**kept, **self.tensors}


def changed_rows(folder: AdapterFolder, source: str, local_only: bool = False) -> ChangedRows:
    """Find the rows of an adapter's embeddings that differ from those of its base model.

    Args:
        folder: the adapter.
        source: its base model, a folder or hub id.
        local_only: ask no hub.
    Raises:
        UnsupportedAdapterError: the adapter has no whole embedding, or rows alone would compute something else.
        BaseModelError: the embeddings of the base model cannot be read.
    """
    where = folder.name
    model = without_weights(folder, ModelSettings(model=source), local_files_only=local_only)
    names = [name for name, _ in embeddings(model)]
    found = {name: _keys_of(folder, name) for name in dict.fromkeys([*names, *_output_layer(model)])}
    own = {name: keys for name, keys in found.items() if keys}
    if not own:
        raise UnsupportedAdapterError(f"{where} stores no whole embedding. Leave --changed-rows-only out.")
    _check_alone(folder, own, model)
    tensors = {name: _same(folder, name, keys) for name, keys in own.items()}
    base = {name: _of_base(source, names[0] if name not in names else name, local_only) for name in own}
    tokens = {name: _differing(tensor, base[name], f"{where}: {name}") for name, tensor in tensors.items()}
    tied = [name for name in found if name not in names]
    if tied and any(tokens.values()):
        _check_tied(folder, tensors, names[0], tied[0], model)
        tokens = {names[0]: tokens[names[0]], tied[0]: []}  # PEFT ties the rows as the weights are tied
    chosen = {name: torch.tensor(own) for name, own in tokens.items() if own}
    rows = {f"{BASE_PREFIX}{name}.{_DELTA}": tensors[name][own] for name, own in chosen.items()}
    replaced = frozenset(key for keys in own.values() for key in keys)
    before = sum(tensor.nbytes for tensor in load_tensors(folder, replaced).values())
    saved = before - sum(tensor.nbytes for tensor in rows.values())
    if saved <= 0:
        raise UnsupportedAdapterError(f"{where}: every row of its embeddings differs from the base model's.")
    return ChangedRows(tokens, rows, replaced, saved)


def _output_layer(model: PreTrainedModel) -> list[str]:
    """The name of the output layer, which `embeddings` leaves out where it has the weights of the first."""
    last = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if last is not None and module is last]


def _keys_of(folder: AdapterFolder, name: str) -> list[str]:
    """Keys of the tensors that an adapter has in the place of a whole module; it may have one under several names."""
    own = [key for key in folder.shapes if split_key(key) is None and not key.endswith(_DELTA)]
    return [key for key in own if parameter_of(key).rpartition(".")[0] == name]


def _check_alone(folder: AdapterFolder, own: Mapping[str, list[str]], model: PreTrainedModel) -> None:
    """Refuse what PEFT cannot store as rows, or computes otherwise then."""
    where, advice = folder.name, "Leave --changed-rows-only out."
    if folder.config.get("trainable_token_indices") or folder.config.get("ensure_weight_tying"):
        raise UnsupportedAdapterError(f"{where} stores some rows alone already, or ties what it stores. {advice}")
    others = {parameter_of(key).rpartition(".")[0] for key in folder.shapes if split_key(key) is None} - own.keys()
    for name, keys in own.items():
        module: Any = model.get_submodule(name)
        if any(site.name == name for site in folder.sites):
            raise UnsupportedAdapterError(
                f"{where} has LoRA on {name} as well, which PEFT does not combine with rows. {advice}"
            )
        is_plain = type(module).forward in (nn.Embedding.forward, nn.Linear.forward) or hasattr(module, "embed_scale")
        if not is_plain or getattr(module, "bias", None) is not None or any(".weight" not in key for key in keys):
            raise UnsupportedAdapterError(
                f"{where}: {name} is more than a table of rows (a bias, or a class of its own), which PEFT leaves out "
                f"where it stores rows alone. {advice}"
            )
        for entry in folder.config.get("modules_to_save") or ():
            if is_named(name, entry) and (odd := [other for other in others if is_named(other, entry)]):
                raise UnsupportedAdapterError(f"{where}: modules_to_save names {odd[0]} by {entry!r} too. {advice}")


def _check_tied(
    folder: AdapterFolder, tensors: Mapping[str, Tensor], first: str, last: str, model: PreTrainedModel
) -> None:
    """Of a base model whose output layer has the weights of the embedding, PEFT ties changed rows as well."""
    is_copy = any(is_named(first, name) for name in folder.config.get("modules_to_save") or ())
    knows = bool(model.config.to_dict().get("tie_word_embeddings"))  # PEFT looks nowhere else
    is_tied = torch.equal(tensors[first], tensors[last]) if first in tensors and last in tensors else not is_copy
    if first in tensors and is_tied and knows:
        return
    raise UnsupportedAdapterError(
        f"{folder.name!r}: the base model ties {first} and {last}, and the adapter changes them apart. PEFT would "
        "tie rows stored alone, which computes something else. Leave --changed-rows-only out."
    )


def _same(folder: AdapterFolder, name: str, keys: list[str]) -> Tensor:
    """The one tensor that stands under several names; PEFT may write three."""
    first, *others = load_tensors(folder, keys).values()
    if any(not torch.equal(first, one) for one in others):
        raise UnsupportedAdapterError(f"{folder.name!r} has {name} {len(keys)} times, with different numbers.")
    return first


def _differing(tensor: Tensor, base: Tensor, where: str) -> list[int]:
    """Rows that are not the base model's, and those that it does not have; numbers are compared as they are."""
    if tensor.shape[1:] != base.shape[1:] or len(tensor) < len(base):
        raise UnsupportedAdapterError(
            f"{where} is {tuple(tensor.shape)}, that of the base model {tuple(base.shape)}: rows alone cannot say that."
        )
    wide = torch.promote_types(tensor.dtype, base.dtype)
    changed = (tensor[: len(base)].to(wide) != base.to(wide)).any(dim=1)
    return [*changed.nonzero().flatten().tolist(), *range(len(base), len(tensor))]


def _of_base(source: str, name: str, local_only: bool) -> Tensor:
    """The weight of an embedding from the files of a base model, without the rest.

    Checkpoints of bare models have the names without their first part (GPT-2's `wte.weight`).
    """
    weights = {}
    for file in ("model.safetensors.index.json", "model.safetensors"):
        found = cached_file(source, file, local_files_only=local_only, _raise_exceptions_for_missing_entries=False,
                            _raise_exceptions_for_connection_errors=False)  # fmt: skip
        if found and file.endswith(".json"):
            weights = json.loads(Path(found).read_text(encoding="utf-8"))["weight_map"]
        elif found and not weights:
            with safe_open(found, framework="pt") as tensors:
                weights = dict.fromkeys(tensors.keys(), file)
    wanted = f"{name}.weight"
    matches = [key for key in weights if key == wanted] or [key for key in weights if is_named(wanted, key)]
    file = len(matches) == 1 and cached_file(source, weights[matches[0]], local_files_only=local_only,
                                             _raise_exceptions_for_missing_entries=False)  # fmt: skip
    if not file:
        raise BaseModelError(
            f"The files of the base model {source!r} have no {wanted!r} in safetensors to compare with. Pass a folder "
            "that has it (--model), or leave --changed-rows-only out."
        )
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(matches[0])
