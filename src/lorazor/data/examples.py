"""Examples: data sets of prompts with answers, or texts with labels, read from files and from the hub.

Formats of a row, found from the columns of the first one, in this order:

    prompt + completion    both text, or both lists of chat messages (one assistant message as completion)
    messages               a chat that ends with the assistant's message, which is the answer
    text or sentence, + label    classification; labels are 0..n-1

and in each of them, if there is one, `references`: a list of accepted answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorazor.data.sources import listed, read_rows
from lorazor.errors import DataError


@dataclass(frozen=True)
class Example:
    """One row of a data set.

    Attributes:
        index: zero-based row in the source.
        prompt: text, or chat messages up to the answer; the text to classify in a labelled row.
        completion: the answer; "" in a labelled row, and where a prompt stands alone.
        references: accepted answers, for metrics; (completion,) if the row has none, () in a labelled row.
        label: class of a labelled row, 0..n-1; None elsewhere.
    """

    index: int
    prompt: str | tuple[Mapping[str, str], ...]
    completion: str
    references: tuple[str, ...]
    label: int | None = None

    @property
    def is_conversational(self) -> bool:
        """Whether the prompt is a chat, to be written with the tokenizer's chat template."""
        return not isinstance(self.prompt, str)

    @property
    def is_labelled(self) -> bool:
        """Whether this is a text with a class, rather than a prompt with an answer."""
        return self.label is not None


