"""The figure of the model card, read back as XML."""

from __future__ import annotations

from xml.etree import ElementTree

from lorazor.adapter.kept_map import kept_map
from lorazor.selection import SelectedSite, Selection

SVG = "{http://www.w3.org/2000/svg}"


def site(name: str, stack: str | None, layer: int | None, kind: str, keep: bool) -> SelectedSite:
    return SelectedSite(name, layer, stack, kind, 8, keep)


def test_every_site_is_drawn_where_it_is():
    sites = [
        site("h.0.q", "h", 0, "q", True),
        site("h.1.q", "h", 1, "q", False),
        site("h.2.q", "h", 2, "q", True),
        site("h.2.v", "h", 2, "v", False),
        site("lm_head", None, None, "lm_head", True),
    ]
    root = ElementTree.fromstring(kept_map(Selection(tuple(sites), "manual")))
    kept, dropped = root.findall(f"{SVG}rect"), root.findall(f"{SVG}circle")
    assert [mark.findtext(f"{SVG}title") for mark in kept] == ["h.0.q: stays", "h.2.q: stays"]
    assert [mark.findtext(f"{SVG}title") for mark in dropped] == ["h.1.q: dropped", "h.2.v: dropped"]
    x = [float(mark.get("x", 0)) for mark in kept]
    middle = float(dropped[0].get("cx", 0))
    assert x[0] < middle < x[1]
    assert "■ lm_head" in [text.text for text in root.findall(f"{SVG}text")]
    assert root.findtext(f"{SVG}title") == "3 of 5 LoRA sites stay"


def test_a_site_is_as_high_as_the_share_of_its_rank():
    ranks = {0: tuple(range(8)), 1: (0, 1, 4, 5), 2: (3,)}
    sites = [SelectedSite(f"h.{i}.q", i, "h", "q", 8, True, components=own) for i, own in ranks.items()]
    root = ElementTree.fromstring(kept_map(Selection(tuple(sites), "shrink by direction")))
    marks = root.findall(f"{SVG}rect")
    assert [float(mark.get("height", 0)) for mark in marks] == [14, 7, 3]
    assert len({float(mark.get("y", 0)) + float(mark.get("height", 0)) for mark in marks}) == 1, "all stand on a line"
    titles = [mark.findtext(f"{SVG}title") for mark in marks]
    assert titles == ["h.0.q: stays", "h.1.q: stays, rank 4 of 8", "h.2.q: stays, rank 1 of 8"]
    assert any("share of its rank" in (text.text or "") for text in root.findall(f"{SVG}text"))


def test_names_are_escaped_and_nothing_reaches_out_of_the_figure():
    sites = [site("<b>&.3.q", "<b>&", 3, "a rather long kind of projection", True)]
    root = ElementTree.fromstring(kept_map(Selection(tuple(sites), "manual")))
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    for mark in root.findall(f"{SVG}rect"):
        assert float(mark.get("x", 0)) + float(mark.get("width", 0)) <= width
        assert float(mark.get("y", 0)) + float(mark.get("height", 0)) <= height
