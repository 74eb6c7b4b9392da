"""Figures of measurements: the boundary, the trade-off, the curves, the training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lorazor.measure.metrics import METRICS
from lorazor.measure.results import Candidate
from lorazor.report.contents import Run, SmallerAdapter
from lorazor.report.drawing import DASHES, SERIES, SYMBOLS, Drawing, empty_figure, literal, named, style
from lorazor.report.words import bounds, count, most, number, share, short, signed, worse
from lorazor.select.boundary import BoundaryCandidate, BoundaryChoice


def draw_boundary(run: Run) -> Drawing | None:
    """The metric at every boundary, with a band of one standard error, and the boundary chosen."""
    if run.choice is None or run.choice.boundary is None:
        return None
    choice, stack = run.choice.boundary, run.choice.stack or ""
    points = choice.candidates
    full = next(one for one in points if one.boundary == choice.full)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08, row_heights=[0.5, 0.5])
    style(figure, 560)
    _add_line(figure, choice, [point.value for point in points], 1)
    _add_line(figure, choice, [point.difference.estimate for point in points], 2)
    figure.add_hline(y=full.value, line={"color": named("axis"), "dash": "dash", "width": 1}, row=1)  # pyright: ignore[reportArgumentType]
    figure.add_hline(y=0, line={"color": named("axis"), "dash": "dash", "width": 1}, row=2)  # pyright: ignore[reportArgumentType]
    figure.update_yaxes(title_text=axis_name(choice.metric), row=1, col=1)
    figure.update_yaxes(title_text="difference to full,<br>close up", range=_close_up(points), row=2, col=1)
    figure.update_xaxes(title_text=f"boundary: layers of {literal(stack)} that keep LoRA", row=2, col=1)
    return Drawing(
        key="boundary",
        title=f"What every boundary costs: {choice.metric}",
        caption=f"Boundary b keeps the LoRA of the first b layers: 0 is the base model, {choice.full} the "
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
                share(measured.n_parameters, run.choice.full.n_parameters),
            )
            for point, measured in zip(points, run.choice.candidates, strict=True)
        ),
    )


def draw_trade_off(runs: Sequence[Run], metric: str) -> Drawing | None:
    """Quality against what is kept, of all runs that chose by one metric; None where there is none."""
    drawn = [(run, run.choice) for run in runs if run.choice is not None and run.choice.metric == metric]
    if not drawn:
        return None
    figure = empty_figure("LoRA parameters kept (%)", axis_name(metric), 440)
    rows: list[tuple[str, ...]] = []
    for index, (run, choice) in enumerate(drawn):
        measured = sorted(choice.candidates, key=lambda one: (one.n_parameters, one.is_healed))
        name = literal(run.name) if len(runs) > 1 else "candidates"
        _add_series(figure, [one for one in measured if not one.is_healed], choice, name, index)
        if healed := [one for one in measured if one.is_healed]:
            _add_series(figure, healed, choice, f"{name}, healed", index, is_healed=True)
        ring = (_percent(choice.chosen, choice), choice.chosen.value)
        _add_ring(figure, ring, _about(choice.chosen, choice), is_listed=index == 0)
        rows += [
            (
                run.name,
                f"{one.label}{' (chosen)' if one == choice.chosen else ''}",
                count(one.n_sites),
                count(one.n_parameters),
                share(one.n_parameters, choice.full.n_parameters),
                number(one.value, metric),
                "–" if one.lost is None else signed(one.lost, metric),
                "–" if one.lost_at_most is None else signed(one.lost_at_most, metric),
            )
            for one in measured
        ]
    smallest = min(_percent(one, choice) for _, choice in drawn for one in choice.candidates)
    figure.update_layout(xaxis=_halving(smallest) if smallest > 0 else {"range": [-3, 103]})
    _add_margins(figure, [choice for _, choice in drawn if choice.margin is not None], smallest)
    choice = drawn[0][1]
    has_margin = any(one.margin is not None for _, one in drawn)
    line = " The dotted line is the margin, and bars end at the one-sided 95 % bound of what is lost."
    return Drawing(
        key=f"trade-off-{metric}",
        title=f"Quality against parameters kept: {metric}",
        caption=f"On the validation examples. {direction(choice.higher_is_better)} The ring marks what was chosen."
        + (line if has_margin else ""),
        figure=figure,
        columns=("run", "adapter", "sites", "parameters", "parameters kept", metric, "worse by", "at most (95 %)"),
        rows=tuple(rows),
    )


def draw_curves(run: Run) -> Drawing | None:
    """Probability of the true token, entropy and rank after every layer, with the adapter and without."""
    curves = run.curves
    if curves is None:
        return None
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
    unit = {"loss": "nats per token", "accuracy": "fraction", "token-accuracy": "fraction", "f1": "fraction"}.get(
        metric
    )
    if unit is None and metric in METRICS and METRICS[metric].needs_text:
        unit = "percent"
    return f"{metric} ({unit})" if unit else metric


def direction(higher_is_better: bool) -> str:
    """Which way is good, as a sentence."""
    return "Higher is better." if higher_is_better else "Lower is better."


def _add_line(figure: go.Figure, choice: BoundaryChoice, y: list[float], row: int) -> None:
    """A line over the boundaries, with its band and the choice ringed."""
    points = choice.candidates
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
        customdata=[_about_boundary(point, choice) for point in points],
        mode="lines+markers",
        line={"color": named("first"), "width": 2},
        marker={"size": 6},
        hovertemplate="%{customdata}<extra></extra>",
        name=choice.metric,
        showlegend=row == 1,
        **where,
    )
    ringed = (choice.boundary, y[x.index(choice.boundary)])
    _add_ring(figure, ringed, _about_boundary(choice.chosen, choice), is_listed=row == 1, **where)


def _close_up(points: Sequence[BoundaryCandidate]) -> list[float]:
    """Limits that show the half of the differences nearest to zero with their bands."""
    differences = sorted((point.difference for point in points), key=lambda one: abs(one.estimate))
    near = differences[: len(differences) // 2 + 1]
    low = min(0.0, *(one.estimate - one.standard_error for one in near))
    high = max(0.0, *(one.estimate + one.standard_error for one in near))
    room = 0.1 * (high - low) or 1.0
    return [low - room, high + room]


def _about_boundary(point: BoundaryCandidate, choice: BoundaryChoice) -> str:
    """What a tooltip says of a boundary."""
    lines = (
        f"<b>boundary {point.boundary}</b>{' (chosen)' if point == choice.chosen else ''}",
        f"{choice.metric} {number(point.value, choice.metric)}",
        f"to full {signed(point.difference.estimate, choice.metric)} ({bounds(point.difference, choice.metric)})",
    )
    return "<br>".join(lines)


def _about(candidate: Candidate, choice: SmallerAdapter) -> str:
    """What a tooltip says of a smaller adapter."""
    lines = [
        f"<b>{literal(candidate.label)}</b>{' (chosen)' if candidate == choice.chosen else ''}",
        f"{choice.metric} {number(candidate.value, choice.metric)}",
    ]
    if candidate.lost is not None:
        lines.append(worse(candidate.lost, choice.metric))
    if candidate.lost_at_most is not None:
        lines.append(most(candidate.lost_at_most, choice.metric))
    lines.append(f"{count(candidate.n_sites)} sites, {count(candidate.n_parameters)} parameters")
    return "<br>".join(lines)


def _add_series(
    figure: go.Figure,
    candidates: Sequence[Candidate],
    choice: SmallerAdapter,
    name: str,
    index: int,
    is_healed: bool = False,
) -> None:
    """A line through the candidates of a run, the healed ones open and apart; each with a bar to what it may lose."""
    colour = named(SERIES[index % len(SERIES)])
    room = [(one.lost_at_most or 0) - (one.lost or 0) if one.lost_at_most is not None else 0 for one in candidates]
    nothing = [0] * len(room)
    up, down = (nothing, room) if choice.higher_is_better else (room, nothing)
    figure.add_scatter(
        x=[_percent(one, choice) for one in candidates],
        y=[one.value for one in candidates],
        customdata=[_about(one, choice) for one in candidates],
        error_y={"array": up, "arrayminus": down, "thickness": 1, "width": 3},
        name=name,
        mode="markers" if is_healed else "lines+markers",
        line={"color": colour, "width": 2, "dash": DASHES[index % len(DASHES)]},
        marker={
            "symbol": f"{SYMBOLS[index % len(SYMBOLS)]}{'-open-dot' * is_healed}",
            "size": 9 if is_healed else 7,
            "color": colour,
        },
        hovertemplate="%{customdata}<extra></extra>",
    )


def _add_margins(figure: go.Figure, choices: Sequence[SmallerAdapter], smallest: float) -> None:
    """A line at what a smaller adapter may lose, one for all runs of which it is the same."""
    limits: dict[float, str] = {}
    for choice in choices:
        margin = choice.margin or 0.0
        limit = choice.full.value - margin if choice.higher_is_better else choice.full.value + margin
        limits.setdefault(round(limit, 9), f"margin: {number(margin, choice.metric)} worse than full")
    for index, (limit, about) in enumerate(limits.items()):
        figure.add_scatter(
            x=[smallest, 100],
            y=[limit, limit],
            mode="lines",
            line={"color": named("bad"), "dash": "dot", "width": 1.5},
            name="margin",
            legendgroup="margin",
            showlegend=index == 0,
            hovertemplate=f"{about}<extra></extra>",
            legendrank=2000,
        )


def _halving(smallest: float) -> dict[str, Any]:
    """An axis of percents on which every halving is as wide."""
    n_halvings = math.ceil(math.log2(100 / smallest))
    ticks = [100 / 2**power for power in range(0, n_halvings + 1, 1 + n_halvings // 7)]
    room = 0.04 * math.log10(100 / smallest) or 0.1
    return {
        "type": "log",
        "range": [math.log10(smallest) - room, 2 + room],
        "tickvals": ticks,
        "ticktext": [f"{tick:.3g}" for tick in ticks],
    }


def _percent(candidate: Candidate, choice: SmallerAdapter) -> float:
    return 100 * candidate.n_parameters / choice.full.n_parameters


def _add_ring(figure: go.Figure, place: tuple[float, float], about: str, is_listed: bool, **where: int) -> None:
    """A ring around the choice."""
    figure.add_scatter(
        x=[place[0]],
        y=[place[1]],
        customdata=[about],
        mode="markers",
        marker={"symbol": "circle-open", "size": 17, "color": named("ink"), "line": {"width": 2.5}},
        hovertemplate="%{customdata}<extra></extra>",
        name="chosen",
        showlegend=is_listed,
        legendrank=3000,
        **where,
    )
