"""One page of a run, or of several side by side. This module never imports torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorazor.errors import OutputError, SettingsError
from lorazor.fields import with_fields
from lorazor.files import write_text
from lorazor.report.contents import Run
from lorazor.report.images import check_can_draw, write_figures
from lorazor.report.page import draw_together, make_page, make_sections
from lorazor.report.reading import read_runs
from lorazor.report.settings import ReportSettings

_LARGE = 6_000_000
"""Bytes from which a page is slow to open and to send."""


@dataclass(frozen=True)
class ReportResult:
    """A page.

    Attributes:
        out: the HTML file.
        figures: image files that were written beside it.
        runs: what the page shows.
    """

    out: Path
    figures: list[Path]
    runs: list[Run]


def report_runs(
    runs: str | Path | Sequence[str | Path],
    *,
    out: str | Path | None = None,
    settings: ReportSettings | None = None,
    say: Callable[[str], None] = lambda message: None,
    **fields: Any,
) -> ReportResult:
    """Make one HTML page that shows what came of runs; it needs no network.

    Args:
        runs: run folders, one or more.
        out: the HTML file; `report.html` in the run folder, or in this folder for several runs, if left out.
        settings: everything else.
        say: receives messages for people.
        fields: of `ReportSettings`, in place of those of `settings`.
    Raises:
        LorazorError: settings, runs or output file cannot be used; before anything is written.
    """
    settings, places = (
        with_fields(ReportSettings, settings, fields),
        [Path(run) for run in ([runs] if isinstance(runs, str | Path) else runs)],
    )
    if not places:
        raise SettingsError("No run. Pass at least one run folder: the --out of another command.")
    page_file = Path(out) if out is not None else (places[0] if len(places) == 1 else Path()) / "report.html"
    _check(page_file, settings)
    found = read_runs(places, settings.partial)
    sections, together = make_sections(found, settings.examples), draw_together(found)
    figures = []
    if settings.figures is not None:
        drawings = [(drawing.key, drawing) for drawing in together]
        for section in sections:  # named after the run, where there are several
            prefix = f"{section.run.name.replace('/', '-')}-" if len(sections) > 1 else ""
            drawings += [(f"{prefix}{drawing.key}", drawing) for drawing in section.drawings]
        figures = write_figures(drawings, Path(settings.figures))
    page = make_page(sections, together)
    write_text(page_file, page)
    if len(page.encode()) > _LARGE:
        say(f"The page has {len(page.encode()) / 1e6:.1f} MB. Fewer --examples or fewer runs make it smaller.")
    if settings.open:
        import webbrowser

        webbrowser.open(page_file.resolve().as_uri())
    return ReportResult(page_file, figures, found)


def _check(page_file: Path, settings: ReportSettings) -> None:
    if settings.examples < 0:
        raise SettingsError(f"--examples {settings.examples}: pass 0 or more.")
    if page_file.exists() and not settings.force:
        raise OutputError(
            f"{str(page_file)!r} exists. Nothing was written; pass --force to replace it, or another --out."
        )
    if page_file.is_dir():
        raise OutputError(f"{str(page_file)!r} is a folder. Pass the name of a file.")
    if settings.figures is not None:
        check_can_draw()
