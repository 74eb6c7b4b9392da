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
from lorazor.workflow.losses import loss_scores, measure_losses, what_was_measured
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
        label: what people call it, in the files of the run too.
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

    A measurement belongs to the digest of its gates, not to a label: other weights on the same parts are measured anew,
    and the same gates under another label are not.

    Attributes:
        run: where everything is kept.
        loaded: the adapter's model.
        parts: what the gates are on.
        settings: of the run.
        metric: to compare by.
        examples: validation examples.
        say: receives messages.
        known: what was measured on them so far, by the digest of its gates; the full adapter first.
    """

    run: RunFolder
    loaded: Loaded
    parts: Parts
    settings: SubsetSettings
    metric: str
    examples: Sequence[Example]
    say: Callable[[str], None]
    known: dict[str, Candidate] = field(default_factory=dict, kw_only=True)

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """What was measured on the validation examples so far, the full adapter first."""
        return tuple(self.known.values())

    def measured(self, label: str, gates: Tensor) -> Candidate:
        """Measure a subset on the validation examples and compare it with the full adapter."""
        digest = self.digest(gates)
        if digest not in self.known:
            self.measure(label, gates, self.examples, "")
            scores = self.compare([gates, torch.ones(len(self.parts))], self.examples, "")
            difference = paired_difference(scores, 0, 1, seed=self.settings.scoring.seed)
            n_sites, n_parameters = self.parts.n_sites_kept(gates), self.parts.n_parameters_kept(gates)
            self.known[digest] = Candidate(label, n_sites, n_parameters, float(scores.values[0]), difference)
        return self.known[digest]

    def digest(self, gates: Tensor) -> str:
        """What names gates in the files of the run, in all processes alike."""
        return from_main_process(lambda: self.parts.digest(gates))

    def measure(self, label: str, gates: Tensor, examples: Sequence[Example], prefix: str) -> None:
        """Write the losses, or the answers where the metric needs them, of a subset into the run."""
        bare = dataclasses.replace(self.loaded, sites=[])  # the gates are on the sites already
        reading, digest = self.settings.reading, self.digest(gates)
        with self.parts.gated(gates.to(self.loaded.model.device), gates != 0):
            if prefix or not metric_named(self.metric).needs_text:  # the report shows losses of held-out examples
                measure_losses(self.run, f"{prefix}losses.jsonl", bare, examples, label, reading, self.say, digest)
            if metric_named(self.metric).needs_text:
                write_answers(
                    self.run,
                    f"{prefix}predictions.jsonl",
                    bare,
                    examples,
                    {digest: torch.zeros(0)},
                    "gates",
                    [self.metric],
                    reading,
                    self.settings.generation,
                    self.say,
                    {"adapter": label},
                )

    def compare(self, variants: Sequence[Tensor], examples: Sequence[Example], prefix: str) -> Scores:
        """The metric of the gates that were measured, in this order."""
        measured = [self.digest(gates) for gates in variants]
        if not metric_named(self.metric).needs_text:
            return loss_scores(self.run, f"{prefix}losses.jsonl", self.metric, measured, examples)
        texts: dict[str, dict[int, str]] = {digest: {} for digest in measured}
        for row in from_main_process(lambda: self.run.rows(f"{prefix}predictions.jsonl")):
            texts.get(what_was_measured(row), {})[row["example"]] = row["text"]
        return score_texts(self.metric, texts, measured, examples)
