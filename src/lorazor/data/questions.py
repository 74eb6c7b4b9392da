"""Questions: extractive question answering, where the answer is a piece of a given context (SQuAD 1.1 and 2.0).

Neither torch nor transformers is imported: tokenizers come in from outside, and arrays are numpy's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lorazor.data.examples import text_of
from lorazor.data.sources import read_rows
from lorazor.data.truncation import untouched
from lorazor.errors import DataError, SettingsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("question", "context", "answers")

_NO_LIMIT = 2**31 - 1  # tokenizers without a limit give 1e30, which is more than their truncation can count


@dataclass(frozen=True)
class Question:
    """A question about a context.

    Attributes:
        index: zero-based row in the source.
        text: the question, without white space around it.
        context: the text that the answer is a piece of.
        answers: accepted answers, none where the context holds no answer.
        answer_starts: where each of them starts in the context, in characters.
    """

    index: int
    text: str
    context: str
    answers: tuple[str, ...] = ()
    answer_starts: tuple[int, ...] = ()

    @property
    def references(self) -> tuple[str, ...]:
        """What a prediction is compared with: the answers, or the empty text where there are none."""
        return self.answers or ("",)


@dataclass(frozen=True, eq=False)
class Window:
    """A question and a piece of its context as tokens.

    Attributes:
        index: `Question.index`.
        inputs: what the model reads, int32 arrays of shape (tokens,): `input_ids`, `attention_mask`, and
            `token_type_ids` where the tokenizer gives them.
        start_position: first token of the answer; `no_answer_position` where this window does not hold all of it.
        end_position: last token of the answer; likewise.
        no_answer_position: the token that stands for "no answer here": [CLS], or else the first.
        context_start: position of the first token of the context.
        offsets: int32, (tokens of the context, 2): the characters of the context that each token covers, end excluded.
    """

    index: int
    inputs: dict[str, NDArray[np.int32]]
    start_position: int
    end_position: int
    no_answer_position: int
    context_start: int
    offsets: NDArray[np.int32]

    @property
    def features(self) -> dict[str, list[int] | int]:
        """A row for a Trainer: lists of numbers, under the names that models give them."""
        positions = {"start_positions": self.start_position, "end_positions": self.end_position}
        return {name: numbers.tolist() for name, numbers in self.inputs.items()} | positions


# From a source to questions


def read_questions(source: str | Path, split: str | None = None, limit: int | None = None) -> list[Question]:
    """Read a data set in the form of SQuAD.

    Args:
        source: a .jsonl, .jsonl.xz, .jsonl.gz or .parquet file, a `datasets` folder, or a name on the hub, with columns
            `question`, `context` and `answers` = {"text": [...], "answer_start": [...]}; empty lists: no answer.
        split: which split of a folder or hub name, such as "validation"; None takes the only one. Not for files.
        limit: read the first so many rows; None reads all.
    Returns:
        The questions in the order of the source, at least one.
    Raises:
        DataError: the source is missing, empty, corrupt or unknown, a row lacks a column or has a wrong type in it,
            or an answer is not where the row says.
        SettingsError: `limit` below 1, or a split where there are none.
    """
    rows = enumerate(read_rows(source, split, limit))
    questions = [_read_row(index, row, f"{source}, {place}") for index, (place, row) in rows]
    if not questions:
        raise DataError(f"{source} is empty. Pass a data set with at least one row.")
    return questions


def _read_row(index: int, row: Any, where: str) -> Question:
    if not isinstance(row, dict):
        raise DataError(f'{where}: {row!r:.60} is no object with columns, {{"question": ..., "context": ..., ...}}.')
    missing = [name for name in COLUMNS if name not in row]
    if missing:
        raise DataError(
            f"{where}: no column {missing[0]!r}; the columns are {', '.join(map(repr, row)) or 'none'}. "
            f"Questions need {', '.join(COLUMNS)}; rename yours."
        )
    question, context = (text_of(row[name], f"{where}: column {name!r}") for name in ("question", "context"))
    if not context.strip():
        raise DataError(f"{where}: column 'context' holds no text to find an answer in. Remove the row or fill it in.")
    answers, starts = _answers(row["answers"], context, f"{where}: column 'answers'")
    return Question(index, question.strip(), context, tuple(answers), tuple(starts))


def _answers(value: Any, context: str, at: str) -> tuple[list[str], list[int]]:
    """The checked answers of a row, and where each starts."""
    form = '{"text": ["..."], "answer_start": [0]}, with empty lists where there is no answer'
    texts, starts = (value.get("text"), value.get("answer_start")) if isinstance(value, dict) else (None, None)
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise DataError(f"{at} is {value!r:.80}, but must be {form}; both lists have one entry per answer.")
    for text, start in zip(texts, starts, strict=True):
        text_of(text, f"{at}: each of 'text'")
        if not text.strip():
            raise DataError(f"{at} has an empty answer. Where there is no answer, leave both lists empty.")
        if type(start) is not int:  # neither True nor 1.0
            raise DataError(f"{at}: 'answer_start' holds {start!r:.60}. Pass whole numbers, in characters from 0.")
        if start < 0 or context[start : start + len(text)] != text:
            there, found = context[max(start, 0) :][: len(text)][:40], context.find(text)
            advice = "is nowhere in the context" if found < 0 else f"is at {found}"
            raise DataError(f"{at}: answer_start={start} is at {there!r}, but {text[:40]!r} {advice}. Correct the row.")
    return texts, starts


# From questions to tokens


def encode_questions(
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    stride: int = 128,
) -> list[Window]:
    """Windows for training and for prediction, as in the script of transformers for question answering.

    The question stands first and whole, only the context is cut. Where it is too long, windows slide over it. The
    target is the first answer; a window that does not hold all of it points at its first token, as all do where
    there is no answer.

    Args:
        questions: what to encode; each `index` once.
        tokenizer: a fast tokenizer, which knows where its tokens stand in the text. It is not changed.
        max_length: most tokens of a window; None takes the tokenizer's `model_max_length`.
        stride: tokens that neighbouring windows share, at most half of the room that the question leaves.
    Returns:
        The windows of each question one after another, in the order of the questions. Pad them on the right.
    Raises:
        DataError: no questions, a question that fills a window alone, or an answer that the tokenizer drops.
        SettingsError: a slow tokenizer, or a setting out of range.
    """
    if (max_length is not None and max_length < 1) or stride < 0:
        raise SettingsError(f"max_length={max_length}, stride={stride} tokens. Pass 1 or more, and 0 or more.")
    if not tokenizer.is_fast:
        raise SettingsError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which does not know where its tokens stand in the text. "
            "Use the model's fast one (tokenizer.json)."
        )
    if not questions:
        raise DataError("There are no questions. Pass at least one.")
    limit = min(tokenizer.model_max_length if max_length is None else max_length, _NO_LIMIT)
    windows: list[Window] = []
    most = limit - tokenizer.num_special_tokens_to_add(pair=True)
    with untouched(tokenizer):
        encoded: Any = tokenizer([question.text for question in questions], add_special_tokens=False, verbose=False)
        for question, ids in zip(questions, encoded["input_ids"], strict=True):
            room = most - len(ids)  # tokens of the context that fit beside the question
            if room < 1:
                raise DataError(
                    f"Question {question.index} has {len(ids)} tokens, but max_length={limit} has room for "
                    f"{max(most - 1, 0)} and one of the context. Raise the limit if the model allows it, or leave it "
                    "out."
                )
            windows += _slide(question, min(stride, room // 2), tokenizer, limit)  # so that windows move on
    return windows


def _slide(question: Question, stride: int, tokenizer: PreTrainedTokenizerBase, limit: int) -> list[Window]:
    """The windows of one question."""
    encoded: Any = tokenizer(
        [question.text],
        [question.context],
        truncation="only_second",
        max_length=limit,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=True,  # some tokenizers do not of themselves
        verbose=False,
    )
    names = [name for name in ("input_ids", "token_type_ids", "attention_mask") if name in encoded]
    rows = range(len(encoded["input_ids"]))
    contexts = [np.array([part == 1 for part in encoded.sequence_ids(row)], bool) for row in rows]  # (tokens,) each
    offsets = [np.array(encoded["offset_mapping"][row], np.int32)[contexts[row]] for row in rows]
    windows = []
    for row, span in zip(rows, _answer_spans(question, offsets), strict=True):
        inputs = {name: np.array(encoded[name][row], np.int32) for name in names}
        first = int(np.argmax(contexts[row]))
        no_answer = int(np.argmax(inputs["input_ids"] == tokenizer.cls_token_id))  # 0 where there is none
        start, end = (no_answer, no_answer) if span is None else (first + span[0], first + span[1])
        windows.append(Window(question.index, inputs, start, end, no_answer, first, offsets[row]))
    return windows


def _answer_spans(question: Question, offsets: Sequence[NDArray[np.int32]]) -> list[tuple[int, int] | None]:
    """First and last token of the first answer, counted in the context of each window; None where it is not whole.

    All windows together show which pieces of the context the answer touches; a window holds it if it has them all.
    """
    if not question.answers:
        return [None] * len(offsets)
    answer, start = question.answers[0], question.answer_starts[0]
    begin, end = start + len(answer) - len(answer.lstrip()), start + len(answer.rstrip())
    # no empty tokens: sentencepiece has some that stand for nothing but a space
    touches = [(own[:, 1] > begin) & (own[:, 0] < end) & (own[:, 0] < own[:, 1]) for own in offsets]
    pieces = [set(map(tuple, own[touch].tolist())) for own, touch in zip(offsets, touches, strict=True)]
    whole = set().union(*pieces)
    if not whole:
        raise DataError(
            f"Question {question.index}: the tokenizer has no token for its answer {answer[:40]!r}. Leave it out."
        )
    tokens = [np.flatnonzero(touch).tolist() for touch in touches]
    return [(own[0], own[-1]) if piece == whole else None for own, piece in zip(tokens, pieces, strict=True)]


def pad_windows(windows: Sequence[Window], tokenizer: PreTrainedTokenizerBase) -> dict[str, NDArray[np.int64]]:
    """The inputs of windows as one batch, padded on the right, so that all positions stay what they are.

    Args:
        windows: at least one.
        tokenizer: the one they were made with.
    Returns:
        The `inputs` of the windows, each (windows, tokens of the longest).
    Raises:
        DataError: the tokenizer has no padding token.
    """
    if tokenizer.pad_token_id is None:
        raise DataError("The tokenizer has no pad token. Set tokenizer.pad_token.")
    padding = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    width = max(len(window.inputs["input_ids"]) for window in windows)
    batch = {}
    for name in windows[0].inputs:
        batch[name] = np.full((len(windows), width), padding.get(name, 0), np.int64)
        for row, window in zip(batch[name], windows, strict=True):
            row[: len(window.inputs[name])] = window.inputs[name]
    return batch


# From scores to answers


def best_answers(
    questions: Sequence[Question],
    windows: Sequence[Window],
    start_logits: Sequence[ArrayLike],
    end_logits: Sequence[ArrayLike],
    max_answer_tokens: int = 30,
    threshold: float | None = None,
) -> list[str]:
    """The best piece of each question's context, over all of its windows.

        score(i, j) = start_i + end_j,  i <= j < i + max_answer_tokens;   none = min over windows of start_c + end_c

    where c is `no_answer_position`. All pairs are compared, not those of the 20 best starts and ends alone; ties keep
    the shorter piece, then the earlier. Pieces neither begin nor end with a token of white space.

    Args:
        questions: what was asked.
        windows: all windows of these questions, in any order.
        start_logits: of each window, (tokens,) or longer, padding at the end.
        end_logits: likewise.
        max_answer_tokens: longest answer, in tokens.
        threshold: answer nothing where none - score is above it, in nats; 0 for SQuAD 2.0; None always answers.
    Returns:
        One text per question, without white space around it; "" for no answer.
    Raises:
        SettingsError: `max_answer_tokens` below 1.
    """
    if max_answer_tokens < 1:
        raise SettingsError(f"max_answer_tokens={max_answer_tokens}. Pass 1 or more.")
    scored: dict[int, list[tuple[Window, Any, Any]]] = {question.index: [] for question in questions}
    for window, starts, ends in zip(windows, start_logits, end_logits, strict=True):
        scored[window.index].append((window, np.asarray(starts, np.float64), np.asarray(ends, np.float64)))
    answers = []
    for question in questions:
        best, text, none = -np.inf, "", np.inf
        for window, starts, ends in scored[question.index]:
            none = min(none, starts[window.no_answer_position] + ends[window.no_answer_position])
            score, begin, end = _best_span(window, question.context, starts, ends, max_answer_tokens)
            if score > best:
                best, text = score, question.context[begin:end].strip()
        answers.append("" if threshold is not None and none - best > threshold else text)
    return answers


def _best_span(
    window: Window, context: str, starts: NDArray[np.float64], ends: NDArray[np.float64], most: int
) -> tuple[float, int, int]:
    """Score, first character and end of the best piece of one window."""
    own = slice(window.context_start, window.context_start + len(window.offsets))
    is_blank = np.array([not context[begin:end].strip() for begin, end in window.offsets], bool)
    starts, ends = (np.where(is_blank, -np.inf, logits[own]) for logits in (starts, ends))
    best, place = -np.inf, (0, 0)
    for n_more in range(min(most, len(starts))):
        scores = starts[: len(starts) - n_more] + ends[n_more:]
        first = int(np.argmax(scores))
        if scores[first] > best:
            best, place = float(scores[first]), (first, first + n_more)
    if best == -np.inf:  # nothing but white space
        return best, 0, 0
    return best, int(window.offsets[place[0], 0]), int(window.offsets[place[1], 1])
