"""docs/architectures.md says what is so."""

from __future__ import annotations

import gc

import pytest

from tests.architectures.results import try_family
from tests.architectures.table import PAGE, VERSIONS, read_page
from tests.architectures.tiny_configs import FAMILIES


@pytest.mark.slow
@pytest.mark.parametrize(("task", "family"), FAMILIES, ids="/".join)
def test_the_page_says_what_comes_of_a_family(task, family, tmp_path):
    result = try_family(task, family, tmp_path)
    gc.collect()
    assert result.failures == []
    assert (result.cells, result.remarks) == read_page()[task, family]


def test_the_page_has_every_family_and_no_failure():
    rows = read_page()
    assert VERSIONS in PAGE.read_text(encoding="utf-8")
    assert list(rows) == FAMILIES
    assert [key for key, (cells, _) in rows.items() if any(cell.startswith("FAILED") for cell in cells.values())] == []
