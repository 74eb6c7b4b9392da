"""A shrink under way: propose, heal, judge, write. What is judged is what is written."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel

from lorazor.adapter.folder import AdapterFolder
from lorazor.adapter.prune import PruneResult
from lorazor.data.examples import Example
from lorazor.files import remove_folder
from lorazor.measure.meter import CONFIRM, DATA, Meter, Variant
from lorazor.measure.metrics import metric_named
from lorazor.measure.results import Candidate
from lorazor.measure.sharding import from_main_process
from lorazor.runs import RunFolder
from lorazor.select.goal import Goal
from lorazor.select.search import Units
from lorazor.select.verdict import Verdict
from lorazor.serve.flags import Flags
from lorazor.settings import ShrinkSettings
from lorazor.train.answers import TrainingRow
from lorazor.workflow.basis import score_parts
from lorazor.workflow.candidates import Candidates, is_whole
from lorazor.workflow.heal import FOLDER as HEALING
from lorazor.workflow.heal import Healing, rows_of, with_answers
from lorazor.workflow.written import FOLDER as WRITTEN
from lorazor.workflow.written import Writer, as_written, difference_when_loaded, losses_of_some

_BOTH_WAYS = 3
"""Forward passes that a forward and a backward pass are worth."""


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


@dataclass(frozen=True)
class ShrinkResult:
    """What a run came to.

    Attributes:
        out: the run folder.
        goal: what was asked for, in words.
        metric: what adapters were compared by; None where nothing was measured.
        reason: why this adapter, in a sentence.
        candidates: what was measured on the validation examples, the full adapter first.
        verdict: on held-out examples; None without them, or where nothing was dropped.
        pruned: the smaller adapter; None where nothing was dropped.
        loaded_differs_by: the largest difference of an example's loss between what was measured and what was written,
            as stock PEFT loads it, in nats per answer token; None where nothing was measured or dropped.
        cost: forward passes and seconds; None where nothing was measured.
        server: who computes it right as it is, `vllm >= 0.32`; None where nobody was named, or nothing was dropped.
        flags: what to tell that server; None where there is nothing.
        model: an ordinary PEFT model with the smaller adapter, in evaluation mode: on the same base weights as the
            model that was given, if one was; None where nothing was dropped, or no base model was loaded.
    """

    out: Path
    goal: str
    metric: str | None
    reason: str
    candidates: tuple[Candidate, ...]
    verdict: Verdict | None
    pruned: PruneResult | None
    loaded_differs_by: float | None = None
    cost: Cost | None = None
    server: str | None = None
    flags: Flags | None = None
    model: PeftModel | None = field(default=None, repr=False, compare=False, metadata={"json": False})


class Work:
    """A shrink under way.

    Attributes:
        goal: what is asked for.
        settings: everything else.
        candidates: smaller adapters, and the meter.
        writer: writes them.
        start: when it began, by `time.monotonic`.
    """

    def __init__(
        self, run: RunFolder, folder: AdapterFolder, meter: Meter, goal: Goal, settings: ShrinkSettings
    ) -> None:
        """Choose the basis, and score."""
        self.goal, self.settings, self.start = goal, settings, time.monotonic()
        has_classes = isinstance(meter.examples(DATA)[0].label, int)
        metric = goal.margin.metric if goal.margin is not None else "accuracy" if has_classes else "loss"
        basis = score_parts(meter, run, folder, settings)
        units = Units.of(basis.scores.parts, settings.by, settings.stack)
        self.writer = Writer(run, folder, basis, goal, settings)
        written = partial(as_written, self.writer, meter)
        self.candidates = Candidates(meter, metric, basis.scores, units, settings.seed, written)

    def finish(self, train: Sequence[Example], rows: Sequence[TrainingRow]) -> ShrinkResult:
        """Propose, heal, judge, and write.

        Args:
            train: examples to heal on, if any.
            rows: the same, encoded, but for those that have no answer yet.
        """
        candidates, meter, run = self.candidates, self.candidates.meter, self.writer.run
        choice = self._choose(train, rows)
        reason, verdict = self._reason(choice), choice.verdict
        pruned = differs_by = loaded = None
        if choice.form is not None:
            with meter.parts.gated(choice.form.gates):
                expected = losses_of_some(meter, meter.loaded)
            note = f"{reason} {verdict.sentence}\n\n{verdict.table}" if verdict else reason
            pruned = self.writer.write(choice.variant, run.path / "adapter", note, True, choice.healed)
            differs_by, loaded = difference_when_loaded(meter, pruned.path, expected)
            meter.say(f"Loaded again in PEFT, its losses differ by up to {differs_by:.1g} nats per answer token.")
        result = ShrinkResult(
            run.path, str(self.goal), candidates.metric, reason, tuple(candidates.measured.values()), verdict, pruned,
            differs_by, self._cost(), model=loaded and loaded.peft_model,
        )  # fmt: skip
        run.write_json("shrink.json", self._document(choice, result))
        for name in (HEALING, WRITTEN):
            from_main_process(partial(remove_folder, run.path / name))
        return result

    def _choose(self, train: Sequence[Example], rows: Sequence[TrainingRow]) -> Choice:
        candidates, margin = self.candidates, self.goal.margin
        has_held_out, for_verdict = bool(candidates.meter.examples(CONFIRM)), self.goal.verdict_margin
        proposal = candidates.propose(self.goal)
        if train and (margin is not None or not is_whole(proposal)):
            answered = with_answers(candidates.meter, train, self.settings.reading.batch_size)
            if answered is not train:
                rows = rows_of(candidates.meter.loaded, answered, self.settings)
            healing = Healing(candidates, self.writer, self.settings, rows)
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

    def _cost(self) -> Cost:
        """Count what the run has cost from what it holds, so that a resumed one says the same."""
        settings, meter, basis, run = self.settings, self.candidates.meter, self.writer.basis, self.writer.run
        n_scored = sum(len(batch.indices) for batch in meter.batches(DATA, about=settings.score_examples))
        n_healed = sum(one.is_healed for one in self.candidates.measured.values())
        n_per_example = _BOTH_WAYS + (settings.heal_from == "full")  # what is learned from runs as well

        def n_rows(ending: str) -> int:
            return from_main_process(lambda: sum(len(run.rows(f"{prefix}{ending}")) for prefix in ("", f"{CONFIRM}-")))

        return Cost(
            scoring=_BOTH_WAYS * basis.n_passes * n_scored,
            measuring=n_rows("losses.jsonl"),
            healing=n_healed * settings.heal_steps * settings.reading.batch_size * n_per_example,
            n_answers=n_rows("predictions.jsonl"),
            seconds=time.monotonic() - self.start,
        )

    def _document(self, choice: Choice, result: ShrinkResult) -> dict[str, Any]:
        basis, sites = self.writer.basis, self.writer.folder.sites
        sums = basis.scores.completeness
        return {
            "goal": result.goal,
            "by": self.settings.by,
            "score": basis.score,
            "basis": basis.name,
            "metric": result.metric,
            "higher_is_better": metric_named(self.candidates.metric).higher_is_better,
            "n_examples": len(self.candidates.meter.examples(DATA)),
            "n_sites": len(sites),
            "n_parameters": sum(site.n_parameters for site in sites),
            "reason": result.reason,
            "chosen": (choice.form or choice.variant).label,
            "margin": self.candidates.allowed(self.goal.margin),
            "candidates": list(result.candidates),
            "verdict": result.verdict.to_document() if result.verdict else None,
            "loaded_differs_by": result.loaded_differs_by,
            "scoring": {
                "n_passes": basis.n_passes,
                "completeness": sums and {**dataclasses.asdict(sums), "gain": sums.gain, "error": sums.error},
            },
            "cost": result.cost,
        }
