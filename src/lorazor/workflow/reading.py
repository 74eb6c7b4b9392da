"""Examples read as the settings say, and checked before anything long begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from lorazor.data.examples import Columns, Example, asked, read_examples
from lorazor.errors import SettingsError
from lorazor.measure.metrics import metric_named, text_scores
from lorazor.runs import RunFolder
from lorazor.settings import DataSettings

EXAMPLES_FILE = "examples.jsonl"


def read_sets(
    reading: DataSettings, metrics: Sequence[str], sources: Mapping[str, str | None]
) -> tuple[list[Example], ...]:
    """Read the data sets of a command, of which no two may share a prompt.

    Args:
        reading: how to read them.
        metrics: what is to be computed.
        sources: by what the command line calls them; None is an empty set.
    Raises:
        DataError, SettingsError, MeasureError: see `read` and `check_held_out`.
    """
    sets = {name: [] if source is None else read(source, reading, metrics) for name, source in sources.items()}
    given = {name: (sources[name], examples) for name, examples in sets.items() if sources[name] is not None}
    check_held_out(dict(reversed(given.items())))
    return tuple(sets.values())


def read(source: str, reading: DataSettings, metrics: Sequence[str] = ()) -> list[Example]:
    """Read a data set of prompts or labelled texts, and see that the metrics can be computed on it.

    Raises:
        DataError: the data cannot be used; see `read_examples`.
        SettingsError: a metric of labels for texts, or of texts for labels.
        MeasureError: a metric cannot be computed from these references.
    """
    columns = Columns(reading.prompt_column, reading.completion_column)
    examples = read_examples(source, columns, reading.split, reading.limit)
    is_labelled = examples[0].is_labelled
    for metric in metrics:
        if is_labelled and metric_named(metric).needs_text:
            raise SettingsError(f"metric={metric!r} needs answers in text, but {source!r} has labels. Pass accuracy.")
        if not is_labelled and metric == "accuracy":
            raise SettingsError(f"metric='accuracy' needs labels, but {source!r} has answers. Pass token-accuracy.")
        if metric_named(metric).needs_text:
            text_scores(metric, [[""] * len(examples)], [example.references for example in examples])
    return examples


def write_examples(run: RunFolder, examples: Sequence[Example]) -> None:
    """Write the examples that a run compares adapters on to its `examples.jsonl`, as text that people can read.

    A chat is written as its messages, each after its role.

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
                "label": one.label,
            }
            for one in examples
        ],
    )


def prompt_text(example: Example) -> str:
    """What an example asks, as text without a template."""
    if isinstance(example.prompt, str):
        return example.prompt
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
