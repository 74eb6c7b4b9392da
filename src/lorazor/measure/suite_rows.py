"""Results of suites: `results.jsonl`, one line a cell, in one schema.

schema       lorazor.results/1
cell         hash of all that the numbers depend on but for versions and machines
task, method, budget, seed      names of the suite; budget is {"kind": "params", "share": 0.125}, or null
n_parameters, n_sites, ranks    of what is kept, a trained head apart
metrics      by name, of the test examples; loss in nats per answer token, text or question
n_test       test examples
seconds      of training and choosing, loading included
steps        optimizer steps
peak_bytes   of memory meanwhile: CUDA's allocator, or the process; null where it is not known
cost         of a step, where it is the budget: as `TrainResult.cost`; else null
device       cpu or cuda
versions     of Python and packages

`other-results.jsonl` has the rows of cells that the suite has no more.
`failures.jsonl` has one line for each cell whose last try failed: cell, name, error.

This module never imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lorazor.errors import OutputError
from lorazor.files import json_text, write_text

SCHEMA = "lorazor.results/1"
RESULTS_FILE, OTHERS_FILE, FAILURES_FILE = "results.jsonl", "other-results.jsonl", "failures.jsonl"


def read_results(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none where it is not there.

    Raises:
        OutputError: a line is no text or no JSON, or of another schema.
    """
    if not path.exists():
        return []
    rows = []
    lines = path.read_bytes().split(b"\n")  # a text line may have other characters that end lines elsewhere
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines, start=1):
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError as error:
            raise OutputError(f"{path}, line {number}: not JSON ({error}). Remove the line.") from error
        found = row.get("schema") if isinstance(row, dict) else None
        if found != SCHEMA:
            raise OutputError(
                f"{path}, line {number}: schema {found!r}; this lorazor reads {SCHEMA!r}. Read it with the version "
                "that wrote it, or begin a new folder."
            )
        rows.append(row)
    return rows


def write_results(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a file of rows, whole or not at all."""
    write_text(path, "".join(json_text(row) + "\n" for row in rows))


def note_failure(path: Path, cell: str, name: str, error: str | None) -> None:
    """Keep what went wrong in a cell in place of what did before; None where it has finished."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    kept = [line for line in lines if line and f'"cell": "{cell}"' not in line]
    kept += [] if error is None else [json_text({"cell": cell, "name": name, "error": error})]
    if kept != [line for line in lines if line]:
        write_text(path, "".join(line + "\n" for line in kept))
