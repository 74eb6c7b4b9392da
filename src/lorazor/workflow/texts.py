"""Generated answers of several variants, kept in a run folder and scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lorazor.adapter.load import Loaded
from lorazor.data.batches import PromptBatch, make_prompt_batches
from lorazor.data.examples import Example
from lorazor.measure.generation import generate_batch
from lorazor.measure.metrics import text_scores
from lorazor.measure.sharding import from_main_process, measure_sharded
from lorazor.measure.stats import Scores
from lorazor.runs import RunFolder
from lorazor.settings import DataSettings, GenerationSettings


def write_answers(
    run: RunFolder,
    file: str,
    loaded: Loaded,
    examples: Sequence[Example],
    variants: dict[Any, Tensor],
    key: str,
    metrics: Sequence[str],
    reading: DataSettings,
    generation: GenerationSettings,
    say: Callable[[str], None],
) -> dict[Any, dict[int, str]]:
    """Generate the answers of every variant to every example, and append them to a file of the run.

    Args:
        run: where the answers go; answers already there are not written again.
        file: name of the JSONL file.
        loaded: model, tokenizer, sites.
        examples: the prompts, with references.
        variants: gates of each variant, shape (n_sites,), by the name it has in the file.
        key: what the file calls a variant, `boundary` or `adapter`.
        metrics: text metrics to note beside each answer.
        reading: batch size and length limits.
        generation: length of the answers.
        say: receives messages.
    Returns:
        The text of each example, by variant and example index.
    """
    import torch

    names = list(variants)
    texts: dict[Any, dict[int, str]] = {name: {} for name in names}
    references = {example.index: example.references for example in examples}
    for row in from_main_process(lambda: run.rows(file)):
        texts.get(row[key], {})[row["example"]] = row["text"]
    missing = [example for example in examples if any(example.index not in texts[name] for name in names)]
    if not missing:
        return texts
    encoding = make_prompt_batches(
        missing, loaded.tokenizer, loaded.task, reading.batch_size, reading.max_length, generation.max_new_tokens
    )
    if encoding.n_truncated:
        say(f"{encoding.n_truncated} of {len(missing)} prompts lost their start to fit into the context.")
    gates = torch.stack([variants[name] for name in names])

    def generate(prompts: PromptBatch) -> list[dict[str, Any]]:
        return [
            {"example": one.example, key: names[one.variant], "text": one.text}
            | {metric: _score(metric, one.text, references[one.example]) for metric in metrics}
            for one in generate_batch(loaded, prompts, gates, generation.max_new_tokens)
        ]

    rows = measure_sharded(encoding.batches, generate, lambda rows: run.append(file, rows), f"writing {file}")
    for row in rows:
        texts[row[key]][row["example"]] = row["text"]
    return texts


def score_texts(
    metric: str, texts: dict[Any, dict[int, str]], names: Sequence[Any], examples: Sequence[Example]
) -> Scores:
    """One text metric of the named variants on the examples, in that order."""
    columns = [[texts[name][example.index] for example in examples] for name in names]
    return text_scores(metric, columns, [example.references for example in examples])


def _score(metric: str, text: str, references: Sequence[str]) -> float:
    return round(float(text_scores(metric, [[text]], [references]).per_example[0, 0]), 4)
