"""What all figures share: a figure with its words and numbers, and the look of its axes."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorazor.report.palette import named

if TYPE_CHECKING:
    import plotly.graph_objects as go


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
    import plotly.graph_objects as go

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


def short_kinds(kinds: Sequence[str]) -> list[str]:
    """The last parts of the kinds, or the whole where two end alike."""
    ends = [kind.rpartition(".")[2] for kind in kinds]
    return [end if ends.count(end) == 1 else kind for kind, end in zip(kinds, ends, strict=True)]
