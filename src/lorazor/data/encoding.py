"""Encoding: an example as tokens, and what is to be predicted at each.

Prompts and answers become tokens exactly as in TRL's SFTTrainer, so that a model is measured on what it was
trained on. Two deviations, both where TRL would lose part of an answer:

* An example that is too long loses prompt tokens, never answer tokens, and is counted; TRL cuts off the end.
* The beginning-of-sequence token survives that cut: models behave oddly without it.

Texts to classify and pairs of them become tokens as in `run_glue.py` of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

from lorazor.data.examples import Example
from lorazor.errors import DataError, SettingsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The target of a position that is not judged, as in `torch.nn.functional.cross_entropy`."""

Side = Literal["left", "right"]


@dataclass(frozen=True)
class EncodedRow:
    """One encoded example: what the model reads first, and the targets, or the class or number, or neither."""

    index: int
    ids: list[int]
    targets: list[int]
    is_truncated: bool
    label: int | float | None = None
    types: list[int] | None = None


def encode_causal(example: Example, tokenizer: PreTrainedTokenizerBase, limit: int) -> EncodedRow:
    """A prompt with its answer, which loses the start of the prompt if it is too long."""
    ids, answer_start = _prompt_and_answer(example, tokenizer)
    answer = ids[answer_start:]
    _check_room(example, answer, limit, n_reserved=min(answer_start, 1))  # a token to predict the first one from
    prompt = _cut_prompt(ids[:answer_start], limit - len(answer), tokenizer)
    targets = ([IGNORED] * len(prompt) + answer)[1:] + [IGNORED]
    if set(targets) == {IGNORED}:
        raise _no_answer(example)
    return EncodedRow(example.index, prompt + answer, targets, len(prompt) < answer_start)


def encode_causal_prompt(example: Example, tokenizer: PreTrainedTokenizerBase, limit: int) -> EncodedRow:
    """A prompt alone."""
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


def encode_seq2seq(example: Example, tokenizer: PreTrainedTokenizerBase, limit: int) -> EncodedRow:
    """A prompt for the encoder, and its answer."""
    answer = list(tokenizer(text_target=example.completion, verbose=False)["input_ids"])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in answer[-2:]:  # mBART's language comes last
        answer.append(tokenizer.eos_token_id)
    _check_room(example, answer, limit, n_reserved=0)
    return replace(encode_text(example, tokenizer, limit, "left"), targets=answer)


def encode_text(example: Example, tokenizer: PreTrainedTokenizerBase, limit: int, side: Side) -> EncodedRow:
    """The text of an example, less the ordinary tokens on one side that are over the limit.

    Tokens that the tokenizer adds itself, such as [CLS] and </s>, stay.
    """
    encoded: Any = tokenizer(str(example.prompt), return_special_tokens_mask=True, verbose=False)
    ids, types = list(encoded["input_ids"]), encoded.get("token_type_ids")
    if not ids:
        raise DataError(f"Example {example.index} has a text without tokens. Give the model something to read.")
    ordinary = [position for position, special in enumerate(encoded["special_tokens_mask"]) if not special]
    n_over = max(len(ids) - limit, 0)
    if n_over and n_over >= len(ordinary):
        raise SettingsError(f"max_length={limit} leaves no room for text. Pass {len(ids) - len(ordinary) + 1} or more.")
    dropped = set(ordinary[:n_over] if side == "left" else ordinary[len(ordinary) - n_over :])
    kept = [position for position in range(len(ids)) if position not in dropped]
    own = None if types is None else [types[position] for position in kept]
    return EncodedRow(example.index, [ids[position] for position in kept], [], n_over > 0, example.label, own)


def encode_classified(example: Example, tokenizer: PreTrainedTokenizerBase, limit: int, has_types: bool) -> EncodedRow:
    """A text or a pair of texts, as `run_glue.py` of transformers encodes them."""
    if example.pair is None:
        row = encode_text(example, tokenizer, limit, "right")
    else:
        n_least = tokenizer.num_special_tokens_to_add(pair=True) + 2
        if limit < n_least:
            raise SettingsError(f"max_length={limit} leaves no room for two texts. Pass {n_least} or more.")
        texts: Any = (str(example.prompt), example.pair)
        encoded: Any = tokenizer(*texts, verbose=False)
        if is_over := len(encoded["input_ids"]) > limit:
            encoded = tokenizer(*texts, truncation="longest_first", max_length=limit, verbose=False)
        ids = list(encoded["input_ids"])
        row = EncodedRow(example.index, ids, [], is_over, example.label, encoded.get("token_type_ids"))
    return row if has_types else replace(row, types=None)


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
