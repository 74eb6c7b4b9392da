"""`lorazor bench`: a suite of trainings, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorazor.bench.settings import BenchSettings
from lorazor.cli.options import options
from lorazor.cli.output import quiet_libraries, say


@options(settings=BenchSettings)
def command(
    suite: Annotated[str, typer.Argument(help="A .toml file, or smoke, cpu, weightlora-paper or boundary-paper.")],
    out: Annotated[Path, typer.Option(help="Folder for cells and results; of the same suite to go on with it.")],
    *,
    settings: BenchSettings,
) -> None:
    """Run a grid of tasks, methods, budgets and seeds; what has finished is not run again."""
    from lorazor.bench.cost import in_words
    from lorazor.bench.run import run_suite

    quiet_libraries()
    result = run_suite(suite, out=out, settings=settings, say=say)
    for line in in_words(result.costs) if settings.dry_run else ():
        typer.echo(line)
    typer.echo(f"{len(result.rows)} of {len(result.suite.cells)} cells have finished; results: {result.out}")
    if result.failed:
        raise typer.Exit(1)
