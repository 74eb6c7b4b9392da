"""A shrink under way: propose, heal, judge, write. What is judged is what is written."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lorazor.adapter.folder import AdapterFolder
from lorazor.adapter.load import Loaded
from lorazor.adapter.prune import PruneResult
from lorazor.data.examples import Example
from lorazor.measure.meter import CONFIRM, DATA, Meter, Variant
from lorazor.measure.metrics import metric_named
from lorazor.measure.sharding import from_main_process
from lorazor.runs import RunFolder
from lorazor.select.goal import DEFAULT_MARGIN, Goal
from lorazor.select.search import Units
from lorazor.select.verdict import Margin, Verdict
from lorazor.settings import ShrinkSettings
from lorazor.workflow.basis import score_parts
from lorazor.workflow.candidates import Candidates, is_whole
from lorazor.workflow.cost import Cost, cost_of
from lorazor.workflow.heal import FOLDER as HEALING
from lorazor.workflow.heal import Healing, with_answers
from lorazor.workflow.written import FOLDER as WRITTEN
from lorazor.workflow.written import (
    Writer,
    as_written,
    difference_when_loaded,
    losses_of_some,
    with_weights_of,
    writer_for,
)


@dataclass(frozen=True)
class Choice:
    """What stays.

    Attributes:
        variant: in the basis; the full adapter where nothing is written.
        form: the same as it is written, on the model now; None where nothing is written.
        verdict: on held-out examples, of what stays; where nothing does, of the proposal that was not shown.
        healed: folder of its weights after healing; None without.
    """

    variant: Variant
    form: Variant | None
    verdict: Verdict | None = None
    healed: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """What a search came to; see `ShrinkResult`."""

    reason: str
    choice: Choice
    pruned: PruneResult | None
    differs_by: float | None
    cost: Cost
    loaded: Loaded | None


@dataclass(frozen=True)
class Work:
    """A shrink under way.

    Attributes:
        goal: what is asked for.
        settings: everything else.
        candidates: smaller adapters, and the meter.
        writer: writes them.
        start: when it began, by `time.monotonic`.
    """

    goal: Goal
    settings: ShrinkSettings
    candidates: Candidates
    writer: Writer
    start: float

    @classmethod
    def begin(cls, run: RunFolder, folder: AdapterFolder, meter: Meter, goal: Goal, settings: ShrinkSettings) -> Work:
        """Choose the basis, and score."""
        start, is_labelled = time.monotonic(), meter.examples(DATA)[0].is_labelled
        metric = goal.margin.metric if goal.margin is not None else "accuracy" if is_labelled else "loss"
        basis = score_parts(meter, run, folder, settings)
        units = Units.of(basis.parts, settings.by, settings.stack)
        writer = writer_for(run, folder, basis, goal, settings)
        written = partial(as_written, writer, meter)
        candidates = Candidates(meter, metric, basis.scores, units, settings.seed, written)
        return cls(goal, settings, candidates, writer, start)

    def finish(self, train: Sequence[Example]) -> Outcome:
        """Propose, heal, judge, and write."""
        candidates, meter, run = self.candidates, self.candidates.meter, self.writer.run
        choice = self._choose(train)
        reason = self._reason(choice)
        pruned = differs_by = loaded = None
        if choice.form is not None:
            expected = losses_of_some(meter, choice.form)
            pruned = self._write(choice, reason)
            differs_by, loaded = difference_when_loaded(meter, pruned.path, expected)
            meter.say(f"Loaded again in PEFT, its losses differ by up to {differs_by:.1g} nats per answer token.")
        n_healed = sum(one.is_healed for one in candidates.measured.values())
        seconds = time.monotonic() - self.start
        cost = cost_of(run, meter, self.writer.basis, self.settings, n_healed, seconds)
        outcome = Outcome(reason, choice, pruned, differs_by, cost, loaded)
        run.write_json("shrink.json", self._document(outcome))
        for name in (HEALING, WRITTEN):
            from_main_process(lambda name=name: shutil.rmtree(run.path / name, ignore_errors=True))
        return outcome

    def _choose(self, train: Sequence[Example]) -> Choice:
        candidates, margin = self.candidates, self.goal.margin
        has_held_out, for_verdict = bool(candidates.meter.examples(CONFIRM)), margin or Margin.parse(DEFAULT_MARGIN)
        proposal = candidates.propose(self.goal)
        if train and (margin is not None or not is_whole(proposal)):
            train = with_answers(candidates.meter, train, self.settings.reading.batch_size)
            healing = Healing(candidates, self.writer, self.settings, train)
            proposal, healed = healing.choose(proposal, margin)
            if healed is not None:
                verdict = candidates.on_held_out(healed, for_verdict) if has_held_out else None
                return Choice(proposal, healed, verdict, healing.folder_of(proposal))
        if self.writer.rounds:
            candidates.measure_others(for_verdict)
            proposal = candidates.within_as_written(proposal, margin)
        if proposal is None or self.writer.is_same(proposal):
            return Choice(candidates.full, None)
        if not has_held_out:
            return Choice(proposal, candidates.as_written(proposal))
        if margin is None:
            form = candidates.as_written(proposal)
            return Choice(proposal, form, candidates.on_held_out(form, for_verdict))
        found, verdict = candidates.certify(proposal, margin)
        if found is None:
            return Choice(candidates.full, None, verdict)
        form = candidates.as_written(found)
        candidates.note([form])  # it may be larger than what was measured as it is written
        return Choice(found, form, verdict)

    def _write(self, choice: Choice, reason: str) -> PruneResult:
        verdict = choice.verdict
        note = f"{reason} {verdict.sentence}\n\n{verdict.table}" if verdict else reason
        pruned = self.writer.write(choice.variant, self.writer.run.path / "adapter", note, is_chosen=True)
        return pruned if choice.healed is None else with_weights_of(pruned, choice.healed)

    def _reason(self, choice: Choice) -> str:
        margin, verdict, sites = self.goal.margin, choice.verdict, self.writer.folder.sites
        if choice.form is None:
            return self._nothing_dropped()
        one, total = self.candidates.measured[choice.form.digest], sum(site.n_parameters for site in sites)
        how = (", healed" if choice.healed else "") + self.writer.in_dtype
        head = f"{one.n_sites} of {len(sites)} sites with {one.n_parameters / total:.1%} of the parameters{how}"
        if margin is None:
            return f"{head}: {self.goal}."  # a verdict has a sentence of its own
        if verdict is None:
            return f"{head}: within the margin of {margin} by the validation examples. Pass --confirm for a verdict."
        if verdict.outcome == "shown":
            return f"{head}: shown to be within the margin of {margin} on held-out examples."
        return f"{head}: within the margin of {margin} by the validation examples, {verdict.outcome} on held-out ones."

    def _nothing_dropped(self) -> str:
        if self.goal.margin is None:
            return f"Nothing is dropped: the whole adapter has {self.goal}."
        advice = ["more examples", "a wider margin"]
        if self.settings.by != "direction":
            advice.append("--by direction")
        if self.settings.heal is None:
            advice.append("--heal TRAIN")
        return (
            f"Nothing is dropped: no smaller adapter is shown to be within the margin of {self.goal.margin}. What may "
            f"show one: {', '.join(advice)}."
        )

    def _document(self, outcome: Outcome) -> dict[str, Any]:
        basis, sites, choice = self.writer.basis, self.writer.folder.sites, outcome.choice
        sums = basis.scores.completeness
        return {
            "goal": str(self.goal),
            "by": self.settings.by,
            "score": basis.score,
            "basis": basis.name,
            "metric": self.candidates.metric,
            "higher_is_better": metric_named(self.candidates.metric).higher_is_better,
            "n_examples": len(self.candidates.meter.examples(DATA)),
            "n_sites": len(sites),
            "n_parameters": sum(site.n_parameters for site in sites),
            "reason": outcome.reason,
            "chosen": (choice.form or choice.variant).label,
            "margin": self.candidates.allowed(self.goal.margin),
            "candidates": list(self.candidates.measured.values()),
            "verdict": choice.verdict.to_document() if choice.verdict else None,
            "loaded_differs_by": outcome.differs_by,
            "scoring": {
                "n_passes": basis.scores.n_passes,
                "completeness": sums and {**dataclasses.asdict(sums), "gain": sums.gain, "error": sums.error},
            },
            "cost": outcome.cost,
        }
