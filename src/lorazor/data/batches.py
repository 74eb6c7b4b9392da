"""Batches: examples as padded tensors, with a target at every position whose logits are to be judged.

Prompts and answers become tokens exactly as in TRL's SFTTrainer, so that a model is measured on what it was
trained on. Two deviations, both where TRL would lose part of an answer:

* An example that is too long loses prompt tokens, never answer tokens, and is counted; TRL cuts off the end.
* The beginning-of-sequence token survives that cut: models behave oddly without it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lorazor.data.examples import Example
from lorazor.errors import DataError, SettingsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The target of a position that is not judged, as in `torch.nn.functional.cross_entropy`."""

Task = Literal["causal", "seq2seq", "classification"]
Side = Literal["left", "right"]
DecoderInputs = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples for one teacher-forced forward pass, padded on the right, or prompts to generate from.

    Attributes:
        indices: `Example.index` of each row.
        inputs: the model's keyword arguments, int64, each (rows, tokens): `input_ids`, `attention_mask`, and for
            answers of seq2seq `decoder_input_ids` (rows, answer tokens). Prompts of causal models are padded on the
            left.
        targets: causal and seq2seq: (rows, tokens), the token that the logits at this position must predict (so
            for causal models already shifted by one), IGNORED elsewhere. Classification: (rows,), the class. Prompts
            have none, (rows, 0).
    """

    indices: tuple[int, ...]
    inputs: dict[str, Tensor]
    targets: Tensor


@dataclass(frozen=True)
class EncodedRow:
    """One encoded example: what the model reads first, and the targets or the class."""

    index: int
    ids: list[int]
    targets: list[int]
    is_truncated: bool
    label: int | None = None


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
            tokenizer's `model_max_length`. Prompts lose tokens on the left, texts to classify on the right.
        decoder_inputs: from targets to what the decoder reads, both (rows, tokens), as in `Loaded`; seq2seq only.
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
    shift = decoder_inputs if task == "seq2seq" else None
    collate = partial(_collate, padding=padding, side="right", decoder_inputs=shift)
    return Encoding([_ENCODERS[task](example, tokenizer, limit) for example in examples], collate, batch_size)


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
        rows = [_encode_causal_prompt(example, tokenizer, limit - max_new_tokens) for example in examples]
    else:
        rows = [_encode_text(example, tokenizer, limit, "left") for example in examples]
    return Encoding(rows, collate, batch_size)


# From an example to tokens


def _encode_causal(example: Example, tokenizer: PreTrainedTokenizerBase, limit: int) -> EncodedRow:
    ids, answer_start = _prompt_and_answer(example, tokenizer)
    answer = ids[answer_start:]
    _check_room(example, answer, limit, n_reserved=min(answer_start, 1))  # a token to predict the first one from
    prompt = _cut_prompt(ids[:answer_start], limit - len(answer), tokenizer)
    targets = ([IGNORED] * len(prompt) + answer)[1:] + [IGNORED]
    if set(targets) == {IGNORED}:
        raise _no_answer(example)
    return EncodedRow(example.index, prompt + answer, targets, len(prompt) < answer_start)


def _encode_causal_prompt(example: Example, tokenizer: PreTrainedTokenizerBase, limit: int) -> EncodedRow:
    ids, answer_start = _prompt_and_answer(example, tokenizer)
    prompt = _cut_prompt(ids[:answer_start], limit, tokenizer)
    if not prompt:
        raise DataError(f"Example {example.index} has a prompt without tokens. Give the model something to start from.")
    return EncodedRow(example.index, prompt, [], len(prompt) < answer_start)


def _prompt_and_answer(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Token ids of prompt and answer, and the position where the answer starts.

    That is where they leave the ids of the prompt alone, which is before the prompt's end if tokens merge across
    it, or if the chat template writes an open turn differently.
    """
    if isinstance(example.prompt, str):
        eos = tokenizer.eos_token
        if not isinstance(eos, str):
            raise DataError("The tokenizer has no eos token to end answers with. Set tokenizer.eos_token.")
        ending = "" if example.completion.endswith(eos) else eos
        prompt_ids = list(tokenizer(example.prompt, verbose=False)["input_ids"])
        ids = list(tokenizer(example.prompt + example.completion + ending, verbose=False)["input_ids"])
    else:
        messages = [dict(message) for message in example.prompt]
        prompt_ids = _tokenize_chat(tokenizer, messages, example.index, is_open=True)
        messages.append({"role": "assistant", "content": example.completion})
        ids = _tokenize_chat(tokenizer, messages, example.index, is_open=False)
    is_shared = [alone == joined for alone, joined in zip(prompt_ids, ids, strict=False)]
    return ids, (is_shared + [False]).index(False)


