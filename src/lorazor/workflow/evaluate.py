"""Evaluation from start to end: several adapters on the same test examples."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from lorazor.adapter.folder import AdapterFolder, read_adapter
from lorazor.adapter.load import Loaded, base_of, find_adapter, load, swap
from lorazor.data.examples import Example
from lorazor.data.questions import Question, Window, best_answers, encode_questions, pad_windows
from lorazor.errors import MeasureError, SettingsError
from lorazor.measure.meter import DATA, Meter, text_columns
from lorazor.measure.metrics import metric_named, teacher_forced_scores, text_scores
from lorazor.measure.results import Evaluated
from lorazor.measure.sharding import from_main_process, measure_sharded
from lorazor.measure.stats import Scores, paired_differences
from lorazor.runs import RunFolder
from lorazor.settings import DataSettings, EvalSettings, ModelSettings
from lorazor.workflow.reading import read_for, start_run, write_examples

BASE = "base"

_FOUND = ("losses.jsonl", "predictions.jsonl")
"""What is written down of questions."""

_Sources: TypeAlias = Mapping[str, tuple[AdapterFolder | None, ModelSettings]]
"""Adapters by name, and how their base models are loaded; the base alone, which comes first, has no folder."""


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation came to.

    Attributes:
        out: the run folder.
        results: every metric of every adapter, the adapters in the order given, the base model last.
    """

    out: Path
    results: list[Evaluated]


def evaluate(
    adapters: Sequence[str | Path],
    data: str,
    *,
    out: str | Path,
    settings: EvalSettings | None = None,
    resume: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> EvalResult:
    """Measure adapters on the same examples and compare each with the first, paired.

    Args:
        adapters: adapter folders or hub ids; none measures the base model alone.
        data: test examples: a file, a dataset folder or a hub name.
        out: the run folder; new, unless `resume`. It receives `examples.jsonl`, `losses.jsonl`,
            `predictions.jsonl`, `metrics.json`.
        settings: everything else.
        resume: go on with an interrupted run in `out`.
        say: receives messages for people.
    Raises:
        LorazorError: settings, adapters, data or output folder cannot be used; before a model is loaded.
    """
    settings, out = settings or EvalSettings(), Path(out)
    metrics = [name.strip() for name in settings.metrics.split(",") if name.strip()]
    names = [str(adapter) for adapter in adapters] + ([BASE] if settings.base or not adapters else [])
    _check(names, metrics, settings)
    adapter_folders = {name: read_adapter(find_adapter(name)) for name in names if name != BASE}
    for folder in adapter_folders.values():
        base_of(folder, settings.model)  # refuses one that is not there
    examples = read_for(adapter_folders, data, settings.reading, metrics)
    everything = dataclasses.asdict(settings) | {"adapters": names, "data": data}
    inputs: dict[str, Path | None] = {"data": Path(data)}
    inputs |= {name: folder.path for name, folder in adapter_folders.items()}
    run = start_run(out, "eval", everything, inputs, resume)
    say = run.noting(say)
    model = settings.model  # of the base model
    if model.model is None and BASE in names and adapter_folders:  # the base model is the first adapter's
        model = dataclasses.replace(model, model=base_of(next(iter(adapter_folders.values())), model))
    write_examples(run, examples)
    sources = {name: (adapter_folders.get(name), model if name == BASE else settings.model) for name in names}
    questions = [one for one in examples if isinstance(one, Question)]
    prompts = [one for one in examples if isinstance(one, Example)]
    if questions:
        found = _scores_of_questions(run, settings, questions, metrics, sources, say)
    else:
        found = _scores_of_prompts(run, settings, prompts, metrics, sources, say)
    results = []
    for metric, scores in zip(metrics, found, strict=True):
        differences = paired_differences(scores, 0, seed=settings.seed)
        for name, value, difference in zip(names, scores.values, differences, strict=True):
            results.append(Evaluated(name, metric, float(value), difference, scores.n_examples))
    run.write_json("metrics.json", [dataclasses.asdict(result) for result in results])
    run.finish()
    return EvalResult(out, results)


def _check(names: list[str], metrics: Sequence[str], settings: EvalSettings) -> None:
    if len(set(names)) < len(names):
        raise SettingsError(f"An adapter is named twice: {', '.join(names)}. Name each once.")
    if not metrics:
        raise SettingsError("No metrics. Pass at least one, such as loss.")
    if len(set(metrics)) < len(metrics):
        raise SettingsError(f"A metric is named twice: {', '.join(metrics)}. Name each once.")
    for metric in metrics:
        metric_named(metric)
    if names == [BASE] and settings.model.model is None:
        raise SettingsError("Nothing to measure. Pass adapter folders, or a base model (--model).")


def _scores_of_prompts(
    run: RunFolder,
    settings: EvalSettings,
    examples: Sequence[Example],
    metrics: Sequence[str],
    sources: _Sources,
    say: Callable[[str], None],
) -> list[Scores]:
    """Every metric on prompts or labelled texts.

    An adapter goes on the base model that is loaded already, where it is of that one, and has no head of its own.
    """
    meter, before, variants = None, "", {}
    for name in sorted(sources, key=lambda name: name != BASE):
        say(f"Measuring {name} on {len(examples)} examples.")
        folder, model = sources[name]
        source = base_of(folder, model)
        if meter is None:
            meter = Meter(load(folder and folder.path, model), run, settings.reading, settings.generation, say)
            meter.add(DATA, examples)
            meter.use(meter.loaded, name)
        elif folder is not None and source == before and meter.loaded.task in ("causal", "seq2seq"):
            meter.use(swap(meter.loaded, folder), name)
        else:
            meter.release()
            gc.collect()  # a model refers to itself in circles; two base models may not fit into memory
            meter.use(load(folder and folder.path, model), name)
        before, variants[name] = source, dataclasses.replace(meter.full, label=name)
        for metric in metrics:
            meter.scores(metric, [variants[name]], DATA)
    assert meter is not None
    return [meter.scores(metric, [variants[name] for name in sources], DATA) for metric in metrics]


def _scores_of_questions(
    run: RunFolder,
    settings: EvalSettings,
    questions: Sequence[Question],
    metrics: Sequence[str],
    sources: _Sources,
    say: Callable[[str], None],
) -> list[Scores]:
    """Every metric on questions, from what is written down of one adapter after the other."""
    of_texts = [metric for metric in metrics if metric_named(metric).needs_text]
    for name in sorted(sources, key=lambda name: name != BASE):
        say(f"Measuring {name} on {len(questions)} examples.")
        folder, model = sources[name]
        loaded = load(folder and folder.path, model, "question-answering")
        if name == BASE and not (loaded.model.config.architectures or [""])[0].endswith("ForQuestionAnswering"):
            say("The base model has no trained head for questions: the numbers are those of a random one.")
        _find_answers(run, loaded, questions, name, of_texts, settings.reading, say)
        del loaded
        gc.collect()  # a model refers to itself in circles; two base models may not fit into memory
    files = from_main_process(lambda: [run.rows(file) for file in _FOUND])
    losses, texts = ({(row["adapter"], row["example"]): row for row in rows} for rows in files)

    def column(key: str) -> list[list[Any]]:
        table = texts if key == "text" else losses
        return [[table[name, one.index][key] for one in questions] for name in sources]

    references = [one.references for one in questions]
    return [
        text_scores(metric, column("text"), references)
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
    threshold = None if all(question.answers for question in questions) else 0.0
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
            found = {"text": text} | text_columns(metrics, text, question.references)
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
