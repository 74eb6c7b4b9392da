"""The examples of a run, with what each adapter made of them, worst first."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from lorazor.report.contents import Answer, Example, Run
from lorazor.report.parsing import read_rows

Key = tuple[str, int]  # the adapter, and the example


def read_answers(run: Run) -> tuple[tuple[str, ...], tuple[Example, ...]]:
    """The adapters that a run compares, and their answers to each example.

    Args:
        run: what else is known of the run; its choice says which boundaries are meant.
    Returns:
        Names of the adapters, the one that the others are compared with first; and the examples that have a loss or a
        text of each, those first that are worst with the second adapter against the first. Nothing of either where
        the run has no examples.jsonl.
    Raises:
        DataError: a file is damaged.
    """
    files, column, names = _source(run)
    answers = _read_all(run.path, files, column, run.is_finished)
    variants = {key: name for key, name in names.items() if any(known == key for known, _ in answers)}

    def example(row: dict[str, Any]) -> Example:
        index = int(row["example"])
        found = [answers.get((key, index), Answer()) for key in variants]
        label, references = row["label"], tuple(str(one) for one in row["references"])
        if label is None:
            found = [dataclasses.replace(answer, is_right=None) for answer in found]
        return Example(index, str(row["prompt"]), references, label, tuple(found))

    examples = read_rows(run.path / "examples.jsonl", example, run.is_finished)
    complete = [one for one in examples if one.answers and all(_is_known(answer) for answer in one.answers)]
    complete.sort(key=lambda one: (math.inf if one.worsening is None else -one.worsening, one.index))
    return tuple(variants.values()) if complete else (), tuple(complete)


def _source(run: Run) -> tuple[tuple[str, str], str, dict[str, str]]:
    """Which files hold losses and texts, which column names the adapter there, and the names to show for its values."""
    choice = run.choice
    prefix = "confirm-" if choice is not None and choice.confirmation is not None else ""
    if choice is not None and choice.chosen.boundary is not None:
        names = {str(choice.full.boundary): "full adapter", str(choice.chosen.boundary): choice.chosen.label}
        return (f"{prefix}sweep.jsonl", f"{prefix}predictions.jsonl"), "boundary", names
    if choice is not None:
        pruned = "pruned" if prefix else choice.chosen.label
        names = {"full": "full adapter"} | ({pruned: "pruned"} if choice.chosen != choice.full else {})
        return (f"{prefix}losses.jsonl", f"{prefix}predictions.jsonl"), "adapter", names
    given = run.document["settings"].get("adapters") or []
    ends = [Path(name).name for name in given]
    shown = {name: end if ends.count(end) == 1 else name for name, end in zip(given, ends, strict=True)}
    return ("losses.jsonl", "predictions.jsonl"), "adapter", shown


def _read_all(path: Path, files: tuple[str, str], column: str, is_finished: bool) -> dict[Key, Answer]:
    """Losses and texts of every adapter and example."""

    def key(row: dict[str, Any]) -> Key:
        return str(row[column]), int(row["example"])

    def loss(row: dict[str, Any]) -> tuple[Key, float, bool]:
        n_tokens = int(row["n_tokens"])
        return key(row), float(row["nll_nats"]) / n_tokens, int(row["n_correct"]) == n_tokens

    def text(row: dict[str, Any]) -> tuple[Key, str, dict[str, float]]:
        known = {"example", column, "gates", "text"}
        return key(row), str(row["text"]), {name: float(value) for name, value in row.items() if name not in known}

    losses = {at: (value, right) for at, value, right in read_rows(path / files[0], loss, is_finished)}
    texts = {at: (value, scores) for at, value, scores in read_rows(path / files[1], text, is_finished)}
    answers = {}
    for at in {*losses, *texts}:
        value, is_right = losses.get(at, (None, None))
        written, scores = texts.get(at, (None, {}))
        answers[at] = Answer(value, written, scores, is_right)
    return answers


def _is_known(answer: Answer) -> bool:
    return answer.loss is not None or answer.text is not None
