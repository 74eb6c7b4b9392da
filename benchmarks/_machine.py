"""What a figure was measured on, printed and kept with the figure."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from lorazor.runs import versions

SOURCE = Path(__file__).resolve().parent


def record(result: dict[str, Any], out: Path | None = None) -> None:
    """Print a result as JSON on stdout, together with what it was measured on, and write it to `out`."""
    text = json.dumps({**result, "measured_on": measured_on()}, indent=2, ensure_ascii=False) + "\n"
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def measured_on() -> dict[str, Any]:
    """The commit (None outside a checkout), versions, command line, processors and how busy they are."""
    commit = _git("rev-parse", "--short", "HEAD")
    return {
        "commit": commit,
        "has_changes": None if commit is None else bool(_git("status", "--porcelain", "--untracked-files=no")),
        "versions": versions(),
        "command": shlex.join(["python", *sys.argv]),
        "n_cpus": os.cpu_count(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,  # not on Windows
    }


def say(message: str) -> None:
    """Tell people on stderr how far it is."""
    print(message, file=sys.stderr, flush=True)


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", "--no-optional-locks", *arguments], cwd=SOURCE, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None
