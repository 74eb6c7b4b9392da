"""`lorazor prune`: apply a selection or a boundary to an adapter folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorazor.cli.chosen import print_test
from lorazor.cli.output import JsonFlag, print_json

if TYPE_CHECKING:
    from lorazor.selection import Selection


def command(
    adapter: Annotated[str, typer.Argument(help="Adapter folder or hub id.")],
    out: Annotated[Path, typer.Option(help="New folder for the smaller adapter.")],
    selection: Annotated[Path | None, typer.Option(help="A selection.json.")] = None,
    boundary: Annotated[int | None, typer.Option(help="Keep the sites of the first N layers.")] = None,
    stack: Annotated[str | None, typer.Option(help="Stack that --boundary cuts, such as decoder.")] = None,
    drop_outside: Annotated[
        bool,
        typer.Option(
            "--drop-outside", help="With --boundary: also drop LoRA outside the layers (lm_head, embeddings)."
        ),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write a smaller adapter, without loading the base model."""
    from lorazor.workflow.prune import prune_adapter

    result, chosen = prune_adapter(
        adapter, out=out, selection=selection, boundary=boundary, stack=stack, drop_outside=drop_outside
    )
    if as_json:
        print_json(result)
        return
    typer.echo(
        f"Kept {result.n_sites_kept} of {result.n_sites} sites, {result.n_parameters_kept:,} of "
        f"{result.n_parameters:,} LoRA parameters, {result.n_bytes:,} of {result.n_bytes_before:,} bytes."
    )
    if boundary is not None:
        _print_cut(chosen)
    if result.left_out:
        typer.echo(f"Not carried over: {', '.join(result.left_out)}.")
    typer.echo(f"Adapter: {result.path}")
    print_test(adapter, out, out, "loss")


def _print_cut(chosen: Selection) -> None:
    """Print which stack a boundary cut, and what it left alone."""
    from lorazor.select.verdict import counted

    cut, n_layers = chosen.settings["stack"], chosen.settings["n_layers"]
    whole = list(dict.fromkeys(site.stack for site in chosen.sites if site.stack not in (cut, None)))
    message = f"LoRA stays in {chosen.settings['boundary']} of {n_layers} layers of {cut}"
    typer.echo(message + (f"; {', '.join(whole)} stays whole. --stack cuts another one." if whole else "."))
    n_outside = sum(site.stack is None for site in chosen.kept)
    if n_outside:
        typer.echo(f"{counted(n_outside, 'site')} outside the layers kept; --drop-outside drops what is there.")
