"""Variants of an adapter (subsets of its parts, with weights), measured on the same examples and compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorazor.adapter.load import Loaded
from lorazor.adapter.parts import Parts
from lorazor.data.examples import Example
from lorazor.measure.metrics import metric_named
from lorazor.measure.sharding import from_main_process
from lorazor.measure.stats import Interval, Scores, paired_difference
from lorazor.runs import RunFolder
from lorazor.settings import (
    DataSettings,
    GenerationSettings,
    ModelSettings,
    RefitSettings,
    ScoreSettings,
    SearchSettings,
    SparseSettings,
    SubsetBudgetSettings,
)
from lorazor.workflow.losses import loss_scores, measure_losses
from lorazor.workflow.texts import score_texts, write_answers

FULL = "full"


@dataclass(frozen=True)
class SubsetSettings:
    """All settings of a subset run, by topic."""

    budget: SubsetBudgetSettings = SubsetBudgetSettings()
    scoring: ScoreSettings = ScoreSettings()
    searching: SearchSettings = SearchSettings()
    refitting: RefitSettings = RefitSettings()
    sparse: SparseSettings = SparseSettings()
    model: ModelSettings = ModelSettings()
    reading: DataSettings = DataSettings()
    generation: GenerationSettings = GenerationSettings()


@dataclass(frozen=True)
class Candidate:
    """A subset that was measured.

    Attributes:
        label: names it in the files of the run.
        n_sites: sites that keep LoRA.
        n_parameters: numbers in A and B that stay.
        value: the metric on the validation examples.
        difference: `value` minus that of the full adapter, paired, with a 95 % interval.
    """

    label: str
    n_sites: int
    n_parameters: int
    value: float
    difference: Interval


@dataclass
class Variants:
    """A loaded adapter whose parts can be gated, and what was measured of it. Gates are (n_parts,), 0 is dropped.

    Attributes:
        run: where everything is kept.
        loaded: the adapter's model.
        parts: what the gates are on.
        settings: of the run.
        metric: to compare by.
        examples: validation examples.
        say: receives messages.
        candidates: what was measured on them so far; the full adapter first.
    """

    run: RunFolder
    loaded: Loaded
    parts: Parts
    settings: SubsetSettings
    metric: str
    examples: Sequence[Example]
    say: Callable[[str], None]
    candidates: list[Candidate] = field(default_factory=list, kw_only=True)

    def measured(self, label: str, gates: Tensor) -> Candidate:
        """Measure a subset on the validation examples and compare it with the full adapter."""
        self.measure(label, gates, self.examples, "")
        scores = self.compare([label, FULL], self.examples, "")
        difference = paired_difference(scores, 0, 1, seed=self.settings.scoring.seed)
        n_sites, n_parameters = self.parts.n_sites_kept(gates), self.parts.n_parameters_kept(gates)
        candidate = Candidate(label, n_sites, n_parameters, float(scores.values[0]), difference)
        self.candidates.append(candidate)
        return candidate

    def measure(self, label: str, gates: Tensor, examples: Sequence[Example], prefix: str) -> None:
        """Write the losses, or the answers where the metric needs them, of a subset into the run."""
        bare = dataclasses.replace(self.loaded, sites=[])  # the gates are on the sites already
        reading = self.settings.reading
        with self.parts.gated(gates.to(self.loaded.model.device), gates != 0):
            if prefix or not metric_named(self.metric).needs_text:  # the report shows losses of held-out examples
                measure_losses(self.run, f"{prefix}losses.jsonl", bare, examples, label, reading, self.say)
            if metric_named(self.metric).needs_text:
                variants, file = {label: torch.zeros(0)}, f"{prefix}predictions.jsonl"
                generation = self.settings.generation
                write_answers(
                    self.run, file, bare, examples, variants, "adapter", [self.metric], reading, generation, self.say
                )

    def compare(self, labels: Sequence[str], examples: Sequence[Example], prefix: str) -> Scores:
        """The metric of subsets that were measured."""
        if not metric_named(self.metric).needs_text:
            return loss_scores(self.run, f"{prefix}losses.jsonl", self.metric, labels, examples)
        texts: dict[str, dict[int, str]] = {label: {} for label in labels}
        for row in from_main_process(lambda: self.run.rows(f"{prefix}predictions.jsonl")):
            texts.get(row["adapter"], {})[row["example"]] = row["text"]
        return score_texts(self.metric, texts, labels, examples)
