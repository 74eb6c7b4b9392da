"""`lorazor train`: train a LoRA adapter, on every site or on those that matter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorazor.cli.options import as_options, options
from lorazor.cli.output import JsonFlag, free_place, is_printed_as_json, of_other_data, print_next, quiet_libraries, say
from lorazor.settings import TrainSettings


@options(settings=TrainSettings)
def command(
    data: Annotated[str, typer.Option(help="Examples to train on: a file, a dataset folder or a hub name.")],
    out: Annotated[Path, typer.Option(help="New folder for the run and the adapter.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")] = False,
    as_json: JsonFlag = False,
    *,
    settings: TrainSettings,
) -> None:
    """Train a LoRA adapter on all sites, or choose the sites that matter and train these."""
    from lorazor.adapter.folder import read_adapter
    from lorazor.adapter.tasks import TASK_TYPES
    from lorazor.workflow.train import train_adapter

    quiet_libraries()
    result = train_adapter(data, out=out, settings=settings, resume=resume, say=say)
    if is_printed_as_json(result, as_json):
        return
    typer.echo(
        f"Trained {result.n_sites} sites, {result.n_parameters:,} parameters in {result.seconds:.0f} s; "
        f"last loss {result.loss:.3f} nats.\nAdapter: {result.out}"
    )
    given = as_options(settings.model, of_other_data(settings.reading))
    if read_adapter(result.out).config.get("task_type") == TASK_TYPES["question-answering"]:  # has no boundary
        what = "What it is worth beside the base model, on examples of yours in place of TEST.jsonl"
        words = ["eval", result.out, "--base", "--data", "TEST.jsonl", *given, "--out", free_place(result.out, "eval")]
    else:
        what = "The layers that need it, on examples of yours in place of VALIDATION.jsonl and TEST.jsonl"
        words = ["boundary", result.out, "--data", "VALIDATION.jsonl", "--confirm", "TEST.jsonl", *given]
        words += ["--out", free_place(result.out, "boundary")]
    print_next(what, *words)
