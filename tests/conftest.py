"""What several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_folders import TinyFolders, make_folders


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyFolders:
    """A tiny base model, an adapter and data on disk; read only."""
    return make_folders(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A place for output that does not exist yet."""
    return tmp_path / "out"
