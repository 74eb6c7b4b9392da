"""Examples read as the settings say, and checked before anything long begins."""

from __future__ import annotations

from collections.abc import Sequence

from lorazor.adapter.load import Loaded
from lorazor.data.batches import make_batches
from lorazor.data.examples import Columns, Example, read_examples
from lorazor.errors import SettingsError
from lorazor.measure.metrics import metric_named, text_scores
from lorazor.settings import DataSettings


def read(source: str, reading: DataSettings, metrics: Sequence[str] = ()) -> list[Example]:
    """Read a data set, and see that the metrics can be computed on it.

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


def check_fits(loaded: Loaded, examples: Sequence[Example], reading: DataSettings) -> None:
    """Raise DataError if an example cannot be made into tokens, such as an answer longer than the context."""
    start = loaded.model.config.to_dict().get("decoder_start_token_id")
    make_batches(examples, loaded.tokenizer, loaded.task, reading.batch_size, reading.max_length, start)
