"""The sweep: the loss of every boundary on every example.

Boundary b keeps the sites of the first b layers of a stack and silences the others: b = L is the full adapter, b = 0
the base model (with the sites outside the stack, which stay on).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import PreTrainedModel

from lorazor.adapter.load import Loaded
from lorazor.adapter.sites import LiveSite, choose_stack, stack_sizes
from lorazor.data.batches import Batch, make_batches
from lorazor.data.examples import Example
from lorazor.errors import MeasureError, SettingsError
from lorazor.measure.engines import choose_engine, naive_losses, on_model, one_pass_losses
from lorazor.measure.metrics import teacher_forced_scores
from lorazor.measure.sharding import measure_sharded
from lorazor.measure.stats import Scores

Engine = Literal["auto", "one-pass", "naive"]


@dataclass(frozen=True)
class SweepRow:
    """One line of `sweep.jsonl`: one example at one boundary.

    Attributes:
        example: index of the example in its file.
        boundary: layers that keep their LoRA.
        nll_nats: summed negative log-likelihood of the answer tokens.
        n_tokens: answer tokens.
        n_correct: answer tokens predicted right.
    """

    example: int
    boundary: int
    nll_nats: float
    n_tokens: int
    n_correct: int


@dataclass(frozen=True)
class Sweep:
    """The sweep as arrays; the last boundary is the full adapter.

    Attributes:
        boundaries: ascending, length n_boundaries.
        examples: indices of the examples, ascending, length n_examples.
        nll_nats: shape (n_boundaries, n_examples), float64.
        n_tokens: shape (n_examples,), int64.
        n_correct: shape (n_boundaries, n_examples), int64.
    """

    boundaries: tuple[int, ...]
    examples: tuple[int, ...]
    nll_nats: np.ndarray
    n_tokens: np.ndarray
    n_correct: np.ndarray

    def scores(self, metric: str = "loss") -> Scores:
        """One teacher-forced metric of every boundary: `loss`, `token-accuracy` or `accuracy`."""
        return teacher_forced_scores(metric, self.nll_nats, self.n_tokens, self.n_correct)


def collect_sweep(rows: Iterable[SweepRow]) -> Sweep:
    """Arrange sweep rows, in any order, as arrays.

    Raises:
        MeasureError: an example lacks a boundary that another has.
    """
    table = {(row.boundary, row.example): row for row in rows}
    boundaries = sorted({boundary for boundary, _ in table})
    examples = sorted({example for _, example in table})
    for boundary in boundaries:
        for example in examples:
            if (boundary, example) not in table:
                raise MeasureError(f"The sweep has no row for example {example} at boundary {boundary}. Run it again.")

    def arrange(field: str, dtype: type) -> np.ndarray:
        return np.array([[getattr(table[b, e], field) for e in examples] for b in boundaries], dtype=dtype)

    return Sweep(
        boundaries=tuple(boundaries),
        examples=tuple(examples),
        nll_nats=arrange("nll_nats", np.float64),
        n_tokens=arrange("n_tokens", np.int64)[0],
        n_correct=arrange("n_correct", np.int64),
    )


def sweep(
    loaded: Loaded,
    examples: Sequence[Example],
    boundaries: Sequence[int] | None = None,
    *,
    stack: str | None = None,
    engine: Engine = "auto",
    batch_size: int = 8,
    max_length: int | None = None,
    known: Iterable[SweepRow] = (),
    on_rows: Callable[[list[SweepRow]], None] = lambda rows: None,
    on_message: Callable[[str], None] = lambda message: None,
    label: str | None = None,
) -> Sweep:
    """Measure the loss of every boundary on every example, shared between the processes of `accelerate launch`.

    Args:
        loaded: model, tokenizer and sites.
        examples: prompts with answers, or labelled texts.
        boundaries: which to measure; all of 0..L if left out.
        stack: the stack the boundary runs through; the only one, or the decoder, if left out.
        engine: `auto` tries `one-pass` against `naive` on the first batch.
        batch_size: examples per forward pass.
        max_length: tokens of prompt and answer; longer prompts lose their start.
        known: rows of an interrupted sweep, which are not measured again.
        on_rows: receives rows as they are measured.
        on_message: receives the engine that is used and the number of truncated prompts.
        label: text of a progress bar on stderr; none if left out.
    Raises:
        DataError: an example that cannot be used.
        MeasureError: a loss is not a number.
        SettingsError: a model for question answering.
    """
    if loaded.task == "question-answering":
        raise SettingsError("No boundary of question answering is measured. Compare adapters with 'lorazor eval'.")
    stack = choose_stack(loaded.sites, stack)
    n_layers = stack_sizes(loaded.sites)[stack]
    boundaries = sorted(set(range(n_layers + 1) if boundaries is None else boundaries))
    rows = [row for row in known if row.boundary in boundaries]
    n_measured = {example.index: 0 for example in examples}
    for row in rows:
        n_measured[row.example] += 1
    missing = [example for example in examples if n_measured[example.index] < len(boundaries)]
    if not missing:
        return collect_sweep(rows)
    encoding = make_batches(missing, loaded.tokenizer, loaded.task, batch_size, max_length, loaded.decoder_inputs)
    if encoding.n_truncated:
        on_message(f"{encoding.n_truncated} of {len(missing)} prompts lost their start to fit into the context.")
    if engine == "auto":
        first = on_model(loaded.model, encoding.batches[0], stack)
        engine, reason = choose_engine(loaded.model, loaded.sites, first, stack, boundaries)
        on_message(f"engine {engine}: {reason}")

    def measure_batch(batch: Batch) -> list[SweepRow]:
        return sweep_batch(loaded.model, loaded.sites, batch, stack, boundaries, engine)

    return collect_sweep([*rows, *measure_sharded(encoding.batches, measure_batch, on_rows, label)])


def sweep_batch(
    model: PreTrainedModel,
    sites: Sequence[LiveSite],
    batch: Batch,
    stack: str,
    boundaries: Sequence[int],
    engine: Engine,
) -> list[SweepRow]:
    """Measure one batch at every boundary.

    Args:
        model: the base model that carries the sites, in evaluation mode.
        sites: all sites of the adapter; those outside the stack stay on.
        batch: from `make_batches`.
        stack: name of the stack, `model.layers`.
        boundaries: any of 0..L.
        engine: `one-pass` or `naive`.
    Raises:
        MeasureError: a loss is not a number; the message names the example.
    """
    measure = one_pass_losses if engine == "one-pass" else naive_losses
    losses = measure(model, sites, on_model(model, batch, stack), stack, boundaries)
    rows = [
        SweepRow(example, boundary, float(nll), int(n_tokens), int(n_correct))
        for boundary in sorted(losses)
        for example, nll, n_tokens, n_correct in zip(
            batch.indices,
            losses[boundary].nll_nats,
            losses[boundary].n_tokens,
            losses[boundary].n_correct,
            strict=True,
        )
    ]
    for row in rows:
        if not np.isfinite(row.nll_nats):
            raise MeasureError(
                f"The loss of example {row.example} at boundary {row.boundary} is {row.nll_nats}. "
                "Check the adapter for NaN weights, or measure in float32 (--dtype float32)."
            )
    return rows
