"""`lorazor curves`: what each layer knows of the answer, with the adapter and without."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorazor.cli.options import as_options, options
from lorazor.cli.output import JsonFlag, free_place, is_printed_as_json, print_next, quiet_libraries, say
from lorazor.report.table import print_table
from lorazor.settings import CurvesSettings

if TYPE_CHECKING:
    from lorazor.workflow.curves import CurvesResult


@options(settings=CurvesSettings)
def command(
    adapter: Annotated[str, typer.Argument(help="Adapter folder or hub id.")],
    data: Annotated[str, typer.Option(help="Validation examples: a file, a dataset folder or a hub name.")],
    out: Annotated[Path, typer.Option(help="New run folder.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")] = False,
    as_json: JsonFlag = False,
    *,
    settings: CurvesSettings,
) -> None:
    """Measure how probable the true answer is after each layer, with the adapter and without."""
    from lorazor.workflow.curves import measure_curves

    quiet_libraries()
    result = measure_curves(adapter, data, out=out, settings=settings, resume=resume, say=say)
    if is_printed_as_json({"out": out, **result.to_document()}, as_json):
        return
    print_result(result)
    typer.echo(f"Run: {out}")
    boundary = result.proposal.boundary
    if boundary is not None and boundary < result.n_layers:
        stack = [] if settings.stack is None else ["--stack", settings.stack]
        given = [*stack, "--rule", "manual", "--boundary", boundary, *as_options(settings.model, settings.reading)]
        place = ["--out", free_place(out, "boundary")]
        print_next("What it costs, and the smaller adapter", "boundary", adapter, "--data", data, *given, *place)
    else:
        print_next("Both curves, on a page", "report", out)


def print_result(result: CurvesResult) -> None:
    """Print both curves side by side, and the boundary that they propose."""
    with_adapter, base = ({one.layer: one for one in result.curves if one.variant == v} for v in ("adapter", "base"))
    rows = []
    for layer, gap in enumerate(result.gap):
        mine, other = with_adapter[layer], base[layer]
        rows.append(
            [
                f"{'→ ' if layer == result.proposal.boundary else '  '}{layer}",
                f"{mine.probability:.4f}",
                f"{other.probability:.4f}",
                f"{gap['gap']:+.4f}",
                f"{gap['standard_error']:.4f}",
                f"{mine.entropy_nats:.2f}",
                f"{other.entropy_nats:.2f}",
                f"{mine.median_rank:g}",
                f"{other.median_rank:g}",
            ]
        )
    print_table(
        f"After each layer, on {result.n_tokens} answer tokens of {result.n_examples} examples",
        ["layer", "adapter", "base", "gap", "±", "adapter", "base", "adapter", "base"],
        rows,
        ["", *["probability of the true token"] * 4, *["entropy, nats"] * 2, *["its median rank"] * 2],
    )
    typer.echo(result.proposal.reason)
