"""The colours of page and figures, by what they are for, light and dark.

Figures name a colour as `var(--first)`: the page fills it in with the theme that is shown, `resolved` for files.
The line colours are those of Okabe and Ito, which colour-blind people can tell apart, made darker for a light ground
and lighter for a dark one; whatever a colour says, a dash, a symbol or a word says too.
"""

from __future__ import annotations

import re

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

_NAMED = re.compile(r"var\(--([a-z]+)\)")


def named(name: str) -> str:
    """How a figure asks for a colour."""
    return f"var(--{name})"


def variables(theme: dict[str, str]) -> str:
    """A theme as declarations of CSS."""
    return " ".join(f"--{name}: {value};" for name, value in theme.items())


def resolved(figure_json: str, theme: dict[str, str] = LIGHT) -> str:
    """A figure's JSON with its named colours filled in."""
    return _NAMED.sub(lambda match: theme[match[1]], figure_json)
