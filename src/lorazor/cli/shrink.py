"""`lorazor shrink`: the smallest adapter within a margin, or the best of a size."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorazor.cli.export import print_flags
from lorazor.cli.options import as_options, options
from lorazor.cli.output import (
    JsonFlag,
    free_place,
    is_printed_as_json,
    print_next,
    print_pruned,
    print_test,
    print_verdict,
    quiet_libraries,
    say,
)
from lorazor.report.table import print_table
from lorazor.settings import ShrinkSettings

if TYPE_CHECKING:
    from lorazor.workflow.shrink import ShrinkResult


@options(settings=ShrinkSettings)
def command(
    adapter: Annotated[str, typer.Argument(help="Adapter folder or hub id.")],
    out: Annotated[Path, typer.Option(help="New run folder; the smaller adapter lies in its folder adapter.")],
    data: Annotated[
        str | None,
        typer.Option(help="Validation examples: a file, a dataset folder or a hub name. Without, the weights decide."),
    ] = None,
    confirm: Annotated[str | None, typer.Option(help="Held-out examples, for the verdict.")] = None,
    server: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="SERVER",
            help="Who serves it, such as vllm or sglang==0.5.23: what is chosen is computed right there, and pays.",
        ),
    ] = None,
    fleet: Annotated[
        Path | None,
        typer.Option(
            help="What 'lorazor fleet --out' wrote, in place of a size: the best that a slot there holds; --margin is "
            "that of the verdict."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")] = False,
    as_json: JsonFlag = False,
    *,
    settings: ShrinkSettings,
) -> None:
    """Make an adapter as small as it can be at no loss that matters, and show that it is so."""
    from lorazor.workflow.shrink import shrink

    quiet_libraries()
    result = shrink(
        adapter, data, out=out, server=server, fleet=fleet, confirm=confirm, settings=settings, resume=resume, say=say
    )
    if is_printed_as_json(result, as_json):
        return
    print_result(result)
    if server is None and result.pruned is None and settings.by != "direction" and data is not None:
        words = as_options(dataclasses.replace(settings, by="direction", stack=None))
        place = ["--out", free_place(result.out, "by-direction")]
        print_next("Directions that no unit of this kind lets go", "shrink", adapter, "--data", data, *words, *place)
    elif result.pruned is not None and result.verdict is None:
        groups = settings.model, settings.reading, settings.generation
        print_test(adapter, result.pruned.path, result.out, result.metric or "loss", *groups)
    elif data is not None:
        print_next("What was measured, on a page", "report", result.out)


def print_result(result: ShrinkResult) -> None:
    """Print what was measured, what stays, the verdict, and where the smaller adapter is."""
    if result.candidates and result.metric is not None:
        rows = [
            [
                one.label,
                str(one.n_sites),
                f"{one.n_parameters:,}",
                f"{one.value:.4f}",
                "" if one.lost is None else f"{one.lost:+.4f}",
                "" if one.lost_at_most is None else f"{one.lost_at_most:+.4f}",
            ]
            for one in sorted(result.candidates, key=lambda one: -one.n_parameters)
        ]
        columns = ["adapter", "sites", "parameters", result.metric, "worse by", "at most"]
        print_table("On the validation examples", columns, rows)
    typer.echo(result.reason)
    if result.verdict is not None or (result.metric is not None and result.pruned is not None):
        print_verdict(result.verdict, is_full=False)
    if result.pruned is not None:
        print_pruned(result.pruned, result.server)
        if result.server is not None:
            print_flags(result.server, result.flags)
    if result.cost is not None:
        typer.echo(result.cost.sentence)
