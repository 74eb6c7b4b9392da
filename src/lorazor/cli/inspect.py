"""`lorazor inspect`: what is in an adapter folder."""

from __future__ import annotations

from typing import Annotated

import typer

from lorazor.cli.output import JsonFlag, print_json, print_table, say


def command(
    adapter: Annotated[str, typer.Argument(help="Adapter folder or hub id.")], as_json: JsonFlag = False
) -> None:
    """Show the LoRA sites of an adapter: layers, kinds, ranks, norms, dead sites. Loads no base model."""
    import dataclasses

    from lorazor.adapter.folder import read_adapter
    from lorazor.adapter.load import find_adapter
    from lorazor.adapter.sites import stack_sizes
    from lorazor.adapter.summary import SiteNorm, site_norms

    folder = read_adapter(find_adapter(adapter))
    norms = site_norms(folder)
    if as_json:
        sites = [dataclasses.asdict(one.site) | {"norm": one.norm, "is_dead": one.is_dead} for one in norms]
        print_json(
            {
                "adapter": folder.path,
                "base_model": folder.config.get("base_model_name_or_path"),
                "n_parameters": sum(site.n_parameters for site in folder.sites),
                "n_bytes": folder.weights.stat().st_size,
                "stacks": stack_sizes(folder.sites),
                "sites": sites,
            }
        )
        return
    n_parameters = sum(site.n_parameters for site in folder.sites)
    ranks = sorted({site.rank for site in folder.sites})
    typer.echo(
        f"{folder.path}: {len(folder.sites)} sites, {n_parameters:,} parameters, rank {', '.join(map(str, ranks))}, "
        f"{folder.weights.stat().st_size:,} bytes\nbase model: {folder.config.get('base_model_name_or_path')}"
    )

    def show(title: str, part: list[SiteNorm]) -> None:
        kinds = list(dict.fromkeys(one.site.kind for one in part))
        ends = [kind.rpartition(".")[2] for kind in kinds]
        headers = [end if ends.count(end) == 1 else kind for kind, end in zip(kinds, ends, strict=True)]
        cells = {(one.site.layer, one.site.kind): f"{one.norm:.3g}" for one in part}
        layers = sorted({one.site.layer for one in part if one.site.layer is not None})
        rows = [[str(layer), *(cells.get((layer, kind), "") for kind in kinds)] for layer in layers]
        print_table(title, ["layer", *headers], rows)

    for stack, n_layers in stack_sizes(folder.sites).items():
        show(f"norm of s B A in {stack} ({n_layers} layers)", [one for one in norms if one.site.stack == stack])
    outside = [one for one in norms if one.site.stack is None]
    for one in outside:
        typer.echo(f"outside the layers: {one.site.name}, rank {one.site.rank}, norm {one.norm:.3g}")
    dead = [one.site.name for one in norms if one.is_dead]
    if dead:
        named = ", ".join(dead[:3]) + (", ..." if len(dead) > 3 else "")
        say(f"Warning: {len(dead)} of {len(norms)} sites are dead (B = 0 or A = 0, they change nothing): {named}")
