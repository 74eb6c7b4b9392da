"""Where an adapter and its base model are: on this machine or on a hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from lorazor.adapter.folder import AdapterFolder
from lorazor.errors import AdapterError, BaseModelError, SettingsError
from lorazor.settings import ModelSettings

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<folder>[\w./-]+?))?(?:@(?P<revision>[\w./-]+))?")
_HUB_FILES = ("adapter_*", "*.json", "*.md", "*.jinja", "*.model", "*.txt", "*.tiktoken")
"""Adapter, card and tokenizer, slow ones too (`vocab.txt`, `merges.txt`)."""


def find_adapter(adapter: str | Path) -> Path:
    """The local folder of an adapter: the folder itself, or the download of a hub id.

    Args:
        adapter: a folder, or `org/repo`, with a folder inside it (`org/repo/checkpoint-100`) or a revision
            (`org/repo@main`) behind it.
    Raises:
        AdapterError: neither a folder nor a hub id that can be reached, or a folder inside that leads out of it.
    """
    path, text = Path(adapter), str(adapter)
    found = _HUB_ID.fullmatch(text)
    inside = found and found["folder"]
    if (
        path.is_dir()
        or found is None
        or text.startswith(("./", "../", "~"))
        or (inside and Path(path.parts[0]).is_dir())
    ):
        return path
    if ".." in text.partition("@")[0].split("/"):
        raise AdapterError(f"There is no folder {text!r}, and '..' in a hub id leads nowhere. Pass org/repo/folder.")
    patterns = [f"{inside}/{name}" if inside else name for name in _HUB_FILES]
    try:
        place = Path(snapshot_download(found["repo"], revision=found["revision"], allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise AdapterError(f"{text!r} is neither an adapter folder nor a hub id that can be reached.") from error
    return place / inside if inside else place


def base_of(folder: AdapterFolder | None, settings: ModelSettings) -> str:
    """The base model of an adapter: the one of the settings, or else the one that its config names.

    A relative path in the config is looked for beside the adapter first, then in the working directory.

    Raises:
        SettingsError: none is named.
        BaseModelError: a folder is named that does not exist.
    """
    source, adapter = settings.model, ""
    if source is None and folder is not None and (source := folder.config.get("base_model_name_or_path")):
        adapter = f" that the adapter {folder.name!r} names"
        if not isinstance(source, str):
            raise AdapterError(
                f"The base model{adapter} is {source!r}, which is no name. Mend its adapter_config.json."
            )
        if (folder.place / source).is_dir():
            return str(folder.place / source)
    if not source:
        raise SettingsError("No base model: the adapter's config names none. Pass one (--model, a hub id or a folder).")
    if not Path(source).is_dir() and (source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source):
        raise BaseModelError(
            f"There is no folder {source!r}{adapter}. Pass the base model (--model, a folder or hub id)."
        )
    return source
