"""Evaluation from start to end: several adapters on the same test examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lorazor.adapter.find import base_of
from lorazor.adapter.folder import AdapterFolder
from lorazor.adapter.head import names_in
from lorazor.adapter.load import load
from lorazor.data.examples import Example
from lorazor.data.labels import numbered
from lorazor.data.questions import Question
from lorazor.errors import SettingsError
from lorazor.fields import with_fields
from lorazor.measure.metrics import metric_named
from lorazor.measure.results import Evaluated
from lorazor.measure.stats import Scores, paired_differences
from lorazor.settings import EvalSettings
from lorazor.workflow.comparison import BASE, Compared, scores_of
from lorazor.workflow.opening import Adapter, Opened, opened
from lorazor.workflow.reading import Source, read_for, source_name, start_run, write_examples

LIVE = "a model in memory"


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
    adapters: Adapter | Sequence[Adapter],
    data: Source,
    *,
    out: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: EvalSettings | None = None,
    resume: bool = False,
    say: Callable[[str], None] = lambda message: None,
    **fields: Any,
) -> EvalResult:
    """Measure adapters on the same examples and compare each with the first, paired.

    Args:
        adapters: adapter folders, hub ids, or one PEFT model in memory, alone or in a list; an empty list measures the
            base model alone.
        data: test examples: a file, a dataset folder, a hub name, or the examples themselves.
        out: the run folder; new, unless `resume`. If left out, a temporary one, which the result names and which stays.
            It receives `examples.jsonl`, `losses.jsonl`, `predictions.jsonl`, `metrics.json`.
        tokenizer: of a model in memory; if left out, that of the base model that its adapter names.
        settings: everything else.
        resume: go on with an interrupted run in `out`.
        say: receives messages for people.
        fields: of `EvalSettings`, in place of those of `settings`.
    Raises:
        LorazorError: settings, adapters, data or output folder cannot be used; before a model is loaded.
    """
    settings = with_fields(EvalSettings, settings, fields)
    metrics = [name.strip() for name in settings.metrics.split(",") if name.strip()]
    adapters = [adapters] if isinstance(adapters, str | Path | PeftModel) else adapters
    names = [one if isinstance(one, str) else str(one) if isinstance(one, Path) else LIVE for one in adapters]
    names += [BASE] if settings.base or not adapters else []
    _check(names, metrics, settings)
    with ExitStack() as stack:
        found = [
            stack.enter_context(
                opened(one, settings.model, tokenizer if isinstance(one, PeftModel) or LIVE not in names else None)
            )
            for one in adapters
        ]
        sources = {name: Compared(one.base, one.load, one.folder) for name, one in zip(names, found, strict=False)}
        if BASE in names:
            sources[BASE] = _base_alone(found, settings)
        folders = {name: one.folder for name, one in zip(names, found, strict=False)}
        examples = _numbered(read_for(folders, data, settings.reading, metrics), folders)
        everything = dataclasses.asdict(settings) | {"adapters": names, "data": source_name(data)}
        everything |= {"in_memory": [one.name for one in found if one.live is not None]}
        inputs = {"data": data} | {name: one.folder.place for name, one in zip(names, found, strict=False)}
        run = start_run(out, "eval", everything, inputs, resume)
        say = run.noting(say)
        write_examples(run, examples)
        columns = scores_of(run, settings.reading, settings.generation, examples, metrics, sources, say)
    results = [one for metric, own in zip(metrics, columns, strict=True) for one in _rows(names, metric, own, settings)]
    run.write_json("metrics.json", [dataclasses.asdict(result) for result in results])
    run.finish()
    return EvalResult(run.path, results)


def _numbered(
    examples: list[Example] | list[Question], folders: Mapping[str, AdapterFolder]
) -> list[Example] | list[Question]:
    """Number labels that are names alone by the first adapter that has names: the base model has none of its own."""
    texts = [one for one in examples if isinstance(one, Example) and one.is_labelled and one.label is None]
    named = next(((name, own) for name, folder in folders.items() if (own := names_in(folder))), None)
    return numbered(texts, named[1], 1 + max(named[1]), named[0]) if texts and named else examples


def _rows(names: Sequence[str], metric: str, scores: Scores, settings: EvalSettings) -> list[Evaluated]:
    """One metric of every adapter, and its paired difference to the first."""
    rows = zip(names, scores.values, paired_differences(scores, 0, seed=settings.seed), strict=True)
    return [Evaluated(name, metric, float(value), difference, scores.n_examples) for name, value, difference in rows]


def _base_alone(found: Sequence[Opened], settings: EvalSettings) -> Compared:
    """The base model: that of the settings, or else the first adapter's."""
    if found:
        return Compared(found[0].base, found[0].load_base)
    return Compared(base_of(None, settings.model), partial(load, None, settings.model))


def _check(names: list[str], metrics: Sequence[str], settings: EvalSettings) -> None:
    if len(set(names)) < len(names):
        raise SettingsError(
            f"An adapter is named twice: {', '.join(names)}. Name each once; of models in memory, pass one at a time."
        )
    if not metrics:
        raise SettingsError("No metrics. Pass at least one, such as loss.")
    if len(set(metrics)) < len(metrics):
        raise SettingsError(f"A metric is named twice: {', '.join(metrics)}. Name each once.")
    for metric in metrics:
        metric_named(metric)
    if names == [BASE] and settings.model.model is None:
        raise SettingsError("Nothing to measure. Pass adapter folders, or a base model (--model).")
