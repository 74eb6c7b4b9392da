"""`lorazor inspect`: what is in an adapter folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorazor.cli.options import options
from lorazor.cli.output import JsonFlag, free_place, print_json, print_next, say
from lorazor.report.table import print_table
from lorazor.serve.settings import InspectSettings

if TYPE_CHECKING:
    from lorazor.adapter.directions import SiteNorm
    from lorazor.workflow.inspect import InspectResult


@options(settings=InspectSettings)
def command(
    adapter: Annotated[str, typer.Argument(help="Adapter folder or hub id.")],
    server: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="SERVER",
            help="Exit 1 unless this server computes what PEFT does: vllm, or with a version, vllm==0.31.",
        ),
    ] = None,
    as_json: JsonFlag = False,
    *,
    settings: InspectSettings,
) -> None:
    """Show what is in an adapter, what is wrong with it, and what servers make of it. Loads no base model."""
    from lorazor.serve.judging import server_named
    from lorazor.workflow.inspect import inspect

    if server is not None:
        server_named(server)  # before the adapter is fetched
    found = inspect(adapter, settings=settings)
    if as_json:
        print_json(found.to_document())
    else:
        _print_sites(found)
        _print_ills(found)
        _print_servers(found, server)
        _print_what_next(found, adapter, server)
    if server is not None and (found.broken or found.strangers or not found.judgement(server).is_right):
        raise typer.Exit(1)


def _print_sites(found: InspectResult) -> None:
    """Print how large it is, and the norm of every site."""
    norms = found.sites
    is_dora = any(one.site.is_dora for one in norms)
    ranks, sites = sorted({one.site.rank for one in norms}), "sites of DoRA" if is_dora else "sites"
    typer.echo(
        f"{found.path}: {len(norms)} {sites}, {found.n_parameters:,} parameters, rank {', '.join(map(str, ranks))}, "
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
    if experts := [one.site.n_experts for one in norms if one.site.n_experts > 1]:
        typer.echo(f"{len(experts)} sites are on experts, {max(experts)} in each, every one of its rank")
    for stack, n_layers in found.stacks.items():
        _print_norms(f"norm of s B A in {stack} ({n_layers} layers)", [one for one in norms if one.site.stack == stack])
    for one in norms:
        if one.site.stack is None:
            typer.echo(f"outside the layers: {one.site.name}, rank {one.site.rank}, norm {one.norm:.3g}")


def _print_ills(found: InspectResult) -> None:
    """Print what is wrong whoever serves it."""
    for names, what in (
        (found.broken, "hold NaN or infinite numbers: take an earlier checkpoint"),
        (found.dead, "are dead (B = 0 or A = 0, they change nothing)"),
        (found.strangers, "are on no module of the base model, or on one of another shape"),
    ):
        if names:
            named = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            say(f"Warning: {len(names)} of {len(found.sites)} sites {what}: {named}")


def _print_servers(found: InspectResult, server: str | None) -> None:
    """Print one line for each server, or for the one that was asked for."""
    judgements = found.judgements if server is None else [found.judgement(server)]
    for one in judgements:
        typer.echo(f"{one.server.title}: {one.headline if server is None else one.sentence}")
    if server is not None:
        typer.echo(f"Smaller adapters pay there {judgements[0].server.gains}.")
    if found.base is None:
        typer.echo(
            "The base model is not on this machine: layers above the highest one with LoRA were not looked at, nor "
            "whether the adapter fits. --model names it."
        )


def _print_what_next(found: InspectResult, adapter: str, server: str | None) -> None:
    """Print the command that comes next."""
    base = [] if found.base_model else ["--model", "BASE"]
    if server is not None and (found.judgement(server).incurable or any(_has_one_form(one) for one in found.sites)):
        return  # export would refuse it
    if server is not None:
        words = ["export", adapter, "--for", server, *base, "--out", free_place(Path(adapter).resolve().name, "export")]
        print_next("In the form that this server computes right, with the flags that it needs", *words)
    elif found.task_type != "QUESTION_ANS":  # its answers are spans, on which nothing is scored
        by = ["--by", "site"] if any(one.site.is_dora for one in found.sites) else []  # it has no directions
        words = ["shrink", adapter, "--data", "VALIDATION.jsonl", *by, *base]
        words += ["--out", free_place(Path(adapter).resolve().name, "shrink")]
        print_next("How small it can be, by examples of yours in place of VALIDATION.jsonl", *words)


def _has_one_form(one: SiteNorm) -> bool:
    return one.site.is_dora or one.site.is_on_parameter


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
