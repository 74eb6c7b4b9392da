"""`lorazor train`: train a LoRA adapter, so that there is something to prune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorazor.cli.options import options
from lorazor.cli.output import JsonFlag, print_json, quiet_libraries, say
from lorazor.settings import DataSettings, LoraSettings, ModelSettings, TrainSettings


@options(lora=LoraSettings, training=TrainSettings, model=ModelSettings, reading=DataSettings)
def command(
    data: Annotated[str, typer.Option(help="Examples to train on: a file, a dataset folder or a hub name.")],
    out: Annotated[Path, typer.Option(help="New folder for the adapter.")],
    as_json: JsonFlag = False,
    *,
    lora: LoraSettings,
    training: TrainSettings,
    model: ModelSettings,
    reading: DataSettings,
) -> None:
    """Train a LoRA adapter with TRL on prompts and answers or on conversations."""
    import dataclasses

    from lorazor.errors import SettingsError
    from lorazor.files import check_is_free, new_folder
    from lorazor.workflow.reading import read

    check_is_free(out)
    if model.model is None:
        raise SettingsError("No base model. Pass --model, a hub id or a folder.")
    examples = read(data, reading)
    from lorazor.adapter.load import load
    from lorazor.train.sft import train_lora

    quiet_libraries()
    loaded = load(None, model)
    say(f"{len(examples)} examples from {data}; {training.steps} steps of {reading.batch_size}.")
    with new_folder(out) as folder:
        trained = train_lora(loaded, examples, folder, lora, training, reading.batch_size, reading.max_length)
    if trained.n_truncated:
        say(f"{trained.n_truncated} of {len(examples)} prompts lost their start to fit into --max-length.")
    if as_json:
        print_json({"adapter": out, **dataclasses.asdict(trained)})
    else:
        typer.echo(
            f"Trained {trained.n_parameters:,} parameters in {trained.seconds:.0f} s; "
            f"last loss {trained.loss:.3f} nats/token.\nAdapter: {out}"
        )
