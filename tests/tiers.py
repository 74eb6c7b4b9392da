"""Which cases of a test are in the fast tier."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def fast_first(cases: Iterable[Any], *fast: Any) -> list[Any]:
    """The cases, all but the named ones in the slow tier."""
    return [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in cases]
