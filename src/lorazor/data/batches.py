"""Batches: examples as padded tensors, with a target at every position whose logits are to be judged.

Examples become tokens in `lorazor.data.encoding`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lorazor.data.encoding import (
    IGNORED,
    EncodedRow,
    Side,
    encode_causal,
    encode_causal_prompt,
    encode_classified,
    encode_seq2seq,
    encode_text,
)
from lorazor.data.examples import Example
from lorazor.data.truncation import untouched
from lorazor.errors import DataError, SettingsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Task = Literal["causal", "seq2seq", "classification"]
DecoderInputs = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples for one teacher-forced forward pass, padded on the right, or prompts to generate from.

    Attributes:
        indices: `Example.index` of each row.
        inputs: the model's keyword arguments, int64, each (rows, tokens): `input_ids`, `attention_mask`, for classes
            `token_type_ids` where tokenizer and model have them, for answers of seq2seq `decoder_input_ids` (rows,
            answer tokens). Prompts of causal models are padded on the left.
        targets: causal and seq2seq: (rows, tokens), the token that the logits at this position must predict (so
            for causal models already shifted by one), IGNORED elsewhere. Classification: (rows,), the class. Prompts
            have none, (rows, 0). Numbers to predict: (rows,), float32.
    """

    indices: tuple[int, ...]
    inputs: dict[str, Tensor]
    targets: Tensor


def what_was_cut(n_truncated: int, n_examples: int, task: str) -> str:
    """That examples do not fit, in words: texts lose their end, prompts their start."""
    what, end = ("texts", "end") if task == "classification" else ("prompts", "start")
    return f"{n_truncated} of {n_examples} {what} lost their {end}"


@dataclass(frozen=True, eq=False)
class Encoding:
    """Examples as tokens: made once, for batches of any size.

    Attributes:
        rows: the examples.
        collate: makes a batch of some of them.
        batch_size: rows of a batch.
    """

    rows: list[EncodedRow]
    collate: Callable[[list[EncodedRow]], Batch]
    batch_size: int

    @cached_property
    def batches(self) -> list[Batch]:
        """All batches, the longest examples first, so that memory runs out early or not at all."""
        return self.of_size(self.batch_size)

    @property
    def n_truncated(self) -> int:
        """Examples that lost tokens to fit the limit."""
        return sum(row.is_truncated for row in self.rows)

    def of_size(self, batch_size: int, examples: Collection[int] | None = None) -> list[Batch]:
        """The same tokens in batches of another size: rows of similar length together, equal ones in their order.

        Args:
            batch_size: rows of a batch; the last batch may have fewer.
            examples: indices of those that are wanted; all if left out.
        """
        wanted = [row for row in self.rows if examples is None or row.index in examples]
        ordered = sorted(wanted, key=lambda row: -(len(row.ids) + len(row.targets)))
        starts = range(0, len(ordered), batch_size)
        return [self.collate(ordered[start : start + batch_size]) for start in starts]


def make_batches(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    batch_size: int = 8,
    max_length: int | None = None,
    decoder_inputs: DecoderInputs | None = None,
    has_types: bool = False,
) -> Encoding:
    """Batches for teacher forcing: the answers are given, and each of their tokens is to be predicted.

    An answer token without any token before it (empty prompt, no beginning-of-sequence token) has no logits
    that predict it and is not a target. Examples of similar length share a batch; the order is deterministic.

    Args:
        examples: what to encode; labelled ones for classification, prompts with answers otherwise.
        tokenizer: the tokenizer of the model. It is not changed.
        task: what the model does.
        batch_size: rows of a batch; the last batch may have fewer.
        max_length: most tokens of prompt and answer together; for seq2seq of each of them; None takes the
            tokenizer's `model_max_length`. Prompts lose tokens on the left, texts to classify on the right, of a pair
            the longer one first.
        decoder_inputs: from targets to what the decoder reads, both (rows, tokens), as in `Loaded`; seq2seq only.
        has_types: whether the model reads `token_type_ids`, which tell the texts of a pair apart, as in `Loaded`.
    Returns:
        The batches, and how many examples were truncated.
    Raises:
        DataError: no examples, examples for another task, no answer tokens, an answer that does not fit, or a
            tokenizer that lacks the tokens or the chat template the examples need.
        SettingsError: a setting is out of range or missing.
    """
    limit, padding = _check_settings(examples, tokenizer, task, batch_size, max_length)
    if task == "seq2seq" and decoder_inputs is None:
        raise SettingsError("seq2seq needs decoder_inputs, which are the model's. Pass Loaded.decoder_inputs.")
    if task == "classification":
        collate = partial(_collate, padding=padding, side="right", type_padding=tokenizer.pad_token_type_id)
        with untouched(tokenizer):
            rows = [encode_classified(example, tokenizer, limit, has_types) for example in examples]
        return Encoding(rows, collate, batch_size)
    shift = decoder_inputs if task == "seq2seq" else None
    collate = partial(_collate, padding=padding, side="right", decoder_inputs=shift)
    encode = encode_seq2seq if task == "seq2seq" else encode_causal
    return Encoding([encode(example, tokenizer, limit) for example in examples], collate, batch_size)


