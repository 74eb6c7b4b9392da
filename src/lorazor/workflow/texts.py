"""Answers to questions, found in their contexts, kept in a run folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorazor.adapter.load import Loaded
from lorazor.data.questions import Question, Window, best_answers, encode_questions, pad_windows
from lorazor.errors import MeasureError
from lorazor.measure.metrics import text_scores
from lorazor.measure.sharding import from_main_process, measure_sharded
from lorazor.runs import RunFolder
from lorazor.settings import DataSettings

_FOUND = ("losses.jsonl", "predictions.jsonl")  # what `find_answers` writes


def find_answers(
    run: RunFolder,
    loaded: Loaded,
    questions: Sequence[Question],
    name: str,
    metrics: Sequence[str],
    reading: DataSettings,
    say: Callable[[str], None],
) -> None:
    """Find the answers to questions in their contexts, and append them to a run with their losses.

    `losses.jsonl` receives the losses of start and end, of each question the mean over its windows, and
    `predictions.jsonl` the answers. Where each question has an answer, one is always given (SQuAD 1.1); else the model
    may also say that there is none (SQuAD 2.0, threshold 0).

    Args:
        run: where they go; what is there already is not measured again.
        loaded: a model for question answering.
        questions: all questions; they decide together whether there may be no answer.
        name: what the files call the adapter.
        metrics: text metrics to note beside each answer.
        reading: batch size and length limits.
        say: receives messages.
    Raises:
        MeasureError: a loss that is not a number.
    """
    known = {(file, row["example"]) for file in _FOUND for row in _rows(run, file) if row["adapter"] == name}
    missing = [one for one in questions if any((file, one.index) not in known for file in _FOUND)]
    if not missing:
        return
    threshold = None if all(question.answers for question in questions) else 0.0
    windows: dict[int, list[Window]] = {question.index: [] for question in missing}
    for window in encode_questions(missing, loaded.tokenizer, reading.max_length):
        windows[window.index].append(window)
    n_long = sum(len(own) > 1 for own in windows.values())
    if n_long:
        say(f"{n_long} of {len(missing)} contexts are too long for one window and are read in several.")

    def measure(chunk: list[Question]) -> list[tuple[str, dict[str, Any]]]:
        own = [window for question in chunk for window in windows[question.index]]
        starts, ends = _span_logits(loaded, own, reading.batch_size)
        scored = list(zip(own, starts, ends, strict=True))
        rows = []
        for question, text in zip(chunk, best_answers(chunk, own, starts, ends, threshold=threshold), strict=True):
            row = {"example": question.index, "adapter": name}
            losses = _span_losses([one for one in scored if one[0].index == question.index], name)
            scores = {metric: _score(metric, text, question.references) for metric in metrics}
            rows += zip(_FOUND, (row | losses, row | {"text": text} | scores), strict=True)
        return rows

    def keep(rows: list[tuple[str, dict[str, Any]]]) -> None:
        for file in _FOUND:
            run.append(file, [row for kind, row in rows if kind == file and (file, row["example"]) not in known])

    measure_sharded(_longest_first(missing, windows, reading.batch_size), measure, keep, name)


def _rows(run: RunFolder, file: str) -> list[dict[str, Any]]:
    return from_main_process(lambda: run.rows(file))


def _longest_first(
    questions: Sequence[Question], windows: dict[int, list[Window]], batch_size: int
) -> list[list[Question]]:
    """Questions of similar length together, all windows of a question in one place."""

    def n_tokens(question: Question) -> int:
        return sum(len(window.inputs["input_ids"]) for window in windows[question.index])

    ordered = sorted(questions, key=n_tokens, reverse=True)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def _span_logits(
    loaded: Loaded, windows: Sequence[Window], batch_size: int
) -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]:
    """The scores of every token of every window as a start and as an end, without those of the padding."""
    import torch

    # PEFT's wrapper for this task hands no token_type_ids on (0.21.2), so an adapter is trained without them: measure
    # it through the same wrapper
    model: Any = loaded.peft_model or loaded.model
    starts, ends = [], []
    for first in range(0, len(windows), batch_size):
        chunk = windows[first : first + batch_size]
        inputs = pad_windows(chunk, loaded.tokenizer).items()
        with torch.no_grad():
            output = model(**{name: torch.from_numpy(x).to(loaded.model.device) for name, x in inputs})
        for found, logits in ((starts, output.start_logits), (ends, output.end_logits)):
            rows = logits.float().cpu().numpy()  # (windows, tokens)
            found += [row[: len(window.inputs["input_ids"])] for row, window in zip(rows, chunk, strict=True)]
    return starts, ends


def _span_losses(
    scored: Sequence[tuple[Window, NDArray[np.float32], NDArray[np.float32]]], name: str
) -> dict[str, float | int]:
    """What a model makes of the windows of one question, as a row of losses has it.

        nll = mean over windows of (log sum exp(s) - s[start]) + (log sum exp(e) - e[end])

    Start and end count as two tokens; each is right where it is the first of highest score in all windows.
    """
    nll_nats, is_right = [], []
    for window, *logits in scored:
        numbers = np.asarray(logits, np.float64)  # (2, tokens)
        positions = [window.start_position, window.end_position]
        targets, highest = numbers[[0, 1], positions], numbers.max(axis=1)
        nll_nats.append((np.log(np.exp(numbers - highest[:, None]).sum(axis=1)) + highest - targets).sum())
        is_right.append(numbers.argmax(axis=1) == positions)
    nll = float(np.mean(nll_nats))
    if not np.isfinite(nll):
        index = scored[0][0].index
        raise MeasureError(f"The loss of example {index} with {name} is {nll}. Check it for NaN weights.")
    return {"nll_nats": nll, "n_tokens": 2, "n_correct": int(np.all(is_right, axis=0).sum())}


def _score(metric: str, text: str, references: Sequence[str]) -> float:
    return round(float(text_scores(metric, [[text]], [references]).per_example[0, 0]), 4)
