"""What a shrink has cost, counted so that a resumed run says the same."""

from __future__ import annotations

from dataclasses import dataclass

from lorazor.measure.meter import CONFIRM, DATA, Meter
from lorazor.measure.sharding import from_main_process
from lorazor.runs import RunFolder
from lorazor.settings import ShrinkSettings
from lorazor.workflow.basis import Basis

_BOTH_WAYS = 3
"""Forward passes that a forward and a backward pass are worth."""


@dataclass(frozen=True)
class Cost:
    """What a run has cost.

    Attributes:
        scoring: forward passes of one example for the scores; a backward pass counts as two.
        measuring: the same for losses of candidates, on validation and held-out examples.
        healing: the same for the steps of healing.
        n_answers: texts that were written for metrics of text.
        seconds: from start to end, without what an interrupted run had spent before.
    """

    scoring: int
    measuring: int
    healing: int
    n_answers: int
    seconds: float

    @property
    def sentence(self) -> str:
        """The cost in plain words."""
        total = self.scoring + self.measuring + self.healing
        answers = f"; {self.n_answers:,} answers were written" if self.n_answers else ""
        return (
            f"It took {self.seconds:,.0f} s and as much as {total:,} forward passes of an example: {self.scoring:,} to "
            f"score, {self.measuring:,} to measure candidates, {self.healing:,} to heal{answers}."
        )


def cost_of(
    run: RunFolder, meter: Meter, basis: Basis, settings: ShrinkSettings, n_healed: int, seconds: float
) -> Cost:
    """Count what a run has cost from what it holds.

    Args:
        run: its folder.
        meter: the examples.
        basis: how they were scored.
        settings: of the run.
        n_healed: adapters that were healed.
        seconds: from start to end.
    """
    scored = meter.batches(DATA, about=settings.score_examples)
    n_passes = basis.scores.n_passes + (basis.name == "balanced" and basis.score != "balanced")  # one for the basis

    def n_rows(ending: str) -> int:
        return from_main_process(lambda: sum(len(run.rows(f"{prefix}{ending}")) for prefix in ("", f"{CONFIRM}-")))

    n_per_example = _BOTH_WAYS + (settings.heal_from == "full")  # what is learned from runs as well
    return Cost(
        scoring=_BOTH_WAYS * n_passes * sum(len(batch.indices) for batch in scored),
        measuring=n_rows("losses.jsonl"),
        healing=n_healed * settings.heal_steps * settings.reading.batch_size * n_per_example,
        n_answers=n_rows("predictions.jsonl"),
        seconds=seconds,
    )
