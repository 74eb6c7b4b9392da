"""The methods of suites, one file each.

A file has a docstring of one line, `BUDGETS`, the kinds of budget that it can meet (none for a method that has no
size to choose), and `train(experiment, *, option=default)`, which trains on `experiment.train` and gives the folder of
what came out: an adapter that PEFT loads, or a whole model. `IS_SHARED = True` says that it begins with the training of
LoRA that methods share. A new file is a new method.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any


def names() -> list[str]:
    """Of all methods: `low-rank` for `low_rank.py`."""
    return sorted(one.name.replace("_", "-") for one in pkgutil.iter_modules(__path__))


def method(name: str) -> ModuleType:
    """The file of a method."""
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")


def budgets_of(name: str) -> tuple[str, ...]:
    """Kinds of budget that a method can meet."""
    return method(name).BUDGETS


def is_shared(name: str) -> bool:
    """Whether a method begins with the training of LoRA that the methods of a task and a seed have in common."""
    return getattr(method(name), "IS_SHARED", False)


def options_of(name: str) -> Mapping[str, Any]:
    """Options of a method, with their defaults."""
    parameters = inspect.signature(method(name).train).parameters.values()
    return {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}
