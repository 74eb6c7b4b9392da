"""How every command begins: examples read as the settings say, checked before anything long, and the run folder."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from lorazor.adapter.folder import AdapterFolder
from lorazor.adapter.tasks import TASK_TYPES
from lorazor.data.examples import Example, asked, read_examples
from lorazor.data.forms import Columns, is_found
from lorazor.data.questions import COLUMNS, Question, read_questions
from lorazor.data.sources import read_rows
from lorazor.errors import DataError, SettingsError
from lorazor.measure.metrics import METRICS, metric_named, text_scores
from lorazor.measure.questions import check_questions
from lorazor.measure.sharding import from_main_process, is_main_process
from lorazor.runs import RunFolder
from lorazor.settings import ExampleSettings

Source = str | Path | Sequence[Example] | Sequence[Question]
"""A file, a dataset folder, a hub name, or examples in memory."""

_HOW = ("accumulation", "batch_size", "device_map", "engine", "gradient_checkpointing", "heal_accumulation")
"""How numbers are computed, not what they are: a run that ran out of memory may go on with less."""

EXAMPLES_FILE = "examples.jsonl"


def start_run(
    out: str | Path | None,
    command: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Source | None],
    resume: bool = False,
) -> RunFolder:
    """Begin a run, or go on with one, in all processes; the main one writes. See `RunFolder.start`.

    Without `out` it is in a temporary folder, which stays.
    A resumed run must have the same settings, but for how its numbers are computed. Where something is learned, the
    batch size is part of what: of a training, and of a healing. Inputs that are files must be the same files;
    `source_name` says it of examples in memory.
    """
    paths = {name: Path(one) for name, one in inputs.items() if isinstance(one, str | Path)}
    learns = command in ("train", "select") or settings.get("heal") is not None
    may_change = [name for name in _HOW if not (learns and name == "batch_size")]
    place = Path(from_main_process(lambda: tempfile.mkdtemp(prefix="lorazor-")) if out is None else out)
    run = from_main_process(lambda: RunFolder.start(place, command, settings, paths, resume, may_change))
    run.is_writer = is_main_process()
    return run


def read_for(
    adapters: Mapping[str, AdapterFolder], source: Source, reading: ExampleSettings, metrics: Sequence[str] = ()
) -> list[Example] | list[Question]:
    """Read a data set of the form that the adapters are for, and see that the metrics can be computed on it.

    Args:
        adapters: by name, without the base model; where there are none, the columns of the first row decide: the other
            forms come first, and so do columns that the settings name.
        source: see `read_examples` and `read_questions`; or examples in memory.
        reading: how to read it.
        metrics: what is to be computed.
    Raises:
        DataError: the data cannot be used, or not with an adapter for questions.
        SettingsError: an adapter for another task than the data, a metric or a column setting that does not fit them.
        MeasureError: a metric cannot be computed from these references.
    """
    if not isinstance(source, str | Path):
        _check_in_memory(source)
        questions = [
            dataclasses.replace(one, index=index) for index, one in enumerate(source) if isinstance(one, Question)
        ]
        return questions[: reading.limit] if questions else read(source, reading, metrics)
    types = {name: folder.config.get("task_type") for name, folder in adapters.items()}
    answering = next((name for name, kind in types.items() if kind == TASK_TYPES["question-answering"]), None)
    _, row = next(read_rows(source, reading.split), ("", None))
    columns = set(row) if isinstance(row, dict) else set()
    is_named = _columns(reading).is_named
    is_other = is_named or "messages" in columns or is_found(columns)
    if answering is None and (is_other or not {"question", "context"} <= columns):
        return read(source, reading, metrics)
    if answering is not None and not set(COLUMNS) <= columns:
        raise DataError(
            f"{answering!r} is an adapter for questions, which needs the columns {', '.join(COLUMNS)}, but {source!r} "
            f"has {', '.join(sorted(columns)) or 'none'}. Pass other data, or another adapter."
        )
    for name, kind in types.items():
        if kind not in (None, TASK_TYPES["question-answering"]):
            raise SettingsError(
                f"{name!r} is an adapter for {kind}, but {source!r} has questions with contexts. "
                f"Pass adapters for {TASK_TYPES['question-answering']} only, or other data."
            )
    if is_named:
        raise SettingsError(f"Questions are read from the columns {', '.join(COLUMNS)}. Name no other column.")
    for metric in metrics:
        check_questions(metric)
    questions = read_questions(source, reading.split, reading.limit)
    for metric in metrics:
        check_questions(metric, [one.answers for one in questions])
    return questions


def read_sets(
    reading: ExampleSettings,
    metrics: Sequence[str],
    sources: Mapping[str, Source | None],
    prompts_alone: Collection[str] = (),
) -> tuple[list[Example], ...]:
    """Read the data sets of a command, of which no two may share a prompt.

    Args:
        reading: how to read them.
        metrics: what is to be computed.
        sources: by what the command line calls them; None is an empty set.
        prompts_alone: those that need no answers, and no metric.
    Raises:
        DataError, SettingsError, MeasureError: see `read` and `check_held_out`.
    """
    sets: dict[str, list[Example]] = {}
    for name, source in sources.items():
        is_alone = name in prompts_alone
        sets[name] = [] if source is None else read(source, reading, () if is_alone else metrics, not is_alone)
    given = {name: (source_name(sources[name]), own) for name, own in sets.items() if sources[name] is not None}
    check_held_out(dict(reversed(given.items())))
    return tuple(sets.values())


def source_name(source: Source | None) -> str | None:
    """What messages and run.json call a data set: its place, or the number and the hash of examples in memory."""
    if source is None or isinstance(source, str | Path):
        return None if source is None else str(source)
    _check_in_memory(source)
    contents = repr([dataclasses.replace(one, index=0) for one in source])
    return f"{len(source)} examples in memory, {hashlib.sha256(contents.encode()).hexdigest()[:12]}"


def _check_in_memory(source: Sequence[Any]) -> None:
    """Refuse what is no list of examples, and examples that no file could hold."""
    if not isinstance(source, list | tuple):
        raise DataError(f"{source!r:.80} is no data. Pass a file, a dataset folder, a hub name, or a list of examples.")
    if source and all(isinstance(one, Question) for one in source):
        return
    for place, one in enumerate(source):
        if not isinstance(one, Example):
            raise DataError(f"Number {place} in memory is {one!r:.80}. Pass lorazor.Example, or a file.")
        is_text = isinstance(one.prompt, str | tuple) and isinstance(one.completion, str)
        is_label = one.label is None or type(one.label) in (int, float)
        if not is_text or not is_label or not all(isinstance(own, str | None) for own in (one.pair, one.label_name)):
            raise DataError(
                f"Number {place} in memory has {one!r:.200}: prompt, completion, pair and the name of a label are "
                "text, a label is a number."
            )


def read(
    source: Source, reading: ExampleSettings, metrics: Sequence[str] = (), needs_answers: bool = True
) -> list[Example]:
    """Read a data set of prompts or labelled texts, and see that the metrics can be computed on it.

    Args:
        source: see `read_examples`; or the examples themselves, which are numbered in their order.
        reading: how to read it.
        metrics: what is to be computed.
        needs_answers: False also reads prompts, or texts, alone.
    Raises:
        DataError: the data cannot be used; see `read_examples`.
        SettingsError: a metric of labels for texts, or of texts for labels.
        MeasureError: a metric cannot be computed from these references.
    """
    name = source_name(source) or ""
    if isinstance(source, str | Path):
        examples = read_examples(source, _columns(reading), reading.split, reading.limit, needs_answers)
    else:
        some = source[: reading.limit]
        examples = [dataclasses.replace(one, index=index) for index, one in enumerate(some) if isinstance(one, Example)]
        if len(examples) < len(some):
            raise DataError("There are questions in memory, and this takes prompts or labelled texts. Pass such.")
        if not examples:
            raise DataError("There are no examples in memory. Pass at least one.")
    for metric in metrics:
        _check_metric(metric, name, examples)
    return examples


_NEEDS = {
    "tokens": "answers or classes",
    "classes": "labels that are classes",
    "numbers": "labels that are numbers (--labels numbers)",
    "text": "answers in text",
    "questions": "questions with contexts",
}


def _check_metric(metric: str, name: str, examples: Sequence[Example]) -> None:
    """Refuse a metric that examples do not have, and name those that they have."""
    first, of = examples[0], metric_named(metric).of
    has = ("text", "tokens")
    if first.is_labelled:
        has = ("numbers",) if isinstance(first.label, float) else ("classes", "tokens")
    if of not in ("anything", *has):
        what = {"text": "answers", "numbers": "numbers to predict", "classes": "classes"}[has[0]]
        known = [one.name for one in METRICS.values() if one.of in ("anything", *has)]
        raise SettingsError(
            f"metric={metric!r} needs {_NEEDS[of]}, but {name!r} has {what}. Pass one of {', '.join(known)}."
        )
    if of == "text":
        text_scores(metric, [[""] * len(examples)], [example.references for example in examples])
    if metric == "f1" and len(classes := {_label(one) for one in examples}) > 2:
        raise SettingsError(
            f"metric='f1' is of two classes, but {name!r} has {len(classes)}. Pass accuracy or matthews."
        )


def _columns(reading: ExampleSettings) -> Columns:
    return Columns(reading.prompt_column, reading.completion_column, reading.pair_column, reading.labels)


def write_examples(run: RunFolder, examples: Sequence[Example | Question]) -> None:
    """Write the examples that a run compares adapters on to its `examples.jsonl`, as text that people can read.

    A chat is written as its messages, each after its role; a question after its context.

    Args:
        run: the run folder.
        examples: what the losses and answers of the run belong to.
    """
    run.write_rows(
        EXAMPLES_FILE,
        [
            {
                "example": one.index,
                "prompt": prompt_text(one),
                "references": list(one.references),
                "label": _label(one) if isinstance(one, Example) else None,
            }
            for one in examples
        ],
    )


def _label(example: Example) -> int | float | str | None:
    return example.label if example.label_name is None else example.label_name


def prompt_text(example: Example | Question) -> str:
    """What an example asks, as text without a template."""
    if isinstance(example, Question):
        return f"{example.context}\n\n{example.text}"
    if isinstance(example.prompt, str):
        return example.prompt if example.pair is None else f"{example.prompt}\n\n{example.pair}"
    return "\n\n".join(f"{message.get('role')}: {message.get('content')}" for message in example.prompt)


def check_held_out(sets: Mapping[str, tuple[str | None, Sequence[Example]]]) -> None:
    """Refuse data sets of which two share a prompt: an answer that was learned or chosen by helps with the other one.

    Only the prompts count, of labelled texts the texts, apart from white space; within one set they may repeat. A chat
    of one question is that question. An example without a prompt is its answer.

    Args:
        sets: source and examples by what the command line calls them, `--confirm`; those to take out of first.
    Raises:
        SettingsError: two sets share a prompt.
    """
    for (option, (source, examples)), (other, (other_source, others)) in combinations(sets.items(), 2):
        seen = {asked(example) for example in others}
        shared = [example for example in examples if asked(example) in seen]
        if shared:
            what = "text" if shared[0].is_labelled else "prompt"
            raise SettingsError(
                f"{len(shared)} of the {len(examples)} examples of {option} {source!r} have a {what} that is also in "
                f"{other} {other_source!r}, the first in row {shared[0].index} (from 0): "
                f"{prompt_text(shared[0])!r:.80}. Take them out of one of the two (all rows of a {what} belong in one "
                "file), or pass other examples."
            )
