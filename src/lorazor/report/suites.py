"""The results of a suite, as plain data: which rows there are, and what was measured within the same seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorazor.errors import DataError, OutputError
from lorazor.measure.metrics import METRICS
from lorazor.measure.suite_rows import FAILURES_FILE, RESULTS_FILE, read_results
from lorazor.report.parsing import cleaned, parse_json, parse_rows

FEWEST_SEEDS = 3
"""With fewer pairs, a difference is shown and nothing is claimed."""


@dataclass(frozen=True)
class Spread:
    """A mean over seeds.

    Attributes:
        mean: NaN where a seed has no number.
        error: standard error of the mean; None of one seed.
        n: seeds.
    """

    mean: float
    error: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """A method less another, within the same seeds.

    Attributes:
        spread: of the differences, in the metric's unit.
        higher_is_better: the direction of the metric.
        verdict: `better` or `worse` by more than two standard errors; `open`; or `few seeds`, which say nothing.
    """

    spread: Spread
    higher_is_better: bool
    verdict: str = field(init=False)

    def __post_init__(self) -> None:
        """Judge it."""
        mean, error = self.spread.mean, self.spread.error
        if self.spread.n < FEWEST_SEEDS:
            verdict = "few seeds"
        elif error is None or not abs(mean) > max(2 * error, 1e-9):  # no number at all is open too
            verdict = "open"
        else:
            verdict = "better" if (mean > 0) == self.higher_is_better else "worse"
        object.__setattr__(self, "verdict", verdict)


@dataclass(frozen=True)
class SuiteResults:
    """Rows of a suite.

    Attributes:
        path: its folder.
        name: of the suite, or of the folder.
        rows: as `measure.suite_rows` describes them.
        failures: cells that have no row, and the last line of what went wrong.
        n_cells: of the suite; None where results are all that is there.
    """

    path: Path
    name: str
    rows: tuple[Mapping[str, Any], ...]
    failures: tuple[tuple[str, str], ...] = ()
    n_cells: int | None = None

    @property
    def tasks(self) -> list[str]:
        """In the order of the rows."""
        return list(dict.fromkeys(row["task"] for row in self.rows))

    def methods(self, task: str | None = None) -> list[str]:
        """With rows of a task, or of any."""
        return list(dict.fromkeys(row["method"] for row in self.rows if task in (None, row["task"])))

    def budgets(self, task: str | None = None, method: str | None = None) -> list[str]:
        """The largest first: `params=0.125`."""
        found = [
            row["budget"] for row in self.rows
            if row["budget"] and task in (None, row["task"]) and method in (None, row["method"])
        ]  # fmt: skip
        found.sort(key=lambda one: (one["kind"], -one["share"]))
        return list(dict.fromkeys(map(label, found)))

    def metrics(self, task: str) -> list[str]:
        """The task's own, the one that ranks methods first; the loss last."""
        names = dict.fromkeys(name for row in self.rows if row["task"] == task for name in row["metrics"])
        return [*(name for name in names if name != "loss"), *(name for name in names if name == "loss")]

    def cells(self, task: str, method: str, budget: str | None) -> dict[int, Mapping[str, Any]]:
        """Rows by seed: of the budget, or of a method that has none."""
        mine = [row for row in self.rows if row["task"] == task and row["method"] == method]
        return {row["seed"]: row for row in mine if row["budget"] is None or label(row["budget"]) == budget}

    def mean(self, task: str, budget: str | None, method: str, column: str) -> Spread | None:
        """A number of the rows, such as `seconds`, over the seeds that have it."""
        found = (row[column] for row in self.cells(task, method, budget).values())
        return spread(value for value in found if value is not None)

    def values(self, task: str, method: str, budget: str | None, metric: str) -> dict[int, float]:
        """A metric by seed; NaN where the file has no number."""
        found = {seed: row["metrics"].get(metric) for seed, row in self.cells(task, method, budget).items()}
        return {seed: math.nan if value is None else value for seed, value in found.items()}

    def difference(self, task: str, budget: str | None, method: str, against: str, metric: str) -> Difference | None:
        """A method less another of the same budget, or of none; None without a seed that both have."""
        own, other = (self.values(task, one, budget, metric) for one in (method, against))
        found = spread(own[seed] - other[seed] for seed in own if seed in other)
        return None if found is None else Difference(found, is_higher_better(metric))

    def is_idle(self, task: str, budget: str | None, metric: str) -> bool:
        """Whether `lora` does not gain on `base` on every seed that both have."""
        base, lora = (self.values(task, one, budget, metric) for one in ("base", "lora"))
        sign = 1 if is_higher_better(metric) else -1
        return any(not sign * (lora[seed] - base[seed]) > 0 for seed in lora if seed in base)

    def gain(self, task: str, budget: str | None, method: str, metric: str) -> Spread | None:
        """Percent of what `lora` gains on `base`, within the same seeds.

        None where base, lora or the method has no rows or not a number, or where `lora` does not gain on every seed: a
        share of nothing says nothing.
        """
        if self.is_idle(task, budget, metric):
            return None
        own, base, lora = (self.values(task, one, budget, metric) for one in (method, "base", "lora"))
        both = [seed for seed in own if seed in base and seed in lora]
        found = spread(100 * (own[seed] - base[seed]) / (lora[seed] - base[seed]) for seed in both)
        return found if found and math.isfinite(found.mean) else None

    def ratio(self, task: str, budget: str | None, method: str, column: str, against: str = "lora") -> Spread | None:
        """A number of the rows, such as `seconds`, in units of another method's, within the same seeds."""
        own, other = (self.cells(task, one, budget) for one in (method, against))
        pairs = [(own[seed][column], other[seed][column]) for seed in own if seed in other]
        return spread(one / of for one, of in pairs if one is not None and of)


