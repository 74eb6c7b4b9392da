"""What commands print: one JSON document, or tables for people."""

from __future__ import annotations

import shlex
from itertools import chain, count
from pathlib import Path
from typing import Annotated, Any

import typer

from lorazor.files import json_text
from lorazor.report.table import print_table

__all__ = [
    "JsonFlag",
    "free_place",
    "print_json",
    "print_next",
    "print_table",
    "quiet_libraries",
    "say",
]

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def print_json(document: Any) -> None:
    """Print one JSON document; see `json_text`."""
    typer.echo(json_text(document, indent=2))


def print_next(what: str, *words: object, err: bool = False) -> None:
    """Print the command that comes next, to be copied as it stands.

    Args:
        what: what it is for.
        words: the command without `lorazor`; words in capitals are for the user to fill in.
        err: print it on stderr, where stdout is for another program.
    """
    typer.echo(f"{what}:\n  {shlex.join(['lorazor', *map(str, words)])}", err=err)


def free_place(beside: object, ending: str) -> Path:
    """A folder of this name that does not exist yet: `run-eval`, `run-eval-2`, ..."""
    place = Path(f"{str(beside).rstrip('/')}-{ending}")
    others = (place.with_name(f"{place.name}-{number}") for number in count(2))
    return next(one for one in chain([place], others) if not one.exists())


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
