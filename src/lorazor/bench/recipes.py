"""From a cell to the settings of lorazor's commands, and what of it they cannot take."""

from __future__ import annotations

from typing import Any

from lorazor.bench import methods
from lorazor.bench.suite import Cell
from lorazor.errors import SettingsError
from lorazor.fields import check_options
from lorazor.settings import (
    DataSettings,
    ExampleSettings,
    FitSettings,
    GenerationSettings,
    LoraSettings,
    ModelSettings,
    TrainSettings,
)
from lorazor.train.fit import check_training


def model_settings(cell: Cell, model: str, device: str | None = None) -> ModelSettings:
    """Of the base model, wherever it is."""
    spec, dtype = cell.spec, cell.recipe.dtype
    return ModelSettings(model, spec.gguf_file, dtype, device_map=device, task=spec.task)  # pyright: ignore[reportArgumentType]


def train_settings(
    cell: Cell, model: ModelSettings, rank: int | None = None, steps: int | None = None, **fields: Any
) -> TrainSettings:
    """Of `lorazor train`; alpha / rank is that of the recipe."""
    own = cell.recipe
    rank = own.rank if rank is None else rank
    return TrainSettings(
        lora=LoraSettings(rank, own.alpha * rank / own.rank, own.dropout, own.target_modules),
        fit=FitSettings(
            steps or own.steps,
            own.learning_rate,
            own.rise_steps,
            own.weight_decay,
            own.precision,  # pyright: ignore[reportArgumentType]
            own.gradient_checkpointing,
            own.accumulation,
            own.save_steps,
            cell.seed,
        ),
        model=model,
        reading=ExampleSettings(max_length=cell.spec.max_length),
        batch_size=own.batch_size,
        **fields,
    )


def example_settings(cell: Cell, split: str | None = None, limit: int | None = None) -> ExampleSettings:
    """How a split is read."""
    return ExampleSettings(split=split, limit=limit, labels=cell.spec.labels)  # pyright: ignore[reportArgumentType]


def data_settings(cell: Cell) -> DataSettings:
    """Of `lorazor shrink` and `boundary`."""
    return DataSettings(max_length=cell.spec.max_length, batch_size=cell.recipe.batch_size)


def generation_settings(cell: Cell) -> GenerationSettings:
    """Of answers."""
    spec = cell.spec
    return GenerationSettings(spec.max_new_tokens, bleu_tokenizer=spec.bleu_tokenizer)  # pyright: ignore[reportArgumentType]


def check_cell(cell: Cell) -> None:
    """Refuse what would be refused when the cell runs, as far as it shows without model and data.

    Raises:
        SettingsError: a value is none that the commands take, or the test examples are those to train on.
    """
    settings = train_settings(cell, model_settings(cell, cell.spec.model))
    check_training(settings.lora, settings.fit, settings.batch_size)
    example_settings(cell)
    generation_settings(cell)
    check_options(methods.method(cell.uses).train, cell.options)
    if cell.spec.test == cell.spec.train:
        raise SettingsError(f"test={cell.spec.test!r} are the examples to train on. Name another split.")