def make_prompt_batches(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    batch_size: int = 8,
    max_length: int | None = None,
    max_new_tokens: int = 0,
) -> Encoding:
    """Batches of prompts to generate answers from: the tokens that precede the answer in `make_batches`.

    Truncation alone differs. There the prompt makes room for the answer, here for the tokens to be generated.

    Args:
        examples: what to encode, prompts with answers.
        tokenizer: the tokenizer of the model. It is not changed.
        task: "causal" or "seq2seq".
        batch_size: rows of a batch; the last batch may have fewer.
        max_length: most tokens of prompt and generated answer together, for seq2seq of the prompt; None takes the
            tokenizer's `model_max_length`. Prompts lose tokens on the left.
        max_new_tokens: how many tokens will be generated at most, in tokens; causal models need room for them.
    Returns:
        The batches, and how many prompts were truncated.
    Raises:
        DataError: no examples, examples for another task, a prompt without tokens, or a tokenizer that lacks the
            tokens or the chat template the examples need.
        SettingsError: a setting is out of range, or no room is left for the prompt.
    """
    limit, padding = _check_settings(examples, tokenizer, task, batch_size, max_length)
    if task == "classification":
        raise SettingsError("task='classification' generates no text. Pass 'causal' or 'seq2seq'.")
    if task == "causal" and not 0 <= max_new_tokens < limit:
        raise SettingsError(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt in max_length={limit}. Pass 0..{limit - 1}."
        )
    collate = partial(_collate, padding=padding, side="left" if task == "causal" else "right")
    if task == "causal":
        rows = [encode_causal_prompt(example, tokenizer, limit - max_new_tokens) for example in examples]
    else:
        rows = [encode_text(example, tokenizer, limit, "left") for example in examples]
    return Encoding(rows, collate, batch_size)


# Checks, order and padding


def _check_settings(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, task: Task, batch_size: int, max_length: int | None
) -> tuple[int, int]:
    """Refuse what cannot work before anything is tokenized; returns the most tokens of a row and the padding token."""
    if task not in get_args(Task):
        raise SettingsError(f"task={task!r}. Pass one of {', '.join(get_args(Task))}.")
    if batch_size < 1 or (max_length is not None and max_length < 1):
        raise SettingsError(f"batch_size={batch_size} rows, max_length={max_length} tokens. Pass 1 or more for each.")
    if not examples:
        raise DataError("There are no examples. Pass at least one.")
    for example in examples:
        where = f"Example {example.index}"
        if example.is_labelled and task != "classification":
            raise DataError(f"{where} is a text with a label, but {task} models need prompts with answers.")
        if not example.is_labelled and task == "classification":
            raise DataError(f"{where} is a prompt with an answer, but classification needs texts with labels.")
        if example.is_labelled and example.label is None:
            raise DataError(f"{where} has a label by name alone, {example.label_name!r}. Number it with `numbered`.")
        if example.is_conversational and task != "causal":
            raise DataError(f"{where} is a chat, but {task} models read text. Pass prompts of text.")
        if example.is_conversational and not tokenizer.chat_template:
            raise DataError(f"{where} is a chat, but the tokenizer has no chat template. Set one, or pass text.")
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if not isinstance(padding, int):
        raise DataError("The tokenizer has neither a pad nor an eos token. Set tokenizer.pad_token.")
    return tokenizer.model_max_length if max_length is None else max_length, padding


def _collate(
    rows: list[EncodedRow],
    padding: int,
    side: Side,
    decoder_inputs: DecoderInputs | None = None,
    type_padding: int = 0,
) -> Batch:
    def padded(numbers: list[list[int]], value: int) -> Tensor:  # (rows, tokens of the longest)
        return pad_sequence([torch.tensor(own, dtype=torch.int64) for own in numbers], True, value, side)

    ids = [row.ids for row in rows]
    inputs = {"input_ids": padded(ids, padding), "attention_mask": padded([[1] * len(own) for own in ids], 0)}
    types = [row.types for row in rows if row.types is not None]
    if len(types) == len(rows) and rows[0].label is not None:
        inputs["token_type_ids"] = padded(types, type_padding)
    if rows[0].label is not None:
        targets = torch.tensor([row.label for row in rows])  # (rows,), int64 or float32
    else:
        targets = padded([row.targets for row in rows], IGNORED)  # (rows, tokens)
    if decoder_inputs is not None:
        inputs["decoder_input_ids"] = decoder_inputs(targets)
    return Batch(tuple(row.index for row in rows), inputs, targets)
