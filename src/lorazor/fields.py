"""What a field of settings may hold: its type, its least value, and whether many people need it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from lorazor.errors import SettingsError

MORE = "more"
"""Marks a field that the help lists under "more options": its default suits nearly everyone."""


_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
UNITS = "a number of bytes, or one with KB, MB, GB, KiB, MiB or GiB"


def n_bytes(size: str) -> int | None:
    """Bytes of a size such as 900MB; None if it is none."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", size)
    unit = (match[2] or "B").upper() if match else ""
    return int(float(match[1]) * _BYTES[unit]) if match and unit in _BYTES else None


@dataclass(frozen=True)
class AtLeast:
    """Marks a field that holds a number of at least so much."""

    least: int


@dataclass(frozen=True)
class AtMost:
    """Marks a field that holds a number of at most so much."""

    most: int


LARGEST_SEED = 2**32 - 1
"""That numpy takes."""


@dataclass(frozen=True)
class Above:
    """Marks a field that holds a number above this one."""

    limit: int


class Settings:
    """What all settings have in common: they are made of what their annotations allow, or not at all."""

    def __post_init__(self) -> None:
        """Refuse a value that is not of its field's type.

        Raises:
            SettingsError: which field, and what it takes.
        """
        for name, field in _annotations(type(self)).items():
            _check(name, getattr(self, name), field)


def check_options(function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuse options of a function that are not of their annotated types; their names are known.

    Raises:
        SettingsError: which option, and what it takes.
    """
    hints = get_type_hints(function, include_extras=True)
    for name, value in options.items():
        if name in hints:
            _check(name, value, _field(hints[name]))


S = TypeVar("S", bound=Settings)


def with_fields(kind: type[S], settings: S | None, fields: Mapping[str, Any]) -> S:
    """Settings with some of their fields replaced, as the keywords of a function give them.

    Args:
        kind: what the settings are.
        settings: None for the defaults.
        fields: values by name.
    Raises:
        SettingsError: other settings, no such field, or a value that cannot be used.
    """
    if settings is not None and not isinstance(settings, kind):
        raise SettingsError(f"settings is of type {type(settings).__name__}. Pass {kind.__name__}, or its fields.")
    names = sorted(_annotations(kind))
    if unknown := sorted(fields.keys() - {*names}):
        raise SettingsError(f"{unknown[0]!r} is no field of {kind.__name__}. Pass some of {', '.join(names)}.")
    return cast(S, dataclasses.replace(cast(Any, settings or kind()), **fields))


_Field = tuple[tuple[Any, ...], tuple[Any, ...]]
"""The types that it takes, and its marks."""


@cache
def _annotations(settings: type) -> dict[str, _Field]:
    return {name: _field(hint) for name, hint in get_type_hints(settings, include_extras=True).items()}


def _field(hint: Any) -> _Field:
    kind, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    is_one = isinstance(kind, type) or get_origin(kind) is Literal
    return (kind,) if is_one else get_args(kind), tuple(marks)


def _check(name: str, value: Any, field: _Field) -> None:
    kinds, marks = field
    if not any(_is_of(value, kind) for kind in kinds):
        raise SettingsError(f"{name}={value!r:.80} cannot be used. Pass {' or '.join(map(_in_words, kinds))}.")
    for mark in marks:
        if isinstance(mark, AtLeast) and value is not None and value < mark.least:
            raise SettingsError(f"{name}={value} is too small. Pass {mark.least} or more.")
        if isinstance(mark, AtMost) and value is not None and value > mark.most:
            raise SettingsError(f"{name}={value} is too large. Pass {mark.most} or less.")
        if isinstance(mark, Above) and value is not None and not value > mark.limit:
            raise SettingsError(f"{name}={value} must be above {mark.limit}.")


def _is_of(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, str | Path) if kind in (str, Path) else isinstance(value, kind)


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    words: dict[Any, str] = {
        int: "a whole number", float: "a finite number", bool: "True or False", str: "text", Path: "a path",
        NoneType: "None",
    }  # fmt: skip
    return words.get(kind) or str(kind.__name__)
