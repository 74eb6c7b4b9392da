"""Folders of a suite that several processes fill: each appears whole or not at all, and what killed ones left goes."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorazor.errors import OutputError
from lorazor.files import explained
from lorazor.runs import RunFolder


@contextmanager
def appearing(place: Path) -> Iterator[Path]:
    """Fill a folder beside its place, which is there when the block ends well; one that was first stays.

    Yields:
        The folder to make.
    """
    with explained(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        around = tempfile.TemporaryDirectory(prefix=".", dir=place.parent, ignore_cleanup_errors=True)
    with around:
        yield (beside := Path(around.name, place.name))
        try:
            beside.rename(place)
        except OSError:
            if not place.exists():
                raise


def finished_row(place: Path) -> dict[str, Any] | None:
    """The row of a cell's folder; None where it has not finished."""
    if not (place / "run.json").exists():
        return None
    document = RunFolder.open(place).document
    return document["result"] if document["finished"] else None


def is_free(out: Path) -> bool:
    """Whether a folder has nothing in it but what a command that was killed was about to write."""
    return not any(path.is_file() and not path.name.startswith(".") for path in out.rglob("*"))


@contextmanager
def alone(out: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the folder of a suite, without leftovers: two commands in it would run the same cells.

    Raises:
        OutputError: another process has it, or it cannot be written.
    """
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"Another process works in {str(out)!r}. Wait for it, or choose another.") from error
        except OSError as error:
            say(f"The file system of {str(out)!r} has no locks ({error.strerror}): run one command at a time in it.")
        _clear(out)
        try:
            yield
        finally:
            _clear(out)


def _clear(out: Path) -> None:
    for pattern in (".results.jsonl.*", ".failures.jsonl.*", "suite/.*", "cells/.*", "shared/.*"):
        for path in out.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
