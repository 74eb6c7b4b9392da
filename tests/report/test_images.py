"""Figures as files: what is missing is said before the work, or after the browser failed."""

from __future__ import annotations

import sys
from types import ModuleType

import plotly.io
import pytest

from lorazor.errors import OutputError
from lorazor.report.images import check_can_draw, write_figures
from lorazor.report.reading import read_run
from lorazor.report.sites import draw_maps


@pytest.fixture
def drawings(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaleido", ModuleType("kaleido"))
    return [(one.key, one) for one in draw_maps(read_run(small, "run"))]


def test_without_kaleido_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(OutputError, match=r"kaleido is not installed.*lorazor\[figures\].*chromium"):
        check_can_draw()


def test_without_a_browser_it_says_what_to_install(drawings, monkeypatch, tmp_path):
    def fail(*arguments, **settings):
        raise RuntimeError("Kaleido requires Google Chrome to be installed.")

    monkeypatch.setattr(plotly.io, "write_images", fail)
    with pytest.raises(OutputError, match="no browser that works.*chromium"):
        write_figures(drawings, tmp_path / "figures")


def test_every_figure_is_drawn_twice_in_fixed_colours(drawings, monkeypatch, tmp_path):
    drawn = {}

    def draw(figures, files, scale, width, height):
        drawn.update(zip(files, figures, strict=True))
        assert width == [900, 900] and height == [drawings[0][1].figure.layout.height] * 2, "else it has plotly's own"

    monkeypatch.setattr(plotly.io, "write_images", draw)
    files = write_figures(drawings, tmp_path / "figures")
    assert [path.name for path in files] == ["sites.png", "sites.svg"] and set(drawn) == set(map(str, files))
    assert all("var(--" not in figure.to_json() for figure in drawn.values())


def test_a_place_that_cannot_be_written_to_is_named(drawings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Cannot write"):
        write_figures(drawings, tmp_path / "file" / "figures")