def _cut_prompt(prompt: list[int], limit: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The last `limit` tokens of a prompt; a leading beginning-of-sequence token takes the first of the places."""
    if len(prompt) <= limit:
        return prompt
    start = prompt[:1] if prompt[0] == tokenizer.bos_token_id else []
    return start + prompt[len(prompt) - limit + len(start) :]


def _encode_seq2seq(example: Example, tokenizer: PreTrainedTokenizerBase, limit: int) -> EncodedRow:
    answer = list(tokenizer(text_target=example.completion, verbose=False)["input_ids"])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in answer[-2:]:  # mBART's language comes last
        answer.append(tokenizer.eos_token_id)
    _check_room(example, answer, limit, n_reserved=0)
    return replace(_encode_text(example, tokenizer, limit, "left"), targets=answer)


def _encode_text(example: Example, tokenizer: PreTrainedTokenizerBase, limit: int, side: Side) -> EncodedRow:
    """The text of an example, less the ordinary tokens on one side that are over the limit.

    Tokens that the tokenizer adds itself, such as [CLS] and </s>, stay.
    """
    encoded: Any = tokenizer(str(example.prompt), return_special_tokens_mask=True, verbose=False)
    ids = list(encoded["input_ids"])
    if not ids:
        raise DataError(f"Example {example.index} has a text without tokens. Give the model something to read.")
    ordinary = [position for position, special in enumerate(encoded["special_tokens_mask"]) if not special]
    n_over = max(len(ids) - limit, 0)
    if n_over and n_over >= len(ordinary):
        raise SettingsError(f"max_length={limit} leaves no room for text. Pass {len(ids) - len(ordinary) + 1} or more.")
    dropped = set(ordinary[:n_over] if side == "left" else ordinary[len(ordinary) - n_over :])
    kept = [token for position, token in enumerate(ids) if position not in dropped]
    return EncodedRow(example.index, kept, [], n_over > 0, example.label)


def _tokenize_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], index: int, is_open: bool
) -> list[int]:
    """Ids of a chat; an open one ends with the beginning of the assistant's turn."""
    options: dict[str, Any] = {"add_generation_prompt": is_open, "tokenizer_kwargs": {"verbose": False}}
    try:
        encoded: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    except TemplateError as error:
        raise DataError(f"Example {index}: the tokenizer's chat template refuses its messages ({error}).") from error
    return list(encoded["input_ids"])


_ENCODERS: dict[str, Callable[[Example, PreTrainedTokenizerBase, int], EncodedRow]] = {
    "causal": _encode_causal,
    "seq2seq": _encode_seq2seq,
    "classification": partial(_encode_text, side="right"),
}


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
            raise DataError(f"{where} is a prompt with an answer, but classification needs texts with integer labels.")
        if example.is_conversational and task != "causal":
            raise DataError(f"{where} is a chat, but {task} models read text. Pass prompts of text.")
        if example.is_conversational and not tokenizer.chat_template:
            raise DataError(f"{where} is a chat, but the tokenizer has no chat template. Set one, or pass text.")
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if not isinstance(padding, int):
        raise DataError("The tokenizer has neither a pad nor an eos token. Set tokenizer.pad_token.")
    return tokenizer.model_max_length if max_length is None else max_length, padding


def _check_room(example: Example, answer: list[int], limit: int, n_reserved: int) -> None:
    if not answer or not example.completion:  # the end of the sequence alone is no answer
        raise _no_answer(example)
    if len(answer) > limit - n_reserved:
        raise DataError(
            f"Example {example.index}: its answer has {len(answer)} tokens, but max_length={limit} has room for "
            f"{limit - n_reserved}. Raise the limit if the model allows it, or remove the example."
        )


def _no_answer(example: Example) -> DataError:
    return DataError(
        f"Example {example.index} has no answer tokens to predict. Check its completion and chat template."
    )


def _collate(rows: list[EncodedRow], padding: int, side: Side, decoder_inputs: DecoderInputs | None = None) -> Batch:
    def padded(numbers: list[list[int]], value: int) -> Tensor:  # (rows, tokens of the longest)
        return pad_sequence([torch.tensor(own, dtype=torch.int64) for own in numbers], True, value, side)

    ids = [row.ids for row in rows]
    inputs = {"input_ids": padded(ids, padding), "attention_mask": padded([[1] * len(own) for own in ids], 0)}
    if rows[0].label is not None:
        targets = torch.tensor([row.label for row in rows])  # (rows,)
    else:
        targets = padded([row.targets for row in rows], IGNORED)  # (rows, tokens)
    if decoder_inputs is not None:
        inputs["decoder_input_ids"] = decoder_inputs(targets)
    return Batch(tuple(row.index for row in rows), inputs, targets)
