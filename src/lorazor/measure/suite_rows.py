"""Results of suites: `results.jsonl`, one line a cell, in one schema.

schema       lorazor.results/1
cell         hash of all that the numbers depend on but for versions and machines
task, method, budget, seed      names of the suite; budget is {"kind": "params", "share": 0.125}, or null
n_parameters, n_sites, ranks    of what is kept, a trained head apart
metrics      by name, of the test examples; loss in nats per answer token, text or question
n_test       test examples
n_text       of these, the first so many, which metrics of written answers are of; 0 where no metric needs answers
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
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorazor.errors import OutputError
from lorazor.files import json_text, write_text

SCHEMA = "lorazor.results/1"
RESULTS_FILE, OTHERS_FILE, FAILURES_FILE = "results.jsonl", "other-results.jsonl", "failures.jsonl"


def read_results(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none where it is not there.

    Raises:
        OutputError: a line is no text, no JSON, of another schema, or lacks something.
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
        try:
            _check(row)
        except (KeyError, TypeError, OverflowError) as error:
            raise OutputError(
                f"{path}, line {number} is damaged: {error!r}. Remove the line; its cell is then run again."
            ) from error
        rows.append(row)
    return rows


def _check(row: Mapping[str, Any]) -> None:
    """Raise KeyError for what a row lacks, TypeError for what is of another kind; a metric may be null, as NaN is."""
    number = (int, float)
    numbers = ("n_sites", "n_parameters", "n_test", "n_text", "seconds", "steps", "seed")
    kinds = [(row, name, number) for name in numbers]
    kinds += [(row, name, str) for name in ("cell", "task", "method", "device")]
    kinds += [(row["metrics"], name, (*number, type(None))) for name in row["metrics"]]
    kinds += [(row, "peak_bytes", (*number, type(None))), (row, "versions", dict), (row, "ranks", list)]
    if row["budget"] is not None:
        kinds += [(row["budget"], "kind", str), (row["budget"], "share", number)]
    for place, name, kind in kinds:
        value = place[name]
        if not isinstance(value, kind):
            raise TypeError(f"{name} is {value!r:.80}")
        if isinstance(value, int):
            float(value)  # or it overflows
    if not row["metrics"]:
        raise TypeError("it has no metrics")


def write_results(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a file of rows, whole or not at all."""
    write_text(path, "".join(json_text(row) + "\n" for row in rows))


def note_failure(path: Path, cell: str, name: str, error: str | None) -> None:
    """Keep what went wrong in a cell in place of what did before; None where it has finished."""
    new = [] if error is None else [json_text({"cell": cell, "name": name, "error": error})]
    _write_lines(path, [*(line for line in _lines(path) if _cell(line) != cell), *new])


def drop_failures(path: Path, left: Container[str]) -> None:
    """Forget what went wrong in cells that are not left to run: they have finished, or the suite has them no more."""
    _write_lines(path, [line for line in _lines(path) if _cell(line) in left])


def _lines(path: Path) -> list[str]:
    text = path.read_bytes().decode("utf-8", errors="replace") if path.exists() else ""
    return [line for line in text.split("\n") if line]


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    if lines != _lines(path):
        write_text(path, "".join(line + "\n" for line in lines))


def _cell(line: str) -> str:
    """Of a failure; nothing of a line that is none."""
    try:
        return str(json.loads(line)["cell"])
    except (ValueError, KeyError, TypeError):
        return ""