def label(budget: Mapping[str, Any]) -> str:
    """A budget as suites and rows name it."""
    return f"{budget['kind']}={budget['share']:g}"


def is_higher_better(metric: str) -> bool:
    """The direction of a metric; of one that this version does not know, upwards."""
    return metric not in METRICS or METRICS[metric].higher_is_better


def spread(values: Iterable[float]) -> Spread | None:
    """Mean and its standard error; None of nothing."""
    found = list(values)
    if not found:
        return None
    if not all(map(math.isfinite, found)):
        return Spread(math.nan, None, len(found))
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None
    return Spread(statistics.fmean(found), error, len(found))


def is_suite(path: Path) -> bool:
    """Whether a folder is that of a suite, or has its results."""
    return (path / RESULTS_FILE).exists() or (path / "suite" / "run.json").exists()


def read_suite_results(path: Path) -> SuiteResults:
    """Read the folder of a suite.

    Raises:
        OutputError: no cell has finished, or the results are damaged or of another schema; the message says which.
        DataError: two rows are of one cell.
    """
    rows = [cleaned(row) for row in read_results(path / RESULTS_FILE)]
    seen: dict[tuple[Any, ...], int] = {}
    for number, row in enumerate(rows, start=1):
        name = (row["task"], row["method"], row["budget"] and label(row["budget"]), row["seed"])
        if (other := seen.setdefault(name, number)) != number:
            place = f"{str(path / RESULTS_FILE)!r}, line {number}"
            raise DataError(f"{place} is of the same cell as line {other}: {name}. Remove one of them.")
    failures = _failures(path, {row["cell"] for row in rows})
    if not rows:
        said = f": {failures[-1][0]}: {failures[-1][1]}" if failures else ""
        raise OutputError(
            f"{str(path)!r} has no results: no cell has finished{said.rstrip('.')}. Run 'lorazor bench' first."
        )
    noted = parse_json(
        path / "suite" / "run.json",
        lambda document: (str(document["settings"]["suite"]), int(document["result"]["n_cells"])),
    )
    name, n_cells = noted or (path.resolve().name, None)
    return SuiteResults(path, name, tuple(rows), failures, n_cells)


def _failures(path: Path, finished: set[str]) -> tuple[tuple[str, str], ...]:
    """The last failure of every cell that has not finished since."""
    found = parse_rows(
        path / FAILURES_FILE, lambda row: (row["cell"], row["name"], str(row["error"])), is_finished=False
    )
    last = {cell: (name, _last_line(error)) for cell, name, error in found if cell not in finished}
    return tuple(last.values())


def _last_line(error: str) -> str:
    return (error.strip().splitlines() or ["no message"])[-1]


def versions_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Packages and their versions, all of those that rows were measured with."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        for name, version in row["versions"].items():
            found.setdefault(name, {})[version if isinstance(version, str) else json.dumps(version)] = None
    return {name: ", ".join(versions) for name, versions in found.items()}
