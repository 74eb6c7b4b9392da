"""`lorazor boundary`: find the boundary, judge it, write the smaller adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
from lorazor.settings import BoundarySettings

if TYPE_CHECKING:
    from lorazor.workflow.boundary import BoundaryResult


@options(settings=BoundarySettings)
def command(
    adapter: Annotated[str, typer.Argument(help="Adapter folder or hub id.")],
    data: Annotated[str, typer.Option(help="Validation examples: a file, a dataset folder or a hub name.")],
    out: Annotated[Path, typer.Option(help="New run folder.")],
    confirm: Annotated[str | None, typer.Option(help="Held-out examples for the verdict, of other prompts.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")] = False,
    as_json: JsonFlag = False,
    *,
    settings: BoundarySettings,
) -> None:
    """Find the layer above which the adapter is not needed, and prune it there."""
    from lorazor.workflow.boundary import find_boundary

    quiet_libraries()
    result = find_boundary(adapter, data, out=out, confirm=confirm, settings=settings, resume=resume, say=say)
    if is_printed_as_json(result, as_json):
        return
    print_result(result)
    if result.choice.boundary == result.choice.full:
        words = ["shrink", adapter, "--data", data, *as_options(settings.model, settings.reading)]
        what = "No layer goes by this rule; the directions inside the layers that can"
        print_next(what, *words, "--out", free_place(result.out, "shrink"))
    elif result.verdict is None and result.pruned is not None:
        groups = settings.model, settings.reading, settings.generation
        print_test(adapter, result.pruned.path, result.out, result.choice.metric, *groups)
    else:
        print_next("What was measured, on a page", "report", result.out)


def print_result(result: BoundaryResult) -> None:
    """Print the curve, the choice, the verdict, and where the smaller adapter is."""
    choice = result.choice
    rows = [
        [
            f"{'→ ' if one.boundary == choice.boundary else '  '}{one.boundary}",
            f"{one.value:.4f}",
            f"{one.difference.estimate:+.4f}",
            f"[{one.difference.low:+.4f}, {one.difference.high:+.4f}]",
        ]
        for one in choice.candidates
    ]
    print_table(
        f"{choice.metric} on {choice.n_examples} examples, by how many layers of {result.stack} keep LoRA",
        ["boundary", choice.metric, "to full", "95 % interval"],
        rows,
    )
    typer.echo(choice.reason)
    print_verdict(result.verdict, choice.boundary == choice.full)
    if result.nothing_left is not None:
        typer.echo(f"No site is left. {result.nothing_left}")
    if result.pruned is not None:
        print_pruned(result.pruned)
