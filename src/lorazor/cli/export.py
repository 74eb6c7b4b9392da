"""`lorazor export`: the form of an adapter that a server computes right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorazor.cli.options import options
from lorazor.cli.output import JsonFlag, print_json, quiet_libraries
from lorazor.serve.settings import ExportSettings

if TYPE_CHECKING:
    from lorazor.serve.flags import Flags


@options(settings=ExportSettings)
def command(
    adapter: Annotated[str, typer.Argument(help="Adapter folder or hub id.")],
    server: Annotated[
        str, typer.Option("--for", metavar="SERVER", help="Whom it is for: vllm, or with a version, vllm==0.31.")
    ],
    out: Annotated[Path, typer.Option(help="New folder for the exported adapter.")],
    as_json: JsonFlag = False,
    *,
    settings: ExportSettings,
) -> None:
    """Write an adapter in the form that a server computes right, verify it in stock PEFT, and print the flags."""
    from lorazor.workflow.export import export

    quiet_libraries()
    result = export(adapter, server, out=out, settings=settings)
    if as_json:
        print_json(result.to_document())
        return
    if not result.before.is_right:
        typer.echo(f"The adapter as it was: {result.server} {result.before.sentence}")
    for sentence in result.said:
        typer.echo(sentence)
    typer.echo(
        f"{result.n_sites:,} sites ({result.n_sites_before:,} before), rank {result.rank}; {result.n_bytes:,} bytes "
        f"({result.n_bytes_before:,} before)."
    )
    if result.difference is None:
        typer.echo("Not verified: nobody compared its logits with the adapter's.")
    else:
        typer.echo(
            f"In stock PEFT its logits differ from the adapter's by up to {result.difference:.3g}; the largest is "
            f"{result.largest_logit:.3g}."
        )
    print_flags(result.server, result.flags)
    typer.echo(f"Adapter: {result.path}")


def print_flags(server: str, flags: Flags | None) -> None:
    """Print what to tell a server, and what that saves."""
    if flags is None:
        return
    typer.echo(f"Tell {server}:\n  {flags}")
    if flags.slot_bytes is not None and flags.slot_bytes_untold:
        typer.echo(
            f"A slot has {flags.slot_bytes:,} bytes then, and {flags.slot_bytes_untold:,} without these flags "
            f"({flags.slot_bytes / flags.slot_bytes_untold:.1%})."
        )
    if flags.targets:
        typer.echo(
            "An adapter with sites on other modules is cut without a word by a server that is told so: 'lorazor fleet' "
            "finds the flags for several, and refuses others."
        )
