"""Where the models and data of a suite are: on the hub, or copies of them in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorazor.data.sources import readable_suffixes
from lorazor.errors import DataError, SettingsError


@dataclass(frozen=True)
class Copies:
    """A folder with copies of what a suite names, each under its name: `nyu-mll/glue/sst2`, `Qwen/Qwen3-0.6B`.

    Attributes:
        folder: None to take everything from the hub.
    """

    folder: Path | None = None

    def __post_init__(self) -> None:
        """Refuse a folder that is none.

        Raises:
            SettingsError: no such folder.
        """
        if self.folder is not None and not self.folder.is_dir():
            raise SettingsError(f"copies={str(self.folder)!r} is no folder. Pass one that holds copies by their names.")

    def model(self, name: str) -> str:
        """The folder of a model, or its name."""
        place = self._place(name)
        return str(place) if place is not None else name

    def data(self, name: str, split: str) -> tuple[str, str | None]:
        """A source of examples, and which of its splits: `SPLIT.jsonl` (or .csv, .parquet, ...) of a copy is one.

        Raises:
            DataError: the copy has no such split, or has it twice.
        """
        place = self._place(name)
        if place is None:
            return name, split
        if any((place / one).exists() for one in ("dataset_dict.json", "dataset_info.json")):
            return str(place), split
        found = [path for suffix in readable_suffixes() if (path := place / f"{split}{suffix}").is_file()]
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise DataError(f"{str(place)!r} has several files for the split {split!r}: {names}. Leave one.")
        if not found:
            names = ", ".join(sorted(path.name for path in place.iterdir())) or "nothing"
            raise DataError(
                f"{str(place)!r} has no file {split}.jsonl (.csv, .parquet, ...) for the split, only {names}."
            )
        return str(found[0]), None

    def how(self, name: str) -> str:
        """What to do where the hub cannot be reached, up to the place of the copy."""
        return f"In a suite: put it into a folder, pass that as --copies, and name it {name.replace(':', '/')}"

    def _place(self, name: str) -> Path | None:
        place = None if self.folder is None else self.folder / name.replace(":", "/")
        return place if place is not None and place.is_dir() else None
