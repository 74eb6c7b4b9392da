"""What `lorazor shrink` and `lorazor boundary` both say of their choice, and which command comes next."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lorazor.cli.options import as_options
from lorazor.cli.output import free_place, print_next
from lorazor.settings import ExampleSettings

if TYPE_CHECKING:
    from lorazor.adapter.prune import PruneResult
    from lorazor.select.verdict import Verdict


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


def print_pruned(pruned: PruneResult) -> None:
    """Print how much stays, and where the adapter is."""
    share, (lowest, highest) = pruned.n_parameters_kept / pruned.n_parameters, pruned.ranks
    ranks = f"rank {lowest}" if lowest == highest else f"ranks {lowest} to {highest}"
    typer.echo(
        f"Saved: {pruned.n_sites_kept} of {pruned.n_sites} sites, {ranks}; {pruned.n_parameters_kept:,} of "
        f"{pruned.n_parameters:,} parameters ({share:.1%}); {pruned.n_bytes:,} of {pruned.n_bytes_before:,} bytes.\n"
        f"Adapter: {pruned.path}"
    )


def print_page(out: Path) -> None:
    """Print the command that comes after a choice that needs no more measuring."""
    print_next("What was measured, on a page", "report", out)


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
