"""`lorazor train`: train a LoRA adapter, on every site or on those that matter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorazor.cli.chosen import of_other_data
from lorazor.cli.options import as_options, options
from lorazor.cli.output import JsonFlag, free_place, print_json, print_next, quiet_libraries, say
from lorazor.settings import (
    BudgetSettings,
    DataSettings,
    LoraSettings,
    MethodSettings,
    ModelSettings,
    TrackingSettings,
    TrainSettings,
    WarmupSettings,
)


@options(
    method=MethodSettings,
    budget=BudgetSettings,
    warmup=WarmupSettings,
    lora=LoraSettings,
    training=TrainSettings,
    model=ModelSettings,
    reading=DataSettings,
    tracking=TrackingSettings,
)
def command(
    data: Annotated[str, typer.Option(help="Examples to train on: a file, a dataset folder or a hub name.")],
    out: Annotated[Path, typer.Option(help="New folder for the run and the adapter.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")] = False,
    as_json: JsonFlag = False,
    *,
    method: MethodSettings,
    budget: BudgetSettings,
    warmup: WarmupSettings,
    lora: LoraSettings,
    training: TrainSettings,
    model: ModelSettings,
    reading: DataSettings,
    tracking: TrackingSettings,
) -> None:
    """Train a LoRA adapter on all sites, or choose the sites that matter and train these."""
    from lorazor.measure.sharding import is_main_process
    from lorazor.workflow.train import TrainingSettings, train_adapter

    quiet_libraries()
    settings = TrainingSettings(model, reading, lora, training, method, budget, warmup, tracking)
    result = train_adapter(data, out, settings, resume, say)
    if not is_main_process():
        return
    if as_json:
        print_json(result)
        return
    typer.echo(
        f"Trained {result.n_sites} sites, {result.n_parameters:,} parameters in {result.seconds:.0f} s; "
        f"last loss {result.loss:.3f} nats.\nAdapter: {result.out}"
    )
    _print_step_after(result.out, model, reading)


def _print_step_after(adapter: Path, model: ModelSettings, reading: DataSettings) -> None:
    from lorazor.adapter.folder import read_adapter
    from lorazor.adapter.tasks import TASK_TYPES

    given = as_options(model, of_other_data(reading))
    if (
        read_adapter(adapter).config.get("task_type") == TASK_TYPES["question-answering"]
    ):  # there, no boundary is measured
        place = ["--out", free_place(adapter, "eval")]
        what = "What it is worth beside the base model, on examples of yours in place of TEST.jsonl"
        print_next(what, "eval", adapter, "--base", "--data", "TEST.jsonl", *given, *place)
        return
    examples, place = (
        ["--data", "VALIDATION.jsonl", "--confirm", "TEST.jsonl"],
        ["--out", free_place(adapter, "boundary")],
    )
    what = "The layers that need it, on examples of yours in place of VALIDATION.jsonl and TEST.jsonl"
    print_next(what, "boundary", adapter, *examples, *given, *place)
