"""`lorazor fleet`: many adapters of one base model, for one server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorazor.cli.export import print_flags
from lorazor.cli.options import options
from lorazor.cli.output import JsonFlag, free_place, print_json, print_next, say
from lorazor.report.table import print_table
from lorazor.serve.settings import FleetSettings

if TYPE_CHECKING:
    from lorazor.workflow.fleet import FleetResult


@options(settings=FleetSettings)
def command(
    adapters: Annotated[list[str], typer.Argument(help="Adapter folders or hub ids.")],
    server: Annotated[
        str, typer.Option("--for", metavar="SERVER", help="Whom they are for: vllm, or with a version, vllm==0.31.")
    ],
    out: Annotated[Path | None, typer.Option(help="Keep the fleet in this new file, for --given.")] = None,
    as_json: JsonFlag = False,
    *,
    settings: FleetSettings,
) -> None:
    """Find the flags with which a server has room for all adapters and for nothing else, and what would save more."""
    from lorazor.workflow.fleet import plan_fleet

    result = plan_fleet(adapters, server, out=out, settings=settings)
    if as_json:
        print_json(result.to_document())
        return
    _print_members(result)
    fleet, n = result.fleet, len(result.members)
    n_bytes = sum(one.n_bytes for one in result.members)
    if settings.given is not None:
        typer.echo(f"All {n} adapters fit the server that {settings.given} is of.")
    typer.echo(
        f"{n} adapters of {fleet.base_model}: {len(fleet.sites):,} sites together, rank up to "
        f"{max(one.rank for one in result.members)}; {n_bytes:,} bytes on disk."
    )
    print_flags(fleet.server, result.flags)
    _print_common(result)
    if out is not None:
        typer.echo(f"Fleet: {out}")
        print_shrinking(result, out)


def print_shrinking(result: FleetResult, out: Path) -> None:
    """Print how the adapters that the fleet has no room for are made to fit."""
    beyond = [one.path for one in result.members if not one.fits]
    if beyond:
        place = free_place(Path(beyond[0]), "in-fleet")
        print_next(
            f"{len(beyond)} of {len(result.members)} adapters have to be shrunk into it, with examples of their own in "
            "place of these",
            "shrink", beyond[0], "--fleet", out, "--data", "VALIDATION.jsonl", "--confirm", "TEST.jsonl", "--heal",
            "TRAIN.jsonl", "--out", place,
        )  # fmt: skip


def _print_members(result: FleetResult) -> None:
    """Print the adapters, and what is wrong with them."""
    rows = [
        [
            one.path,
            f"{one.n_sites:,}",
            str(one.rank),
            f"{one.n_bytes:,}",
            f"{one.slot_bytes:,}" if one.slot_bytes else "",
        ]
        for one in result.members
    ]
    columns = ["adapter", "sites", "rank", "bytes on disk", "bytes of a slot for it alone"]
    print_table("adapters", columns[: len(rows[0])], rows)
    for one in result.members:
        if not one.judgement.is_right:
            say(
                f"Warning: {one.path}: {one.judgement.server.title} {one.judgement.sentence}. Export it first: lorazor "
                "export"
            )


def _print_common(result: FleetResult) -> None:
    """Print what one more common form would save."""
    now = result.slot_bytes_now
    if not result.common or not now:
        return
    rows = [
        [one.what, f"{one.n_sites:,}", f"{one.slot_bytes:,}", f"{one.slot_bytes / now:.0%}", f"{one.energy_lost:.1%}"]
        for one in result.common
    ]
    columns = ["if all of them had", "sites", "bytes of a slot", "of now", "energy lost at most"]
    print_table("what one more common form would save", columns, rows)
    typer.echo(
        "Energy is the squared norm of the updates, cut by weights alone; 'lorazor shrink --fleet' does better, and "
        "says what it costs on data. Choose a form with --max-rank, --sites-fraction and --out FILE."
    )
