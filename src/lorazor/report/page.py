"""The page: one HTML file that needs nothing else, from runs that have been read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

from lorazor.report.contents import Run
from lorazor.report.drawing import Drawing
from lorazor.report.figures import draw_boundary, draw_curves, draw_trade_off, draw_training
from lorazor.report.headline import COMPARISON, Headline, comparison, headline
from lorazor.report.palette import DARK, LIGHT, variables
from lorazor.report.sites import draw_gates, draw_maps, outside
from lorazor.report.words import bounds, count, new_words, number, signed
from lorazor.runs import versions

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from markupsafe import Markup


@dataclass(frozen=True)
class Section:
    """What the page shows of one run.

    Attributes:
        run: the run.
        headline: what came of it.
        drawings: its figures, in the order of the page.
        outside: sites outside every stack: name, score, parameters, whether they stay.
        n_examples: examples shown, the first of the run's.
        command: the command line that it was started with, if it was.
        settings: every setting, flat: name and value.
        hashes: SHA-256 of every input.
        notes: messages that the run kept.
        measured: what an evaluation measured, a header and a row for each adapter and metric.
        missing: what the page would show of a run that had it, and what would measure it.
    """

    run: Run
    headline: Headline
    drawings: tuple[Drawing, ...]
    outside: list[tuple[str, str, str, str]]
    n_examples: int
    command: str | None
    settings: list[tuple[str, str]]
    hashes: list[tuple[str, str]]
    notes: list[str]
    measured: list[tuple[str, ...]]
    missing: list[str]


def make_sections(runs: Sequence[Run], n_examples: int) -> list[Section]:
    """Draw every run.

    Args:
        runs: what was read.
        n_examples: most examples to show of each run.
    """
    return [_section(run, n_examples, is_alone=len(runs) == 1) for run in runs]


def draw_together(runs: Sequence[Run]) -> list[Drawing]:
    """The figures that hold several runs: the trade-off of every metric that they choose by."""
    if len(runs) < 2:
        return []
    metrics = dict.fromkeys(run.choice.metric for run in runs if run.choice is not None)
    return [drawing for metric in metrics if (drawing := draw_trade_off(runs, metric)) is not None]


def make_page(sections: Sequence[Section], together: Sequence[Drawing] = ()) -> str:
    """Write the page.

    Args:
        sections: one a run.
        together: figures of all runs.
    Returns:
        HTML, with its styles, scripts and plotly inside: it asks the network for nothing.
    """
    import jinja2
    from plotly.offline import get_plotlyjs

    files = resources.files("lorazor.report")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"figure_json": _figure_json, "marked": _marked}
    template = environment.from_string((files / "page.html.jinja").read_text(encoding="utf-8"))
    runs = [section.run for section in sections]
    page = template.render(
        title=", ".join(run.name for run in runs),
        sections=sections,
        together=together,
        columns=COMPARISON,
        comparison=comparison(runs) if len(runs) > 1 else [],
        version=versions()["lorazor"],
        style=_markup((files / "page.css").read_text(encoding="utf-8")),
        light=_markup(variables(LIGHT)),
        dark=_markup(variables(DARK)),
        script=_markup((files / "page.js").read_text(encoding="utf-8")),
        plotly=_markup(get_plotlyjs()) if together or any(section.drawings for section in sections) else "",
    )
    return page.lstrip() + "\n"


def _section(run: Run, n_examples: int, is_alone: bool) -> Section:
    trade_off = draw_trade_off([run], run.choice.metric) if run.choice is not None and is_alone else None
    maps = draw_maps(run)
    optional = [draw_boundary(run), trade_off, draw_curves(run), draw_gates(run), draw_training(run)]
    drawings = (*maps, *(drawing for drawing in optional if drawing is not None))
    return Section(
        run=run,
        headline=headline(run),
        drawings=drawings,
        outside=outside(run),
        n_examples=min(n_examples, len(run.examples)),
        command=run.document.get("command_line"),
        settings=_flat(run.document["settings"]),
        hashes=[(role, digest or "not on this disk") for role, digest in run.document["hashes"].items()],
        notes=[str(note) for note in run.document.get("notes") or []],
        measured=_measured(run),
        missing=_missing(run),
    )


def _measured(run: Run) -> list[tuple[str, ...]]:
    rows = [
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
    return [("adapter", "metric", "value", "difference to the first", "95 % interval", "examples"), *rows]


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
    return _markup(text)


def _marked(text: str, other: str | None) -> Markup:
    """A text, escaped, with the words marked that another does not have."""
    pieces = [(escape(piece), is_new) for piece, is_new in new_words(text, other or "")]
    return _markup("".join(f"<mark>{piece}</mark>" if is_new else piece for piece, is_new in pieces))


def _markup(text: str) -> Markup:
    """Text that is HTML already."""
    from markupsafe import Markup

    return Markup(text)
