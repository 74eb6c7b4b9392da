"""`lorazor prune`: apply a selection or a boundary to an adapter folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorazor.cli.output import JsonFlag, print_json
from lorazor.errors import SettingsError


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
    if (selection is None) == (boundary is None):
        raise SettingsError("Pass either --selection FILE or --boundary N, and not both.")
    if selection is not None and (stack is not None or drop_outside):
        raise SettingsError("--stack and --drop-outside belong to --boundary; a selection already names every site.")
    from lorazor.adapter.folder import read_adapter
    from lorazor.adapter.load import find_adapter
    from lorazor.adapter.prune import prune, select_boundary
    from lorazor.selection import Selection

    folder = read_adapter(find_adapter(adapter))
    if selection is not None:
        chosen = Selection.load(selection)
    else:
        assert boundary is not None
        chosen = select_boundary(folder.sites, boundary, stack, drop_outside)
    result = prune(folder.path, chosen, out)
    if as_json:
        print_json(result)
        return
    typer.echo(
        f"Kept {result.n_sites_kept} of {result.n_sites} sites, {result.n_parameters_kept:,} of "
        f"{result.n_parameters:,} LoRA parameters, {result.n_bytes:,} of {result.n_bytes_before:,} bytes."
    )
    n_outside = sum(site.stack is None for site in chosen.kept)
    if boundary is not None and n_outside:
        typer.echo(f"{n_outside} sites outside the layers were kept; --drop-outside drops them.")
    if result.left_out:
        typer.echo(f"Not carried over: {', '.join(result.left_out)}.")
    typer.echo(f"Adapter: {result.path}")
