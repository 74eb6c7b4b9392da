"""Losses of an adapter on examples, kept in a run folder and scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lorazor.adapter.load import Loaded
from lorazor.data.batches import Batch, make_batches
from lorazor.data.examples import Example
from lorazor.data.questions import Question
from lorazor.errors import MeasureError
from lorazor.measure.engines import on_model
from lorazor.measure.losses import row_losses
from lorazor.measure.metrics import teacher_forced_scores
from lorazor.measure.sharding import from_main_process, measure_sharded
from lorazor.measure.stats import Scores
from lorazor.runs import RunFolder
from lorazor.settings import DataSettings


def encode(
    loaded: Loaded, examples: Sequence[Example], reading: DataSettings, say: Callable[[str], None]
) -> list[Batch]:
    """Examples as batches for the model; says how many prompts had to be cut."""
    assert loaded.task != "question-answering"  # by `check_fits`
    encoding = make_batches(
        examples, loaded.tokenizer, loaded.task, reading.batch_size, reading.max_length, loaded.decoder_inputs
    )
    if encoding.n_truncated:
        say(f"{encoding.n_truncated} of {len(examples)} prompts lost their start to fit into the context.")
    return encoding.batches


def measure_losses(
    run: RunFolder,
    file: str,
    loaded: Loaded,
    examples: Sequence[Example],
    name: str,
    reading: DataSettings,
    say: Callable[[str], None],
    gates: str | None = None,
) -> None:
    """Measure the loss of every example, and append it to a file of the run.

    Args:
        run: where the losses go; what is there already is not measured again.
        file: name of the JSONL file.
        loaded: the model as it is to be measured.
        examples: prompts with answers, or labelled texts.
        name: what the file calls this adapter.
        reading: batch size and length limits.
        say: receives messages.
        gates: digest of the gates that are on the adapter, which then says what is measured, whatever its name.
    Raises:
        MeasureError: a loss is not a number.
    """
    measured = what_was_measured({"adapter": name, "gates": gates})
    known = {row["example"] for row in from_main_process(lambda: run.rows(file)) if what_was_measured(row) == measured}
    missing = [example for example in examples if example.index not in known]
    if not missing:
        return

    def measure_batch(batch: Batch) -> list[dict[str, Any]]:
        losses = row_losses(loaded.model, on_model(loaded.model, batch))
        columns = (losses.nll_nats.tolist(), losses.n_tokens.int().tolist(), losses.n_correct.int().tolist())
        rows = []
        for example, nll, n_tokens, n_correct in zip(batch.indices, *columns, strict=True):
            if not np.isfinite(nll):
                raise MeasureError(f"The loss of example {example} with {name} is {nll}. Check it for NaN weights.")
            row = {"example": example, "adapter": name} | ({} if gates is None else {"gates": gates})
            rows.append(row | {"nll_nats": nll, "n_tokens": n_tokens, "n_correct": n_correct})
        return rows

    measure_sharded(encode(loaded, missing, reading, say), measure_batch, lambda rows: run.append(file, rows), name)


def what_was_measured(row: Mapping[str, Any]) -> str:
    """The key of a row of losses or answers: the gates that were on the adapter, or else the adapter's name."""
    return row.get("gates") or row["adapter"]


def loss_scores(
    run: RunFolder, file: str, metric: str, measured: Sequence[str], examples: Sequence[Example | Question]
) -> Scores:
    """One teacher-forced metric of several adapters, from what `measure_losses` wrote.

    Args:
        run: where the losses are.
        file: name of the JSONL file.
        metric: `loss`, `token-accuracy` or `accuracy`.
        measured: `what_was_measured`: digests of gates, or names of adapters.
        examples: which examples, in this order.
    """
    rows = from_main_process(lambda: run.rows(file))
    table = {(what_was_measured(row), row["example"]): row for row in rows}

    def arrange(field: str) -> list[list[float]]:
        return [[table[one, example.index][field] for example in examples] for one in measured]

    return teacher_forced_scores(metric, arrange("nll_nats"), arrange("n_tokens")[0], arrange("n_correct"))
