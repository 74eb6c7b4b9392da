"""A summarisation set from the docstrings of installed Python packages: real text that every machine has.

A docstring begins with a sentence that sums it up. The rest of it becomes the prompt, that sentence the answer.
The packages are read, never imported, in an order made by hashing, so that the same packages give the same examples.
Each package is in one of the three sets only, and texts that begin alike are used once: nothing leaks between them.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorazor.errors import DataError
from lorazor.files import write_text

Row = dict[str, str]  # {"prompt": ..., "completion": ...}

_SUMMARY_CHARACTERS = range(30, 121)
_FEWEST_PROMPT_CHARACTERS = 80
_MOST_PROMPT_CHARACTERS = 600
_MOST_PER_PACKAGE = 8  # many packages with a few examples each: one style of writing must not dominate a set
_MOST_PER_FILE = 2
_MOST_FILES_PER_PACKAGE = 60  # a package without prose in so many files has none; bounds the time
_MOST_BYTES_OF_A_FILE = 200_000  # above this it is mostly generated code, and slow to parse
_ALIKE_LETTERS = 30  # texts whose first so many letters agree count as the same

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "testing", "__pycache__"}

# The first sentence: up to a full stop that is followed by a capital, and that does not end "e.g.", "i.e." or "vs."
_SENTENCE = re.compile(
    r"(?P<summary>[A-Z].+?(?<!e\.g)(?<!i\.e)(?<!etc)(?<!\bvs)\.)(?:\s+(?=[A-Z`\"'(*])(?P<more>.*))?$"
)
_CODE_IN_SUMMARY = re.compile(r"[^A-Za-z0-9 ,.;'\"()/`_-]")
# The line that ends the prose of a docstring: a heading ("Args:", "Parameters", "Returns: ..."), a field (":param x:"),
# an item of a list, a directive, a doctest, a table.
_END_OF_PROSE = re.compile(
    r"^\s*(?:[A-Z][A-Za-z]+(?: [A-Za-z]+)?:?\s*$|[A-Z][a-z]+:\s|[:@](?:param|type|return|rtype|raise|arg|keyword)"
    r"|[-*+] |\.\. |>>>|```|\||[-=~]{4,})",
    re.MULTILINE,
)


def docstring_examples(
    n_train: int,
    n_validation: int,
    n_heldout: int,
    roots: Sequence[Path] | None = None,
    most_prompt_characters: int = _MOST_PROMPT_CHARACTERS,
) -> tuple[list[Row], list[Row], list[Row]]:
    r"""Make a summarisation set: prompts that hold the rest of a docstring, answers that hold its first sentence.

    Reading stops as soon as there are enough examples, which takes a few seconds for some hundred of them.

    Args:
        n_train: examples to train on.
        n_validation: examples to choose by.
        n_heldout: examples to confirm the choice on.
        roots: folders that hold packages; by default the standard library and the installed packages.
        most_prompt_characters: where prompts are cut off, between two words.
    Returns:
        Training, validation and held-out rows, each {"prompt": "...\nSummary:", "completion": " ..."}.
    Raises:
        DataError: the packages hold too few docstrings that are prose.
    """
    wanted = (n_train, n_validation, n_heldout)
    sets: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    used: set[str] = set()
    for files in _packages(installed_roots() if roots is None else roots):
        shares = [len(rows) / n if n > 0 else 1.0 for rows, n in zip(sets, wanted, strict=True)]
        emptiest = shares.index(min(shares))
        if shares[emptiest] >= 1:
            return sets
        n_missing = wanted[emptiest] - len(sets[emptiest])
        sets[emptiest].extend(_rows_of_package(files, min(n_missing, _MOST_PER_PACKAGE), most_prompt_characters, used))
    if any(len(rows) < n for rows, n in zip(sets, wanted, strict=True)):
        raise DataError(
            f"The installed packages gave {' + '.join(str(len(rows)) for rows in sets)} docstrings to summarise, but "
            f"{' + '.join(map(str, wanted))} are wanted (training + validation + held-out). Pass data of your own."
        )
    return sets


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as a JSONL file that every lorazor command reads, whole or not at all.

    Raises:
        OutputError: the place cannot be written to, or the disk is full.
    """
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def installed_roots() -> list[Path]:
    """Folders of the standard library and of the packages installed beside it."""
    paths = sysconfig.get_paths()
    return list(dict.fromkeys(Path(paths[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib")))


def stable_hash(text: str) -> str:
    """SHA-256 of a text in hexadecimal: an order that is arbitrary, and the same everywhere."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# From folders to packages


def _packages(roots: Sequence[Path]) -> Iterator[list[Path]]:
    """The Python files of every package in the roots; packages and files in hash order."""
    places: dict[str, list[Path]] = {}
    for root in roots:
        for place in root.iterdir() if root.is_dir() else ():
            name = place.stem if place.suffix == ".py" else place.name
            if name.isidentifier() and name not in _SKIPPED_FOLDERS:
                places.setdefault(name, []).append(place)
    for name in sorted(places, key=stable_hash):
        files = {str(file.relative_to(place.parent)): file for place in places[name] for file in _files(place)}
        yield [files[path] for path in sorted(files, key=stable_hash)[:_MOST_FILES_PER_PACKAGE]]


def _files(place: Path) -> Iterator[Path]:
    if place.is_file():
        yield place
        return
    for folder, inner, names in os.walk(place):
        inner[:] = [name for name in inner if name not in _SKIPPED_FOLDERS]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


# From files to rows


def _rows_of_package(files: Iterable[Path], n_rows: int, most_prompt_characters: int, used: set[str]) -> list[Row]:
    """At most `n_rows` examples whose prompts and answers begin unlike all those used, which they join."""
    rows: list[Row] = []
    for file in files:
        n_before = len(rows)
        for docstring in sorted(_docstrings(file), key=stable_hash):
            if len(rows) >= min(n_rows, n_before + _MOST_PER_FILE):
                break
            row = _as_row(docstring, most_prompt_characters)
            if row is None:
                continue
            starts = {f"{column} {_first_letters(text)}" for column, text in row.items()}
            if not starts & used:
                used |= starts
                rows.append(row)
        if len(rows) >= n_rows:
            break
    return rows


def _docstrings(file: Path) -> Iterator[str]:
    try:
        if file.stat().st_size > _MOST_BYTES_OF_A_FILE:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the code of others
            tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):  # unreadable, templates, other versions of Python
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def _as_row(docstring: str, most_prompt_characters: int) -> Row | None:
    """The example a docstring makes, None where it is not prose."""
    end = _END_OF_PROSE.search(docstring)
    first, *others = re.split(r"\n\s*\n", docstring[: end.start()] if end else docstring)
    found = _SENTENCE.match(" ".join(first.split()))
    if found is None:
        return None
    summary, rest = found["summary"], [found["more"] or "", *others]
    prompt = _shortened(" ".join(" ".join(rest).split()), most_prompt_characters)
    if not (_is_summary(summary) and len(prompt) >= _FEWEST_PROMPT_CHARACTERS and _is_prose(prompt)):
        return None
    return {"prompt": f"{prompt}\nSummary:", "completion": f" {summary}"}


def _shortened(text: str, most_characters: int) -> str:
    return text if len(text) <= most_characters else text[: most_characters + 1].rsplit(" ", 1)[0]


def _is_summary(text: str) -> bool:
    return len(text) in _SUMMARY_CHARACTERS and not _CODE_IN_SUMMARY.search(text) and _is_prose(text)


def _is_prose(text: str) -> bool:
    """Mostly letters and spaces of English, and no code."""
    n_letters = sum(character.isascii() and (character.isalpha() or character == " ") for character in text)
    return n_letters >= 0.9 * len(text) and ">>>" not in text


def _first_letters(text: str) -> str:
    return re.sub(r"[^a-z]", "", text.lower())[:_ALIKE_LETTERS]
