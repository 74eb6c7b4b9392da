"""The trade-off of a suite: share of the gain against parameters, a line for each method."""

from __future__ import annotations

import re

from lorazor.report.drawing import DASHES, SERIES, SYMBOLS, Drawing, empty_figure, literal, named
from lorazor.report.leaderboards import percent
from lorazor.report.suites import Spread, SuiteResults, spread
from lorazor.report.words import count

_LOWEST = -20.0
"""Percent of the gain below which a method would press all others together."""


def draw_gains(results: SuiteResults) -> list[Drawing]:
    """A figure for each task and metric; none where `lora` does not gain on every seed."""
    drawings = [
        _draw_gain(results, task, metric)
        for task in results.tasks
        for metric in sorted({results.metrics(task)[0], "loss"} & {*results.metrics(task)}, key="loss".__ne__)
    ]
    return [one for one in drawings if one is not None]


def _draw_gain(results: SuiteResults, task: str, metric: str) -> Drawing | None:
    lines = {method: _points(results, task, method, metric) for method in results.methods(task) if method != "base"}
    lines = {method: points for method, points in lines.items() if points}
    if not lines:
        return None
    figure = empty_figure("parameters (log scale)", f"% of lora's gain in {metric}", 620)
    rows: list[tuple[str, ...]] = []
    for index, (method, points) in enumerate(lines.items()):
        colour = named(SERIES[index % len(SERIES)])
        figure.add_scatter(
            x=[size for _, size, _ in points],
            y=[gain.mean for _, _, gain in points],
            error_y={"array": [gain.error or 0 for _, _, gain in points], "thickness": 1, "width": 2},
            customdata=[
                f"<b>{literal(method)}</b>{f' at {budget}' if budget else ''}<br>{percent(gain)} % of the gain"
                f"<br>{count(size)} parameters, seeds: {gain.n}"
                for budget, size, gain in points
            ],
            name=literal(method),
            mode="lines+markers",
            line={"color": colour, "width": 1.5, "dash": DASHES[index // len(SERIES) % len(DASHES)]},
            marker={"symbol": SYMBOLS[index % len(SYMBOLS)], "size": 8, "color": colour},
            hovertemplate="%{customdata}<extra></extra>",
        )
        rows += [(method, budget or "–", count(size), percent(gain), str(gain.n)) for budget, size, gain in points]
    gains = [gain.mean for points in lines.values() for _, _, gain in points]
    figure.add_hline(y=100, line={"color": named("axis"), "dash": "dash", "width": 1})
    figure.update_xaxes(type="log", tickformat="~s")
    figure.update_yaxes(range=[max(min(gains), _LOWEST) - 5, max(*gains, 100) + 5])
    figure.update_layout(legend={"y": -0.16, "yanchor": "top"})
    below = sorted({method for method, points in lines.items() if any(gain.mean < _LOWEST for _, _, gain in points)})
    hidden = f" Below {_LOWEST:g} %, and so only in the table: {', '.join(below)}." if below else ""
    return Drawing(
        key=re.sub(r"[^\w.-]", "_", f"results-{task}-{metric}"),
        title=f"{task}: share of the gain in {metric} against parameters",
        caption="0 % is the base model, 100 % LoRA on all sites (dashed line); means within seeds, bars are one "
        f"standard error. A line joins the budgets of a method.{hidden}",
        figure=figure,
        columns=("method", "budget", "parameters", "% of the gain", "seeds"),
        rows=tuple(rows),
    )


def _points(results: SuiteResults, task: str, method: str, metric: str) -> list[tuple[str | None, float, Spread]]:
    """Budget, parameters and gain, the smallest first."""
    found = []
    for budget in results.budgets(task, method) or [None]:
        size = spread(row["n_parameters"] for row in results.cells(task, method, budget).values())
        gain = results.gain(task, budget, method, metric)
        if size is not None and size.mean > 0 and gain is not None:  # a log scale has no place for nothing
            found.append((budget, size.mean, gain))
    return sorted(found, key=lambda one: one[1])
