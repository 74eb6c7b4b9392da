"""`lorazor report`: one page for a run, or for several side by side."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorazor.cli.options import options
from lorazor.cli.output import JsonFlag, print_json, say
from lorazor.errors import OutputError, SettingsError
from lorazor.settings import ReportSettings

if TYPE_CHECKING:
    from lorazor.report.drawing import Drawing
    from lorazor.report.page import Section

_LARGE = 6_000_000
"""Bytes from which a page is slow to open and to send."""


@options(settings=ReportSettings)
def command(
    runs: Annotated[list[Path], typer.Argument(help="Run folders: the --out of other commands.")],
    as_json: JsonFlag = False,
    *,
    settings: ReportSettings,
) -> None:
    """Make one HTML page that shows what came of runs; it needs no network."""
    from lorazor.files import write_text
    from lorazor.report.headline import headline
    from lorazor.report.images import check_can_draw, write_figures
    from lorazor.report.page import draw_together, make_page, make_sections
    from lorazor.report.reading import read_runs

    if settings.examples < 0:
        raise SettingsError(f"--examples {settings.examples}: pass 0 or more.")
    out = settings.out or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    if out.exists() and not settings.force:
        raise OutputError(f"{str(out)!r} exists. Nothing was written; pass --force to replace it, or another --out.")
    if out.is_dir():
        raise OutputError(f"{str(out)!r} is a folder. Pass the name of a file.")
    if settings.figures is not None:
        check_can_draw()
    found = read_runs(runs, settings.partial)
    sections, together = make_sections(found, settings.examples), draw_together(found)
    figures = write_figures(_files(sections, together), settings.figures) if settings.figures is not None else []
    page = make_page(sections, together)
    write_text(out, page)
    if len(page.encode()) > _LARGE:
        say(f"The page has {len(page.encode()) / 1e6:.1f} MB. Fewer --examples or fewer runs make it smaller.")
    if as_json:
        headlines = [{"run": run.path, "command": run.command, **asdict(headline(run))} for run in found]
        print_json({"out": out, "figures": figures, "runs": headlines})
    else:
        from rich.console import Console

        from lorazor.report.terminal import print_headlines

        print_headlines(found, Console())
        typer.echo(f"Page: {out}" + (f"\nFigures: {settings.figures} ({len(figures)} files)" if figures else ""))
    if settings.open:
        import webbrowser

        webbrowser.open(out.resolve().as_uri())


def _files(sections: list[Section], together: list[Drawing]) -> list[tuple[str, Drawing]]:
    """Every figure with the name of its file: after the run, where there are several."""
    prefixes = [f"{section.run.name.replace('/', '-')}-" if len(sections) > 1 else "" for section in sections]
    of_runs = [
        (f"{prefix}{drawing.key}", drawing)
        for prefix, section in zip(prefixes, sections, strict=True)
        for drawing in section.drawings
    ]
    return [*((drawing.key, drawing) for drawing in together), *of_runs]
