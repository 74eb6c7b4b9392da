"""The figure of a model card: which sites stay, layers by projection kinds, as one small SVG."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from lorazor.selection import SelectedSite, Selection

_CELL, _GAP, _LINE, _FONT = 14, 3, 18, 12
_LOWEST = 3
"""Height of a site of which hardly anything stays."""
_CHARACTER = 7
"""About the width of a letter."""
_KEPT, _MUTED = "#2b6cb0", "#7a869a"
"""Colours that stand out on white and on black; kept and dropped also differ in shape."""


def kept_map(selection: Selection) -> str:
    """Draw a selection: a filled square is a site that stays, lower where its rank is; a small ring one that goes.

    Args:
        selection: of any adapter; sites outside every stack are named below.
    Returns:
        The text of an SVG file.
    """
    stacks = sorted({site.stack for site in selection.sites if site.stack is not None})
    groups = [(stack, [site for site in selection.sites if site.stack == stack]) for stack in stacks]
    outside = [site for site in selection.sites if site.stack is None]
    kinds = {site.kind for site in selection.sites if site.stack is not None}
    left = max((len(kind) for kind in kinds), default=0) * _CHARACTER + 12
    n_layers = max((site.layer or 0 for site in selection.sites), default=0) + 1
    svg = ElementTree.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "role": "img"})
    svg.set("font-family", "sans-serif")
    n_kept = len(selection.kept)
    ElementTree.SubElement(svg, "title").text = f"{n_kept} of {len(selection.sites)} LoRA sites stay"
    y = _LINE
    _write(svg, 0, y, f"■ stays ({n_kept})   ○ dropped ({len(selection.dropped)})   layers from left to right")
    if any(site.kept_rank < site.rank for site in selection.kept):
        y += _LINE
        _write(svg, 0, y, "a site that stays is as high as the share of its rank that stays")
    for stack, sites in groups:
        y = _draw_stack(svg, stack, sites, left, y + _LINE)
    for site in outside:
        y += _LINE
        _write(svg, 0, y, f"{'■' if site.keep else '○'} {site.name}")
    width = max(left + n_layers * (_CELL + _GAP) + _GAP, 400)
    svg.set("viewBox", f"0 0 {width} {y + 8}")
    svg.set("width", str(width))
    svg.set("height", str(y + 8))
    return ElementTree.tostring(svg, encoding="unicode") + "\n"


def _draw_stack(svg: ElementTree.Element, stack: str, sites: Sequence[SelectedSite], left: int, y: int) -> int:
    """Draw one stack below y; returns where it ends."""
    n_layers = max(site.layer or 0 for site in sites) + 1
    _write(svg, 0, y, f"{stack}, layers 0 to {n_layers - 1}")
    in_order = sorted(sites, key=lambda site: (site.layer or 0, site.name))
    for kind in dict.fromkeys(site.kind for site in in_order):
        y += _CELL + _GAP
        _write(svg, 0, y, kind)
        for site in (one for one in sites if one.kind == kind):
            x = left + (site.layer or 0) * (_CELL + _GAP)
            _draw_site(svg, x, y - _CELL + 2, site)
    return y


def _draw_site(svg: ElementTree.Element, x: int, y: int, site: SelectedSite) -> None:
    if site.keep:
        height = max(_LOWEST, round(_CELL * site.kept_rank / site.rank))
        size = {"width": str(_CELL), "height": str(height), "rx": "2", "fill": _KEPT}
        mark = ElementTree.SubElement(svg, "rect", {"x": str(x), "y": str(y + _CELL - height), **size})
    else:
        place = {"cx": str(x + _CELL / 2), "cy": str(y + _CELL / 2), "r": "2.5"}
        mark = ElementTree.SubElement(svg, "circle", {**place, "fill": "none", "stroke": _MUTED})
    rank = f", rank {site.kept_rank} of {site.rank}" if site.kept_rank < site.rank else ""
    ElementTree.SubElement(mark, "title").text = f"{site.name}: {f'stays{rank}' if site.keep else 'dropped'}"


def _write(svg: ElementTree.Element, x: int, y: int, text: str) -> None:
    ElementTree.SubElement(svg, "text", {"x": str(x), "y": str(y), "font-size": str(_FONT), "fill": _MUTED}).text = text
