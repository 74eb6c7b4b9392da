"""The page: one HTML file that needs nothing else, from runs that have been read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from lorazor.report.contents import Run
from lorazor.report.drawing import DARK, LIGHT, Drawing
from lorazor.report.figures import draw_boundary, draw_curves, draw_trade_off, draw_training
from lorazor.report.headline import COMPARISON, Headline, comparison, headline
from lorazor.report.sites import draw_gates, draw_maps, outside
from lorazor.report.suite_page import SuiteSection
from lorazor.report.words import bounds, count, new_words, number, signed
from lorazor.runs import versions


@dataclass(frozen=True)
class Section:
    """What the page shows of one run.

    Attributes:
        run: the run.
        headline: what came of it.
        drawings: its figures, in the order of the page.
        n_examples: examples shown, the first of the run's.
    """

    run: Run
    headline: Headline
    drawings: tuple[Drawing, ...]
    n_examples: int


def make_sections(runs: Sequence[Run], n_examples: int) -> list[Section]:
    """Draw every run.

    Args:
        runs: what was read.
        n_examples: most examples to show of each run.
    """
    sections = []
    for run in runs:
        trade_off = draw_trade_off(runs, run.choice.metric) if len(runs) == 1 and run.choice is not None else None
        optional = [draw_boundary(run), trade_off, draw_curves(run), draw_gates(run), draw_training(run)]
        drawings = (*draw_maps(run), *(drawing for drawing in optional if drawing is not None))
        sections.append(Section(run, headline(run), drawings, min(n_examples, len(run.examples))))
    return sections


def draw_together(runs: Sequence[Run]) -> list[Drawing]:
    """The figures that hold several runs: the trade-off of every metric that they choose by."""
    if len(runs) < 2:
        return []
    metrics = dict.fromkeys(run.choice.metric for run in runs if run.choice is not None)
    return [drawing for metric in metrics if (drawing := draw_trade_off(runs, metric)) is not None]


def make_page(sections: Sequence[Section], together: Sequence[Drawing] = (), suite: SuiteSection | None = None) -> str:
    """Write the page.

    Args:
        sections: one a run.
        together: figures of all runs.
        suite: results of a suite.
    Returns:
        HTML, with its styles, scripts and plotly inside: it asks the network for nothing.
    """
    files = resources.files("lorazor.report")
    style, script, text = (
        (files / name).read_text(encoding="utf-8") for name in ("page.css", "page.js", "page.html.jinja")
    )
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"figure_json": _figure_json, "marked": _marked, "flat": _flat}
    environment.globals |= {"measured": _measured, "missing": _missing, "outside": outside}
    runs = [section.run for section in sections]
    has_figures = bool(together) or any(one.drawings for one in (*sections, *([suite] if suite else [])))
    page = environment.from_string(text).render(
        title=", ".join([*(run.name for run in runs), *([suite.results.name] if suite else [])]),
        suite=suite,
        sections=sections,
        together=together,
        columns=COMPARISON,
        comparison=comparison(runs) if len(runs) > 1 else [],
        version=versions()["lorazor"],
        style=Markup(style),
        light=LIGHT,
        dark=DARK,
        script=Markup(script),
        plotly=Markup(get_plotlyjs()) if has_figures else "",
    )
    return page.lstrip() + "\n"


# What the template calls


def _measured(run: Run) -> list[tuple[str, ...]]:
    """A row for each adapter and metric of an evaluation."""
    return [
        (
            one.adapter,
            one.metric,
            number(one.value, one.metric),
            signed(one.difference.estimate, one.metric),
            bounds(one.difference, one.metric),
            count(one.n_examples),
        )
        for one in run.measured
    ]


def _missing(run: Run) -> list[str]:
    """What the page shows of other runs, and which command measures it."""
    wanted = (
        (any(site.score is not None for site in run.sites), "Scores of the sites: `lorazor shrink` writes them."),
        (run.choice, "What dropping costs: `lorazor shrink --data` and `lorazor boundary` measure it."),
        (run.curves, "What the model knows after each layer: `lorazor curves` measures it."),
        (run.gates, "Gates over the steps: `lorazor train --method weightlora` writes them."),
        (
            run.examples,
            "Examples side by side: `lorazor shrink --data`, `lorazor boundary` and `lorazor eval` write them.",
        ),
    )
    return [sentence for has, sentence in wanted if not has]


def _flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in settings.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        elif value is not None:
            rows.append((f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return rows


def _figure_json(figure: go.Figure) -> Markup:
    """A figure as JSON that no text in it can break out of a script element."""
    text = figure.to_json() or "{}"
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _marked(text: str, other: str | None) -> Markup:
    """A text, escaped, with the words marked that another does not have."""
    pieces = [(escape(piece), is_new) for piece, is_new in new_words(text, other or "")]
    return Markup("".join(f"<mark>{piece}</mark>" if is_new else piece for piece, is_new in pieces))
