"""Figures of the sites: the map of layers and kinds, and the paths of their gates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lorazor.report.contents import Run, SiteRow
from lorazor.report.drawing import Drawing, empty_figure, literal, named
from lorazor.report.words import count, short

_FLOW = ("q_proj", "k_proj", "v_proj", "query", "key", "value", "o_proj", "gate_proj", "up_proj", "down_proj")
_PLACES = {kind: place for place, kind in enumerate(_FLOW)}
"""Kinds in the order in which a layer runs them; others follow in the run's own order."""

_ROW_PIXELS, _LOW_ROW_PIXELS = 18, 14
_TAIL = 98
"""Percentile of the scores at which the colours end: one huge score must not make all others look alike."""


def draw_maps(run: Run) -> list[Drawing]:
    """One map of layers and kinds for every stack of a run."""
    stacks = list(dict.fromkeys(site.stack for site in run.sites if site.stack is not None))
    return [_draw_map(run, stack, f"sites-{index}" if index else "sites") for index, stack in enumerate(stacks)]


def _draw_map(run: Run, stack: str, key: str) -> Drawing:
    """Layers upward, kinds to the right; the colour is the score, a cross marks what was dropped.

    Where ranks were lowered, every site that stays has its rank written on it.
    """
    sites = [site for site in run.sites if site.stack == stack and site.layer is not None]
    kinds = list(dict.fromkeys(site.kind for site in sites))
    kinds.sort(key=lambda kind: _PLACES.get(kind.rpartition(".")[2], len(_FLOW)))
    ends = [kind.rpartition(".")[2] for kind in kinds]
    names = [end if ends.count(end) == 1 else kind for kind, end in zip(kinds, ends, strict=True)]
    layers = range(1 + max(site.layer or 0 for site in sites))
    grid = {(site.layer, site.kind): site for site in sites}
    table = [[grid.get((layer, kind)) for kind in kinds] for layer in layers]
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100) if len(layers) / step <= 34 or step == 100)
    has_scores, is_lowered = any(site.score is not None for site in sites), any(site.is_lowered for site in sites)
    figure = empty_figure("", "layer", 100 + (_ROW_PIXELS if has_scores else _LOW_ROW_PIXELS) * max(len(layers), 6))
    figure.add_heatmap(
        x=[literal(name) for name in names],
        y=list(layers),
        z=[[_height(site, has_scores) for site in row] for row in table],
        text=[[_mark(site, is_lowered) for site in row] for row in table],
        customdata=[[_about(site, run) for site in row] for row in table],
        texttemplate="%{text}",
        textfont={"size": 13} if has_scores else {"size": 11, "color": named("muted")},
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        xgap=2,
        ygap=2,
        **_colours(sites, run, has_scores),
    )
    figure.update_xaxes(showgrid=False, showline=False, ticks="", side="top")
    figure.update_yaxes(showgrid=False, showline=False, ticks="", dtick=step, tick0=0)
    figure.update_layout(margin={"t": 28, "b": 24})
    return Drawing(
        key=key,
        title=_title(run, stack, has_scores),
        caption=_caption(run, sites, has_scores),
        figure=figure,
        columns=("layer", *names),
        rows=tuple((str(layer), *map(_cell, row)) for layer, row in zip(layers, table, strict=True)),
        width=340 + 84 * len(kinds),
    )


def draw_gates(run: Run) -> Drawing | None:
    """The gate of every site over the warm-up; those that stay are drawn over those that go."""
    if not run.gates:
        return None
    figure = empty_figure("step", "gate")
    parts = (("dropped", False, "muted", "dot", 1.0), ("kept", True, "first", "solid", 1.8))
    for name, keep, colour, dash, width in parts:
        indices = [index for index, site in enumerate(run.sites) if bool(site.keep) == keep]
        if not indices:
            continue
        x: list[int | None] = []
        y: list[float | None] = []
        names: list[str] = []
        for index in indices:  # one line for all, with gaps: hundreds of traces are slow
            x += [*(step for step, _ in run.gates), None]
            y += [*(values[index] for _, values in run.gates), None]
            names += [literal(run.sites[index].name)] * (len(run.gates) + 1)
        figure.add_scatter(
            x=x,
            y=y,
            text=names,
            name=f"{name} ({len(indices)})",
            mode="lines",
            opacity=0.55 if keep else 0.5,
            line={"color": named(colour), "dash": dash, "width": width},
            hovertemplate=f"<b>%{{text}}</b> ({name})<br>step %{{x}}: gate %{{y:.4f}}<extra></extra>",
        )
    _, last = run.gates[-1]
    ordered = sorted(zip(run.sites, last, strict=True), key=lambda pair: -abs(pair[1]))
    return Drawing(
        key="gates",
        title="Gates in the selection run",
        caption="One line per site, from 1 at the start. Solid: kept; dotted: dropped. WeightLoRA learns the gates "
        "together with the adapter.",
        figure=figure,
        columns=("site", "last gate", "kept"),
        rows=tuple((site.name, f"{gate:.4f}", "yes" if site.keep else "no") for site, gate in ordered),
    )


