"""`lorazor prune`: apply a selection or a boundary to an adapter folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorazor.cli.options import options
from lorazor.cli.output import JsonFlag, print_json, print_servers, print_test
from lorazor.settings import PruneSettings


@options(settings=PruneSettings)
def command(
    adapter: Annotated[str, typer.Argument(help="Adapter folder or hub id.")],
    out: Annotated[Path, typer.Option(help="New folder for the smaller adapter.")],
    selection: Annotated[Path | None, typer.Option(help="A selection.json.")] = None,
    as_json: JsonFlag = False,
    *,
    settings: PruneSettings,
) -> None:
    """Write a smaller adapter, without loading the base model."""
    from lorazor.workflow.prune import prune

    result = prune(adapter, selection, out=out, settings=settings)
    if as_json:
        print_json(result)
        return
    typer.echo(
        f"Kept {result.n_sites_kept} of {result.n_sites} sites, {result.n_parameters_kept:,} of "
        f"{result.n_parameters:,} LoRA parameters, {result.n_bytes:,} of {result.n_bytes_before:,} bytes."
    )
    if settings.boundary is not None:
        _print_cut(adapter, settings)
    if result.left_out:
        typer.echo(f"Not carried over: {', '.join(result.left_out)}.")
    typer.echo(f"Adapter: {result.path}")
    print_servers(result.path)
    print_test(adapter, out, out, "loss")


def _print_cut(adapter: str, settings: PruneSettings) -> None:
    """Print which stack a boundary cut, and what it left alone."""
    from lorazor.adapter.find import find_adapter
    from lorazor.adapter.folder import read_adapter
    from lorazor.workflow.prune import boundary_of

    chosen = boundary_of(read_adapter(find_adapter(adapter)), settings)
    cut, n_layers = chosen.settings["stack"], chosen.settings["n_layers"]
    whole = list(dict.fromkeys(site.stack for site in chosen.sites if site.stack not in (cut, None)))
    message = f"LoRA stays in {chosen.settings['boundary']} of {n_layers} layers of {cut}"
    typer.echo(message + (f"; {', '.join(whole)} stays whole. --stack cuts another one." if whole else "."))
    n_outside = sum(site.stack is None for site in chosen.kept)
    if n_outside:
        sites = "site" if n_outside == 1 else "sites"
        typer.echo(f"{n_outside:,} {sites} outside the layers kept; --drop-outside drops what is there.")
