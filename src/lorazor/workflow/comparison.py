"""Metrics of adapters, each loaded in its turn, on the same prompts, labelled texts or questions."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lorazor.adapter.folder import AdapterFolder
from lorazor.adapter.load import Loaded, Task, swap, without_place
from lorazor.adapter.offloading import device_of_inputs
from lorazor.data.examples import Example
from lorazor.data.questions import Question, Window, best_answers, encode_questions, pad_windows
from lorazor.errors import MeasureError
from lorazor.measure.meter import DATA, Meter, note_base
from lorazor.measure.metrics import metric_named, teacher_forced_scores
from lorazor.measure.questions import question_scores
from lorazor.measure.sharding import from_main_process, measure_sharded
from lorazor.measure.stats import Scores
from lorazor.runs import RunFolder
from lorazor.settings import DataSettings, GenerationSettings

BASE = "base"

_FOUND = ("losses.jsonl", "predictions.jsonl")
"""What is written down of questions."""


@dataclass(frozen=True)
class Compared:
    """What is measured: an adapter, or a base model alone.

    Attributes:
        base: the base model, see `Opened.base`.
        load: loads it.
        folder: of the adapter; None of the base model alone.
    """

    base: str
    load: Callable[[Task | None], Loaded]
    folder: AdapterFolder | None = None


def scores_of(
    run: RunFolder,
    reading: DataSettings,
    generation: GenerationSettings,
    examples: Sequence[Example] | Sequence[Question],
    metrics: Sequence[str],
    sources: Mapping[str, Compared],
    say: Callable[[str], None],
) -> list[Scores]:
    """Every metric of every source, in their order; what is measured is appended to the run.

    Args:
        run: receives `losses.jsonl` and `predictions.jsonl`, and has what was measured before.
        reading: how to cut examples into batches.
        generation: how to write answers.
        examples: all prompts or labelled texts, or all questions.
        metrics: their names.
        sources: by name; the base model's is `BASE`.
        say: receives messages for people.
    Raises:
        MeasureError: a loss is not a number.
        DataError: the examples do not fit a model.
    """
    prompts = [one for one in examples if isinstance(one, Example)]
    if questions := [one for one in examples if isinstance(one, Question)]:
        return _scores_of_questions(run, reading, questions, metrics, sources, say)
    return _scores_of_prompts(run, reading, generation, prompts, metrics, sources, say)


def _scores_of_prompts(
    run: RunFolder,
    reading: DataSettings,
    generation: GenerationSettings,
    examples: Sequence[Example],
    metrics: Sequence[str],
    sources: Mapping[str, Compared],
    say: Callable[[str], None],
) -> list[Scores]:
    """Every metric on prompts or labelled texts.

    An adapter goes on the base model that is loaded already, where it is of that one, and has no head of its own.
    """
    meter, before, variants = None, "", {}
    for name in sorted(sources, key=lambda name: name != BASE):
        say(f"Measuring {name} on {len(examples)} examples.")
        one = sources[name]
        if meter is None:
            meter = Meter(one.load(None), run, reading, generation, say)
            meter.add(DATA, examples)
            meter.use(meter.loaded, name)
        elif one.base == before and _goes_on(one.folder, meter.loaded):
            assert one.folder is not None
            meter.use(swap(meter.loaded, one.folder), name)
        else:
            meter.release()
            gc.collect()  # a model refers to itself in circles; two base models may not fit into memory
            meter.use(one.load(None), name)
        before, variants[name] = one.base, dataclasses.replace(meter.full, label=name)
        for metric in metrics:
            meter.scores(metric, [variants[name]], DATA)
    assert meter is not None
    return [meter.scores(metric, [variants[name] for name in sources], DATA) for metric in metrics]


def _goes_on(folder: AdapterFolder | None, loaded: Loaded) -> bool:
    """Whether an adapter can take the place of another on its base model, as that is loaded."""
    return folder is not None and loaded.task in ("causal", "seq2seq") and not without_place(loaded.model, folder)


def _scores_of_questions(
    run: RunFolder,
    reading: DataSettings,
    questions: Sequence[Question],
    metrics: Sequence[str],
    sources: Mapping[str, Compared],
    say: Callable[[str], None],
) -> list[Scores]:
    """Every metric on questions, from what is written down of one adapter after the other."""
    of_texts = [metric for metric in metrics if metric_named(metric).needs_text]
    for name in sorted(sources, key=lambda name: name != BASE):
        say(f"Measuring {name} on {len(questions)} examples.")
        loaded = sources[name].load("question-answering")
        note_base(run, loaded, say)
        if name == BASE and not (loaded.model.config.architectures or [""])[0].endswith("ForQuestionAnswering"):
            say("The base model has no trained head for questions: the numbers are those of a random one.")
        _find_answers(run, loaded, questions, name, of_texts, reading, say)
        del loaded
        gc.collect()  # a model refers to itself in circles; two base models may not fit into memory
    files = from_main_process(lambda: [run.rows(file) for file in _FOUND])
    losses, texts = ({(row["adapter"], row["example"]): row for row in rows} for rows in files)

    def column(key: str) -> list[list[Any]]:
        table = texts if key == "text" else losses
        return [[table[name, one.index][key] for one in questions] for name in sources]

    answers, is_squad_2 = [one.answers for one in questions], not all(one.answers for one in questions)
    return [
        question_scores(metric, column("text"), answers, is_squad_2)
        if metric in of_texts
        else teacher_forced_scores(metric, column("nll_nats"), column("n_tokens")[0], column("n_correct"))
        for metric in metrics
    ]


def _find_answers(
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
    """
    before = from_main_process(lambda: [(file, row) for file in _FOUND for row in run.rows(file)])
    known = {(file, row["example"]) for file, row in before if row["adapter"] == name}
    missing = [one for one in questions if any((file, one.index) not in known for file in _FOUND)]
    if not missing:
        return
    is_squad_2 = not all(question.answers for question in questions)
    threshold = 0.0 if is_squad_2 else None
    windows: dict[int, list[Window]] = {question.index: [] for question in missing}
    for window in encode_questions(missing, loaded.tokenizer, reading.max_length):
        windows[window.index].append(window)
    if n_long := sum(len(own) > 1 for own in windows.values()):
        say(f"{n_long} of {len(missing)} contexts are too long for one window and are read in several.")

    def measure(chunk: list[Question]) -> list[tuple[str, dict[str, Any]]]:
        own = [window for question in chunk for window in windows[question.index]]
        starts, ends = _span_logits(loaded, own, reading.batch_size)
        scored = list(zip(own, starts, ends, strict=True))
        rows = []
        for question, text in zip(chunk, best_answers(chunk, own, starts, ends, threshold=threshold), strict=True):
            row = {"example": question.index, "adapter": name}
            losses = _span_losses([one for one in scored if one[0].index == question.index], name)
            found: dict[str, Any] = {"text": text}
            for metric in (one for one in metrics if metric_named(one).of == "text"):
                value = question_scores(metric, [[text]], [question.answers], is_squad_2).per_example[0, 0]
                found[metric] = round(float(value), 4)
            rows += zip(_FOUND, (row | losses, row | found), strict=True)
        return rows

    def keep(rows: list[tuple[str, dict[str, Any]]]) -> None:
        for file in _FOUND:
            run.append(file, [row for kind, row in rows if kind == file and (file, row["example"]) not in known])

    # questions of similar length together, all windows of a question in one place
    lengths = {index: sum(len(one.inputs["input_ids"]) for one in own) for index, own in windows.items()}
    ordered, size = sorted(missing, key=lambda one: lengths[one.index], reverse=True), reading.batch_size
    chunks = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    measure_sharded(chunks, measure, keep, name)


def _span_logits(
    loaded: Loaded, windows: Sequence[Window], batch_size: int
) -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]:
    """The scores of every token of every window as a start and as an end, without those of the padding."""
    # PEFT's wrapper for this task hands no token_type_ids on (0.21.2), so an adapter is trained without them: measure
    # it through the same wrapper
    model: Any = loaded.peft_model or loaded.model
    device = device_of_inputs(loaded.model)
    starts, ends = [], []
    for first in range(0, len(windows), batch_size):
        chunk = windows[first : first + batch_size]
        inputs = pad_windows(chunk, loaded.tokenizer).items()
        with torch.no_grad():
            output = model(**{name: torch.from_numpy(x).to(device) for name, x in inputs})
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
