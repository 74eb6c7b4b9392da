"""The meter: variants of one loaded adapter, measured on the same examples, each once.

A variant is a vector of gates. What was measured is known by a hash of gates, examples and settings, never by what
people call it; it is kept in memory and appended to the run folder, and a resumed run measures only what is missing.
Where memory runs out, batches are halved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorazor.adapter.load import Loaded
from lorazor.adapter.parts import Parts
from lorazor.adapter.sites import is_kept
from lorazor.data.batches import Batch
from lorazor.data.examples import Example
from lorazor.errors import DataError, MeasureError
from lorazor.measure.engines import choose_engine, failure, on_model, one_pass_losses
from lorazor.measure.generation import generate_batch
from lorazor.measure.labels import LABEL_METRICS, label_scores
from lorazor.measure.losses import RowLosses, row_losses
from lorazor.measure.measured import ExampleSet, Measured, Rows, Variant, for_head
from lorazor.measure.metrics import metric_named, teacher_forced_scores, text_scores
from lorazor.measure.sharding import Fitting, is_out_of_memory, measure_sharded
from lorazor.measure.stats import Scores
from lorazor.runs import RunFolder
from lorazor.settings import DataSettings, GenerationSettings

DATA, CONFIRM, HEAL = "data", "confirm", "heal"
"""Names of sets: the examples that choices are made on, those that they are judged on, and prompts to heal on."""

_DECODED_TOGETHER = 8
"""Rows of a decoding batch per row of a batch for losses: a step reads one token of each."""
_LOSSES, _DECODING = "losses", "decoding"
"""Kinds of work whose batch sizes differ."""


class Meter:
    """Measures variants of a loaded adapter on sets of examples, shared between processes; see the module.

    Attributes:
        loaded: the model.
        parts: what the gates are on, those of its sites.
        adapter: which adapter is on the model.
        say: receives messages.
    """

    def __init__(
        self,
        loaded: Loaded,
        run: RunFolder,
        reading: DataSettings,
        generation: GenerationSettings,
        say: Callable[[str], None],
    ) -> None:
        """Use `add` next.

        Raises:
            OutputError: the run began with other weights of the base model.
        """
        self.say, self._run = say, run
        self._reading, self._generation, self._say_once = reading, generation, cache(say)
        self._fitting = Fitting({_LOSSES: reading.batch_size, _DECODING: reading.batch_size * _DECODED_TOGETHER})
        self._sets: dict[str, ExampleSet] = {}
        self.loaded = loaded
        self.use(loaded, "")

    def add(self, name: str, examples: Sequence[Example], prefix: str = "", has_answers: bool = True) -> None:
        """Make examples known, and into tokens.

        Args:
            name: for the other methods.
            examples: prompts with answers, or labelled texts.
            prefix: what the names of the files begin with, `confirm-`.
            has_answers: False for prompts alone, of which only `answers` is asked.
        Raises:
            DataError: an example that cannot be used with this model, such as one of a class that its head lacks.
        """
        if not examples:
            return
        if self.loaded.task == "question-answering":
            raise DataError("The model answers questions, and the data has none with contexts. Pass other data.")
        examples = for_head(self.loaded, examples)
        self._sets[name] = ExampleSet(self._run, prefix, examples, self._reading, self._generation, self.say)
        if has_answers:
            self.batches(name)

    def use(self, loaded: Loaded, adapter: str) -> None:
        """Go on with another adapter, or the same one in another basis; what was measured stays known.

        Args:
            loaded: the model with the adapter on it.
            adapter: tells its variants from those of the others.

        Raises:
            OutputError: the run began with other weights of the base model.
            DataError: its head lacks a class of the examples, or numbers them otherwise.
        """
        for own in self._sets.values():
            if for_head(loaded, own.examples) != own.examples:
                raise DataError(
                    f"{adapter} numbers its classes otherwise than the adapter before. Measure the two one by one."
                )
        note_base(self._run, loaded, self._say_once)
        if loaded.tokenizer is not self.loaded.tokenizer:
            for own in self._sets.values():
                own.forget()
        self.loaded, self.parts, self.adapter = loaded, Parts(tuple(loaded.sites)), adapter

    def release(self) -> None:
        """Forget the model, so that another one fits into memory; `use` comes next."""
        for own in self._sets.values():
            own.forget()  # its batches ask the model what its decoder reads
        self.loaded = dataclasses.replace(self.loaded, model=cast(PreTrainedModel, None), sites=[], peft_model=None)
        self.parts = Parts(())

    @property
    def full(self) -> Variant:
        """All of the adapter."""
        return Variant("full", torch.ones(len(self.parts)), self.adapter)

    @property
    def base(self) -> Variant:
        """None of the adapter, but for a trained head."""
        return Variant("base", torch.zeros(len(self.parts)), self.adapter)

    def examples(self, of: str) -> Sequence[Example]:
        """The examples of a set; none of one that was not added."""
        return self._sets[of].examples if of in self._sets else ()

    def batches(self, of: str, batch_size: int | None = None, about: int | None = None) -> list[Batch]:
        """The batches of a set, tokenised once.

        Args:
            of: name of the set.
            batch_size: rows of a batch; that of the settings if left out.
            about: take whole batches of all lengths, of about so many examples together; all if left out.
        """
        size = batch_size or self._reading.batch_size
        batches = self._sets[of].answers(self.loaded).of_size(size)
        n_wanted = len(batches) if about is None else min(len(batches), -(-about // size))
        return [batches[place * len(batches) // n_wanted] for place in range(n_wanted)]

    def scores(self, metric: str, variants: Sequence[Variant], of: str) -> Scores:
        """One metric of variants on a set, measuring what is missing.

        Args:
            metric: its name.
            variants: in the order of the result.
            of: name of the set.
        Raises:
            MeasureError: a loss is not a number.
        """
        examples = self._sets[of].examples
        if metric_named(metric).needs_text:
            rows = self.answers(variants, of, [metric])
            texts = [[own[example.index]["text"] for example in examples] for own in rows]
            references = [example.references for example in examples]
            return text_scores(metric, texts, references, self._generation.bleu_tokenizer)
        rows = self.losses(variants, of)

        def column(name: str) -> list[list[float]]:
            return [[own[example.index][name] for example in examples] for own in rows]

        if metric in LABEL_METRICS:
            return label_scores(metric, column("predicted"), [cast(float, one.label) for one in examples])
        return teacher_forced_scores(metric, column("nll_nats"), column("n_tokens")[0], column("n_correct"))

    def losses(self, variants: Sequence[Variant], of: str) -> list[Rows]:
        """What every variant makes of the answer tokens: rows of `losses.jsonl` by example, one mapping per variant."""
        own, model = self._sets[of], self.loaded.model
        for variant in self._lacking(own.losses, variants)[0]:

            def measure(batch: Batch, variant: Variant = variant) -> list[dict[str, Any]]:
                with self.parts.gated(variant.gates):
                    return _rows(batch, variant, row_losses(model, on_model(model, batch)))

            self._measure_losses(own, [variant], measure, variant.label)
        return [own.losses.rows(variant) for variant in variants]

    def prefixes(self, variants: Mapping[int, Variant], of: str, stack: str, engine: str = "auto") -> None:
        """Measure the losses of boundaries as `losses` would, all of them in one pass where the model allows it.

        Args:
            variants: by boundary: what keeps the first so many layers of the stack.
            of: name of the set.
            stack: the stack.
            engine: "auto", "one-pass" or "naive".
        Raises:
            MeasureError: a loss is not a number, or the model cannot be run in one pass, as it was asked for.
        """
        own, model, sites = self._sets[of], self.loaded.model, list(self.loaded.sites)
        lacking, _ = self._lacking(own.losses, list(variants.values()))
        missing = {boundary: one for boundary, one in sorted(variants.items()) if one in lacking}
        if not missing:
            return
        if engine == "auto":
            engine = self._engine(of, stack, list(missing))
        if engine == "naive":
            self.losses(lacking, of)
            return

        def measure(batch: Batch) -> list[dict[str, Any]]:
            try:
                found = one_pass_losses(model, sites, on_model(model, batch, stack), stack, list(missing))
            except Exception as error:  # a model's own code, run as it was not meant to be, may raise anything
                if is_out_of_memory(error):
                    raise
                raise MeasureError(f"{failure(error)}. Measure with --engine naive.") from error
            return [row for boundary, one in missing.items() for row in _rows(batch, one, found[boundary])]

        self._measure_losses(own, lacking, measure, f"measuring {own.losses.file}")

    def _engine(self, of: str, stack: str, boundaries: Sequence[int]) -> str:
        """The engine that the first batch speaks for, the same in all processes."""
        model, sites = self.loaded.model, list(self.loaded.sites)

        def choose(batch: Batch) -> list[tuple[str, str]]:
            return [choose_engine(model, sites, on_model(model, batch, stack), stack, boundaries)]

        ((engine, reason),) = self._fitting.run(
            _LOSSES, lambda size: measure_sharded(self.batches(of, size)[:1], choose, lambda rows: None)
        )
        self.say(f"engine {engine}: {reason}")
        return engine

    def answers(self, variants: Sequence[Variant], of: str, metrics: Sequence[str] = ()) -> list[Rows]:
        """What every variant writes: rows of `predictions.jsonl` by example; several are decoded in one batch.

        Args:
            variants: in the order of the result.
            of: name of the set.
            metrics: of text, to note beside each answer.
        """
        own, longest = self._sets[of], self._generation.max_new_tokens
        table, references = own.predictions, {one.index: one.references for one in own.examples}
        missing, _ = self._lacking(table, variants)

        def measure(item: tuple[list[Variant], Batch]) -> list[dict[str, Any]]:
            group, prompts = item
            gates = torch.stack([variant.gates for variant in group])
            return [
                {"example": one.example, "adapter": group[one.variant].label, "key": group[one.variant].digest}
                | {"text": one.text}
                | text_columns(metrics, one.text, references[one.example], self._generation.bleu_tokenizer)
                for one in generate_batch(self.loaded, self.parts, prompts, gates, longest, self._say_once)
            ]

        def decode(size: int) -> None:
            n_together = min(size, len(missing))
            groups = [missing[start : start + n_together] for start in range(0, len(missing), n_together)]
            prompts, todo = own.prompts(self.loaded), [self._lacking(table, group) for group in groups]
            work = [(group, one) for group, lost in todo for one in prompts.of_size(size // n_together, lost)]
            measure_sharded(work, measure, table.keep, f"writing {table.file}")

        if missing:
            self._fitting.run(_DECODING, decode)
        return [table.rows(variant) for variant in variants]

    def _measure_losses(
        self, own: ExampleSet, variants: Sequence[Variant], measure: Callable[[Batch], list[dict[str, Any]]], label: str
    ) -> None:
        """Measure the examples that one of the variants lacks, and keep what was measured."""

        def work(size: int) -> None:
            batches = own.answers(self.loaded).of_size(size, self._lacking(own.losses, variants)[1])
            measure_sharded(batches, measure, own.losses.keep, label)

        self._fitting.run(_LOSSES, work)

    def _lacking(self, table: Measured, variants: Sequence[Variant]) -> tuple[list[Variant], set[int]]:
        """Variants that lack an example, each once, and the examples that they lack."""
        missing, lost = table.lacking(variants)
        assert all(one.adapter == self.adapter for one in missing)  # the model has no other
        return missing, lost


def boundary_gates(parts: Parts, stack: str, boundary: int) -> Tensor:
    """(n_parts,), 1 where the boundary keeps the part, else 0."""
    return torch.tensor([float(is_kept(parts.sites[index], stack, boundary)) for index in parts.site_of])


def _rows(batch: Batch, variant: Variant, losses: RowLosses) -> list[dict[str, Any]]:
    columns = (losses.nll_nats.tolist(), losses.n_tokens.int().tolist(), losses.n_correct.int().tolist())
    rows = []
    for example, nll, n_tokens, n_correct in zip(batch.indices, *columns, strict=True):
        if not np.isfinite(nll):
            raise MeasureError(
                f"The loss of example {example} with {variant.label} is {nll}. Check it for NaN weights."
            )
        row = {"example": example, "adapter": variant.label, "key": variant.digest}
        rows.append(row | {"nll_nats": nll, "n_tokens": n_tokens, "n_correct": n_correct})
    if losses.predicted is not None:
        for row, predicted in zip(rows, losses.predicted.tolist(), strict=True):
            row["predicted"] = predicted
    return rows


def text_columns(
    metrics: Sequence[str], text: str, references: Sequence[str], bleu_tokenizer: str = "13a"
) -> dict[str, float]:
    """Metrics of one answer, as a row of `predictions.jsonl` has them."""
    values = {
        metric: text_scores(metric, [[text]], [references], bleu_tokenizer).per_example[0, 0] for metric in metrics
    }
    return {metric: round(float(value), 4) for metric, value in values.items()}


def note_base(run: RunFolder, loaded: Loaded, say: Callable[[str], None]) -> None:
    """Note which base model an adapter is measured on; of a model without an adapter the head may be a random one.

    Args:
        run: where it is noted.
        loaded: what is measured.
        say: told where the base model is in another form than the adapter was trained on.
    Raises:
        OutputError: the run began with other weights of the base model.
    """
    if loaded.peft_model is not None:
        config = loaded.model.config
        name = config.name_or_path or ""
        if name and not config.architectures:  # the text model of one that looks at images, which has fewer weights
            name = f"{name} ({type(loaded.model).__name__})"
        run.note_base(name, loaded.fingerprint)
        if loaded.warning:
            say(loaded.warning)
