"""`lorazor bench`: a suite of trainings, measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from lorazor.bench.settings import BenchSettings
from lorazor.cli.options import options
from lorazor.cli.output import JsonFlag, print_json, print_next, quiet_libraries, say


@options(settings=BenchSettings)
def command(
    suite: Annotated[
        str, typer.Argument(help="A .toml file, or smoke, cpu, costs, weightlora-paper or boundary-paper.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for cells and results; of the same suite to go on with it.")],
    as_json: JsonFlag = False,
    *,
    settings: BenchSettings,
) -> None:
    """Run a grid of tasks, methods, budgets and seeds; what has finished is not run again."""
    from lorazor.bench.cost import COLUMNS, in_words, n_unknown
    from lorazor.bench.run import run_suite
    from lorazor.cli.report import print_boards
    from lorazor.report.leaderboards import leaderboards
    from lorazor.report.suites import SuiteResults
    from lorazor.report.table import print_table

    quiet_libraries()
    result = run_suite(suite, out=out, settings=settings, say=say)
    if as_json:
        left = [one.name for one in result.left]
        costs = [dataclasses.asdict(one) for one in result.costs]
        print_json({"out": result.out, "rows": result.rows, "failed": result.failed, "left": left, "costs": costs})
        raise typer.Exit(1 if result.failed else 0)
    if settings.dry_run:
        print_table(result.suite.about or result.suite.name, COLUMNS, in_words(result.costs))
        if n_left := n_unknown(result.costs):
            typer.echo(f"and {n_left} cells of which nothing is known")
    if result.rows and not settings.dry_run:
        print_boards(leaderboards(SuiteResults(out, result.suite.name, tuple(result.rows))))
    typer.echo(f"{len(result.rows)} of {len(result.suite.cells)} cells have finished; results: {result.out}")
    if result.rows:
        print_next("The page of leaderboards and figures", "report", out)
    if result.failed:
        raise typer.Exit(1)
