"""The trade-off of a suite: what share of the gain every method keeps, at each of its sizes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lorazor.report.drawing import SERIES, SYMBOLS, Drawing, empty_figure, literal, named
from lorazor.report.leaderboards import percent
from lorazor.report.suites import FEWEST_SEEDS, Spread, SuiteResults
from lorazor.report.words import count

_LOWEST, _HIGHEST = -20.0, 200.0
"""Percent of the gain beyond which a method would press all others together."""
_LONGEST = 40
"""Characters of a name beside the axis."""
_OWN_SIZE = "no budget"


@dataclass(frozen=True)
class _Point:
    """A method at one of its budgets: how many parameters it has, and what they gain."""

    method: str
    budget: str
    size: float
    gain: Spread

    @property
    def is_shown(self) -> bool:
        return _LOWEST <= self.gain.mean <= _HIGHEST


def draw_gains(results: SuiteResults) -> list[Drawing]:
    """A figure for each task and metric; none where `lora` does not gain on every seed."""
    drawings: dict[str, Drawing] = {}
    for task in results.tasks:
        for metric in sorted({results.metrics(task)[0], "loss"} & {*results.metrics(task)}, key="loss".__ne__):
            one = _draw_gain(results, task, metric)
            while one is not None and one.key in drawings:  # names that differ in what files cannot be called
                one = dataclasses.replace(one, key=f"{one.key}-")
            drawings |= {} if one is None else {one.key: one}
    return list(drawings.values())


def _draw_gain(results: SuiteResults, task: str, metric: str) -> Drawing | None:
    found = {method: _points(results, task, method, metric) for method in results.methods(task) if method != "base"}
    lines = {method: points for method, points in found.items() if points}
    if not lines:
        return None
    methods = sorted(lines, key=lambda method: max(point.gain.mean for point in lines[method]))
    points = [point for line in lines.values() for point in line]
    budgets = [*results.budgets(task), _OWN_SIZE]
    legend = 24 * -(-len(budgets) // 2)
    figure = empty_figure(f"% of lora's gain in {metric}", "", 90 + legend + 20 * len(methods))
    for index, budget in enumerate(budgets):
        if mine := [point for point in points if point.is_shown and point.budget == budget]:
            colour, symbol = named(SERIES[index % len(SERIES)]), SYMBOLS[index % len(SYMBOLS)]
            figure.add_scatter(
                x=[point.gain.mean for point in mine],
                y=[point.method for point in mine],
                error_x={"array": [point.gain.error or 0 for point in mine], "thickness": 1, "width": 2},
                customdata=[
                    f"<b>{literal(point.method)}</b>, {literal(budget)}<br>{percent(point.gain)} % of the gain"
                    f"<br>{count(point.size)} parameters, seeds: {point.gain.n}"
                    for point in mine
                ],
                name=literal(budget),
                mode="markers",
                marker={
                    "symbol": [f"{symbol}-open" if point.gain.n < FEWEST_SEEDS else symbol for point in mine],
                    "size": 8,
                    "color": colour,
                },
                hovertemplate="%{customdata}<extra></extra>",
            )
    ends = [point.gain.mean + sign * (point.gain.error or 0) for point in points for sign in (-1, 1) if point.is_shown]
    figure.add_vline(x=100, line={"color": named("axis"), "dash": "dash", "width": 1})
    figure.update_xaxes(range=[max(min(ends, default=100), _LOWEST) - 3, min(max(ends, default=100), _HIGHEST) + 3])
    names = [_name(method, lines[method]) for method in methods]
    figure.update_yaxes(
        type="category", categoryorder="array", categoryarray=methods, tickmode="array", tickvals=methods,
        ticktext=names, range=[-0.7, len(methods) - 0.3],
    )  # fmt: skip
    figure.update_layout(margin_t=16 + legend)
    return Drawing(
        key=re.sub(r"[^\w.-]", "_", f"results-{task}-{metric}"),
        title=f"{task}: share of the gain in {metric} at each size",
        caption="0 % is the base model, 100 % LoRA on all sites (dashed line); means within seeds, bars are one "
        f"standard error, and hollow points have fewer than {FEWEST_SEEDS} seeds. Methods without a budget have "
        f"the parameters beside their name.{_hidden(points)}",
        figure=figure,
        columns=("method", "budget", "parameters", "% of the gain", "seeds"),
        rows=tuple(_row(point) for method in reversed(methods) for point in lines[method]),
    )


def _row(point: _Point) -> tuple[str, ...]:
    budget = "–" if point.budget == _OWN_SIZE else point.budget
    return point.method, budget, count(point.size), percent(point.gain), str(point.gain.n)


def _hidden(points: Sequence[_Point]) -> str:
    """What is beyond the ends of the axis."""
    far = [f"{point.method} ({point.budget}, {percent(point.gain)} %)" for point in points if not point.is_shown]
    return f" Too far off to be drawn: {', '.join(far)}." if far else ""


def _name(method: str, points: Sequence[_Point]) -> str:
    """As it stands beside the axis: with its parameters where no budget says them."""
    short = method if len(method) <= _LONGEST else f"{method[: _LONGEST - 1]}…"
    own = [point.size for point in points if point.budget == _OWN_SIZE]
    return literal(f"{short}, {count(own[0])}" if own else short)


def _points(results: SuiteResults, task: str, method: str, metric: str) -> list[_Point]:
    """The smallest first."""
    found = []
    for budget in results.budgets(task, method) or [None]:
        size = results.mean(task, budget, method, "n_parameters")
        gain = results.gain(task, budget, method, metric)
        if size is not None and gain is not None:
            found.append(_Point(method, budget or _OWN_SIZE, size.mean, gain))
    return sorted(found, key=lambda one: one.size)
