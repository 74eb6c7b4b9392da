"""What it takes to repeat a run: its command line, and where its inputs have changed since."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
from collections.abc import Iterator
from typing import Any

import lorazor.settings as every
from lorazor.report.contents import Run
from lorazor.runs import versions

_BASE = "base"
"""What an evaluation calls the base model alone, which no one names."""

_ARGUMENTS = ("adapter", "adapters")
"""Settings that stand in the command line without a name."""

_DATA = ("data", "confirm", "heal")


def command_line(run: Run) -> str:
    """The command that a run was started with, for a shell.

    Settings that have their default are left out, where the run is of this version of lorazor and the default is not
    in doubt.
    """
    settings = dict(run.document["settings"])
    words, flags = ["lorazor", run.command], []
    for name in _ARGUMENTS:
        given = settings.pop(name, None)
        listed = given if isinstance(given, list) else [given]
        words += [str(one) for one in listed if one not in (None, _BASE)]
    defaults = _defaults() if run.document["versions"].get("lorazor") == versions()["lorazor"] else {}
    for name, value in _flat(settings):
        if value is None or defaults.get(name, []) == [value]:
            continue
        flags += _option(name, value)
    return shlex.join([*words, *flags, "--out", str(run.path)])


def _flat(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Data first, then other settings, then those of every topic."""
    yield from ((name, settings[name]) for name in _DATA if name in settings)
    yield from (item for item in settings.items() if item[0] not in _DATA and not isinstance(item[1], dict))
    for value in settings.values():
        if isinstance(value, dict):
            yield from value.items()


def _option(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]


def _defaults() -> dict[str, list[Any]]:
    """Every default that a field of this name has in any of the settings."""
    found: dict[str, list[Any]] = {}
    for _, settings in inspect.getmembers(every, dataclasses.is_dataclass):
        for field in dataclasses.fields(settings):
            known = found.setdefault(field.name, [])
            if field.default not in known:
                known.append(field.default)
    return found
