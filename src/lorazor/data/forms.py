"""Forms of rows: which columns hold the prompt, the second text of a pair, and the answer or the label."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lorazor.data.sources import listed
from lorazor.errors import DataError


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read; None looks for the usual names.

    Attributes:
        prompt: column of the prompt, or of the text to classify.
        completion: column of the answer, or of the label: numbers in it make the rows labelled ones.
        pair: column of the second text of a pair.
        labels: what labels are: "classes", also if they are texts in another column than `label`; "numbers" to
            predict, also if they are whole; "auto": numbers where the first is no whole one.
    """

    prompt: str | None = None
    completion: str | None = None
    pair: str | None = None
    labels: Literal["auto", "classes", "numbers"] = "auto"

    @property
    def is_named(self) -> bool:
        """Whether a column is named."""
        return (self.prompt, self.completion, self.pair) != (None, None, None)


@dataclass(frozen=True)
class Layout:
    """The format that all rows of a source share."""

    format: Literal["text", "chat", "messages", "class", "number", "prompt"]
    prompt: str
    completion: str
    pair: str | None = None


TRIPLES = ("tripleset", "modified_triple_sets", "input")
"""Columns of facts: lists of subject, relation and object, or of "subject | relation | object"."""


FORMS: tuple[tuple[str, str | None, str], ...] = (
    ("prompt", None, "completion"),
    ("sentence1", "sentence2", "label"),  # GLUE: MRPC, STS-B, RTE, WNLI
    ("premise", "hypothesis", "label"),  # MNLI
    ("question", "sentence", "label"),  # QNLI
    ("question1", "question2", "label"),  # QQP
    ("text", None, "label"),
    ("sentence", None, "label"),  # CoLA, SST-2
    ("document", None, "summary"),  # XSum
    ("article", None, "highlights"),  # CNN/DailyMail
    ("dialogue", None, "summary"),  # SAMSum, DialogSum
    ("question", None, "answer"),  # GSM8K
    ("meaning_representation", None, "human_reference"),  # E2E
    ("tripleset", None, "annotations"),  # DART
    ("modified_triple_sets", None, "lex"),  # WebNLG
    ("document", None, "target"),  # and those four in GEM
    ("meaning_representation", None, "target"),
    ("tripleset", None, "target"),
    ("input", None, "target"),
)
"""Columns of the prompt, of the second text, and of the answer or the label; the first that a row has counts."""


def is_found(columns: Collection[str]) -> bool:
    """Whether rows with these columns have a form that is read without naming one."""
    return any(all(name in columns for name in form if name) for form in FORMS)


def find_layout(row: Mapping[str, Any], columns: Columns, where: str, needs_answers: bool) -> Layout:
    """The format of a row.

    Args:
        row: by column.
        columns: those that are named.
        where: the row, for the error.
        needs_answers: False also takes prompts alone.
    Raises:
        DataError: the columns have no form that is known.
    """
    forms = list(dict.fromkeys(_named(form, columns) for form in FORMS))
    found = [form for form in forms if all(name in row for name in form if name)]
    if not columns.is_named and "messages" in row and FORMS[0] not in found:
        last = row["messages"][-1] if isinstance(row["messages"], list) and row["messages"] else None
        is_answered = isinstance(last, dict) and last.get("role") == "assistant"
        return Layout("messages" if is_answered or needs_answers else "prompt", "messages", "messages")
    if not found and not needs_answers:
        alone = next((form for form in forms if form[0] in row and (form[1] is None or form[1] in row)), None)
        if alone is not None:
            return Layout("prompt", alone[0], alone[0], alone[1])
    if not found:
        wanted = ", ".join(" + ".join(filter(None, form)) for form in forms)
        wanted += "" if columns.is_named else ", messages"
        raise DataError(
            f"{where}: the columns are {listed(row)}, but lorazor needs one of: {wanted}. Name yours with "
            "--prompt-column and --completion-column, the second text of a pair with --pair-column."
        )
    prompt, pair, completion = found[0]
    value = row[completion]
    if columns.labels != "auto" or completion == "label" or pair is not None or type(value) in (int, float):
        is_number = columns.labels == "numbers" or (columns.labels == "auto" and type(value) is float)
        return Layout("number" if is_number else "class", prompt, completion, pair)
    is_chat = isinstance(value, list) and prompt not in TRIPLES
    return Layout("chat" if is_chat else "text", prompt, completion)


def _named(form: tuple[str, str | None, str], columns: Columns) -> tuple[str, str | None, str]:
    """A form with the user's names in it; a prompt that is named has no second text, unless that is named as well."""
    prompt, pair, completion = form
    second = columns.pair or (None if columns.prompt else pair)
    return columns.prompt or prompt, second, columns.completion or completion
