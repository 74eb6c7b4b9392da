"""`lorazor shrink` from start to end: score, propose, heal, judge, write."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorazor.adapter.fingerprint import base_fingerprint
from lorazor.adapter.folder import AdapterFolder, check_is_finite, read_adapter
from lorazor.adapter.load import Loaded, find_adapter, load
from lorazor.adapter.parts import Parts
from lorazor.adapter.prune import PruneResult
from lorazor.data.examples import Example
from lorazor.errors import SettingsError
from lorazor.measure.meter import CONFIRM, DATA, Meter, Variant
from lorazor.measure.metrics import metric_named
from lorazor.measure.results import Candidate
from lorazor.measure.sharding import from_main_process
from lorazor.runs import RunFolder
from lorazor.select.goal import DEFAULT_MARGIN, Goal
from lorazor.select.units import Units
from lorazor.select.verdict import Margin, Verdict
from lorazor.settings import ShrinkSettings, Tracker
from lorazor.tracking import check_tracker, track
from lorazor.workflow.basis import score_parts
from lorazor.workflow.by_weights import shrink_by_weights
from lorazor.workflow.candidates import Candidates
from lorazor.workflow.heal import Healing, check_healing
from lorazor.workflow.reading import read_sets, write_examples
from lorazor.workflow.starting import start_run
from lorazor.workflow.verdicts import check_can_decide, check_gains, what_can_be_decided
from lorazor.workflow.written import Writer, difference_when_loaded, losses_of_some, with_weights_of


@dataclass(frozen=True)
class ShrinkResult:
    """What a run came to.

    Attributes:
        out: the run folder.
        goal: what was asked for, in words.
        metric: what adapters were compared by; None where nothing was measured.
        reason: why this adapter, in a sentence.
        candidates: what was measured on the validation examples, the full adapter first.
        verdict: on held-out examples; None without them, without a margin, or where nothing was dropped.
        pruned: the smaller adapter; None where nothing was dropped.
        loaded_differs_by: the largest difference of an example's loss between what was measured and what was written,
            as stock PEFT loads it, in nats per answer token; None where nothing was measured or dropped.
    """

    out: Path
    goal: str
    metric: str | None
    reason: str
    candidates: tuple[Candidate, ...]
    verdict: Verdict | None
    pruned: PruneResult | None
    loaded_differs_by: float | None = None


def shrink(
    adapter: str | Path,
    data: str | None = None,
    *,
    out: str | Path,
    confirm: str | None = None,
    settings: ShrinkSettings | None = None,
    resume: bool = False,
    say: Callable[[str], None] = lambda message: None,
    tracker: Tracker = "none",
) -> ShrinkResult:
    """Make an adapter as small as it can be, within a margin or for a size, and write it.

    Args:
        adapter: adapter folder or hub id.
        data: validation examples; without them the weights alone decide, and nothing is measured.
        out: the run folder; new, unless `resume`.
        confirm: examples that take no part in the choice, for the verdict.
        settings: everything else.
        resume: go on with an interrupted run in `out`; what was measured is not measured again.
        say: receives messages for people.
        tracker: where to log the headline numbers.
    Raises:
        LorazorError: settings, adapter, data or output folder cannot be used; before the model is loaded.
    """
    settings, out = settings or ShrinkSettings(), Path(out)
    folder = read_adapter(find_adapter(adapter))
    check_is_finite(folder)
    check_tracker(tracker)
    goal = Goal.of(settings, folder, data is not None)
    _check_needs_data(data, {"--confirm": confirm, "--heal": settings.heal})
    Units.of(Parts(folder.sites), settings.by, settings.stack)  # refuses what cannot be gathered
    sources = {"--data": data, "--confirm": confirm, "--heal": settings.heal}
    metrics = [goal.margin.metric] if goal.margin is not None else []
    examples, held_out, train = read_sets(settings.reading, metrics, sources)
    check_can_decide(goal.margin, examples, "--data")
    check_can_decide(goal.margin, held_out)
    check_healing(settings, train)
    inputs = {"adapter": folder.path} | {name[2:]: Path(source) for name, source in sources.items() if source}
    everything = dataclasses.asdict(settings) | {"adapter": folder.path, "data": data, "confirm": confirm}
    run = start_run(out, "shrink", everything, inputs, resume)
    if data is None:
        reason, pruned = shrink_by_weights(run, folder, goal, settings)
        run.finish()
        return ShrinkResult(out, str(goal), None, reason, (), None, pruned)
    margin = goal.margin or (Margin.parse(DEFAULT_MARGIN) if held_out else None)
    if margin and (sentence := what_can_be_decided(margin, {"validation": examples, "held-out": held_out})):
        run.noting(say)(sentence)
    loaded = load(folder.path, settings.model)
    note_base(run, folder, loaded)
    meter = Meter(loaded, Parts(tuple(loaded.sites)), run, settings.reading, settings.generation, run.noting(say))
    meter.add(DATA, examples)
    meter.add(CONFIRM, held_out, "confirm-")
    write_examples(run, held_out or examples)
    check_gains(meter, goal.margin, [DATA])
    check_gains(meter, goal.margin or Margin.parse(DEFAULT_MARGIN), [CONFIRM])
    result = _Work.begin(run, folder, meter, goal, settings).finish(train)
    track(run, tracker, [(one.n_parameters, {f"shrink/{result.metric}": one.value}) for one in result.candidates])
    run.finish()
    return result


def note_base(run: RunFolder, folder: AdapterFolder, loaded: Loaded) -> None:
    """Keep in run.json which base model was used."""
    name = loaded.model.config.name_or_path or folder.config.get("base_model_name_or_path")
    run.document["base"] = {"name": name, "fingerprint": base_fingerprint(loaded.model)}


def _check_needs_data(data: str | None, others: Mapping[str, str | None]) -> None:
    given = next((name for name, source in others.items() if source is not None), None)
    if data is None and given is not None:
        raise SettingsError(f"{given} without --data: choices are made on validation examples first. Pass --data.")


@dataclass(frozen=True)
class _Work:
    """A shrink under way.

    Attributes:
        goal: what is asked for.
        settings: everything else.
        candidates: smaller adapters, and the meter.
        writer: writes them.
    """

    goal: Goal
    settings: ShrinkSettings
    candidates: Candidates
    writer: Writer

    @classmethod
    def begin(cls, run: RunFolder, folder: AdapterFolder, meter: Meter, goal: Goal, settings: ShrinkSettings) -> _Work:
        """Choose the basis, and score."""
        is_labelled = meter.examples(DATA)[0].is_labelled
        metric = goal.margin.metric if goal.margin is not None else "accuracy" if is_labelled else "loss"
        basis = score_parts(meter, run, folder, goal, settings)
        units = Units.of(basis.parts, settings.by, settings.stack)
        chosen_by = {"goal": str(goal), "score": basis.score, "basis": basis.name}
        writer = Writer(run, folder, basis, f"shrink by {settings.by}", chosen_by)
        return cls(goal, settings, Candidates(meter, metric, basis.scores, units, settings.seed), writer)

    def finish(self, train: Sequence[Example]) -> ShrinkResult:
        """Propose, heal, judge, and write."""
        candidates, meter, healed, verdict = self.candidates, self.candidates.meter, None, None
        margin, has_held_out = self.goal.margin, bool(meter.examples(CONFIRM))
        chosen = candidates.propose(self.goal)
        healing = Healing(candidates, self.writer, self.settings, train)
        if train and not is_whole(chosen):
            chosen, healed = healing.choose(chosen, margin)
        if not is_whole(chosen) and has_held_out:
            if healed is not None or margin is None:
                verdict = candidates.on_held_out(healed or chosen, margin or Margin.parse(DEFAULT_MARGIN))
            else:
                chosen, verdict = candidates.certify(chosen, margin)
        reason = self._reason(chosen, healed, verdict)
        pruned = differs_by = None
        if not is_whole(chosen):
            expected = losses_of_some(meter, healed or chosen)
            pruned = self._write(chosen, healed and healing.folder_of(chosen), reason, verdict)
            differs_by = difference_when_loaded(meter, pruned.path, expected)
            meter.say(f"Loaded again in PEFT, its losses differ by up to {differs_by:.1g} nats per answer token.")
        run, metric = self.writer.run, candidates.metric
        measured = tuple(candidates.measured.values())
        result = ShrinkResult(run.path, str(self.goal), metric, reason, measured, verdict, pruned, differs_by)
        run.write_json("shrink.json", self._document(result, (healed or chosen).label))
        from_main_process(lambda: shutil.rmtree(run.path / "healing", ignore_errors=True))
        return result

    def _write(self, chosen: Variant, healed: Path | None, reason: str, verdict: Verdict | None) -> PruneResult:
        note = f"{reason} {verdict.sentence}\n\n{verdict.table}" if verdict else reason
        pruned = self.writer.write(chosen, self.writer.run.path / "adapter", note, is_chosen=True)
        return pruned if healed is None else with_weights_of(pruned, healed)

    def _reason(self, chosen: Variant, healed: Variant | None, verdict: Verdict | None) -> str:
        margin, sites = self.goal.margin, self.writer.folder.sites
        total = sum(site.n_parameters for site in sites)
        if is_whole(chosen) and margin is None:
            return f"Nothing is dropped: the whole adapter has {self.goal}."
        if is_whole(chosen):
            return (
                f"Nothing is dropped: no smaller adapter is shown to be within the margin of {margin}. More "
                "examples, or a wider margin, may show one."
            )
        one, how = self.candidates.measured[chosen.digest], ", healed" if healed is not None else ""
        head = f"{one.n_sites} of {len(sites)} sites with {one.n_parameters / total:.1%} of the parameters{how}"
        if margin is None:
            return f"{head}: {self.goal}."  # a verdict has a sentence of its own
        if verdict is None:
            return f"{head}: within the margin of {margin} by the validation examples. Pass --confirm for a verdict."
        if verdict.outcome == "shown":
            return f"{head}: shown to be within the margin of {margin} on held-out examples."
        return f"{head}: within the margin of {margin} by the validation examples, {verdict.outcome} on held-out ones."

    def _document(self, result: ShrinkResult, chosen: str) -> dict[str, Any]:
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
            "chosen": chosen,
            "margin": self.candidates.allowed(self.goal.margin),
            "candidates": [dataclasses.asdict(one) for one in result.candidates],
            "verdict": result.verdict.to_document() if result.verdict else None,
            "loaded_differs_by": result.loaded_differs_by,
            "scoring": {
                "n_passes": basis.scores.n_passes,
                "completeness": sums and {**dataclasses.asdict(sums), "gain": sums.gain, "error": sums.error},
            },
        }


def is_whole(variant: Variant) -> bool:
    """Whether nothing is dropped."""
    return bool((variant.gates == 1).all())
