"""What came of runs, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorazor.report.contents import Run
from lorazor.report.headline import COMPARISON, comparison, headline
from lorazor.report.table import print_table

if TYPE_CHECKING:
    from rich.console import Console


def print_headlines(runs: Sequence[Run], console: Console) -> None:
    """Print the headline of every run; of several, first the table that compares them.

    Texts were made visible when they were read, and are printed as they are: brackets in them are no markup.
    """
    from rich.table import Table
    from rich.text import Text

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
