"""`lorazor report`: one page for a run, for several side by side, or for a suite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorazor.cli.options import options
from lorazor.cli.output import JsonFlag, print_json, say
from lorazor.report.settings import ReportSettings
from lorazor.report.table import print_table

if TYPE_CHECKING:
    from rich.console import Console

    from lorazor.report.contents import Run
    from lorazor.report.leaderboards import Board
    from lorazor.report.suite_page import SuiteSection


@options(settings=ReportSettings)
def command(
    runs: Annotated[list[Path], typer.Argument(help="Run folders: the --out of other commands; or one of 'bench'.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The HTML file. Default: report.html in the run folder, or in this folder for several runs."),
    ] = None,
    as_json: JsonFlag = False,
    *,
    settings: ReportSettings,
) -> None:
    """Make one HTML page that shows what came of runs, or of a suite; it needs no network."""
    from lorazor.report.headline import headline
    from lorazor.workflow.report import report_runs

    result = report_runs(runs, out=out, settings=settings, say=say)
    if as_json:
        if result.suite is not None:
            print_json({"out": result.out, "figures": result.figures, **suite_document(result.suite)})
            return
        headlines = [{"run": run.path, "command": run.command, **asdict(headline(run))} for run in result.runs]
        print_json({"out": result.out, "figures": result.figures, "runs": headlines})
        return
    if result.suite is not None:
        print_boards(result.suite.boards)
    print_headlines(result.runs)
    figures = f"\nFigures: {settings.figures} ({len(result.figures)} files)" if result.figures else ""
    typer.echo(f"Page: {result.out}{figures}")
    if settings.markdown is not None:
        typer.echo(f"Markdown: {settings.markdown}")


def suite_document(suite: SuiteSection) -> dict[str, Any]:
    """What a suite came to, for other programs."""
    return {"suite": suite.results.name, "boards": suite.boards, "findings": suite.findings,
            "failures": suite.results.failures}  # fmt: skip


def print_boards(boards: Sequence[Board]) -> None:
    """Print leaderboards, in 120 columns, and how to read them."""
    from lorazor.report.leaderboards import compact_table, reading_aid

    for board in boards:
        table = compact_table(board)
        print_table(table.title, table.columns, table.rows)
    if boards:
        typer.echo(reading_aid(boards))


def print_headlines(runs: Sequence[Run], console: Console | None = None) -> None:
    """Print the headline of every run; of several, first the table that compares them.

    Texts were made visible when they were read, and are printed as they are: brackets in them are no markup.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from lorazor.report.headline import COMPARISON, comparison, headline

    console = console or Console()
    if len(runs) > 1:
        print_table(f"{len(runs)} runs side by side", COMPARISON, comparison(runs), console=console)
    for run in runs:
        found = headline(run)
        table = Table(title=Text(f"{run.name} ({run.command})"), title_justify="left", show_header=False)
        table.add_column()
        table.add_column(justify="right", no_wrap=True)
        table.add_column()
        for fact in found.numbers:
            colour = {True: "bold green", False: "bold red", None: "bold"}[fact.is_good]
            table.add_row(Text(fact.label), Text(fact.value, style=colour), Text("; ".join(fact.details)))
        if found.numbers:
            console.print(table)
        for sentence in found.sentences:
            console.print(Text(sentence))
