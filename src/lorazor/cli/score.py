"""`lorazor score`: what every site of a trained adapter is worth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorazor.cli.options import options
from lorazor.cli.output import (
    JsonFlag,
    TrackOption,
    free_place,
    print_json,
    print_next,
    print_table,
    quiet_libraries,
    say,
)
from lorazor.settings import DataSettings, ModelSettings, ScoreSettings

if TYPE_CHECKING:
    from lorazor.workflow.score import ScoreResult

_N_SHOWN = 10


@options(scoring=ScoreSettings, model=ModelSettings, reading=DataSettings)
def command(
    adapter: Annotated[str, typer.Argument(help="Adapter folder or hub id.")],
    out: Annotated[Path, typer.Option(help="New run folder, for scores.jsonl.")],
    data: Annotated[str | None, typer.Option(help="Validation examples: a file, a dataset folder or a hub id.")] = None,
    track: TrackOption = "none",
    as_json: JsonFlag = False,
    *,
    scoring: ScoreSettings,
    model: ModelSettings,
    reading: DataSettings,
) -> None:
    """Score every site of a trained adapter, for 'lorazor prune --scores' and for the report."""
    from lorazor.measure.sharding import is_main_process
    from lorazor.workflow.score import score_adapter

    quiet_libraries()
    result = score_adapter(adapter, data, out, scoring, model, reading, say, track)
    if not is_main_process():
        return
    if as_json:
        print_json(result)
    else:
        print_result(result)
        if len(result.scores) > 1:
            half = ["--scores", out, "--params-fraction", 0.5, "--out", free_place(out, "half")]
            print_next("The half of its parameters that these scores keep", "prune", adapter, *half)


def print_result(result: ScoreResult) -> None:
    """Print the highest scores, the sum of each kind and layer block, and the completeness check."""
    ranked = sorted(result.scores, key=lambda one: one.score_per_parameter, reverse=True)
    short = _short_names(list(dict.fromkeys(one.stack for one in result.scores if one.stack is not None)))
    rows = [
        [
            one.site if one.stack is None else f"{short[one.stack]}{one.layer}  {one.kind}",
            f"{one.score:.4g}",
            "" if one.standard_error is None else f"{one.standard_error:.2g}",
            f"{one.score_per_parameter:.3g}",
            f"{one.n_parameters:,}",
        ]
        for one in ranked[:_N_SHOWN]
    ]
    columns = [
        "stack, layer, kind" if len(short) > 1 else "layer, kind",
        result.method,
        "standard error",
        "per parameter",
        "parameters",
    ]
    print_table(f"{len(rows)} of {len(ranked)} sites, highest score per parameter first", columns, rows)
    kinds = list(dict.fromkeys(one.kind for one in result.scores))
    total = sum(one.score for one in result.scores)
    print_table(
        "by projection kind",
        ["kind", "sites", result.method, "share"],
        [_sum_of([one for one in result.scores if one.kind == kind], kind, total) for kind in kinds],
    )
    sums = result.completeness
    if sums is not None:
        typer.echo(
            f"Completeness: the credits add up to {sums.credit_sum:.4f} nats per answer token; measured, the adapter "
            f"gains {sums.gain:.4f} ({sums.loss_base:.4f} to {sums.loss_full:.4f}): {sums.error:.2%} off, standard "
            f"error {sums.standard_error:.2g}."
        )
    if result.n_examples:
        typer.echo(
            f"Cost: {result.n_passes} forward-backward passes over {result.n_examples} examples, for all "
            f"{len(ranked)} sites at once."
        )
    typer.echo(f"Run: {result.out}")


def _short_names(stacks: list[str]) -> dict[str, str]:
    """What tells stacks apart, with a space behind it: `encoder` and `decoder`; nothing where there is one."""
    parts = [stack.split(".") for stack in stacks]
    differing = [len(set(column)) > 1 for column in zip(*parts, strict=False)]
    if len({len(part) for part in parts}) > 1:
        return {stack: f"{stack} " for stack in stacks}
    return {
        stack: "".join(f"{word} " for word, differs in zip(part, differing, strict=True) if differs)
        for stack, part in zip(stacks, parts, strict=True)
    }


def _sum_of(sites: list, kind: str, total: float) -> list[str]:
    score = sum(one.score for one in sites)
    return [kind, str(len(sites)), f"{score:.4g}", f"{score / total:.1%}" if total else ""]