def outside(run: Run) -> list[tuple[str, str, str, str]]:
    """Sites outside every stack: name, score, parameters, whether they stay."""
    return [
        (site.name, short(site.score), count(site.n_parameters), _fate(site) or "–")
        for site in run.sites
        if site.stack is None or site.layer is None
    ]


def _height(site: SiteRow | None, has_scores: bool) -> float | None:
    """What the colour shows; nothing where there is no LoRA."""
    if site is None:
        return None
    if has_scores:
        return site.score if site.score is not None and math.isfinite(site.score) else None
    return 0.0 if site.keep is False else 1.0


def _fate(site: SiteRow) -> str:
    """What becomes of a site, in words; nothing where the run does not say."""
    if site.is_lowered and site.ranks is not None:
        return f"rank {site.ranks[0]} of {site.ranks[1]}"
    return {True: "kept", False: "dropped", None: ""}[site.keep]


def _mark(site: SiteRow | None, with_ranks: bool) -> str:
    """What is written on a site."""
    if site is None or site.keep is None:
        return ""
    return "×" if not site.keep else str(site.ranks[0]) if with_ranks and site.ranks is not None else ""


def _colours(sites: Sequence[SiteRow], run: Run, has_scores: bool) -> dict[str, Any]:
    if not has_scores:
        scale = [[0, named("dropped")], [0.5, named("dropped")], [0.5, named("kept")], [1, named("kept")]]
        return {"zmin": 0, "zmax": 1, "colorscale": scale, "showscale": False}
    low, high = _limits(sites)
    font = {"color": named("ink"), "size": 13}
    bar = {
        "title": {"text": literal(run.score_name or "score"), "side": "right", "font": font},
        "tickfont": {"color": named("muted"), "size": 12},
        "thickness": 12,
        "outlinewidth": 0,
        "exponentformat": "power",
        "len": 1,
    }
    return {"zmin": low, "zmax": high, "colorscale": "Viridis", "colorbar": bar}


def _limits(sites: Sequence[SiteRow]) -> tuple[float, float]:
    scores = np.array([site.score for site in sites if site.score is not None and math.isfinite(site.score)])
    if not len(scores):
        return 0.0, 1.0
    return float(scores.min()), float(np.percentile(scores, _TAIL))


def _about(site: SiteRow | None, run: Run) -> str:
    """What a tooltip says of a site."""
    if site is None:
        return ""
    lines = [f"<b>{literal(site.name)}</b>"]
    if site.score is not None:
        error = "" if site.standard_error is None else f" ± {short(site.standard_error)}"
        lines.append(f"{literal(run.score_name or 'score')}: {short(site.score)}{error}")
    if site.n_parameters is not None:
        lines.append(f"{count(site.n_parameters)} parameters")
    if site.keep is not None:
        lines.append(_fate(site))
    if site.keep and site.weight != 1:
        lines.append(f"gate {short(site.weight)}")
    return "<br>".join(lines)


def _cell(site: SiteRow | None) -> str:
    if site is None:
        return "–"
    mark = _fate(site).replace("dropped", "×")
    return f"{short(site.score)} {mark}".strip() if site.score is not None else mark


def _title(run: Run, stack: str, has_scores: bool) -> str:
    what = "Score of every site, and what was kept" if has_scores and run.is_choice else "What was kept"
    if not run.is_choice:
        what = "Score of every site" if has_scores else "The sites"
    n_stacks = len({site.stack for site in run.sites} - {None})
    return f"{what}: {stack}" if n_stacks > 1 else what


def _caption(run: Run, sites: Sequence[SiteRow], has_scores: bool) -> str:
    parts = ["Layer 0, the first, is at the bottom."]
    if has_scores:
        beyond = sum(site.score is not None and site.score > _limits(sites)[1] for site in sites)
        parts.append(f"Colour: {run.score_name or 'score'}, yellow is high.")
        if beyond:
            highest = "highest score is" if beyond == 1 else f"{beyond} highest scores are"
            parts.append(f"The {highest} beyond the end of the scale.")
    if run.is_choice:
        n_kept = sum(bool(site.keep) for site in sites)
        parts.append(f"× marks a dropped site; {n_kept} of {len(sites)} stay.")
        if any(site.is_lowered for site in sites):
            highest = max(site.ranks[1] for site in sites if site.ranks is not None)
            parts.append(f"Numbers are the ranks that stay, of {highest}.")
    if len({(site.layer, site.kind) for site in sites}) < len({s.layer for s in sites}) * len({s.kind for s in sites}):
        parts.append("No colour: no LoRA there.")
    return " ".join(parts)
