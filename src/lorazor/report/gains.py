"""The trade-off of a suite: what share of the gain every method keeps, at each of its sizes."""

from __future__ import annotations

import re

from lorazor.report.drawing import SERIES, SYMBOLS, Drawing, empty_figure, literal, named
from lorazor.report.leaderboards import percent
from lorazor.report.suites import FEWEST_SEEDS, Spread, SuiteResults, spread
from lorazor.report.words import count

_LOWEST = -20.0
"""Percent of the gain below which a method would press all others together."""
_OWN_SIZE = "no budget"


def draw_gains(results: SuiteResults) -> list[Drawing]:
    """A figure for each task and metric; none where `lora` does not gain on every seed."""
    drawings = [
        _draw_gain(results, task, metric)
        for task in results.tasks
        for metric in sorted({results.metrics(task)[0], "loss"} & {*results.metrics(task)}, key="loss".__ne__)
    ]
    return [one for one in drawings if one is not None]


def _draw_gain(results: SuiteResults, task: str, metric: str) -> Drawing | None:
    found = {method: _points(results, task, method, metric) for method in results.methods(task) if method != "base"}
    lines = {method: points for method, points in found.items() if points}
    if not lines:
        return None
    best_last = sorted(lines, key=lambda method: max(gain.mean for _, _, gain in lines[method]))
    figure = empty_figure(f"% of lora's gain in {metric}", "", 110 + 20 * len(lines))
    names = {method: _name(method, lines[method]) for method in lines}
    sizes = [*results.budgets(task), _OWN_SIZE]
    for index, size in enumerate(sizes):
        points = [
            (method, parameters, gain)
            for method in best_last for budget, parameters, gain in lines[method] if budget == size
        ]  # fmt: skip
        if points:
            colour, symbol = named(SERIES[index % len(SERIES)]), SYMBOLS[index % len(SYMBOLS)]
            figure.add_scatter(
                x=[gain.mean for _, _, gain in points],
                y=[names[method] for method, _, _ in points],
                error_x={"array": [gain.error or 0 for _, _, gain in points], "thickness": 1, "width": 2},
                customdata=[
                    f"<b>{literal(method)}</b>, {size}<br>{percent(gain)} % of the gain"
                    f"<br>{count(parameters)} parameters, seeds: {gain.n}"
                    for method, parameters, gain in points
                ],
                name=size,
                mode="markers",
                marker={
                    "symbol": [f"{symbol}-open" if gain.n < FEWEST_SEEDS else symbol for _, _, gain in points],
                    "size": 8,
                    "color": colour,
                },
                hovertemplate="%{customdata}<extra></extra>",
            )
    shown = [gain for points in lines.values() for _, _, gain in points if gain.mean >= _LOWEST]
    ends = [100.0, *(gain.mean + sign * (gain.error or 0) for gain in shown for sign in (-1, 1))]
    figure.add_vline(x=100, line={"color": named("axis"), "dash": "dash", "width": 1})
    figure.update_xaxes(range=[min(ends) - 3, max(ends) + 3])
    figure.update_yaxes(categoryorder="array", categoryarray=[names[method] for method in best_last])
    below = sorted({method for method, points in lines.items() if any(gain.mean < _LOWEST for _, _, gain in points)})
    hidden = f" Below {_LOWEST:g} %, and so only in the table: {', '.join(below)}." if below else ""
    return Drawing(
        key=re.sub(r"[^\w.-]", "_", f"results-{task}-{metric}"),
        title=f"{task}: share of the gain in {metric} at each size",
        caption="0 % is the base model, 100 % LoRA on all sites (dashed line); means within seeds, bars are one "
        f"standard error, and hollow points have fewer than {FEWEST_SEEDS} seeds. Methods without a budget have "
        f"the parameters beside their name.{hidden}",
        figure=figure,
        columns=("method", "budget", "parameters", "% of the gain", "seeds"),
        rows=tuple(
            (method, "–" if size == _OWN_SIZE else size, count(parameters), percent(gain), str(gain.n))
            for method in reversed(best_last)
            for size, parameters, gain in lines[method]
        ),
    )


def _name(method: str, points: list[tuple[str, float, Spread]]) -> str:
    """With its parameters where no budget says them."""
    own = [size for budget, size, _ in points if budget == _OWN_SIZE]
    return f"{literal(method)}, {count(own[0])}" if own else literal(method)


def _points(results: SuiteResults, task: str, method: str, metric: str) -> list[tuple[str, float, Spread]]:
    """Budget, parameters and gain, the smallest first."""
    found = []
    for budget in results.budgets(task, method) or [None]:
        size = spread(row["n_parameters"] for row in results.cells(task, method, budget).values())
        gain = results.gain(task, budget, method, metric)
        if size is not None and gain is not None:
            found.append((budget or _OWN_SIZE, size.mean, gain))
    return sorted(found, key=lambda one: one[1])
