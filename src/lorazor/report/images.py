"""Figures as files: PNG and SVG, drawn by kaleido in a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io

from lorazor.errors import OutputError
from lorazor.files import explained
from lorazor.report.drawing import Drawing, resolved

_NEEDS = (
    "Figures as files need kaleido and a browser: pip install 'lorazor[figures]', and Chrome or Chromium "
    "(apt install chromium, or plotly_get_chrome). Without --figures the page is made all the same."
)
_WIDTH = 900


def check_can_draw() -> None:
    """Raise OutputError, before any work, if kaleido is not installed."""
    try:
        import kaleido  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise OutputError(f"kaleido is not installed. {_NEEDS}") from error


def write_figures(drawings: Sequence[tuple[str, Drawing]], folder: Path) -> list[Path]:
    """Write every figure as PNG and SVG, in the light colours, on a white ground.

    Args:
        drawings: each with the start of its file's name.
        folder: where they go; files of the same names are replaced.
    Returns:
        The files.
    Raises:
        OutputError: kaleido or its browser is missing, or the folder cannot be written to.
    """
    check_can_draw()
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        figures: list[Any] = []
        files: list[Path] = []
        scales: list[float | None] = [2, 1] * len(drawings)
        for name, drawing in drawings:
            figure = go.Figure(json.loads(resolved(drawing.figure.to_json() or "{}")))
            figure.update_layout(paper_bgcolor="white", width=min(drawing.width or _WIDTH, _WIDTH))
            figures += [figure, figure]
            files += [folder / f"{name}.png", folder / f"{name}.svg"]
        try:  # all in one browser: starting it takes longer than drawing
            sizes: Any = {side: [figure.layout[side] for figure in figures] for side in ("width", "height")}
            plotly.io.write_images(figures, [str(file) for file in files], scale=scales, **sizes)
        except OSError:
            raise
        except Exception as error:  # kaleido's errors have no common base, and change from version to version
            if re.search("chrome|browser", f"{type(error).__name__} {error}", re.IGNORECASE):
                raise OutputError(f"kaleido finds no browser that works. {_NEEDS}") from error
            raise
    return files
