"""Sources: files, folders and data sets on the hub, read row by row.

Neither torch nor `datasets` is imported until a source needs it: the command line has to start fast. CSV files are read
here and not by `datasets`, whose reader shifts or drops cells where a line has more of them than the header.
"""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from lorazor.errors import DataError, SettingsError

PlacedRow = tuple[str, Any]  # where it is ("line 3"), and what was read there


def read_rows(source: str | Path, split: str | None, limit: int | None = None) -> Iterator[PlacedRow]:
    """The rows of a source, whatever their format; arguments and errors are those of `read_examples`."""
    if limit is not None and limit < 1:
        raise SettingsError(f"limit={limit} rows to read. Pass 1 or more, or none to read all.")
    path = Path(source)
    suffix = next((suffix for suffix in _READERS if path.name.lower().endswith(suffix)), None)
    is_folder = path.is_dir() and source != ""  # Path("") is the working folder; an empty name is a slip
    if is_folder or (suffix is None and not path.exists() and _may_be_on_the_hub(source)):
        return islice(_dataset_rows(source, split), limit)
    if suffix is None or not path.exists():
        problem = "No such file" if not path.exists() else "Not a type of file that lorazor reads"
        raise DataError(f"{problem}: {str(source)!r}. Pass a {', '.join(_READERS)} file, a folder, or a hub name.")
    if split is not None:
        raise SettingsError(f"split={split!r}, but {source} is a file, which has no splits. Leave the split out.")
    return islice(_READERS[suffix](path), limit)


def readable_suffixes() -> tuple[str, ...]:
    """Ends of the names of files that can be read, such as `.jsonl.xz`."""
    return tuple(_READERS)


def _may_be_on_the_hub(source: str | Path) -> bool:
    """Whether a source that does not exist here has the form `name` or `owner/name`, maybe `:configuration`."""
    owner, slash, _ = str(source).partition("/")
    is_name = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?", str(source), re.ASCII) is not None
    return is_name and isinstance(source, str) and not (slash and Path(owner).is_dir())


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file, plain or compressed, with their numbers from 1."""
    openers = {".xz": lzma.open, ".gz": gzip.open}
    number = 0
    try:
        with openers.get(path.suffix.lower(), open)(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}: not UTF-8 ({error.reason}). Convert the file to UTF-8.") from error
    except (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path} is corrupt or cut off after line {number} ({error}). Get the file again.") from error
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}.") from error


def _jsonl_rows(path: Path) -> Iterator[PlacedRow]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = _one_line(error)
            raise DataError(f"{path}, line {number}: not JSON ({reason}). Write one JSON object per line.") from error
        yield f"line {number}", row


def _csv_rows(path: Path) -> Iterator[PlacedRow]:
    previous = csv.field_size_limit(2**31 - 1)  # the usual limit of 131072 characters is short for documents
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{path}: the header names a column twice: {', '.join(header)}. Rename one.")
        for cells in filter(None, reader):
            place = f"line {reader.line_num}"
            if len(cells) != len(header):
                raise DataError(f"{path}, {place}: {len(cells)} cells, but the header has {len(header)}.")
            yield place, _from_csv(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV ({error}). Check the quotes.") from error
    finally:
        csv.field_size_limit(previous)


def _from_csv(cells: dict[str, str]) -> dict[str, Any]:
    """All cells are text: read labels that are numbers, and references written as a JSON list; the rest stays text."""
    row: dict[str, Any] = dict(cells)
    label = cells.get("label", "").strip()
    if re.fullmatch(r"-?\d{1,18}", label, re.ASCII):
        row["label"] = int(label)
    elif re.fullmatch(r"-?\d*\.\d+", label, re.ASCII):
        row["label"] = float(label)
    if "references" in cells:
        with suppress(ValueError):
            row["references"] = json.loads(cells["references"] or "null")
    return row


def _parquet_rows(path: Path) -> Iterator[PlacedRow]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            is_of_datasets = b"huggingface" in (file.schema_arrow.metadata or {})
            names = _class_names(_features(file.schema_arrow)) if is_of_datasets else {}
            yield from _numbered((row for batch in file.iter_batches() for row in batch.to_pylist()), names)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a Parquet file that can be read ({_one_line(error)}).") from error


_READERS: dict[str, Callable[[Path], Iterator[PlacedRow]]] = {
    **dict.fromkeys((".jsonl", ".jsonl.xz", ".jsonl.gz"), _jsonl_rows),
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}


def _dataset_rows(source: str | Path, split: str | None) -> Iterator[PlacedRow]:
    import datasets
    from datasets.exceptions import DatasetsError

    name, is_saved = str(source), any((Path(source) / file).is_file() for file in ("dataset_dict.json", "state.json"))
    is_folder = Path(source).is_dir()
    repository, _, configuration = (name, "", "") if is_folder else name.partition(":")
    try:
        if is_saved:
            data = datasets.load_from_disk(name)
        else:
            data = datasets.load_dataset(repository, configuration or None, split=split)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        if is_folder:
            raise DataError(f"{name} is no folder of data that can be loaded ({_one_line(error)}).") from error
        raise DataError(
            f"{name} is no file here, nor a data set on the hub that can be loaded ({_one_line(error)}). Where the hub "
            "cannot be reached, pass a copy: a folder that save_to_disk of `datasets` wrote where it can, or the "
            "data's own .parquet or .jsonl file."
        ) from error
    if isinstance(data, Mapping):
        chosen = next(iter(data)) if split is None and len(data) == 1 else split
        if chosen not in data:
            raise DataError(f"{name}: split {chosen!r} was asked for. Pass one of its splits: {listed(data)}.")
        data = data[chosen]
    elif is_saved and split not in (None, str(data.split)):
        raise SettingsError(f"split={split!r}, but {name} has no such split: it is a single set. Leave the split out.")
    return _numbered(data.with_format(None), _class_names(data.features))


def _features(schema: Any) -> Mapping[str, Any]:
    import datasets

    return datasets.Features.from_arrow_schema(schema)


def _class_names(features: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """Names of the classes, by the columns that hold their numbers."""
    return {column: one.names for column, one in (features or {}).items() if type(one).__name__ == "ClassLabel"}


def _numbered(rows: Iterable[Any], names: Mapping[str, Sequence[str]]) -> Iterator[PlacedRow]:
    """Rows with their places; the name of a class is put beside its number, as `label_text` beside `label`."""
    for index, row in enumerate(rows):
        for column, own in names.items():
            if isinstance(number := row[column], int) and 0 <= number < len(own):
                row = {f"{column}_text": own[number], **row}
        yield f"row {index} (from 0)", row


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def listed(names: Iterable[object]) -> str:
    """Names for an error message."""
    return ", ".join(repr(str(name)) for name in names) or "none"
