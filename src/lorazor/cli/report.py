"""`lorazor report`: one page for a run, or for several side by side."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lorazor.cli.options import options
from lorazor.cli.output import JsonFlag, print_json, say
from lorazor.settings import ReportSettings


@options(settings=ReportSettings)
def command(
    runs: Annotated[list[Path], typer.Argument(help="Run folders: the --out of other commands.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The HTML file. Default: report.html in the run folder, or in this folder for several runs."),
    ] = None,
    as_json: JsonFlag = False,
    *,
    settings: ReportSettings,
) -> None:
    """Make one HTML page that shows what came of runs; it needs no network."""
    from lorazor.report.headline import headline
    from lorazor.workflow.report import report_runs

    result = report_runs(runs, out=out, settings=settings, say=say)
    if as_json:
        headlines = [{"run": run.path, "command": run.command, **asdict(headline(run))} for run in result.runs]
        print_json({"out": result.out, "figures": result.figures, "runs": headlines})
        return
    from rich.console import Console

    from lorazor.report.terminal import print_headlines

    print_headlines(result.runs, Console())
    figures = f"\nFigures: {settings.figures} ({len(result.figures)} files)" if result.figures else ""
    typer.echo(f"Page: {result.out}{figures}")
