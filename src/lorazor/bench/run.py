"""A suite from start to end: cells that are left, wherever they run, into one file of results."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lorazor.bench.copies import Copies
from lorazor.bench.cost import Costs, Line, measure_teraflops
from lorazor.bench.devices import find_devices, run_on_devices
from lorazor.bench.on_ray import check_cluster, run_on_ray
from lorazor.bench.peft_results import write_peft_results
from lorazor.bench.places import alone, finished_row, is_free
from lorazor.bench.reading import find_suite, read_suite
from lorazor.bench.settings import BenchSettings
from lorazor.bench.suite import Cell, Outcome, Suite
from lorazor.errors import OutputError, SettingsError
from lorazor.fields import with_fields
from lorazor.measure.suite_rows import (
    FAILURES_FILE,
    OTHERS_FILE,
    RESULTS_FILE,
    drop_failures,
    note_failure,
    read_results,
    write_results,
)
from lorazor.runs import RunFolder


@dataclass(frozen=True)
class BenchResult:
    """What a suite came to.

    Attributes:
        out: its folder.
        suite: all its cells.
        rows: of the cells that have finished.
        failed: what went wrong, by the names of cells.
        left: cells that have not finished.
        costs: what these cost; of a dry run alone.
    """

    out: Path
    suite: Suite
    rows: list[dict[str, Any]]
    failed: dict[str, str]
    left: list[Cell]
    costs: Sequence[Line] = ()


def run_suite(
    suite: str | Path,
    *,
    out: str | Path,
    settings: BenchSettings | None = None,
    say: Callable[[str], None] = lambda message: None,
    **fields: Any,
) -> BenchResult:
    """Run the cells of a suite that have not finished.

    Args:
        suite: a .toml file, or the name of a suite that comes with lorazor.
        out: folder for cells and results, new or of the same suite; `results.jsonl` in it has what has finished.
        settings: everything else.
        say: receives messages for people.
        fields: of `BenchSettings`, in place of those of `settings`.
    Raises:
        LorazorError: suite, settings or folder cannot be used, before any cell begins. What goes wrong in a cell is
            noted, and does not stop the others.
    """
    settings, out = with_fields(BenchSettings, settings, fields), Path(out)
    plan = read_suite(find_suite(str(suite)))
    copies = Copies(settings.copies)
    wanted = chosen_cells(plan, settings.only)
    check_is_of(out, plan)
    if settings.dry_run:
        rows = finished_rows(out, plan)
        left, costs = _left(wanted, rows), Costs(plan.cells, copies, settings.teraflops or measure_teraflops())
        return BenchResult(out, plan, rows, {}, left, costs.lines(left, rows))
    runner = _runner(settings)
    # Measuring takes the device, which is that of the cells here alone.
    speed = settings.teraflops or (measure_teraflops() if settings.on == "here" else None)
    with alone(out, say):
        _note_suite(out, plan)
        rows, failed = finished_rows(out, plan), dict[str, str]()
        _bring_up_to_date(out, plan, rows, say)
        left, costs = _left(wanted, rows), Costs(plan.cells, copies, speed)
        say(f"{plan.name}: {len(left)} cells to run, {len(rows)} of {len(plan.cells)} have finished.")
        for place, (cell, outcome) in enumerate(runner(left, out, copies, settings, say), start=1):
            note_failure(out / FAILURES_FILE, cell.key, cell.name, outcome if isinstance(outcome, str) else None)
            if isinstance(outcome, str):
                failed[cell.name] = outcome
                say(f"[{place}/{len(left)}] {cell.name}: failed: {outcome.strip().splitlines()[-1]}")
                continue
            rows.append(outcome)
            write_results(out / RESULTS_FILE, in_order(rows, plan))
            shown = ", ".join(f"{name} {value:.4f}" for name, value in outcome["metrics"].items())
            say(f"[{place}/{len(left)}] {cell.name}: {outcome['n_parameters']:,}, {shown}, {outcome['seconds']:.0f} s")
            say(costs.time_left([one for one in _left(wanted, rows) if one.name not in failed], rows))
        write_peft_results(out, rows, plan.cells)
    return BenchResult(out, plan, in_order(rows, plan), failed, _left(wanted, rows))


def chosen_cells(suite: Suite, only: str | None) -> list[Cell]:
    """The cells that a pattern names, all without one: `sst2 low-* seed=0, rte` is these of sst2, and all of rte.

    A name with spaces or commas stands in quotes, as in a shell.

    Raises:
        SettingsError: it names none, or a quotation does not end.
    """
    patterns = _patterns(only or "")

    def is_named(cell: Cell, words: Sequence[str]) -> bool:
        return all(any(fnmatchcase(part, word) for part in cell.parts) for word in words)

    found = [cell for cell in suite.cells if not patterns or any(is_named(cell, words) for words in patterns)]
    if not found:
        raise SettingsError(
            f"only={only!r} names no cell. A cell has a task, a method, a budget and a seed, such as "
            f"{shlex.join(suite.cells[0].parts)!r}; * stands for anything, and names with spaces are in quotes."
        )
    return found


def _patterns(only: str) -> list[list[str]]:
    """Words between commas, unless these are in quotes."""
    words = shlex.shlex(only, posix=True, punctuation_chars=",")
    words.whitespace_split, words.commenters = True, ""
    try:
        groups = itertools.groupby(words, key=lambda word: not word.strip(","))
        return [list(own) for is_comma, own in groups if not is_comma]
    except ValueError as error:
        raise SettingsError(f"only={only!r}: {error}. Close the quotation.") from error


def check_is_of(out: Path, suite: Suite) -> None:
    """Refuse a folder of another suite, or of something else.

    Raises:
        OutputError: it is.
    """
    if not out.exists() or is_free(out):
        return
    if not (out / "suite" / "run.json").exists():
        if (out / RESULTS_FILE).exists():  # results alone, as they are passed on
            return
        raise OutputError(f"The output folder {str(out)!r} holds no suite. Nothing was written; choose another folder.")
    found = RunFolder.open(out / "suite").document["settings"]["suite"]
    if found != suite.name:
        raise OutputError(f"{str(out)!r} holds the suite {found!r}, not {suite.name!r}. Choose another folder.")


def _note_suite(out: Path, suite: Suite) -> None:
    """Note which suite the folder is of, and how many cells it has, which reports cannot know otherwise."""
    run = RunFolder.start(out / "suite", "bench", {"suite": suite.name}, {}, resume=True)
    run.document["result"] = {"n_cells": len(suite.cells)}
    run.finish()


def finished_rows(out: Path, suite: Suite) -> list[dict[str, Any]]:
    """Rows of the cells of this suite that have finished, in their order: of the results, and of the cells' folders.

    Raises:
        OutputError: results of another schema.
    """
    rows = {row["cell"]: row for row in _known(out)}
    for cell in suite.cells:
        if cell.key not in rows and (row := finished_row(out / "cells" / cell.folder)) is not None:
            rows[cell.key] = row
    return in_order(rows.values(), suite)


def _known(out: Path) -> list[dict[str, Any]]:
    """Every row in the folder's files."""
    return [*read_results(out / OTHERS_FILE), *read_results(out / RESULTS_FILE)]


