"""Figures of measurements: the boundary, the trade-off, the curves, the training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorazor.measure.metrics import METRICS
from lorazor.report.contents import Choice, Point, Run
from lorazor.report.drawing import Drawing, empty_figure, literal, style
from lorazor.report.palette import DASHES, SERIES, SYMBOLS, named
from lorazor.report.words import bounds, count, number, share, short, signed


def draw_boundary(run: Run) -> Drawing | None:
    """The metric at every boundary, with a band of one standard error, and the boundary chosen."""
    choice = run.choice
    if choice is None or choice.chosen.boundary is None:
        return None
    from plotly.subplots import make_subplots

    points = sorted(choice.points, key=lambda one: one.boundary or 0)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08, row_heights=[0.5, 0.5])
    style(figure, 560)
    _add_line(figure, points, choice, [point.value for point in points], 1)
    _add_line(figure, points, choice, [point.difference.estimate for point in points], 2)
    figure.add_hline(y=choice.full.value, line={"color": named("axis"), "dash": "dash", "width": 1}, row=1)  # pyright: ignore[reportArgumentType]
    figure.add_hline(y=0, line={"color": named("axis"), "dash": "dash", "width": 1}, row=2)  # pyright: ignore[reportArgumentType]
    figure.update_yaxes(title_text=axis_name(choice.metric), row=1, col=1)
    figure.update_yaxes(title_text="difference to full,<br>close up", range=_close_up(points), row=2, col=1)
    figure.update_xaxes(title_text=f"boundary: layers of {literal(choice.stack or '')} that keep LoRA", row=2, col=1)
    return Drawing(
        key="boundary",
        title=f"What every boundary costs: {choice.metric}",
        caption=f"Boundary b keeps the LoRA of the first b layers: 0 is the base model, {choice.full.boundary} the "
        f"full adapter (dashed line). The lower panel shows the difference to the full adapter, so near that the "
        f"better half of the boundaries fills it; the band is one standard error of that paired difference. "
        f"{direction(choice.higher_is_better)} {count(choice.n_examples)} examples.",
        figure=figure,
        columns=("boundary", choice.metric, "difference to full", "95 % interval", "parameters kept"),
        rows=tuple(
            (
                f"{point.boundary}{' (chosen)' if point == choice.chosen else ''}",
                number(point.value, choice.metric),
                signed(point.difference.estimate, choice.metric),
                bounds(point.difference, choice.metric),
                share(point.n_parameters, choice.full.n_parameters),
            )
            for point in points
        ),
    )


def draw_trade_off(runs: Sequence[Run], metric: str) -> Drawing | None:
    """Quality against what is kept, of all runs that chose by one metric; None where no run knows sizes."""
    drawn = [(run, run.choice) for run in runs if run.choice is not None and run.choice.metric == metric]
    drawn = [(run, choice) for run, choice in drawn if choice.full.n_parameters]
    if not drawn:
        return None
    figure = empty_figure("LoRA parameters kept (%)", axis_name(metric), 440)
    rows: list[tuple[str, ...]] = []
    listed: list[str] = []
    for index, (run, choice) in enumerate(drawn):
        measured = [one for one in choice.points if one.n_parameters is not None]
        measured.sort(key=lambda one: one.n_parameters or 0)
        _add_series(figure, measured, choice, literal(run.name) if len(runs) > 1 else "candidates", index)
        for baseline in choice.baselines:
            is_new = baseline.label not in listed
            listed += [baseline.label] if is_new else []
            _add_baseline(figure, baseline, choice, listed.index(baseline.label), index, len(drawn), is_new)
        _mark_chosen(figure, _percent(choice.chosen, choice), choice.chosen.value, choice, is_listed=index == 0)
        rows += [_row(run, point, choice) for point in (*measured, *choice.baselines)]
    figure.update_xaxes(range=[-3, 103])
    choice = drawn[0][1]
    return Drawing(
        key=f"trade-off-{metric}",
        title=f"Quality against parameters kept: {metric}",
        caption="Bars are 95 % intervals of the paired difference to the full adapter of the same run. "
        f"{direction(choice.higher_is_better)} The ring marks what was chosen.",
        figure=figure,
        columns=("run", "part", "parameters kept", metric, "difference to full", "95 % interval"),
        rows=tuple(rows),
    )


def draw_curves(run: Run) -> Drawing | None:
    """Probability of the true token, entropy and rank after every layer, with the adapter and without."""
    curves = run.curves
    if curves is None:
        return None
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.5, 0.25, 0.25])
    style(figure, 640)
    panels = (
        ("probability", "probability_standard_error", "probability of<br>the true token"),
        ("entropy_nats", "entropy_standard_error", "entropy<br>(nats)"),
        ("median_rank", None, "median rank<br>(log scale)"),
    )
    looks = (("base", "second", "dash", "square"), ("adapter", "first", "solid", "circle"))
    for row, (value, error, title) in enumerate(panels, start=1):
        for variant, colour, dash, symbol in looks:
            points = [point for point in curves.points if point.variant == variant]
            errors = None if error is None else [getattr(point, error) for point in points]
            figure.add_scatter(
                x=[point.layer for point in points],
                y=[getattr(point, value) for point in points],
                error_y=None if errors is None else {"array": errors, "thickness": 1, "width": 0},
                customdata=[""] * len(points) if errors is None else [f" ± {short(one)}" for one in errors],
                mode="lines+markers",
                name="with the adapter" if variant == "adapter" else "base model",
                showlegend=row == 1,
                line={"color": named(colour), "dash": dash, "width": 2},
                marker={"symbol": symbol, "size": 5},
                hovertemplate=f"after layer %{{x}}, {variant}: %{{y:.4g}}%{{customdata}}<extra></extra>",
                row=row,
                col=1,
            )
        figure.update_yaxes(title_text=title, row=row, col=1)
    figure.update_yaxes(type="log", row=3, col=1)
    figure.update_xaxes(title_text=f"layers of {literal(curves.stack)} that have run", row=3, col=1)
    if curves.boundary is not None:
        figure.add_vline(x=curves.boundary, line={"color": named("axis"), "dash": "dot", "width": 2})
    line = " The dotted line is the boundary read off the curves." if curves.boundary is not None else ""
    return Drawing(
        key="curves",
        title="What the model knows after each layer",
        caption=f"Means over {count(curves.n_examples)} examples, bars are one standard error; "
        f"0 is what the first layer is given.{line}",
        figure=figure,
        columns=("variant", "layer", "probability", "entropy (nats)", "median rank"),
        rows=tuple(
            (one.variant, str(one.layer), f"{one.probability:.4f}", f"{one.entropy_nats:.4f}", f"{one.median_rank:g}")
            for one in curves.points
        ),
    )


def draw_training(run: Run) -> Drawing | None:
    """The loss that the trainers logged."""
    if not run.training:
        return None
    figure = empty_figure("step", "training loss (nats)", 300)
    figure.add_scatter(
        x=[step for step, _ in run.training],
        y=[loss for _, loss in run.training],
        mode="lines",
        line={"color": named("first"), "width": 2},
        hovertemplate="step %{x}: %{y:.4f}<extra></extra>",
    )
    return Drawing(
        key="training",
        title="Loss in training",
        caption="As the trainers logged it, on the training examples.",
        figure=figure,
        columns=("step", "loss"),
        rows=tuple((str(step), f"{loss:.4f}") for step, loss in run.training),
    )


def axis_name(metric: str) -> str:
    """A metric as the title of an axis, with its unit."""
    unit = {"loss": "nats per token", "accuracy": "fraction", "token-accuracy": "fraction"}.get(metric)
    if unit is None and metric in METRICS:
        unit = "percent"
    return f"{metric} ({unit})" if unit else metric


def direction(higher_is_better: bool) -> str:
    """Which way is good, as a sentence."""
    return "Higher is better." if higher_is_better else "Lower is better."


def _add_line(figure, points: Sequence[Point], choice: Choice, y: list[float], row: int) -> None:
    """A line over the boundaries, with its band and the choice ringed."""
    x = [point.boundary for point in points]
    errors = [point.difference.standard_error for point in points]
    above = [value + error for value, error in zip(y, errors, strict=True)]
    below = [value - error for value, error in zip(y, errors, strict=True)]
    where = {"row": row, "col": 1}
    figure.add_scatter(
        x=[*x, *reversed(x)],
        y=[*above, *reversed(below)],
        fill="toself",
        fillcolor=named("band"),
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        name="± one standard error",
        showlegend=row == 1,
        **where,
    )
    figure.add_scatter(
        x=x,
        y=y,
        customdata=[_about(point, choice) for point in points],
        mode="lines+markers",
        line={"color": named("first"), "width": 2},
        marker={"size": 6},
        hovertemplate="%{customdata}<extra></extra>",
        name=choice.metric,
        showlegend=row == 1,
        **where,
    )
    ringed = next(value for point, value in zip(points, y, strict=True) if point == choice.chosen)
    _mark_chosen(figure, choice.chosen.boundary or 0, ringed, choice, is_listed=row == 1, **where)


def _close_up(points: Sequence[Point]) -> list[float]:
    """Limits that show the half of the differences nearest to zero with their bands."""
    differences = sorted((point.difference for point in points), key=lambda one: abs(one.estimate))
    near = differences[: len(differences) // 2 + 1]
    low = min(0.0, *(one.estimate - one.standard_error for one in near))
    high = max(0.0, *(one.estimate + one.standard_error for one in near))
    room = 0.1 * (high - low) or 1.0
    return [low - room, high + room]


def _about(point: Point, choice: Choice) -> str:
    """What a tooltip says of a measured part."""
    lines = [
        f"<b>{literal(point.label)}</b>{' (chosen)' if point == choice.chosen else ''}",
        f"{choice.metric} {number(point.value, choice.metric)}",
        f"to full {signed(point.difference.estimate, choice.metric)} ({bounds(point.difference, choice.metric)})",
    ]
    if point.n_sites is not None:
        lines.append(f"{count(point.n_sites)} sites, {count(point.n_parameters)} parameters")
    return "<br>".join(lines)


def _add_series(figure, points: Sequence[Point], choice: Choice, name: str, index: int) -> None:
    colour = named(SERIES[index % len(SERIES)])
    figure.add_scatter(
        x=[_percent(point, choice) for point in points],
        y=[point.value for point in points],
        customdata=[_about(point, choice) for point in points],
        error_y=_bars(points),
        name=name,
        mode="lines+markers",
        line={"color": colour, "width": 2, "dash": DASHES[index % len(DASHES)]},
        marker={"symbol": SYMBOLS[index % len(SYMBOLS)], "size": 7, "color": colour},
        hovertemplate="%{customdata}<extra></extra>",
    )


def _add_baseline(figure, point: Point, choice: Choice, order: int, index: int, n_runs: int, is_listed: bool) -> None:
    """An open symbol: one per baseline; in a colour of its own, or in that of its run where there are several."""
    colour = named(SERIES[(order + 1 if n_runs == 1 else index) % len(SERIES)])
    figure.add_scatter(
        x=[_percent(point, choice)],
        y=[point.value],
        customdata=[_about(point, choice)],
        error_y=_bars([point]),
        name=literal(point.label),
        mode="markers",
        marker={
            "symbol": SYMBOLS[(order + 1) % len(SYMBOLS)] + "-open",
            "size": 10,
            "color": colour,
            "line": {"width": 2},
        },
        hovertemplate="%{customdata}<extra></extra>",
        showlegend=is_listed,
        legendrank=2000,
    )


def _bars(points: Sequence[Point]) -> dict[str, Any]:
    """The 95 % intervals of the differences, around the values."""
    return {
        "array": [max(point.difference.high - point.difference.estimate, 0) for point in points],
        "arrayminus": [max(point.difference.estimate - point.difference.low, 0) for point in points],
        "thickness": 1,
        "width": 3,
    }


def _percent(point: Point, choice: Choice) -> float:
    return 100 * (point.n_parameters or 0) / (choice.full.n_parameters or 1)


def _mark_chosen(figure, x: float, y: float, choice: Choice, is_listed: bool, **where: int) -> None:
    """A ring around the choice."""
    figure.add_scatter(
        x=[x],
        y=[y],
        customdata=[_about(choice.chosen, choice)],
        mode="markers",
        marker={"symbol": "circle-open", "size": 17, "color": named("ink"), "line": {"width": 2.5}},
        hovertemplate="%{customdata}<extra></extra>",
        name="chosen",
        showlegend=is_listed,
        legendrank=3000,
        **where,
    )


def _row(run: Run, point: Point, choice: Choice) -> tuple[str, ...]:
    return (
        run.name,
        f"{point.label}{' (chosen)' if point == choice.chosen else ''}",
        share(point.n_parameters, choice.full.n_parameters),
        number(point.value, choice.metric),
        signed(point.difference.estimate, choice.metric),
        bounds(point.difference, choice.metric),
    )
