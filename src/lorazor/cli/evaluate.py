"""`lorazor eval`: measure adapters on the same test examples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorazor.cli.options import options
from lorazor.cli.output import JsonFlag, is_printed_as_json, print_next, quiet_libraries, say
from lorazor.report.table import print_table
from lorazor.settings import EvalSettings


@options(settings=EvalSettings)
def command(
    data: Annotated[str, typer.Option(help="Test examples: a file, a dataset folder or a hub name.")],
    out: Annotated[Path, typer.Option(help="New run folder.")],
    adapters: Annotated[
        list[str] | None, typer.Argument(help="Adapter folders or hub ids; each is compared with the first.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")] = False,
    as_json: JsonFlag = False,
    *,
    settings: EvalSettings,
) -> None:
    """Measure adapters on the same examples; the differences are paired, with 95 % intervals."""
    from lorazor.workflow.evaluate import evaluate

    quiet_libraries()
    result = evaluate(adapters or [], data, out=out, settings=settings, resume=resume, say=say)
    if is_printed_as_json(result, as_json):
        return
    for metric in dict.fromkeys(one.metric for one in result.results):
        rows = [
            [
                one.adapter,
                f"{one.value:.4f}",
                f"{one.difference.estimate:+.4f}",
                f"[{one.difference.low:+.4f}, {one.difference.high:+.4f}]",
            ]
            for one in result.results
            if one.metric == metric
        ]
        columns = ["adapter", metric, "to the first", "95 % interval"]
        print_table(f"{metric} on {result.results[0].n_examples} examples", columns, rows)
    typer.echo(f"Run: {result.out}")
    print_next("Every example, on a page", "report", result.out)
