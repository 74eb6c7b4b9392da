"""`lorazor subset`: find the sites that earn their place, confirm the choice, write the smaller adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorazor.cli.chosen import print_confirmation, print_page, print_pruned, print_test
from lorazor.cli.options import options
from lorazor.cli.output import JsonFlag, TrackOption, print_json, print_table, quiet_libraries, say
from lorazor.settings import (
    DataSettings,
    GenerationSettings,
    ModelSettings,
    RefitSettings,
    ScoreSettings,
    SearchSettings,
    SparseSettings,
    SubsetBudgetSettings,
)

if TYPE_CHECKING:
    from lorazor.workflow.subset import SubsetResult


@options(
    budget=SubsetBudgetSettings,
    searching=SearchSettings,
    scoring=ScoreSettings,
    refitting=RefitSettings,
    sparse=SparseSettings,
    generation=GenerationSettings,
    model=ModelSettings,
    reading=DataSettings,
)
def command(
    adapter: Annotated[str, typer.Argument(help="Adapter folder or hub id.")],
    data: Annotated[str, typer.Option(help="Validation examples: a file, a dataset folder or a hub name.")],
    out: Annotated[Path, typer.Option(help="New run folder.")],
    confirm: Annotated[
        str | None, typer.Option(help="Held-out examples to confirm the choice on, of other prompts.")
    ] = None,
    track: TrackOption = "none",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")] = False,
    as_json: JsonFlag = False,
    *,
    budget: SubsetBudgetSettings,
    searching: SearchSettings,
    scoring: ScoreSettings,
    refitting: RefitSettings,
    sparse: SparseSettings,
    generation: GenerationSettings,
    model: ModelSettings,
    reading: DataSettings,
) -> None:
    """Find the sites of a trained adapter that earn their place, for a budget or a tolerance, and prune to them."""
    from lorazor.measure.sharding import is_main_process
    from lorazor.workflow.subset import find_subset
    from lorazor.workflow.variants import SubsetSettings

    quiet_libraries()
    settings = SubsetSettings(budget, scoring, searching, refitting, sparse, model, reading, generation)
    result = find_subset(adapter, data, out, confirm, settings, resume, say, track)
    if not is_main_process():
        return
    if as_json:
        print_json(result)
    else:
        print_result(result)
        if result.confirmation is None and not result.is_full:
            print_test(adapter, result.pruned.path, out, result.metric, model, reading, generation)
        else:
            print_page(out)


def print_result(result: SubsetResult) -> None:
    """Print what was measured, the choice, whether it held, and where the smaller adapter is."""
    total = result.pruned.n_parameters
    rows = [
        [
            # what stands in brackets tells selections of one size apart in the files of the run
            f"{'→ ' if one == result.chosen else '  '}{one.label.partition(' (')[0]}",
            str(one.n_sites),
            f"{one.n_parameters / total:.1%}",
            f"{one.value:.4f}",
            f"{one.difference.estimate:+.4f}",
            f"{one.difference.low:+.3f} to {one.difference.high:+.3f}",
        ]
        for one in [*result.candidates, *result.baselines]
    ]
    columns = ["selection", "sites", "parameters", result.metric, "to full", "95 % interval"]
    print_table("on validation examples", columns, rows)
    typer.echo(result.reason)
    print_confirmation(result.confirmation, result.is_full)
    print_pruned(result.pruned)
