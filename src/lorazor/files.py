"""Writing files so that a crash or a full disk never leaves half of one behind."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorazor.errors import OutputError


def json_text(document: Any, indent: int | None = None) -> str:
    """A document as JSON that every parser reads.

    Dataclasses are objects, less the fields whose metadata say `{"json": False}`; what JSON has no word for is text,
    and numbers that it has no word for (infinite bounds, NaN) are null.
    """
    return json.dumps(_plain(document), indent=indent, ensure_ascii=False, default=str, allow_nan=False)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field for field in dataclasses.fields(value) if field.metadata.get("json", True)]
        return {field.name: _plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all: beside its place first, then renamed.

    Raises:
        OutputError: the place cannot be written to, or the disk is full.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a folder beside its place; it appears under `path` only when the block ends well.

    Yields:
        The temporary folder to write into.
    Raises:
        OutputError: `path` exists and is not an empty folder, or the disk is full.
    """
    check_is_free(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield temporary
            os.chmod(temporary, 0o777 & ~_umask())
            if path.exists():
                path.rmdir()
            temporary.rename(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def check_is_free(path: Path) -> None:
    """Raise OutputError unless `path` does not exist yet, below folders only, or is an empty folder."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists():
        what = "is not empty" if path.is_dir() else "is a file"
        raise OutputError(f"The output folder {str(path)!r} {what}. Nothing was written; choose another folder.")
    above = next((parent for parent in path.parents if parent.exists()), path)
    if above.is_file():
        raise OutputError(f"The output folder {str(path)!r} cannot be made: {str(above)!r} is a file. Choose another.")


def remove_folder(path: Path) -> None:
    """Remove a folder, if it is there; when this is interrupted, nothing is left that looks like it."""
    gone = path.with_name(f".{path.name}-removed")
    shutil.rmtree(gone, ignore_errors=True)  # what an interruption left
    if path.exists():
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the operating system's complaint about writing into an OutputError."""
    try:
        yield
    except OSError as error:
        what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise OutputError(f"Cannot write {str(path)!r}: {what}. What was there before is unchanged.") from error


def _umask() -> int:
    """The process's umask; the system call can only read it by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
