"""JSON and JSONL files, read without changing them: `RunFolder.rows` mends a file that an interruption cut short.

Every text passes through `visible` on its way in, so that nothing downstream meets a control character.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lorazor.errors import DataError, LorazorError
from lorazor.report.words import visible

T = TypeVar("T")

_BROKEN = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
"""What comes of making something of a file that is not as it should be."""


def parse_json(path: Path, make: Callable[[Any], T]) -> T | None:
    """Read a JSON file and make something of it; None where there is no such file.

    Raises:
        DataError: it is damaged, or lacks something.
    """
    if not path.exists():
        return None
    try:
        return make(cleaned(json.loads(path.read_text(encoding="utf-8"))))
    except LorazorError:
        raise
    except (OSError, *_BROKEN) as error:
        raise DataError(f"{str(path)!r} is damaged: {_in_words(error)}. Run the command again.") from error


def parse_rows(path: Path, make: Callable[[dict[str, Any]], T], is_finished: bool) -> list[T]:
    """Read a JSONL file and make something of each line; nothing where there is no such file.

    Args:
        path: the file.
        make: what to make of a line.
        is_finished: False lets a last line pass that an interruption cut short.
    Raises:
        DataError: a line is damaged, or lacks something.
    """
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{str(path)!r} cannot be read: {_in_words(error)}. Run the command again.") from error
    if not lines[-1] or not is_finished:
        lines.pop()
    made = []
    for number, line in enumerate(lines, start=1):
        try:
            made.append(make(cleaned(json.loads(line))))
        except _BROKEN as error:
            where = f"{str(path)!r}, line {number}"
            raise DataError(f"{where} is damaged: {_in_words(error)}. Run the command again.") from error
    return made


def _in_words(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg} at character {error.pos + 1})"
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return str(error)


def cleaned(value: Any) -> Any:
    """Parsed JSON with all its texts made visible."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {visible(key): cleaned(item) for key, item in value.items()}
    return [cleaned(item) for item in value] if isinstance(value, list) else value
