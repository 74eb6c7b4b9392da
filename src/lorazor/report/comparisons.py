"""Methods compared two by two within tasks, budgets and seeds; and what that comes to, in a sentence."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lorazor.report.suites import FEWEST_SEEDS, Difference, SuiteResults

BEYOND = " by more than two standard errors"
VERDICTS = ("better", "worse", "open", "few seeds")


@dataclass(frozen=True)
class Comparison:
    """A method and another, of one task, budget and metric."""

    task: str
    budget: str | None
    method: str
    against: str
    metric: str
    difference: Difference

    @property
    def place(self) -> str:
        """For sentences."""
        return f"{self.task} at {self.budget}" if self.budget else self.task


def compared(results: SuiteResults, methods: Iterable[str], against: Iterable[str]) -> list[Comparison]:
    """Every method with every other, wherever both have rows; in every metric, the first of the task first."""
    found = []
    for task, method, other in itertools.product(results.tasks, methods, against):
        if method == other:
            continue
        places = results.budgets(task, method) or results.budgets(task, other) or [None]
        for budget, metric in itertools.product(places, results.metrics(task)):
            difference = results.difference(task, budget, method, other, metric)
            if difference is not None:
                found.append(Comparison(task, budget, method, other, metric, difference))
    return found


def counted(found: Sequence[Comparison], with_places: bool = True, beyond: str = BEYOND) -> str:
    """`better by more than two standard errors on 2 of 3 (sst2, rte), worse on 0, open on 1`."""
    n, words = len(found), [one.difference.verdict for one in found]
    if words.count("few seeds") == n:
        return f"{n} comparison{'s' * (n != 1)} with fewer than {FEWEST_SEEDS} seeds in common, so nothing is claimed"
    pieces = []
    for verdict, said in (("better", f"better{beyond}"), ("worse", "worse"), ("open", "open")):
        places = [one.place for one in found if one.difference.verdict == verdict]
        where = f" ({', '.join(places)})" if with_places and verdict != "open" and 0 < len(places) < n else ""
        pieces.append(f"{said} on {len(places)}{f' of {n}' * (verdict == 'better')}{where}")
    few = words.count("few seeds")
    return ", ".join([*pieces, *([f"too few seeds on {few}"] if few else [])])


def by_metric(results: SuiteResults, found: Sequence[Comparison]) -> list[tuple[str, list[Comparison]]]:
    """The comparisons in the first metric of each task, and those in the loss where it is not the first."""
    first = {task: results.metrics(task)[0] for task in results.tasks}
    parts = [
        ("in the task's metric", [one for one in found if one.metric == first[one.task]]),
        ("in loss", [one for one in found if one.metric == "loss" != first[one.task]]),
    ]
    return [(name, part) for name, part in parts if part]


def missing(results: SuiteResults, methods: Sequence[str]) -> str | None:
    """Which rows an answer lacks; None where it has all."""
    absent = [method for method in methods if method not in results.methods()]
    gaps = []
    for method in methods:
        places = [
            f"{task} at {budget}" if budget else task
            for task in results.tasks
            for budget in (results.budgets(task) if results.budgets(method=method) else [None])
            if method not in absent and not results.cells(task, method, budget)
        ]
        gaps += [f"{method} on {', '.join(places)}"] if places else []
    if absent:
        gaps.insert(0, f"{', '.join(absent)} on any task")
    return f"No rows of {'; '.join(gaps)}." if gaps else None
