"""One page of a run, of several side by side, or of a suite. This module never imports torch."""

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
from lorazor.report.suite_page import SuiteSection, make_suite_section, suite_markdown
from lorazor.report.suites import is_suite, read_suite_results

_LARGE = 6_000_000
"""Bytes from which a page is slow to open and to send."""


@dataclass(frozen=True)
class ReportResult:
    """A page.

    Attributes:
        out: the HTML file.
        figures: image files that were written beside it.
        runs: what the page shows.
        suite: what it shows of a suite, in the place of runs.
    """

    out: Path
    figures: list[Path]
    runs: list[Run]
    suite: SuiteSection | None = None


def report_runs(
    runs: str | Path | Sequence[str | Path],
    *,
    out: str | Path | None = None,
    settings: ReportSettings | None = None,
    say: Callable[[str], None] = lambda message: None,
    **fields: Any,
) -> ReportResult:
    """Make one HTML page that shows what came of runs, or of a suite; it needs no network.

    Args:
        runs: run folders, one or more; or the folder of a suite, alone.
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
    suite = _read_suite(places, settings)
    found = [] if suite else read_runs(places, settings.partial)
    sections, together = make_sections(found, settings.examples), draw_together(found)
    figures, drawings = [], [(drawing.key, drawing) for drawing in (*together, *(suite.drawings if suite else ()))]
    if settings.figures is not None:
        for section in sections:  # named after the run, where there are several
            prefix = f"{section.run.name.replace('/', '-')}-" if len(sections) > 1 else ""
            drawings += [(f"{prefix}{drawing.key}", drawing) for drawing in section.drawings]
        figures = write_figures(drawings, Path(settings.figures))
    page = make_page(sections, together, suite)
    write_text(page_file, page)
    if suite is not None and settings.markdown is not None:
        images = {file.stem: file for file in figures if file.suffix == ".png"}
        write_text(Path(settings.markdown), suite_markdown(suite, Path(settings.markdown), images))
    if len(page.encode()) > _LARGE:
        say(f"The page has {len(page.encode()) / 1e6:.1f} MB. Fewer --examples or fewer runs make it smaller.")
    if settings.open:
        import webbrowser

        webbrowser.open(page_file.resolve().as_uri())
    return ReportResult(page_file, figures, found, suite)


def _read_suite(places: Sequence[Path], settings: ReportSettings) -> SuiteSection | None:
    """What there is to show of a suite; None of runs.

    Raises:
        SettingsError: a suite beside other folders, or settings of suites for runs.
    """
    suites = [place for place in places if is_suite(place)]
    if suites and len(places) > 1:
        raise SettingsError(f"{str(suites[0])!r} is a suite. Pass it alone: a page shows one suite, or runs.")
    if suites:
        return make_suite_section(read_suite_results(suites[0]), settings.against)
    for name in ("markdown", "against"):
        if (value := getattr(settings, name)) is not None:
            raise SettingsError(f"--{name} {value} is for suites, and {str(places[0])!r} is none. Leave it out.")
    return None


def _check(page_file: Path, settings: ReportSettings) -> None:
    if settings.examples < 0:
        raise SettingsError(f"--examples {settings.examples}: pass 0 or more.")
    for file, option in ((page_file, "--out"), (settings.markdown and Path(settings.markdown), "--markdown")):
        if file is not None and file.exists() and not settings.force:
            raise OutputError(
                f"{str(file)!r} exists. Nothing was written; pass --force to replace it, or another {option}."
            )
    if page_file.is_dir():
        raise OutputError(f"{str(page_file)!r} is a folder. Pass the name of a file.")
    if settings.figures is not None:
        check_can_draw()
