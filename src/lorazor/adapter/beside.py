"""What an adapter brings beside LoRA: trained heads, embeddings and tokens, and a vocabulary of its own.

An adapter that was trained with new tokens has embeddings with more rows than the base model that it names, since that
was saved before. The base gets as many, as the one it was trained on did.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from inspect import signature
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorazor.adapter.folder import BASE_PREFIX, CONFIG_FILE, AdapterFolder, load_tensors, split_key
from lorazor.errors import AdapterError, BaseModelError
from lorazor.naming import is_named

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
    """Copies, on the CPU, of what an adapter is going to write over.

    Raises:
        BaseModelError: some of it is kept away from where it is computed (accelerate's offloading).
    """
    own = model.state_dict()
    names = [name for name in beside_lora(folder) if name in own]
    _check_at_hand({name: own[name] for name in names}, folder)
    return {name: own[name].detach().to("cpu", copy=True) for name in names}


def _check_at_hand(weights: Mapping[str, Tensor], folder: AdapterFolder) -> None:
    away = next((name for name, weight in weights.items() if weight.is_meta), None)
    if away is not None:
        raise BaseModelError(
            f"{folder.name!r} brings its own {away!r}, which the device map keeps off the device between two "
            "passes: it cannot be replaced there. Pass another --device-map, such as cpu."
        )


def n_rows(model: PreTrainedModel) -> int | None:
    """Rows of a model's embedding of tokens; None of a model that has no such table (Canine, Perceiver)."""
    embedding = next(embeddings(model), None)
    return None if embedding is None else len(embedding[1].weight)


def fit_vocabulary_(model: PreTrainedModel, folder: AdapterFolder, n_own: int | None) -> None:
    """Give the embeddings of a base model as many rows as those have that an adapter was trained on.

    Args:
        model: the base model, without an adapter.
        folder: the adapter.
        n_own: rows that the base model was loaded with; None of a model without a table of them.
    Raises:
        BaseModelError: the adapter has no rows for new tokens: they would be drawn at random, others at every load; or
            the model cannot have more.
        AdapterError: its config names tokens that are none.
    """
    if n_own is None:
        return
    rows, before = _n_rows_wanted(model, folder, n_own), n_rows(model)
    if rows == before:
        return
    if before is None or before < n_own:
        raise BaseModelError(
            f"{folder.name!r} was trained with {rows} tokens, and the model has {before} of {n_own} left. Measure "
            "these adapters apart."
        )
    lacking = _without_rows(model, folder, range(n_own, rows))
    if lacking:
        raise BaseModelError(
            f"{folder.name!r} was trained with {rows} tokens, {rows - n_own} more than the base model has, and "
            f"has no rows of {lacking[0]!r} for them: they would be drawn at random. Pass the base model with these "
            "tokens (--model), or save the adapter with its embeddings (save_embedding_layers=True)."
        )
    _check_at_hand({f"{name}.weight": module.weight for name, module in embeddings(model)}, folder)
    resize = model.resize_token_embeddings
    options = {"mean_resizing": False} if "mean_resizing" in signature(resize).parameters else {}  # MobileBERT
    try:
        resize(rows, **options)
    except NotImplementedError as error:  # I-BERT
        raise BaseModelError(
            f"{folder.name!r} was trained with {rows} tokens, {rows - n_own} more than the base model has, and "
            f"transformers cannot give a {type(model).__name__} more. Pass the base model with these tokens (--model)."
        ) from error


def check_tokens(
    model: PreTrainedModel,
    folder: AdapterFolder,
    tokenizer: PreTrainedTokenizerBase,
    base_tokenizer: Callable[[], PreTrainedTokenizerBase],
) -> None:
    """Refuse a tokenizer with tokens that the embedding has no rows for.

    Args:
        model: the base model, with as many rows as the adapter was trained on.
        folder: the adapter.
        tokenizer: of the adapter.
        base_tokenizer: gives that of the base model; some of these name a token or two more than there are rows
            (Gemma 3's one of images), which no text has.
    Raises:
        BaseModelError: there are such tokens, and they are not the base model's own.
    """
    rows, n_tokens = n_rows(model), _n_ids(tokenizer)
    if rows is None or n_tokens <= rows:
        return
    with suppress(BaseModelError):  # a base model without a tokenizer
        if n_tokens <= _n_ids(base_tokenizer()):
            return
    raise BaseModelError(
        f"The tokenizer in {folder.name!r} has {n_tokens} tokens, but the embedding has {rows} rows, and the "
        "adapter brings none for the others. Pass the base model that it was trained on (--model), save the adapter "
        "with its embeddings (save_embedding_layers=True), or take tokens that it does not need out of its tokenizer."
    )


def _n_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def _n_rows_wanted(model: PreTrainedModel, folder: AdapterFolder, n_own: int) -> int:
    """As the adapter's own tensors of embeddings and output layers have it, or else as many as its new tokens need."""
    names = [name for name, _ in embeddings(model)]
    shapes = [rows for name in names for rows in _whole(folder, name)]
    for key, shape in folder.shapes.items():
        site, part = split_key(key) or ("", "")
        if site in names and part in _ROWS:
            shapes.append(shape[_ROWS[part]])
    tokens = [token for some in _trained_tokens(folder, names).values() for token in some]
    return max(shapes, default=max(n_own, 1 + max(tokens, default=0)))


def _without_rows(model: PreTrainedModel, folder: AdapterFolder, new: range) -> list[str]:
    """Embeddings and output layers of which an adapter brings neither all rows nor those of the new tokens."""
    names = [name for name, _ in embeddings(model)]
    trained = _trained_tokens(folder, names)
    lacking = [name for name in names if not (_whole(folder, name) or {*new} <= {*trained[name]})] if new else []
    return [*lacking, "lm_head"] if new and _copies_tied(model, folder) else lacking


def _whole(folder: AdapterFolder, name: str) -> list[int]:
    """Rows of the tensors that an adapter has in the place of a whole embedding; it may have it under several names."""
    own = [key for key in folder.shapes if not split_key(key) and parameter_of(key) == f"{name}.weight"]
    return [folder.shapes[key][0] for key in own if not key.endswith(_DELTA)]


def _copies_tied(model: PreTrainedModel, folder: AdapterFolder) -> bool:
    """Whether PEFT trains a copy of an embedding whose original, with new rows, stays the output layer's."""
    name, first = next(embeddings(model))
    last: Any = model.get_output_embeddings()
    if last is None or getattr(last, "weight", None) is not first.weight:
        return False
    copied = any(is_named(name, one) for one in folder.config.get("modules_to_save") or ())
    return copied and not any(f"{name}.original_module." in key or ".lm_head." in key for key in folder.shapes)


def _trained_tokens(folder: AdapterFolder, names: Sequence[str]) -> dict[str, list[int]]:
    """Tokens of which the rows are trained alone, by embedding; a plain list is of the first, that of the input."""
    chosen = folder.config.get("trainable_token_indices") or {}
    if not isinstance(chosen, Mapping):
        chosen = {names[0]: chosen}
    for tokens in chosen.values():
        if not isinstance(tokens, list | tuple) or not all(isinstance(one, int) and one >= 0 for one in tokens):
            raise AdapterError(
                f"{CONFIG_FILE}: trainable_token_indices is {chosen!r:.80}. It must list numbers of tokens."
            )
    return {name: [one for key in chosen if is_named(name, key) for one in chosen[key]] for name in names}


def embeddings(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """Name and module of the embedding of tokens, and of the output layer where it has weights of its own."""
    names = {module: name for name, module in model.named_modules()}
    try:
        first: Any = model.get_input_embeddings()
    except NotImplementedError:  # how transformers says that a model reads no table (Canine hashes characters)
        return
    last: Any = model.get_output_embeddings()
    if first not in names or not hasattr(first, "weight"):
        return
    yield names[first], first
    if last in names and getattr(last, "weight", None) is not first.weight:
        yield names[last], last
