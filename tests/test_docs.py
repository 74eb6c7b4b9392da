"""Generated documentation is what the code says today."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_generated_pages_are_what_the_code_says() -> None:
    command = [sys.executable, "-m", "cogapp", "--check", "--diff", "docs/help.md", "docs/servers.md"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, f"Run: make docs\n{result.stdout}{result.stderr}"
