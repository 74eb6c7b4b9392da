"""What commands print: one JSON document, or words for people, and which command comes next."""

from __future__ import annotations

import logging
import shlex
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorazor.cli.options import as_options
from lorazor.files import json_text
from lorazor.settings import ExampleSettings

if TYPE_CHECKING:
    from lorazor.adapter.prune import PruneResult
    from lorazor.select.verdict import Verdict

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def print_json(document: Any) -> None:
    """Print one JSON document; see `json_text`."""
    typer.echo(json_text(document, indent=2))


def is_printed_as_json(document: Any, as_json: bool) -> bool:
    """Print a result as JSON where that is asked for; of several processes, all but the main one have nothing to say.

    Returns:
        Whether nothing more is to be printed.
    """
    from lorazor.measure.sharding import is_main_process

    if as_json and is_main_process():
        print_json(document)
    return as_json or not is_main_process()


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


def print_verdict(verdict: Verdict | None, is_full: bool) -> None:
    """Print the verdict on a choice, or why there is none.

    Args:
        verdict: None where it was not judged.
        is_full: whether the choice is the full adapter.
    """
    if verdict is not None:
        typer.echo(verdict.sentence)
    elif is_full:
        typer.echo("Nothing was dropped, so there is nothing to judge.")
    else:
        typer.echo("Not judged: pass --confirm with examples that took no part in the choice.")


def print_pruned(pruned: PruneResult, server: str | None = None) -> None:
    """Print how much stays, where the adapter is, and who computes it right: one server, or who does not of all."""
    share, (lowest, highest) = pruned.n_parameters_kept / pruned.n_parameters, pruned.ranks
    ranks = f"rank {lowest}" if lowest == highest else f"ranks {lowest} to {highest}"
    typer.echo(
        f"Saved: {pruned.n_sites_kept} of {pruned.n_sites} sites, {ranks}; {pruned.n_parameters_kept:,} of "
        f"{pruned.n_parameters:,} parameters ({share:.1%}); {pruned.n_bytes:,} of {pruned.n_bytes_before:,} bytes.\n"
        f"Adapter: {pruned.path}"
    )
    if server is None:
        print_servers(pruned.path)
    else:
        typer.echo(f"Computed right, as it is, by {server}.")


def print_servers(path: Path) -> None:
    """Print which servers do not compute an adapter as PEFT does, in one line; nothing where all do."""
    from lorazor.workflow.inspect import not_right

    if found := not_right(path):
        titles = ", ".join(one.server.title for one in found)
        typer.echo(
            f"Not computed right, as it is, by {titles}: 'lorazor inspect' says why, 'lorazor export --for' "
            "writes a form that is."
        )


def print_test(adapter: str, smaller: Path, run: Path, metric: str, *settings: Any) -> None:
    """Print the command that compares a smaller adapter with the full one, on examples that the user has to name.

    Args:
        adapter: the full adapter.
        smaller: folder of the smaller one.
        run: what the folder of the comparison is named after.
        metric: to compare by, beside the loss.
        settings: how to load and to read; for other examples than these.
    """
    metrics = [] if metric == "loss" else ["--metrics", f"loss,{metric}"]
    options = [*metrics, *as_options(*(of_other_data(one) for one in settings))]
    words = ["eval", adapter, smaller, "--data", "TEST.jsonl", *options, "--out", free_place(run, "eval")]
    print_next("What it costs on examples that took no part, yours in place of TEST.jsonl", *words)


def of_other_data(settings: Any) -> Any:
    """The settings less those that are about one set of examples alone."""
    return replace(settings, limit=None, split=None) if isinstance(settings, ExampleSettings) else settings


def say(message: str) -> None:
    """Print a message for people on stderr."""
    typer.echo(message, err=True)


def quiet_bitsandbytes() -> None:
    """Keep its notices out of the way: of kernels that are not installed, and of a cast in every layer of every pass.

    It gives the first of them when PEFT is imported, so this comes before.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


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
