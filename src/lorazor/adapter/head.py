"""Heads of classifiers: the names of their classes, kept beside the adapter in a `config.json` of transformers.

PEFT's own config has no place for them. transformers and PEFT read an `adapter_config.json` first, so the folder stays
an adapter; `AutoConfig.from_pretrained(folder)` gives the head that it needs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedConfig

from lorazor.adapter.folder import AdapterFolder
from lorazor.errors import AdapterError

HEAD_FILE = "config.json"
_MADE_UP = re.compile(r"LABEL_\d+")  # by transformers, where there are no names


def names_of_classes(config: PreTrainedConfig) -> dict[int, str]:
    """The names of the classes of a head by their numbers, without those that are made up."""
    names = (config.id2label or {}).items()
    return {int(number): str(name) for number, name in names if not _MADE_UP.fullmatch(str(name))}


def names_in(folder: AdapterFolder) -> dict[int, str]:
    """The names that an adapter folder keeps, none where it keeps none.

    Raises:
        AdapterError: the file is no JSON object, or numbers its classes by other than 0..n-1.
    """
    path = folder.path / HEAD_FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("id2label") or {}
        names = {int(number): str(name) for number, name in found.items()}
    except (ValueError, AttributeError) as error:
        raise AdapterError(f"{folder.name!r}: {HEAD_FILE} has no readable id2label. Mend or remove it.") from error
    return {number: name for number, name in names.items() if not _MADE_UP.fullmatch(name)}


def name_classes_(config: PreTrainedConfig, names: Mapping[int, str]) -> None:
    """Name the classes of a head, unless it has all of these names already, under whatever numbers.

    Args:
        config: of the model with the head; changed.
        names: by number; those outside the head are left out.
    """
    own = {name.lower() for name in names_of_classes(config).values()}
    if not names or own >= {name.lower() for name in names.values()}:
        return
    named = {number: names.get(number, f"LABEL_{number}") for number in range(config.num_labels or 0)}
    config.id2label, config.label2id = dict(named), {name: number for number, name in named.items()}


def note_head(folder: Path, config: PreTrainedConfig | None) -> None:
    """Keep the head of a classifier beside its adapter: how many outputs, for what, and their names."""
    if config is not None:
        config.save_pretrained(str(folder))