def _bring_up_to_date(out: Path, suite: Suite, rows: Sequence[dict[str, Any]], say: Callable[[str], None]) -> None:
    """Have the files follow a suite that was edited, and cells that ended when the last command did not note it.

    Rows of cells that the suite has no more are kept in a file of their own, and come back from it with the cell.
    """
    keys = {cell.key for cell in suite.cells}
    aside = {row["cell"]: row for row in read_results(out / OTHERS_FILE)}
    others = {row["cell"]: row for row in _known(out) if row["cell"] not in keys}
    if n_new := len(others.keys() - aside.keys()):
        say(f"{n_new} rows are of cells that the suite no longer has: they go to {OTHERS_FILE}.")
    # killed in between, a row that moves is in both files, and never in none
    for name, own in (
        (OTHERS_FILE, {**aside, **others}.values()),
        (RESULTS_FILE, rows),
        (OTHERS_FILE, others.values()),
    ):
        if list(own) != read_results(out / name):
            write_results(out / name, own)
    drop_failures(out / FAILURES_FILE, keys - {row["cell"] for row in rows})


def in_order(rows: Iterable[dict[str, Any]], suite: Suite) -> list[dict[str, Any]]:
    """The rows as the suite has its cells, under the names that it gives them."""
    by_key = {row["cell"]: row for row in rows}
    return [
        {**by_key[cell.key], "task": cell.task, "method": cell.method} for cell in suite.cells if cell.key in by_key
    ]


def _left(cells: Sequence[Cell], rows: Iterable[dict[str, Any]]) -> list[Cell]:
    done = {row["cell"] for row in rows}
    return [cell for cell in cells if cell.key not in done]


def _runner(settings: BenchSettings) -> Callable[..., Iterator[Outcome]]:
    """What runs cells where the settings say.

    Raises:
        SettingsError: they cannot be run there.
    """
    if settings.on == "ray":
        check_cluster(settings)
        return run_on_ray
    devices = find_devices(settings.devices)
    if settings.on == "devices":
        return run_on_devices
    if settings.devices is not None and devices != find_devices(None)[:1]:
        raise SettingsError(
            f"devices={settings.devices!r}, but on='here' runs all cells on {find_devices(None)[0]}. Pass on='devices'."
        )
    return run_here


def run_here(
    cells: Sequence[Cell], out: Path, copies: Copies, settings: BenchSettings, say: Callable[[str], None]
) -> Iterator[Outcome]:
    """One after the other, in this process."""
    from lorazor.bench.cell import attempt

    for cell in cells:
        say(f"{cell.name} ...")
        yield cell, attempt(cell, out, copies, settings.devices, say)
