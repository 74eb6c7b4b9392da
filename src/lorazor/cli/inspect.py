"""`lorazor inspect`: what is in an adapter folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorazor.cli.output import JsonFlag, free_place, print_json, print_next, say
from lorazor.report.table import print_table

if TYPE_CHECKING:
    from lorazor.adapter.directions import SiteNorm


def command(
    adapter: Annotated[str, typer.Argument(help="Adapter folder or hub id.")], as_json: JsonFlag = False
) -> None:
    """Show the LoRA sites of an adapter: layers, kinds, ranks, norms, dead sites. Loads no base model."""
    from lorazor.workflow.inspect import inspect

    found = inspect(adapter)
    if as_json:
        print_json(found.to_document())
        return
    norms = found.sites
    ranks = sorted({one.site.rank for one in norms})
    typer.echo(
        f"{found.path}: {len(norms)} sites, {found.n_parameters:,} parameters, rank {', '.join(map(str, ranks))}, "
        f"{found.n_bytes:,} bytes\nbase model: {found.base_model}"
    )
    if beside := found.n_bytes_beside:
        total = sum(beside.values())
        typer.echo(f"beside LoRA: {total:,} bytes ({total / found.n_bytes:.0%} of the file) of {', '.join(beside)}")
    if found.n_bytes_unchanged:
        typer.echo(
            f"{found.n_bytes_unchanged:,} bytes of it are as in the base model: 'lorazor prune --changed-rows-only' "
            "leaves them out, and the adapter computes the same"
        )

    for stack, n_layers in found.stacks.items():
        _print_norms(f"norm of s B A in {stack} ({n_layers} layers)", [one for one in norms if one.site.stack == stack])
    outside = [one for one in norms if one.site.stack is None]
    for one in outside:
        typer.echo(f"outside the layers: {one.site.name}, rank {one.site.rank}, norm {one.norm:.3g}")
    dead = [one.site.name for one in norms if one.is_dead]
    if dead:
        named = ", ".join(dead[:3]) + (", ..." if len(dead) > 3 else "")
        say(f"Warning: {len(dead)} of {len(norms)} sites are dead (B = 0 or A = 0, they change nothing): {named}")
    if found.task_type != "QUESTION_ANS":  # its answers are spans, on which nothing is scored
        base = [] if found.base_model else ["--model", "BASE"]
        place = free_place(Path(adapter).resolve().name, "shrink")
        words = ["shrink", adapter, "--data", "VALIDATION.jsonl", *base, "--out", place]
        print_next("How small it can be, by examples of yours in place of VALIDATION.jsonl", *words)


def _print_norms(title: str, norms: list[SiteNorm]) -> None:
    """Norms by layer and kind; several sites of a kind in a layer, as experts are, have one norm together."""
    kinds = list(dict.fromkeys(one.site.kind for one in norms))
    groups = [kind.rpartition(".")[0] for kind in kinds]
    ends = {group.rpartition(".")[2] for group in groups}
    if len(ends) == len(set(groups)):
        groups = [group.rpartition(".")[2] for group in groups]
    cells: dict[tuple[int | None, str], list[float]] = {}
    for one in norms:
        cells.setdefault((one.site.layer, one.site.kind), []).append(one.norm)
    layers = sorted({one.site.layer for one in norms if one.site.layer is not None})
    together = ", all sites of a kind in a layer together" if any(len(cell) > 1 for cell in cells.values()) else ""
    rows = [
        [str(layer), *(f"{math.hypot(*cells[layer, kind]):.3g}" if (layer, kind) in cells else "" for kind in kinds)]
        for layer in layers
    ]
    print_table(title + together, ["layer", *(kind.rpartition(".")[2] for kind in kinds)], rows, ["", *groups])
