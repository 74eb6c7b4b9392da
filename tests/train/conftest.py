"""What trainings in tests share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def fast_collection() -> Iterator[None]:
    """Each training collects garbage once, which takes a quarter of a second if it looks through all of torch."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
