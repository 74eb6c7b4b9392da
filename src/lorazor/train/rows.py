"""Examples as the rows that a Trainer reads, the order in which it reads them, and their batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from lorazor.adapter.load import Loaded
from lorazor.data.batches import IGNORED, make_batches
from lorazor.data.examples import Example
from lorazor.data.questions import Question, encode_questions
from lorazor.errors import DataError

TARGETS = "targets"
"""The column of what is to be predicted, as `Batch.targets` has it; the others are the model's keyword arguments."""

TrainingRow = dict[str, list[int] | int]


@dataclass(frozen=True)
class TrainingRows:
    """Encoded examples.

    Attributes:
        rows: one dictionary per example, in the order of the examples: the model's keyword arguments, and `TARGETS`. A
            question whose context is too long has one per window; positions stand in it in the place of targets.
        n_truncated: examples that lost tokens to fit the limit.
    """

    rows: list[TrainingRow]
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
    places = {example.index: place for place, example in enumerate(texts)}
    rows: list[TrainingRow] = [{} for _ in texts]
    for batch in encoding.batches:
        columns = {**batch.inputs, TARGETS: batch.targets}
        rows[places[batch.indices[0]]] = {name: values[0].tolist() for name, values in columns.items()}
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


class PadRight:
    """Makes batches of rows, padded on the right whatever the tokenizer's side, so that positions stay what they are.

    Padding is masked and has no target.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Note what to pad with.

        Raises:
            DataError: the tokenizer has no padding token.
        """
        padding = tokenizer.pad_token_id
        if not isinstance(padding, int):
            raise DataError("The tokenizer has no pad token. Set tokenizer.pad_token.")
        self.values = {"input_ids": padding, "decoder_input_ids": padding, "attention_mask": 0, TARGETS: IGNORED}
        self.values["token_type_ids"] = tokenizer.pad_token_type_id

    def __call__(self, rows: Sequence[TrainingRow]) -> dict[str, Tensor]:
        """(rows, tokens of the longest) of what is a list in a row, (rows,) of what is a number; int64."""
        batch = {}
        for name in rows[0]:
            values = [torch.tensor(row[name]) for row in rows]
            is_list = values[0].ndim == 1
            batch[name] = pad_sequence(values, True, self.values[name]) if is_list else torch.stack(values)
        return batch
