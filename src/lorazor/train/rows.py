"""Examples as the rows that a Trainer reads, and the order in which it reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorazor.adapter.load import Loaded
from lorazor.data.batches import IGNORED, make_batches
from lorazor.data.examples import Example
from lorazor.data.questions import Question, encode_questions

Row = dict[str, list[int] | int]


@dataclass(frozen=True)
class TrainingRows:
    """Encoded examples.

    Attributes:
        rows: one dictionary per example, in the order of the examples: token ids and what is to be predicted. A
            question whose context is too long has one per window.
        n_truncated: examples that lost tokens to fit the limit.
    """

    rows: list[Row]
    n_truncated: int


def make_rows(
    loaded: Loaded, examples: Sequence[Example] | Sequence[Question], max_length: int | None = None
) -> TrainingRows:
    """Encode examples exactly as they are measured later.

    Args:
        loaded: model and tokenizer.
        examples: of the model's task.
        max_length: tokens, see `make_batches`.
    Raises:
        DataError: an example that cannot be encoded, such as an answer that does not fit.
    """
    if loaded.task == "question-answering":
        questions = [one for one in examples if isinstance(one, Question)]
        windows = encode_questions(questions, loaded.tokenizer, max_length)
        return TrainingRows([window.features for window in windows], 0)
    texts = [one for one in examples if isinstance(one, Example)]
    encoding = make_batches(texts, loaded.tokenizer, loaded.task, 1, max_length, loaded.decoder_inputs)
    as_row = {"causal": _causal_row, "seq2seq": _seq2seq_row, "classification": _labelled_row}[loaded.task]
    places = {example.index: place for place, example in enumerate(texts)}
    rows: list[Row] = [{} for _ in texts]
    for batch in encoding.batches:
        rows[places[batch.indices[0]]] = as_row(batch.inputs["input_ids"][0], batch.targets[0])
    return TrainingRows(rows, encoding.n_truncated)


def training_order(n_rows: int, n_needed: int, seed: int) -> list[int]:
    """Which row comes when: every epoch is a permutation of its own.

    Args:
        n_rows: rows there are.
        n_needed: rows that the training reads.
        seed: of the permutations.
    Returns:
        `n_needed` places in the rows. A longer training begins like a shorter one, so that runs of one seed see the
        same batches, in one run or in two.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < n_needed:
        order += torch.randperm(n_rows, generator=generator).tolist()
    return order[:n_needed]


def _causal_row(input_ids: torch.Tensor, targets: torch.Tensor) -> Row:
    """A pre-tokenised row of TRL; the target at position t is token t + 1."""
    return {"input_ids": input_ids.tolist(), "completion_mask": [0, *(targets[:-1] != IGNORED).int().tolist()]}


def _seq2seq_row(input_ids: torch.Tensor, targets: torch.Tensor) -> Row:
    return {"input_ids": input_ids.tolist(), "labels": targets.tolist()}


def _labelled_row(input_ids: torch.Tensor, targets: torch.Tensor) -> Row:
    return {"input_ids": input_ids.tolist(), "labels": int(targets)}


def columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Rows as columns, which is what `datasets` takes."""
    return {name: [row[name] for row in rows] for name in rows[0]}
