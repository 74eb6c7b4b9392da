"""What a command works on: an adapter in a folder, on a hub, or on a model in memory."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lorazor.adapter.base import without_weights
from lorazor.adapter.find import base_of, find_adapter
from lorazor.adapter.fingerprint import base_fingerprint
from lorazor.adapter.folder import AdapterFolder, read_adapter
from lorazor.adapter.live import base_beside, save_live
from lorazor.adapter.load import Loaded, Task, load, swap
from lorazor.adapter.translation import is_of_other_version, translated
from lorazor.errors import SettingsError
from lorazor.settings import ModelSettings

Adapter = str | Path | PeftModel


@dataclass(frozen=True)
class Opened:
    """An adapter that was read; its base model is not loaded yet.

    Attributes:
        folder: of a model in memory, or under names of another version of transformers, one that is gone when the
            command ends.
        settings: of the base model.
        live: the model in memory, if it is one.
        tokenizer: of the model in memory.
    """

    folder: AdapterFolder
    settings: ModelSettings
    live: PeftModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def name(self) -> str:
        """For people and run.json; the base in memory has no name to tell a resumed run of another one by."""
        if self.live is None:
            return self.folder.name
        return f"a model in memory, base {base_fingerprint(self.live)[:12]}"

    @property
    def base(self) -> str:
        """Which base model it is for: adapters that say the same can take turns on it; see `base_of`."""
        return base_of(self.folder, self.settings) if self.live is None else f"in memory, {id(self.live)}"

    def load(self, task: Task | None = None) -> Loaded:
        """The adapter on its base model; a model in memory stays as it is, and says itself what it is for."""
        if self.live is None:
            return load(self.folder, self.settings, task)
        return swap(self.load_base(), self.folder)

    def load_base(self, task: Task | None = None) -> Loaded:
        """The base model alone."""
        if self.live is None:
            names = [site.name for site in self.folder.sites]
            return load(None, dataclasses.replace(self.settings, model=self.base), task, modules=names)
        return base_beside(self.live, self.folder, self.tokenizer, self.settings)


@contextmanager
def opened(
    adapter: Adapter,
    settings: ModelSettings | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    translate: bool = True,
) -> Iterator[Opened]:
    """Read an adapter; that of a model in memory lies in a folder inside the block, and so does one with other names.

    Args:
        adapter: adapter folder, hub id, or a PEFT model.
        settings: of the base model.
        tokenizer: of a model in memory.
        translate: give the modules of an adapter of another version of transformers today's names, as PEFT does when it
            loads it; the config of its base model is read.
    Raises:
        SettingsError: no adapter, or settings that do not go with it.
        LorazorError: it cannot be read.
    """
    settings = settings or ModelSettings()
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise SettingsError(f"tokenizer={tokenizer!r:.80} is no tokenizer. Pass one of transformers.")
    if isinstance(adapter, str | Path):
        if tokenizer is not None:
            raise SettingsError("tokenizer goes with a model in memory; a folder or a hub id has its own.")
        folder = read_adapter(find_adapter(adapter))
        if not (translate and is_of_other_version(folder)):
            yield Opened(folder, settings)
            return
        settings = dataclasses.replace(settings, model=base_of(folder, settings))
        with tempfile.TemporaryDirectory(prefix="lorazor-adapter-") as place:
            yield Opened(translated(folder, without_weights(folder, settings), Path(place)), settings)
        return
    if not isinstance(adapter, PeftModel):
        raise SettingsError(
            f"{type(adapter).__name__} is no adapter. Pass a folder, a hub id, or a PeftModel (unwrapped)."
        )
    if dataclasses.replace(settings, task="auto") != ModelSettings():
        raise SettingsError("A model in memory has its base already. Of the model settings, pass task alone.")
    with tempfile.TemporaryDirectory(prefix="lorazor-adapter-") as place:
        folder = save_live(adapter, Path(place), tokenizer)
        yield Opened(folder, settings, adapter, tokenizer)
