"""The examples of a run, with what each adapter made of them, worst first."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lorazor.report.contents import Answer, ComparedExample, Run
from lorazor.report.parsing import parse_rows
from lorazor.report.words import short_names

Key = tuple[str, int]  # the adapter, and the example
_NO_METRIC = ("example", "adapter", "key", "text")


def read_answers(run: Run) -> tuple[tuple[str, ...], tuple[ComparedExample, ...]]:
    """The adapters that a run compares, and their answers to each example.

    Args:
        run: what else is known of the run; its choice says which adapters are meant.
    Returns:
        Names of the adapters, the one that the others are compared with first; and the examples that have a loss or a
        text of each, those first that are worst with the second adapter against the first. Nothing of either where
        the run has no examples.jsonl.
    Raises:
        DataError: a file is damaged.
    """
    names, answers = _compared(run), _read_all(run)
    variants = {key: name for key, name in names.items() if any(known == key for known, _ in answers)}

    def example(row: dict[str, Any]) -> ComparedExample:
        index = int(row["example"])
        found = [answers.get((key, index), Answer()) for key in variants]
        label, references = row["label"], tuple(str(one) for one in row["references"])
        if label is None:
            found = [dataclasses.replace(answer, is_right=None) for answer in found]
        return ComparedExample(index, str(row["prompt"]), references, label, tuple(found))

    examples = parse_rows(run.path / "examples.jsonl", example, run.is_finished)
    complete = [one for one in examples if one.answers and all(_is_known(answer) for answer in one.answers)]
    complete.sort(key=lambda one: (math.inf if one.worsening is None else -one.worsening, one.index))
    return tuple(variants.values()) if complete else (), tuple(complete)


def _compared(run: Run) -> dict[str, str]:
    """The adapters to compare, by what the files call them, with the names to show."""
    if run.choice is not None:
        chosen = run.choice.chosen
        return {"full": "full adapter"} | ({chosen.label: chosen.label} if chosen != run.choice.full else {})
    given = run.document["settings"].get("adapters") or []
    return dict(zip(given, short_names(given), strict=True))


def _read_all(run: Run) -> dict[Key, Answer]:
    """Losses and texts of every adapter and example of examples.jsonl, the held-out ones if there are any."""
    prefix = "confirm-" if run.has_held_out else ""

    def key(row: dict[str, Any]) -> Key:
        return str(row["adapter"]), int(row["example"])

    def loss(row: dict[str, Any]) -> tuple[Key, float, bool]:
        n_tokens = int(row["n_tokens"])
        return key(row), float(row["nll_nats"]) / n_tokens, int(row["n_correct"]) == n_tokens

    def text(row: dict[str, Any]) -> tuple[Key, str, dict[str, float]]:
        return key(row), str(row["text"]), {name: float(value) for name, value in row.items() if name not in _NO_METRIC}

    losses_file, texts_file = (run.path / f"{prefix}{name}.jsonl" for name in ("losses", "predictions"))
    losses = {at: (value, right) for at, value, right in parse_rows(losses_file, loss, run.is_finished)}
    texts = {at: (value, scores) for at, value, scores in parse_rows(texts_file, text, run.is_finished)}
    answers = {}
    for at in {*losses, *texts}:
        value, is_right = losses.get(at, (None, None))
        written, scores = texts.get(at, (None, {}))
        answers[at] = Answer(value, written, scores, is_right)
    return answers


def _is_known(answer: Answer) -> bool:
    return answer.loss is not None or answer.text is not None
