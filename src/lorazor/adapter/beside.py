"""What an adapter brings beside LoRA: trained heads, embeddings and tokens, and a vocabulary of its own.

An adapter that was trained with new tokens has embeddings with more rows than the base model that it names, since that
was saved before. The base gets as many, as the one it was trained on did.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lorazor.adapter.folder import BASE_PREFIX, AdapterFolder, load_tensors, split_key
from lorazor.errors import BaseModelError

_OF_PEFT = re.compile(r"\.(base_layer|modules_to_save|original_module|token_adapter)(?=\.)")
"""What PEFT puts into the names of parameters that it wraps."""
_DELTA = ".trainable_tokens_delta"
_ROWS = {"lora_embedding_A": 1, "lora_B.weight": 0}
"""Parts of LoRA on an embedding and on an output layer, and the axis of the tokens."""


def parameter_of(key: str) -> str:
    """The parameter of the base model that a tensor beside LoRA replaces, or of which it replaces some rows."""
    name = _OF_PEFT.sub("", key.removeprefix(BASE_PREFIX))
    return f"{name.removesuffix(_DELTA)}.weight" if name.endswith(_DELTA) else name


def beside_lora(folder: AdapterFolder) -> list[str]:
    """The parameters of the base model that an adapter replaces, wholly or some rows."""
    return sorted({parameter_of(key) for key in folder.shapes if not split_key(key)})


def bytes_beside(folder: AdapterFolder) -> dict[str, int]:
    """What an adapter's file has beside LoRA, in bytes by module of the base model; PEFT may write one three times."""
    found: dict[str, int] = {}
    for key, tensor in load_tensors(folder, [key for key in folder.shapes if not split_key(key)]).items():
        module = parameter_of(key).rpartition(".")[0]
        found[module] = found.get(module, 0) + tensor.nbytes
    return found


def replaced_by(model: PreTrainedModel, folder: AdapterFolder) -> dict[str, Tensor]:
    """Copies, on the CPU, of what an adapter is going to write over."""
    own = model.state_dict()
    return {name: own[name].detach().to("cpu", copy=True) for name in beside_lora(folder) if name in own}


def n_rows(model: PreTrainedModel) -> int:
    """Rows of a model's embedding of tokens."""
    embedding: Any = model.get_input_embeddings()
    return len(embedding.weight)


def fit_vocabulary_(model: PreTrainedModel, folder: AdapterFolder, n_own: int) -> None:
    """Give the embeddings of a base model as many rows as those have that an adapter was trained on.

    Args:
        model: the base model, without an adapter.
        folder: the adapter.
        n_own: rows that the base model was loaded with.
    Raises:
        BaseModelError: the adapter has no rows for new tokens: they would be drawn at random, others at every load.
    """
    rows, before = _n_rows_wanted(model, folder, n_own), n_rows(model)
    if rows == before:
        return
    if before < n_own:
        raise BaseModelError(
            f"{str(folder.path)!r} was trained with {rows} tokens, and the model has {before} of {n_own} left. Measure "
            "these adapters apart."
        )
    lacking = [name for name, _ in _embeddings(model) if rows > n_own and not _has_rows(folder, name, n_own, rows)]
    if lacking:
        raise BaseModelError(
            f"{str(folder.path)!r} was trained with {rows} tokens, {rows - n_own} more than the base model has, and "
            f"has no rows of {lacking[0]!r} for them: they would be drawn at random. Pass the base model with these "
            "tokens (--model), or save the adapter with its embeddings (save_embedding_layers=True)."
        )
    model.resize_token_embeddings(rows, mean_resizing=False)


def _n_rows_wanted(model: PreTrainedModel, folder: AdapterFolder, n_own: int) -> int:
    """As the adapter's own tensors of embeddings and output layers have it, or else as many as its new tokens need."""
    shapes = []
    for name, _ in _embeddings(model):
        for key, shape in folder.shapes.items():
            site, part = split_key(key) or ("", "")
            if not site and not key.endswith(_DELTA) and parameter_of(key) == f"{name}.weight":
                shapes.append(shape[0])
            elif site == name and part in _ROWS:
                shapes.append(shape[_ROWS[part]])
    tokens = [token for name, _ in _embeddings(model) for token in _trained_tokens(folder, name)]
    return max(shapes, default=max(n_own, 1 + max(tokens, default=0)))


def _has_rows(folder: AdapterFolder, name: str, n_own: int, rows: int) -> bool:
    """Whether an adapter has all rows of an embedding, or those of the new tokens."""
    keys = [key for key in folder.shapes if not split_key(key) and parameter_of(key) == f"{name}.weight"]
    is_whole = any(not key.endswith(_DELTA) for key in keys)
    return is_whole or set(range(n_own, rows)) <= set(_trained_tokens(folder, name))


def _trained_tokens(folder: AdapterFolder, name: str) -> list[int]:
    """Tokens of which the rows of an embedding are trained alone; a plain list is of the embedding of the input."""
    chosen = folder.config.get("trainable_token_indices") or {}
    if not isinstance(chosen, Mapping):
        chosen = {"embed_tokens": chosen}
    return [token for key, tokens in chosen.items() if f".{name}".endswith(f".{key}") for token in tokens]


def _embeddings(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of the embedding of tokens, and of the output layer where it has weights of its own."""
    names = {module: name for name, module in model.named_modules()}
    first: Any = model.get_input_embeddings()
    last: Any = model.get_output_embeddings()
    yield names[first], first
    if last in names and getattr(last, "weight", None) is not first.weight:
        yield names[last], last
