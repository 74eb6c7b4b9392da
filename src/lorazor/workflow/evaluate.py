"""Evaluation from start to end: several adapters on the same test examples."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lorazor.adapter.folder import AdapterFolder, read_adapter
from lorazor.adapter.load import Loaded, base_of, find_adapter, load, swap
from lorazor.adapter.parts import Parts
from lorazor.data.examples import Example
from lorazor.data.questions import Question
from lorazor.errors import SettingsError
from lorazor.measure.meter import DATA, Meter, Variant
from lorazor.measure.metrics import metric_named, teacher_forced_scores, text_scores
from lorazor.measure.results import Evaluated
from lorazor.measure.sharding import from_main_process
from lorazor.measure.stats import Scores, paired_differences
from lorazor.runs import RunFolder
from lorazor.settings import EvalSettings, ModelSettings
from lorazor.workflow.reading import check_fits, read_for, write_examples
from lorazor.workflow.starting import start_run
from lorazor.workflow.texts import find_answers

BASE = "base"


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
    questions = [one for one in examples if isinstance(one, Question)]
    if questions:
        work: _Prompts | _Questions = _Questions(run, settings, questions, metrics, say)
    else:
        work = _Prompts(run, settings, [one for one in examples if isinstance(one, Example)], metrics, say)
    for name in sorted(names, key=lambda name: name != BASE):  # the base model before anything is put on it
        say(f"Measuring {name} on {len(examples)} examples.")
        work.measure(name, adapter_folders.get(name), model if name == BASE else settings.model)
    results = _compare(names, metrics, work, settings.seed)
    run.write_json("metrics.json", [dataclasses.asdict(result) for result in results])
    run.finish()
    return EvalResult(out, results)


def _compare(names: Sequence[str], metrics: Sequence[str], work: _Prompts | _Questions, seed: int) -> list[Evaluated]:
    """Every metric of every adapter, and its paired difference to the first."""
    results = []
    for metric in metrics:
        scores = work.scores(metric, names)
        differences = paired_differences(scores, 0, seed=seed)
        for name, value, difference in zip(names, scores.values, differences, strict=True):
            results.append(Evaluated(name, metric, float(value), difference, scores.n_examples))
    return results


def _has_head(loaded: Loaded) -> bool:
    return (loaded.model.config.architectures or [""])[0].endswith("ForQuestionAnswering")


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


@dataclass
class _Prompts:
    """An evaluation on prompts or labelled texts: one base model, on which the adapters take turns."""

    run: RunFolder
    settings: EvalSettings
    examples: Sequence[Example]
    metrics: list[str]
    say: Callable[[str], None]
    meter: Meter | None = None
    source: str = ""
    variants: dict[str, Variant] = field(default_factory=dict)

    def measure(self, name: str, folder: AdapterFolder | None, model: ModelSettings) -> None:
        """Losses, and answers if a metric needs them, of one adapter or of the base model alone."""
        loaded = self._loaded(folder, model)
        parts = Parts(tuple(loaded.sites))
        if self.meter is None:
            settings = self.settings
            self.meter = Meter(loaded, parts, self.run, settings.reading, settings.generation, self.say)
            self.meter.add(DATA, self.examples)
        self.meter.use(loaded, parts, name)
        self.variants[name] = Variant(name, torch.ones(len(parts)), name)
        for metric in self.metrics:
            self.meter.scores(metric, [self.variants[name]], DATA)

    def scores(self, metric: str, names: Sequence[str]) -> Scores:
        """One metric of the named adapters."""
        assert self.meter is not None
        return self.meter.scores(metric, [self.variants[name] for name in names], DATA)

    def _loaded(self, folder: AdapterFolder | None, model: ModelSettings) -> Loaded:
        """The adapter on the base model that is loaded already, where it is of that one, and has no head of its own."""
        source = base_of(folder, model)
        before, self.source = self.source, source
        if self.meter is not None and folder is not None and source == before:
            loaded = self.meter.loaded
            if loaded.task in ("causal", "seq2seq"):
                return swap(loaded, folder)
        if self.meter is not None:
            self.meter.release()
            gc.collect()  # a model refers to itself in circles; two base models may not fit into memory
        return load(folder and folder.path, model)


@dataclass
class _Questions:
    """An evaluation on questions, one adapter after the other."""

    run: RunFolder
    settings: EvalSettings
    examples: Sequence[Question]
    metrics: list[str]
    say: Callable[[str], None]

    def measure(self, name: str, folder: AdapterFolder | None, model: ModelSettings) -> None:
        """Losses and answers of one adapter, or of the base model alone."""
        loaded = load(folder and folder.path, model, "question-answering")
        check_fits(loaded, self.examples, self.settings.reading)
        if name == BASE and not _has_head(loaded):
            self.say("The base model has no trained head for questions: the numbers are those of a random one.")
        text_metrics = [metric for metric in self.metrics if metric_named(metric).needs_text]
        find_answers(self.run, loaded, self.examples, name, text_metrics, self.settings.reading, self.say)
        gc.collect()  # a model refers to itself in circles; two base models may not fit into memory

    def scores(self, metric: str, names: Sequence[str]) -> Scores:
        """One metric of the named adapters, from what was written."""
        needs_text = metric_named(metric).needs_text
        rows = from_main_process(lambda: self.run.rows("predictions.jsonl" if needs_text else "losses.jsonl"))
        table = {(row["adapter"], row["example"]): row for row in rows}

        def column(key: str) -> list[list[Any]]:
            return [[table[name, one.index][key] for one in self.examples] for name in names]

        if needs_text:
            return text_scores(metric, column("text"), [one.references for one in self.examples])
        return teacher_forced_scores(metric, column("nll_nats"), column("n_tokens")[0], column("n_correct"))