def asked(example: Example) -> tuple[tuple[str, ...], ...]:
    """What an example asks, in words by role, so that two which ask the same are equal."""
    prompt = [{"role": "user", "content": example.prompt}] if isinstance(example.prompt, str) else example.prompt
    asked = tuple((one["role"], *one["content"].split()) for one in prompt)
    has_words = any(len(message) > 1 for message in asked)
    return asked if has_words else (*asked, tuple(example.completion.split()))


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read; None looks for the usual names.

    Attributes:
        prompt: column of the prompt, or of the text to classify.
        completion: column of the answer, or of the label: integers in it make the rows labelled ones.
    """

    prompt: str | None = None
    completion: str | None = None


def read_examples(
    source: str | Path,
    columns: Columns = Columns(),
    split: str | None = None,
    limit: int | None = None,
    needs_answers: bool = True,
) -> list[Example]:
    """Read a data set.

    Args:
        source: a .jsonl, .jsonl.xz, .jsonl.gz, .csv or .parquet file, a `datasets` folder, or a name on the hub.
        columns: names of the columns, where they are not the usual ones.
        split: which split of a folder or hub name, such as "validation"; None takes the only one. Not for files.
        limit: read the first so many rows; None reads all.
        needs_answers: False also reads prompts (or texts) alone: their completion is "", and they have no label.
    Returns:
        The examples in the order of the source, at least one.
    Raises:
        DataError: the source is missing, empty, corrupt or unknown, or a row does not have the format of the first.
        SettingsError: `limit` below 1, or a split where there are none.
    """
    examples: list[Example] = []
    layout = None
    for index, (place, row) in enumerate(read_rows(source, split, limit)):
        where = f"{source}, {place}"
        if not isinstance(row, dict):
            raise DataError(f'{where}: {_kind(row)} instead of an object with columns, {{"prompt": ..., ...}}.')
        layout = layout or _find_layout(row, columns, where, needs_answers)
        if layout.format == "prompt" and _find_layout(row, columns, where, needs_answers).format != "prompt":
            raise DataError(
                f"{where} has an answer, and the first row has none. Pass two files, or answers throughout."
            )
        examples.append(_read_row(index, row, layout, where))
    if not examples:
        raise DataError(f"{source} is empty. Pass a data set with at least one row.")
    return examples


# From a row to an example


@dataclass(frozen=True)
class _Layout:
    """The format that all rows of a source share."""

    format: Literal["text", "chat", "messages", "label", "prompt"]
    prompt: str
    completion: str


_NO_TEXT = ("image", "images", "video", "videos", "audio", "audios")
PAIRS = (("prompt", "completion"), ("text", "label"), ("sentence", "label"))


def _find_layout(row: Mapping[str, Any], columns: Columns, where: str, needs_answers: bool) -> _Layout:
    pairs = list(dict.fromkeys((columns.prompt or prompt, columns.completion or answer) for prompt, answer in PAIRS))
    found = [pair for pair in pairs if pair[0] in row and pair[1] in row]
    if columns == Columns() and "messages" in row and PAIRS[0] not in found:
        last = row["messages"][-1] if isinstance(row["messages"], list) and row["messages"] else None
        is_answered = isinstance(last, dict) and last.get("role") == "assistant"
        return _Layout("messages" if is_answered or needs_answers else "prompt", "messages", "messages")
    alone = next((name for name, _ in pairs if name in row), None)
    if not found and not needs_answers and alone is not None:
        return _Layout("prompt", alone, alone)
    if not found:
        wanted = ", ".join(" + ".join(pair) for pair in pairs) + (", messages" if columns == Columns() else "")
        raise DataError(
            f"{where}: the columns are {listed(row)}, but lorazor needs one of: {wanted}. "
            "Name yours with --prompt-column and --completion-column."
        )
    prompt, completion = found[0]
    if completion == "label" or type(row[completion]) is int:
        return _Layout("label", prompt, completion)
    return _Layout("chat" if isinstance(row[completion], list) else "text", prompt, completion)


def _read_row(index: int, row: Mapping[str, Any], layout: _Layout, where: str) -> Example:
    for name in (layout.prompt, layout.completion):
        if name not in row:
            raise DataError(f"{where}: no column {name!r}, which the first row has. The columns are {listed(row)}.")
    for name in _NO_TEXT:
        if row.get(name):
            raise DataError(
                f"{where}: column {name!r} is no text, and lorazor reads text alone. Remove the column where the text "
                "can be answered without it, or pass other data."
            )
    question, at_question = row[layout.prompt], f"{where}: column {layout.prompt!r}"
    answer, at = row[layout.completion], f"{where}: column {layout.completion!r}"
    if layout.format == "prompt":
        is_chat = isinstance(question, list)
        prompt = tuple(_messages(question, at_question)) if is_chat else text_of(question, at_question)
        return Example(index, prompt, "", ())
    accepted = row.get("references")
    if not isinstance(accepted, (list, type(None))):
        raise DataError(f"{where}: 'references' must be a list of texts, not {_kind(accepted)}.")
    references = tuple(text_of(reference, f"{where}: each of 'references'") for reference in accepted or ())
    if layout.format in ("chat", "messages"):
        prompt, completion = _read_chat(row, layout, where)
    else:
        prompt = text_of(question, at_question)
        if layout.format == "label":
            if type(answer) is not int or answer < 0:  # neither True nor 1.0
                raise DataError(f"{at} is {answer!r}. Labels must be integers 0..n-1; replace names by their numbers.")
            return Example(index, prompt, "", references, answer)
        completion = text_of(answer, at)
    if not completion.strip():
        raise DataError(f"{at} holds an empty answer. Remove the row or fill it in.")
    return Example(index, prompt, completion, references or (completion,))


def _read_chat(row: Mapping[str, Any], layout: _Layout, where: str) -> tuple[tuple[Mapping[str, str], ...], str]:
    for name in ("tools", "chat_template_kwargs"):
        if row.get(name):
            raise DataError(f"{where}: column {name!r} changes how the chat is written, and lorazor cannot use it.")
    prompt = _messages(row[layout.prompt], f"{where}: column {layout.prompt!r}")
    at = f"{where}: column {layout.completion!r}"
    if layout.format == "messages":
        *prompt, last = prompt
    else:
        last, *more = _messages(row[layout.completion], at)
        if more:
            raise DataError(f"{at} has {1 + len(more)} messages; pass exactly one.")
    if last["role"] != "assistant":
        raise DataError(f"{at} ends with a message of {last['role']!r}. The last one must be the assistant's answer.")
    if set(last) - {"role", "content"}:
        raise DataError(f"{at}: the answer has {listed(last)}. It may only have 'role' and 'content'.")
    if not prompt:
        raise DataError(f"{at} has nothing before the assistant's answer. Put the user's message first.")
    return tuple(prompt), last["content"]


def _messages(value: Any, at: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        what = _kind(value) if value != [] else "an empty one"
        raise DataError(f"{at} must be a list of messages in this data set, not {what}.")
    messages = []
    for message in value:
        if not isinstance(message, dict) or None in (message.get("role"), message.get("content")):
            raise DataError(f"{at}: a message must be an object with 'role' and 'content', not {message!r:.80}.")
        present = {key: value for key, value in message.items() if value is not None}  # Arrow fills gaps with None
        if isinstance(present["content"], list):
            present["content"] = _text_of_parts(present["content"], at)
        messages.append({key: text_of(value, f"{at}: {key!r}") for key, value in present.items()})
    return messages


def _text_of_parts(parts: Sequence[Any], at: str) -> str:
    """The text of a message that is written in parts, which models that look at images have."""
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in parts]
    if None in texts:
        raise DataError(
            f"{at}: a message holds {parts[texts.index(None)]!r:.60}, which is no text, and lorazor reads text alone. "
            "Pass data of text."
        )
    return "".join(text_of(text, at) for text in texts)


def text_of(value: Any, at: str) -> str:
    """The value, if it is text that can be written as UTF-8; `at` says where it is, for the error."""
    if not isinstance(value, str):
        raise DataError(f"{at} must be text in this data set, not {_kind(value)}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{at} has half of a surrogate pair, which is no character. Repair the text.") from error
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)
