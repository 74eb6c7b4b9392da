"""The command line as a user types it."""

from __future__ import annotations

import sys

import pytest

from lorazor.cli.app import main


@pytest.fixture
def lorazor(monkeypatch, capsys):
    """Run `lorazor ...`; gives exit status, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lorazor", *map(str, arguments)])
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 0
        output = capsys.readouterr()
        return status, output.out, output.err

    return run
