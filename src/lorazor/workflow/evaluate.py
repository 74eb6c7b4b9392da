"""Evaluation from start to end: several adapters on the same test examples."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorazor.adapter.folder import read_adapter
from lorazor.adapter.load import Loaded, base_of, find_adapter, load
from lorazor.data.examples import Example
from lorazor.data.questions import Question
from lorazor.errors import SettingsError
from lorazor.measure.metrics import metric_named
from lorazor.measure.sharding import from_main_process, is_main_process
from lorazor.measure.stats import Interval, Scores, paired_differences
from lorazor.runs import RunFolder
from lorazor.settings import DataSettings, GenerationSettings, ModelSettings, Tracker
from lorazor.tracking import Point, check_tracker, track
from lorazor.workflow.losses import loss_scores, measure_losses
from lorazor.workflow.reading import check_fits, read_for, write_examples
from lorazor.workflow.starting import start_run
from lorazor.workflow.texts import find_answers, score_texts, write_answers

BASE = "base"


@dataclass(frozen=True)
class Evaluated:
    """One metric of one adapter.

    Attributes:
        adapter: the adapter as given; `base` is the base model alone.
        metric: name of the metric.
        value: on all examples.
        difference: to the first adapter, paired, with a 95 % interval.
        n_examples: examples.
    """

    adapter: str
    metric: str
    value: float
    difference: Interval
    n_examples: int


@dataclass(frozen=True)
class EvaluationSettings:
    """All settings of an evaluation, by topic."""

    model: ModelSettings = ModelSettings()
    reading: DataSettings = DataSettings()
    generation: GenerationSettings = GenerationSettings()
    seed: int = 0


def evaluate(
    adapters: Sequence[str | Path],
    data: str,
    metrics: Sequence[str],
    out: str | Path,
    settings: EvaluationSettings | None = None,
    with_base: bool = False,
    resume: bool = False,
    say: Callable[[str], None] = lambda message: None,
    tracker: Tracker = "none",
) -> list[Evaluated]:
    """Measure adapters on the same examples and compare each with the first, paired.

    Args:
        adapters: adapter folders or hub ids; none measures the base model alone.
        data: test examples.
        metrics: names of metrics.
        out: the run folder; new, unless `resume`. It receives `examples.jsonl`, `losses.jsonl`,
            `predictions.jsonl`, `metrics.json`.
        settings: everything else.
        with_base: also measure the base model without an adapter.
        resume: go on with an interrupted run.
        say: receives messages for people.
        tracker: where to log the metrics, when all is done.
    Raises:
        LorazorError: settings, adapters, data or output folder cannot be used; before a model is loaded.
    """
    check_tracker(tracker)
    settings, out = settings or EvaluationSettings(), Path(out)
    names = [str(adapter) for adapter in adapters] + ([BASE] if with_base or not adapters else [])
    _check(names, metrics, settings)
    adapter_folders = {name: read_adapter(find_adapter(name)) for name in names if name != BASE}
    folders = {name: folder.path for name, folder in adapter_folders.items()}
    examples = read_for(adapter_folders, data, settings.reading, metrics)
    everything = dataclasses.asdict(settings) | {"adapters": names, "data": data, "metrics": list(metrics)}
    inputs: dict[str, Path | None] = {"data": Path(data), **folders}
    run = start_run(out, "eval", everything, inputs, resume)
    if not is_main_process():
        say = _silent
    work = _Work(run, settings, examples, list(metrics), say)
    model = settings.model
    if model.model is None and BASE in names and folders:  # the base model is the first adapter's
        model = dataclasses.replace(model, model=base_of(next(iter(adapter_folders.values())), model))
    for name in names:
        if name != names[0]:
            gc.collect()  # a model may refer to itself in circles, and two base models may not fit into memory
        work.measure(name, folders.get(name), model)
    results = work.compare(names)
    run.write_json("metrics.json", [dataclasses.asdict(result) for result in results])
    track(run, tracker, _headline(results))
    run.finish()
    return results


def _headline(results: Sequence[Evaluated]) -> list[Point]:
    return [(0, {f"{one.metric}/{one.adapter.strip('/')}": one.value for one in results})]


def _has_head(loaded: Loaded) -> bool:
    return (loaded.model.config.architectures or [""])[0].endswith("ForQuestionAnswering")


def _silent(message: str) -> None:
    """Say nothing: of several processes, only the main one talks."""


def _check(names: list[str], metrics: Sequence[str], settings: EvaluationSettings) -> None:
    if len(set(names)) < len(names):
        raise SettingsError(f"An adapter is named twice: {', '.join(names)}. Name each once.")
    if not metrics:
        raise SettingsError("No metrics. Pass at least one, such as loss.")
    for metric in metrics:
        metric_named(metric)
    if names == [BASE] and settings.model.model is None:
        raise SettingsError("Nothing to measure. Pass adapter folders, or a base model (--model).")


@dataclass(frozen=True)
class _Work:
    """The measuring part of an evaluation."""

    run: RunFolder
    settings: EvaluationSettings
    examples: Sequence[Example | Question]
    metrics: list[str]
    say: Callable[[str], None]

    @property
    def text_metrics(self) -> list[str]:
        return [metric for metric in self.metrics if metric_named(metric).needs_text]

    def measure(self, name: str, folder: Path | None, model: ModelSettings) -> None:
        """Load one adapter, or the base model alone, and measure it; nothing refers to it afterwards."""
        self.say(f"Measuring {name} on {len(self.examples)} examples.")
        task = "question-answering" if isinstance(self.examples[0], Question) else None
        loaded = load(folder, model, task)
        check_fits(loaded, self.examples, self.settings.reading)
        write_examples(self.run, self.examples)
        if task and name == BASE and not _has_head(loaded):
            self.say("The base model has no trained head for questions: the numbers are those of a random one.")
        self._measure_loaded(name, loaded)

    def _measure_loaded(self, name: str, loaded: Loaded) -> None:
        """Losses, and answers if a metric needs them."""
        questions = [example for example in self.examples if isinstance(example, Question)]
        if questions:
            find_answers(self.run, loaded, questions, name, self.text_metrics, self.settings.reading, self.say)
            return
        examples = [example for example in self.examples if isinstance(example, Example)]
        if len(self.text_metrics) < len(self.metrics):
            measure_losses(self.run, "losses.jsonl", loaded, examples, name, self.settings.reading, self.say)
        if self.text_metrics:
            variants = {name: torch.ones(len(loaded.sites))}
            write_answers(
                self.run,
                "predictions.jsonl",
                loaded,
                examples,
                variants,
                "adapter",
                self.text_metrics,
                self.settings.reading,
                self.settings.generation,
                self.say,
            )

    def compare(self, names: list[str]) -> list[Evaluated]:
        """Every metric of every adapter, and its paired difference to the first."""
        results = []
        for metric in self.metrics:
            scores = self._scores(metric, names)
            differences = paired_differences(scores, 0, seed=self.settings.seed)
            for name, value, difference in zip(names, scores.values, differences, strict=True):
                results.append(Evaluated(name, metric, float(value), difference, scores.n_examples))
        return results

    def _scores(self, metric: str, names: list[str]) -> Scores:
        if metric in self.text_metrics:
            texts: dict[str, dict[int, str]] = {name: {} for name in names}
            for row in self._rows("predictions.jsonl"):
                texts[row["adapter"]][row["example"]] = row["text"]
            return score_texts(metric, texts, names, self.examples)
        return loss_scores(self.run, "losses.jsonl", metric, names, self.examples)

    def _rows(self, file: str) -> list[dict[str, Any]]:
        return from_main_process(lambda: self.run.rows(file))
