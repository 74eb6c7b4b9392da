"""What commands print: one JSON document, or tables for people."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer

from lorazor.settings import Tracker

TrackOption = Annotated[
    Tracker, typer.Option(help="Log the headline numbers of the finished run to TensorBoard (in --out) or Trackio.")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def print_json(document: Any) -> None:
    """Print one JSON document; dataclasses become objects, paths become text."""
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False, default=_plain))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table on stdout; numbers to the right, the first column to the left."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text, so that brackets in names are not markup
    Console().print(table)


def say(message: str) -> None:
    """Print a message for people on stderr."""
    typer.echo(message, err=True)


def quiet_libraries() -> None:
    """Keep the progress bars and notices of transformers and datasets out of the way of ours."""
    import warnings

    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    # PEFT, of a base model in a folder with a GGUF file only
    warnings.filterwarnings("ignore", message="Could not find a config file")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
