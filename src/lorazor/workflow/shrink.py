"""`lorazor shrink` from start to end: score, propose, heal, judge, write."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorazor.adapter.fingerprint import base_fingerprint
from lorazor.adapter.folder import AdapterFolder, check_is_finite, read_adapter
from lorazor.adapter.load import Loaded, find_adapter, load
from lorazor.adapter.parts import Parts
from lorazor.adapter.prune import PruneResult
from lorazor.errors import SettingsError
from lorazor.measure.meter import CONFIRM, DATA, Meter
from lorazor.measure.results import Candidate
from lorazor.runs import RunFolder
from lorazor.select.goal import DEFAULT_MARGIN, Goal
from lorazor.select.units import Units
from lorazor.select.verdict import Margin, Verdict
from lorazor.settings import ShrinkSettings, Tracker
from lorazor.tracking import check_tracker, track
from lorazor.workflow.by_weights import shrink_by_weights
from lorazor.workflow.choosing import Work
from lorazor.workflow.cost import Cost
from lorazor.workflow.heal import check_healing
from lorazor.workflow.reading import read_sets, write_examples
from lorazor.workflow.starting import start_run
from lorazor.workflow.verdicts import check_can_decide, check_gains, what_can_be_decided


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
        cost: forward passes and seconds; None where nothing was measured.
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
    alone = ["--heal"] if settings.heal_from == "full" else []
    examples, held_out, train = read_sets(settings.reading, metrics, sources, alone)
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
    work = Work.begin(run, folder, meter, goal, settings)
    found = work.finish(train)
    result = ShrinkResult(
        out, str(goal), work.candidates.metric, found.reason, tuple(work.candidates.measured.values()),
        found.choice.verdict, found.pruned, found.differs_by, found.cost,
    )  # fmt: skip
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
