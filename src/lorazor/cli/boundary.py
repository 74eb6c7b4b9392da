"""`lorazor boundary`: find the boundary, confirm it, write the smaller adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorazor.cli.options import options
from lorazor.cli.output import JsonFlag, TrackOption, print_json, print_table, quiet_libraries, say
from lorazor.settings import ChoiceSettings, DataSettings, GenerationSettings, ModelSettings, SweepSettings

if TYPE_CHECKING:
    from lorazor.workflow.boundary import BoundaryResult


@options(
    choosing=ChoiceSettings,
    sweeping=SweepSettings,
    generation=GenerationSettings,
    model=ModelSettings,
    reading=DataSettings,
)
def command(
    adapter: Annotated[str, typer.Argument(help="Adapter folder or hub id.")],
    data: Annotated[str, typer.Option(help="Validation examples: a file, a dataset folder or a hub name.")],
    out: Annotated[Path, typer.Option(help="New run folder.")],
    confirm: Annotated[str | None, typer.Option(help="Held-out examples to confirm the choice on.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")] = False,
    track: TrackOption = "none",
    as_json: JsonFlag = False,
    *,
    choosing: ChoiceSettings,
    sweeping: SweepSettings,
    generation: GenerationSettings,
    model: ModelSettings,
    reading: DataSettings,
) -> None:
    """Find the layer above which the adapter is not needed, and prune it there."""
    from lorazor.measure.sharding import is_main_process
    from lorazor.workflow.boundary import BoundarySettings, find_boundary

    quiet_libraries()
    settings = BoundarySettings(model, reading, sweeping, choosing, generation)
    result = find_boundary(adapter, data, out, confirm, settings, resume, say, track)
    if not is_main_process():
        return
    if as_json:
        print_json(result)
    else:
        print_result(result)


def print_result(result: BoundaryResult) -> None:
    """Print the curve, the choice, whether it held, and where the smaller adapter is."""
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
        f"{choice.metric} on {choice.n_examples} examples",
        ["boundary", choice.metric, "to full", "95 % interval"],
        rows,
    )
    typer.echo(choice.reason)
    if result.confirmation is not None:
        typer.echo(result.confirmation.sentence)
    else:
        typer.echo("Not confirmed: pass --confirm with examples that took no part in the choice.")
    pruned = result.pruned
    if pruned is None:
        typer.echo(f"No site is left. {result.remains}")
        return
    share = 1 - pruned.n_parameters_kept / pruned.n_parameters
    typer.echo(
        f"Kept {pruned.n_sites_kept} of {pruned.n_sites} sites ({share:.1%} of the LoRA parameters dropped, "
        f"{pruned.n_bytes_before:,} to {pruned.n_bytes:,} bytes).\nAdapter: {pruned.path}"
    )
