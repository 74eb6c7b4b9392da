"""Examples: data sets of prompts with answers, or texts with labels, read from files and from the hub.

Formats of a row, found from the columns of the first one, in this order:

    prompt + completion    both text, or both lists of chat messages (one assistant message as completion)
    messages               a chat that ends with the assistant's message, which is the answer
    two texts, or text or sentence, + label    labels: classes (0..n-1, or names), or numbers to predict
    an input and an output under the names of a data set on the hub, see `lorazor.data.forms`

and in each of them, if there is one, `references`: a list of accepted answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorazor.data.forms import TRIPLES, Columns, Layout, find_layout
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
        label: of a labelled row: its class, 0..n-1, or the number to predict, a float; None elsewhere, and where the
            class is known by its name alone, see `lorazor.data.labels.numbered`.
        label_name: name of the class; None where it has none.
        pair: the second text of a pair; None elsewhere.
    """

    index: int
    prompt: str | tuple[Mapping[str, str], ...]
    completion: str
    references: tuple[str, ...]
    label: int | float | None = None
    label_name: str | None = None
    pair: str | None = None

    @property
    def is_conversational(self) -> bool:
        """Whether the prompt is a chat, to be written with the tokenizer's chat template."""
        return not isinstance(self.prompt, str)

    @property
    def is_labelled(self) -> bool:
        """Whether this is a text with a class or a number, rather than a prompt with an answer."""
        return self.label is not None or self.label_name is not None


def asked(example: Example) -> tuple[tuple[str, ...], ...]:
    """What an example asks, in words by role, so that two which ask the same are equal."""
    prompt = [{"role": "user", "content": example.prompt}] if isinstance(example.prompt, str) else example.prompt
    asked = tuple((one["role"], *one["content"].split()) for one in prompt)
    if example.pair is not None:
        asked = (*asked, ("pair", *example.pair.split()))
    has_words = any(len(message) > 1 for message in asked)
    return asked if has_words else (*asked, tuple(example.completion.split()))


def read_examples(
    source: str | Path,
    columns: Columns | None = None,
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
    columns, layout = columns or Columns(), None
    for index, (place, row) in enumerate(read_rows(source, split, limit)):
        where = f"{source}, {place}"
        if not isinstance(row, dict):
            raise DataError(f'{where}: {_kind(row)} instead of an object with columns, {{"prompt": ..., ...}}.')
        layout = layout or find_layout(row, columns, where, needs_answers)
        if layout.format == "prompt" and find_layout(row, columns, where, needs_answers).format != "prompt":
            raise DataError(
                f"{where} has an answer, and the first row has none. Pass two files, or answers throughout."
            )
        examples.append(_read_row(index, row, layout, where))
    if not examples:
        raise DataError(f"{source} is empty. Pass a data set with at least one row.")
    return examples


# From a row to an example


_NO_TEXT = ("image", "images", "video", "videos", "audio", "audios")


def _read_row(index: int, row: Mapping[str, Any], layout: Layout, where: str) -> Example:
    for name in filter(None, (layout.prompt, layout.pair, layout.completion)):
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
    pair = None if layout.pair is None else text_of(row[layout.pair], f"{where}: column {layout.pair!r}")
    if layout.format == "prompt":
        is_chat = isinstance(question, list) and layout.prompt not in TRIPLES
        prompt = tuple(_messages(question, at_question)) if is_chat else _prompt(row, layout, at_question)
        return Example(index, prompt, "", (), pair=pair)
    accepted = row.get("references")
    if not isinstance(accepted, (list, type(None))):
        raise DataError(f"{where}: 'references' must be a list of texts, not {_kind(accepted)}.")
    references = tuple(text_of(reference, f"{where}: each of 'references'") for reference in accepted or ())
    if layout.format in ("chat", "messages"):
        prompt, completion = _read_chat(row, layout, where)
    else:
        prompt = _prompt(row, layout, at_question)
        if layout.format in ("class", "number"):
            label, name = _label(answer, row.get(f"{layout.completion}_text"), layout.format == "number", at)
            return Example(index, prompt, "", references, label, name, pair)
        texts = _answers(answer, at)
        completion, references = texts[0], references or texts
    if not completion.strip():
        raise DataError(f"{at} holds an empty answer. Remove the row or fill it in.")
    return Example(index, prompt, completion, references or (completion,))


def _label(value: Any, name: Any, is_number: bool, at: str) -> tuple[int | float | None, str | None]:
    """The class of a row, its name if it has one, or its number; neither True nor False is any of them."""
    if is_number:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise DataError(f"{at} is {value!r:.60}. In this data set labels are numbers to predict; pass finite ones.")
        return float(value), None
    if isinstance(value, str) and value.strip():
        return None, text_of(value, at).strip()
    if type(value) is float:
        raise DataError(
            f"{at} is {value!r}, but the labels before it are classes. Pass --labels numbers to predict numbers."
        )
    if type(value) is not int or value < 0:
        hidden = " -1 stands for the hidden labels of a test split; pass another split." if value == -1 else ""
        raise DataError(f"{at} is {value!r:.60}. Classes must be integers 0..n-1, or names.{hidden}")
    return value, text_of(name, f"{at}, its name") if isinstance(name, str) else None


def _prompt(row: Mapping[str, Any], layout: Layout, at: str) -> str:
    """The text of a prompt; facts are written "subject : relation : object | ..."."""
    value = row[layout.prompt]
    if layout.prompt not in TRIPLES or isinstance(value, str):
        return text_of(value, at)
    if isinstance(value, dict):  # WebNLG has sets that say the same in other orders
        value = (value.get("mtriple_set") or [None])[0]
    facts = [fact.split("|") if isinstance(fact, str) else fact for fact in value or ()] if value else []
    if not facts or not all(isinstance(fact, list) and fact for fact in facts):
        raise DataError(f"{at} is {row[layout.prompt]!r:.60}, but must be a list of [subject, relation, object].")
    return " | ".join(" : ".join(text_of(part, at).strip() for part in fact) for fact in facts)


def _answers(value: Any, at: str) -> tuple[str, ...]:
    """An answer, or the several that DART and WebNLG keep in one column, of which the first is trained on."""
    texts = value.get("text") if isinstance(value, dict) else [value]
    if not isinstance(texts, list) or not texts:
        raise DataError(f'{at} is {value!r:.60}, but must be text, or {{"text": [...]}} with at least one.')
    return tuple(text_of(text, at) for text in texts)


def _read_chat(row: Mapping[str, Any], layout: Layout, where: str) -> tuple[tuple[Mapping[str, str], ...], str]:
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
