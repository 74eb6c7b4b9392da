"""What all figures share: the colours, a figure with its words and numbers, and the look of its axes.

Figures name a colour as `var(--first)`: the page fills it in with the theme that is shown, `resolved` for files.
The line colours are those of Okabe and Ito, which colour-blind people can tell apart, made darker for a light ground
and lighter for a dark one; whatever a colour says, a dash, a symbol or a word says too.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

LIGHT = {
    "ground": "#fbfbfa",
    "panel": "#ffffff",
    "ink": "#1b1e22",
    "muted": "#5a626b",
    "line": "#e1e4e8",
    "axis": "#9aa2ab",
    "first": "#0063a6",
    "second": "#b35300",
    "third": "#00735a",
    "fourth": "#8d3f84",
    "fifth": "#6d6000",
    "band": "rgba(0, 99, 166, 0.16)",
    "faint": "rgba(90, 98, 107, 0.35)",
    "kept": "#7fb0d6",
    "dropped": "#eceef0",
    "good": "#00634d",
    "bad": "#a03400",
    "mark": "#fdf0c4",
}

DARK = {
    "ground": "#121518",
    "panel": "#1a1e22",
    "ink": "#e9ecef",
    "muted": "#a1aab3",
    "line": "#2d343b",
    "axis": "#6b7580",
    "first": "#62b5f5",
    "second": "#f2a154",
    "third": "#45c9a2",
    "fourth": "#dc9ad6",
    "fifth": "#d9ca4d",
    "band": "rgba(98, 181, 245, 0.20)",
    "faint": "rgba(161, 170, 179, 0.30)",
    "kept": "#3f7fb3",
    "dropped": "#272d33",
    "good": "#5fd4b1",
    "bad": "#ffab73",
    "mark": "#4a4220",
}

SERIES = ("first", "second", "third", "fourth", "fifth")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "triangle-down", "x")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


def named(name: str) -> str:
    """How a figure asks for a colour."""
    return f"var(--{name})"


def resolved(figure_json: str) -> str:
    """A figure's JSON with its named colours filled in, the light ones."""
    return re.sub(r"var\(--([a-z]+)\)", lambda match: LIGHT[match[1]], figure_json)


@dataclass(frozen=True)
class Drawing:
    """A figure of the page.

    Attributes:
        key: names its place in the page and its file, `boundary`.
        title: what it shows.
        caption: how to read it, in plain words.
        figure: plotly's figure; its colours are names of the palette.
        columns: header of the table with the same numbers.
        rows: the numbers, for those who cannot see or point at the figure.
        width: widest useful width, in pixels; None takes what there is.
    """

    key: str
    title: str
    caption: str
    figure: go.Figure
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    width: int | None = None


def literal(text: str) -> str:
    """Foreign text for a figure: plotly reads tags in its texts."""
    return html.escape(text, quote=False)


def empty_figure(x_title: str, y_title: str, height: int = 400) -> go.Figure:
    """A figure with the look of the page and nothing in it.

    Args:
        x_title: what runs to the right, with its unit.
        y_title: what runs up, with its unit.
        height: in pixels.
    """
    figure = go.Figure()
    style(figure, height)
    figure.update_xaxes(title_text=literal(x_title))
    figure.update_yaxes(title_text=literal(y_title))
    return figure


def style(figure: go.Figure, height: int) -> None:
    """Give a figure the look of the page. Drags and wheels belong to the page, so that a phone can scroll."""
    ink, muted, line = named("ink"), named("muted"), named("line")
    axis: dict[str, Any] = {
        "gridcolor": line,
        "zeroline": False,
        "linecolor": named("axis"),
        "showline": True,
        "ticks": "outside",
        "tickcolor": named("axis"),
        "ticklen": 4,
        "tickfont": {"color": muted, "size": 12},
        "title": {"font": {"color": ink, "size": 13}, "standoff": 10},
        "automargin": True,
        "fixedrange": True,
    }
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 56, "r": 16, "t": 16, "b": 48},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={
            "family": "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', sans-serif",
            "color": ink,
            "size": 13,
        },
        hoverlabel={"bgcolor": named("panel"), "bordercolor": named("axis"), "font": {"color": ink}, "align": "left"},
        hovermode="closest",
        dragmode=False,
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"color": ink}},
    )
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
