"""Run folders: everything that happened, in files that other tools may read.

    run.json          command, settings, versions, hashes of the inputs, whether the run has finished
    *.jsonl           measurements, one line each, appended while the run goes on
    choice.json, ...  what was decided
    selection.json, adapter/

A line is written whole and at once, so that after a crash, a full disk or Ctrl-C everything finished is still there
and the same command with --resume goes on.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorazor.errors import LorazorError, OutputError
from lorazor.files import check_is_free, explained, json_text, sha256_of_file, write_text

FORMAT = "lorazor.run/1"

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_PACKAGES = ("lorazor", "torch", "transformers", "peft", "trl", "accelerate")


class RunFolder:
    """A run folder that is being filled, or read.

    Attributes:
        path: the folder.
        document: the contents of `run.json`.
        is_writer: whether this process writes; of several processes only the main one does.
    """

    def __init__(self, path: Path, document: dict[str, Any], is_writer: bool = True) -> None:
        """Use `start` or `open` instead."""
        self.path = path
        self.document = document
        self.is_writer = is_writer

    @classmethod
    def start(
        cls,
        path: Path,
        command: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, Path | None],
        resume: bool,
        may_change: Collection[str] = (),
    ) -> RunFolder:
        """Begin a run in a new folder, or go on with an interrupted one.

        The folder appears with the first thing written, so that a command that fails before (a base model that cannot
        be loaded) can be corrected and given again.

        Args:
            path: the folder.
            command: what runs, `boundary`.
            settings: all its settings, JSON-ready.
            inputs: files and folders the run depends on, by role; their hashes must be the same on resume.
            resume: go on with what is there.
            may_change: names of the settings that a resumed run may have other values of; `run.json` then has these.
        Raises:
            OutputError: the folder holds something and `resume` is off, or it holds another run.
        """
        document = {
            "format": FORMAT,
            "command": command,
            "settings": json.loads(json_text(settings)),
            "hashes": {role: _hash(source) for role, source in inputs.items() if source is not None},
            "versions": versions(),
            "command_line": command_line(),
            "finished": False,
        }
        if resume and (path / "run.json").exists():
            run = cls.open(path)
            run._check_is_same(document, may_change)
            run.document["settings"] = document["settings"]
            return run
        check_is_free(path)
        return cls(path, document)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open a run folder.

        Raises:
            OutputError: no run there, or one that this version cannot read.
        """
        try:
            document = json.loads((path / "run.json").read_text(encoding="utf-8"))
        except OSError as error:
            raise OutputError(
                f"{str(path)!r} is not a run folder: it has no run.json. Pass the --out of a run."
            ) from error
        except ValueError as error:
            raise OutputError(f"{str(path / 'run.json')!r} is not a JSON file ({error}).") from error
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        if found != FORMAT:
            raise OutputError(
                f"{str(path)!r} has format {found!r}; this lorazor reads {FORMAT!r}. "
                "Read it with the version of lorazor that wrote it, or a newer one."
            )
        return cls(path, document)

    def write_json(self, name: str, document: Any) -> None:
        """Write a JSON file, whole or not at all."""
        self._write(name, json_text(document, indent=2) + "\n")

    def write_rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write a JSONL file, whole or not at all."""
        self._write(name, "".join(json_text(row) + "\n" for row in rows))

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append lines to a JSONL file, all of them in one write."""
        self._write(name, "".join(json_text(row) + "\n" for row in rows), is_added=True)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Read a JSONL file; a last line that an interruption cut short is taken off, in the file too."""
        path = self.path / name
        if not path.exists():
            return []
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_text(path, whole)
        return [json.loads(line) for line in whole.split("\n")[:-1]]  # texts may hold other ends of lines

    def noting(self, say: Callable[[str], None]) -> Callable[[str], None]:
        """Messages to people that `run.json` keeps once, as a run that goes on says them again; only of the writer."""

        def note(message: str) -> None:
            if self.is_writer:
                say(message)
                notes = self.document.setdefault("notes", [])
                if message not in notes:
                    notes.append(message)

        return note

    def note_base(self, name: str, fingerprint: str) -> None:
        """Note in `run.json` which base model is measured.

        Raises:
            OutputError: it had other weights when the run began.
        """
        if self.document.setdefault("bases", {}).setdefault(name, fingerprint) != fingerprint:
            raise self._is_another(f"the weights of the base model {name!r} have changed")

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Add to refusals inside, where something is measured already, that a corrected command needs another place."""
        try:
            yield
        except LorazorError as error:
            if not isinstance(error, OutputError) and (self.path / "run.json").exists():
                place = f"What was measured is in {str(self.path)!r}: remove it, or pass another --out."
                error.args = (f"{error} {place}",)
            raise

    def finish(self) -> None:
        """Note in `run.json` that everything is there."""
        self.document["finished"] = True
        self.write_json("run.json", self.document)

    def _write(self, name: str, text: str, is_added: bool = False) -> None:
        """Write a file, or add to it; `run.json` first, with which a folder is a run."""
        if not self.is_writer:
            return
        if name != "run.json" and not (self.path / "run.json").exists():
            self.write_json("run.json", self.document)
        if not is_added:
            write_text(self.path / name, text)
            return
        with explained(self.path / name), (self.path / name).open("a", encoding="utf-8") as file:
            file.write(text)

    def _check_is_same(self, document: dict[str, Any], may_change: Collection[str]) -> None:
        old, new = ({"command": one["command"], **one["settings"]} for one in (self.document, document))
        found = _first_difference(old, new, may_change)
        changed = [role for role, digest in document["hashes"].items() if self.document["hashes"].get(role) != digest]
        if found is None and changed:
            found = f"the contents of {changed[0]} have changed"
        if found is not None:
            raise self._is_another(found)

    def _is_another(self, what: str) -> OutputError:
        return OutputError(
            f"{str(self.path)!r} holds another run: {what}. Resume with the same, or pass another --out."
        )


def command_line() -> str | None:
    """The command that this process was started with, for a shell; None where it was not lorazor's own."""
    program = Path(sys.argv[0])
    is_own = program.stem == "lorazor" or (program.name == "__main__.py" and program.parent.name == "lorazor")
    return shlex.join(["lorazor", *sys.argv[1:]]) if is_own else None


def versions() -> dict[str, str]:
    """Versions of Python and the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _hash(source: Path) -> str | None:
    """SHA-256 of a file, of an adapter's config and weights, or of all files of another folder.

    None for what is not on this disk, such as a hub name.
    """
    if source.is_file():
        return sha256_of_file(source)
    if not source.is_dir():
        return None
    adapter = [source / name for name in _ADAPTER_FILES if (source / name).is_file()]
    files = adapter or sorted(path for path in source.rglob("*") if path.is_file())
    digests = "".join(f"{path.relative_to(source).as_posix()} {sha256_of_file(path)}\n" for path in files)
    return hashlib.sha256(digests.encode()).hexdigest()


def _first_difference(before: Mapping[str, Any], now: Mapping[str, Any], may_change: Collection[str]) -> str | None:
    """The first setting, in any group, that is another one; None where there is none."""
    for name in sorted({*before, *now} - {*may_change}):
        was, is_now = before.get(name), now.get(name)
        if isinstance(was, dict) and isinstance(is_now, dict):
            if found := _first_difference(was, is_now, may_change):
                return found
        elif was != is_now:
            return f"{name} was {was!r} and is now {is_now!r}"
    return None
