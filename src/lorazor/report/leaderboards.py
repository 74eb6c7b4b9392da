"""Leaderboards: for each task and budget, what every method ends with, the best first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lorazor.errors import SettingsError
from lorazor.measure.metrics import METRICS
from lorazor.report.suites import (
    FEWEST_SEEDS,
    Difference,
    Spread,
    SuiteResults,
    is_higher_better,
    spread,
)
from lorazor.report.words import count, number, signed

REFERENCES = ("low-rank", "random-sites-rank-1", "random-sites", "lora")
"""What differences are taken to unless a method is asked for: the first that a board has."""


@dataclass(frozen=True)
class Line:
    """A method on a board.

    Attributes:
        method: its name.
        n_seeds: seeds with a row.
        n_sites, n_parameters: of what is kept, means over the seeds.
        metrics: by name.
        differences: to the reference; none of the reference itself, and none without common seeds.
        gains: percent of what `lora` gains on `base`, by metric; none where `lora` does not gain on every seed.
        seconds: of choosing and training.
        peak_bytes: mean over the seeds; None where it was not measured.
    """

    method: str
    n_seeds: int
    n_sites: float
    n_parameters: float
    metrics: Mapping[str, Spread]
    differences: Mapping[str, Difference]
    gains: Mapping[str, Spread]
    seconds: Spread
    peak_bytes: float | None


@dataclass(frozen=True)
class Board:
    """One task at one budget.

    Attributes:
        task: its name.
        budget: `params=0.125`; None of a task whose methods have none.
        against: the method that differences are taken to; None where no method is one.
        metrics: the one that ranks first, the loss last.
        lines: the best first.
    """

    task: str
    budget: str | None
    against: str | None
    metrics: tuple[str, ...]
    lines: tuple[Line, ...]

    @property
    def title(self) -> str:
        """Names it."""
        return f"{self.task}, {self.budget}" if self.budget else self.task


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        title: what it shows.
        columns: its header.
        rows: of cells, each with as many as there are columns.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def leaderboards(results: SuiteResults, against: str | None = None) -> list[Board]:
    """One a task and budget; methods without a budget stand in each of their task, with their own size.

    Args:
        results: of the suite.
        against: the method to take differences to; the first of `REFERENCES` that a board has, if left out.
    Raises:
        SettingsError: no row is of that method.
    """
    if against is not None and against not in results.methods():
        raise SettingsError(f"against={against!r} has no rows. Pass one of {', '.join(results.methods())}.")
    return [
        _board(results, task, budget, against)
        for task in results.tasks
        for budget in results.budgets(task) or [None]
    ]  # fmt: skip


def _board(results: SuiteResults, task: str, budget: str | None, against: str | None) -> Board:
    methods = [method for method in results.methods(task) if results.cells(task, method, budget)]
    reference = next((one for one in ([against] if against else REFERENCES) if one in methods), None)
    metrics = results.metrics(task)
    sign = -1 if is_higher_better(metrics[0]) else 1

    def place(one: Line) -> float:
        found = one.metrics.get(metrics[0])
        return sign * found.mean if found and math.isfinite(found.mean) else math.inf

    lines = sorted((_line(results, task, budget, method, reference) for method in methods), key=place)
    return Board(task, budget, reference, tuple(metrics), tuple(lines))


def _line(results: SuiteResults, task: str, budget: str | None, method: str, against: str | None) -> Line:
    metrics = results.metrics(task)
    found = {metric: spread(results.values(task, method, budget, metric).values()) for metric in metrics}
    differences = {
        metric: results.difference(task, budget, method, against, metric)
        for metric in metrics if against not in (None, method)
    }  # fmt: skip
    gains = {metric: results.gain(task, budget, method, metric) for metric in metrics}
    columns = ("n_sites", "n_parameters", "seconds", "peak_bytes")
    sites, sizes, seconds, peaks = (results.mean(task, budget, method, column) for column in columns)
    assert sites is not None and sizes is not None and seconds is not None
    return Line(
        method,
        sizes.n,
        sites.mean,
        sizes.mean,
        {metric: one for metric, one in found.items() if one is not None},
        {metric: one for metric, one in differences.items() if one is not None},
        {metric: one for metric, one in gains.items() if one is not None},
        seconds,
        None if peaks is None else peaks.mean,
    )


# As texts


def board_table(board: Board) -> Table:
    """All of a board: every metric with its difference to the reference and its share of the gain."""
    gained = {metric for metric in board.metrics if any(metric in line.gains for line in board.lines)}
    columns = ["method", "seeds", "sites", "parameters"]
    for metric in board.metrics:
        columns += [metric, *([f"{metric} to {board.against}", "verdict"] if board.against else [])]
        columns += [f"% of gain in {metric}"] if metric in gained else []
    rows = []
    for line in board.lines:
        sites = count(line.n_sites) if line.n_sites or not line.n_parameters else "–"  # full fine-tuning has none
        cells = [line.method, str(line.n_seeds), sites, count(line.n_parameters)]
        for metric in board.metrics:
            one = line.differences.get(metric)
            cells += [with_error(line.metrics.get(metric), metric)]
            cells += [with_error(one, metric), word(one)] if board.against else []
            cells += [percent(line.gains.get(metric))] if metric in gained else []
        rows.append((*cells, f"{line.seconds.mean:,.0f}", gigabytes(line.peak_bytes)))
    return Table(board.title, (*columns, "seconds", "peak GB"), tuple(rows))


def compact_table(board: Board) -> Table:
    """What fits a terminal of 120 columns: the first metric, and the gain in loss."""
    metric = board.metrics[0]
    gained = "loss" if "loss" in board.metrics else metric
    against = [f"to {board.against}", "verdict"] if board.against else []
    columns = ("method", "seeds", "parameters", metric, *against, f"% of gain in {gained}", "seconds", "peak GB")
    rows = []
    for line in board.lines:
        one = line.differences.get(metric)
        cells = [line.method, str(line.n_seeds), count(line.n_parameters), with_error(line.metrics.get(metric), metric)]
        cells += [with_error(one, metric), word(one)] if board.against else []
        gain = percent(line.gains.get(gained))
        rows.append((*cells, gain, f"{line.seconds.mean:,.0f}", gigabytes(line.peak_bytes)))
    return Table(board.title, columns, tuple(rows))


def reading_aid(boards: Sequence[Board]) -> str:
    """How to read the words of the tables, with the chance at which they err."""
    from scipy import stats

    counts = {line.n_seeds for board in boards for line in board.lines}
    most = max(counts, default=0)
    text = (
        "Means ± standard errors over seeds; differences and shares are taken within a seed. '% of gain' is what a "
        "method gains on the base model, in percent of what lora gains. 'better' and 'worse' are differences beyond "
        "two standard errors, 'open' is less than that, and 'few seeds' is no claim: fewer than "
        f"{FEWEST_SEEDS} seeds in common."
    )
    if any(len({line.n_seeds for line in board.lines}) > 1 for board in boards):
        text += " A method with fewer seeds stands where the mean of these puts it: compare it by its differences."
    if most < FEWEST_SEEDS:
        return text
    chance = 100 * 2 * float(stats.t.sf(2, most - 1))
    return (
        f"{text} With {most} seeds, {chance:.0f} of 100 comparisons of a method with its like end beyond two standard "
        "errors, by chance."
    )


def answered(results: SuiteResults) -> Iterator[str]:
    """Which metrics are of some of the test examples, those that answers are written for: a sentence for each task."""
    for task in results.tasks:
        some = {(row["n_text"], row["n_test"]) for row in results.rows if row["task"] == task and row["n_text"]}
        if few := sorted(one for one in some if one[0] < one[1]):
            names = [name for name in results.metrics(task) if name in METRICS and METRICS[name].needs_text]
            counts = " or ".join(f"{n} of {n_test}" for n, n_test in few)
            yield f"On {task}, {', '.join(names)} {'is' if len(names) == 1 else 'are'} of {counts} test examples."


def with_error(value: Spread | Difference | None, metric: str) -> str:
    """`0.8127 ± 0.0034`; a difference has its sign."""
    if value is None:
        return "–"
    is_difference = isinstance(value, Difference)
    one = value.spread if is_difference else value
    mean = signed(one.mean, metric) if is_difference else number(one.mean, metric)
    return mean if one.error is None else f"{mean} ± {number(one.error, metric)}"


def word(value: Difference | None) -> str:
    """What a difference shows; nothing where there is none."""
    return "" if value is None else value.verdict


def percent(value: Spread | None) -> str:
    """`98.2 ± 0.4`."""
    if value is None or not math.isfinite(value.mean):
        return "–"
    mean = f"{value.mean:.1f}".replace("-", "−")
    return mean if value.error is None else f"{mean} ± {value.error:.1f}"


def gigabytes(n_bytes: float | None) -> str:
    """In units of 10⁹ bytes."""
    return "–" if n_bytes is None else f"{n_bytes / 1e9:.2f}"
