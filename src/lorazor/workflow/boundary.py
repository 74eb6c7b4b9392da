"""The boundary from start to end: sweep, choose, confirm, prune."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorazor.adapter.folder import AdapterFolder, read_adapter
from lorazor.adapter.load import Loaded, find_adapter, load
from lorazor.adapter.prune import PruneResult, prune, select_boundary, without_sites
from lorazor.adapter.sites import Site, choose_stack, stack_sizes
from lorazor.data.examples import Example
from lorazor.errors import BoundaryError
from lorazor.measure.generation import boundary_gates
from lorazor.measure.metrics import metric_named
from lorazor.measure.sharding import from_main_process, is_main_process
from lorazor.measure.stats import Scores
from lorazor.measure.sweep import Sweep, SweepRow, collect_sweep, sweep
from lorazor.runs import RunFolder
from lorazor.select.boundary import (
    BoundaryConfirmation,
    Choice,
    check_rule,
    choose_boundary,
    coarse_boundaries,
    confirm_boundary,
    parse_boundaries,
    refine_boundaries,
    shortlist,
)
from lorazor.selection import Selection
from lorazor.settings import ChoiceSettings, DataSettings, GenerationSettings, ModelSettings, SweepSettings, Tracker
from lorazor.tracking import Point, check_tracker, track
from lorazor.workflow.reading import check_fits, check_held_out, read, write_examples
from lorazor.workflow.starting import start_run
from lorazor.workflow.texts import score_texts, write_answers

SITES_FILE = "sites.jsonl"


@dataclass(frozen=True)
class BoundaryResult:
    """What a boundary run came to.

    Attributes:
        out: the run folder.
        choice: the boundary and why.
        confirmation: the same comparison on held-out examples, None without them and for the full adapter.
        pruned: the smaller adapter, None where the boundary keeps no site at all.
        stack: the stack that the boundary runs through.
        remains: what is left without a site, in a sentence; None where there is an adapter.
    """

    out: Path
    choice: Choice
    confirmation: BoundaryConfirmation | None
    pruned: PruneResult | None
    stack: str
    remains: str | None = None


@dataclass(frozen=True)
class BoundarySettings:
    """All settings of a boundary run, by topic."""

    model: ModelSettings = ModelSettings()
    reading: DataSettings = DataSettings()
    sweeping: SweepSettings = SweepSettings()
    choosing: ChoiceSettings = ChoiceSettings()
    generation: GenerationSettings = GenerationSettings()


def find_boundary(
    adapter: str | Path,
    data: str,
    out: str | Path,
    confirm: str | None = None,
    settings: BoundarySettings | None = None,
    resume: bool = False,
    say: Callable[[str], None] = lambda message: None,
    tracker: Tracker = "none",
) -> BoundaryResult:
    """Find the boundary of an adapter on validation data, confirm it on other data, and prune.

    Args:
        adapter: adapter folder or hub id.
        data: validation examples: a file, a dataset folder or a hub name.
        out: the run folder; new, unless `resume`.
        confirm: examples that take no part in the choice.
        settings: everything else.
        resume: go on with an interrupted run in `out`.
        say: receives messages for people.
        tracker: where to log the value of every boundary, when all is done.
    Raises:
        LorazorError: settings, adapter, data or output folder cannot be used; before the model is loaded.
    """
    check_tracker(tracker)
    settings, out = settings or BoundarySettings(), Path(out)
    folder = read_adapter(find_adapter(adapter))
    plan = _Plan.make(folder, settings)
    examples, held_out = _read(data, confirm, settings)
    run = _start(out, folder, data, confirm, settings, resume)
    loaded = load(folder.path, settings.model)
    check_fits(loaded, [*examples, *held_out], settings.reading)
    write_examples(run, held_out or examples)
    run.write_rows(SITES_FILE, [_row(site) for site in folder.sites])
    work = _Work(run, loaded, settings, plan, say if is_main_process() else lambda _: None)
    choice = work.choose(examples)
    confirmation = work.confirm(held_out, choice) if held_out and choice.boundary != choice.full else None
    if confirmation is None:
        write_examples(run, examples)
    document = choice.to_document() | {
        "stack": plan.stack,
        "confirmation": confirmation.to_document() if confirmation else None,
    }
    run.write_json("choice.json", document)
    pruned = from_main_process(lambda: _prune(run, folder, plan.stack, choice, confirmation))
    track(run, tracker, _headline(choice, confirmation))
    run.finish()
    remains = without_sites(folder) if pruned is None else None
    return BoundaryResult(out, choice, confirmation, pruned, plan.stack, remains)


@dataclass(frozen=True)
class _Plan:
    """What can be settled before anything is loaded."""

    stack: str
    n_layers: int
    boundaries: list[int]

    @classmethod
    def make(cls, folder: AdapterFolder, settings: BoundarySettings) -> _Plan:
        choosing, sweeping = settings.choosing, settings.sweeping
        metric_named(choosing.select_by)
        check_rule(choosing.rule, choosing.at_most, choosing.boundary)
        stack = choose_stack(folder.sites, sweeping.stack)
        n_layers = stack_sizes(folder.sites)[stack]
        for name, value in (("at_most", choosing.at_most), ("boundary", choosing.boundary)):
            if value is not None and not 0 <= value <= n_layers:
                raise BoundaryError(
                    f"{name}={value}, but LoRA reaches over {n_layers} layers of {stack}. Pass 0..{n_layers}."
                )
        if sweeping.boundaries == "coarse":
            return cls(stack, n_layers, coarse_boundaries(n_layers))
        boundaries = parse_boundaries(sweeping.boundaries, n_layers)
        if choosing.at_most is not None and choosing.at_most < boundaries[0]:
            raise BoundaryError(
                f"at_most={choosing.at_most}, but boundaries={sweeping.boundaries!r} has none up to it. Add one there."
            )
        if choosing.boundary is not None and choosing.boundary not in boundaries:
            raise BoundaryError(
                f"boundary={choosing.boundary} is not among boundaries={sweeping.boundaries!r}. Add it there."
            )
        return cls(stack, n_layers, boundaries)


@dataclass(frozen=True)
class _Work:
    """The measuring part of a run."""

    run: RunFolder
    loaded: Loaded
    settings: BoundarySettings
    plan: _Plan
    say: Callable[[str], None]

    def choose(self, examples: Sequence[Example]) -> Choice:
        """Measure, and choose; with coarse boundaries, measure again around the first choice."""
        choice = self._choose_among(examples, self.plan.boundaries)
        if self.settings.sweeping.boundaries == "coarse":
            finer = refine_boundaries(self.plan.boundaries, choice.boundary)
            self.say(f"Boundary {choice.boundary} of the coarse ones; measuring {finer or 'nothing'} around it.")
            if finer:
                choice = self._choose_among(examples, sorted({*self.plan.boundaries, *finer}))
        return choice

    def confirm(self, examples: Sequence[Example], choice: Choice) -> BoundaryConfirmation:
        """Compare the chosen boundary with the full adapter on held-out examples."""
        self.say(f"Confirming boundary {choice.boundary} on {len(examples)} held-out examples.")
        pair = [choice.boundary, choice.full]
        measured = self._sweep("confirm-sweep.jsonl", examples, pair)
        scores = self._scores(choice.metric, "confirm-predictions.jsonl", examples, measured, pair)
        return confirm_boundary(scores, choice, self.settings.choosing.seed)

    def _choose_among(self, examples: Sequence[Example], boundaries: list[int]) -> Choice:
        choosing = self.settings.choosing
        needs_text = metric_named(choosing.select_by).needs_text
        # the shortlist is of those that keep half of the gain over boundary 0, which may not be one to choose
        measured = self._sweep("sweep.jsonl", examples, {0, *boundaries} if needs_text else boundaries)
        if needs_text:
            allowed = [one for one in boundaries if choosing.at_most is None or one <= choosing.at_most]
            n_listed = self.settings.generation.shortlist
            boundaries = shortlist(measured.scores("loss"), measured.boundaries, n_listed, allowed)
            if choosing.boundary is not None:
                boundaries = sorted({*boundaries, choosing.boundary})
            self.say(f"Writing answers at boundaries {', '.join(map(str, boundaries))}.")
        scores = self._scores(choosing.select_by, "predictions.jsonl", examples, measured, boundaries)
        return choose_boundary(
            scores, boundaries, choosing.rule, at_most=choosing.at_most, boundary=choosing.boundary, seed=choosing.seed
        )

    def _sweep(self, file: str, examples: Sequence[Example], boundaries: Iterable[int]) -> Sweep:
        """The losses at the boundaries; those that are whole in the file are not measured again."""
        wanted, known = set(boundaries), self._swept(file)
        n_known = Counter(boundary for boundary, _ in {(row.boundary, row.example) for row in known})
        missing = sorted(boundary for boundary in wanted if n_known[boundary] < len(examples))
        if missing:
            sweep(
                self.loaded,
                examples,
                missing,
                stack=self.plan.stack,
                engine=self.settings.sweeping.engine,
                batch_size=self.settings.reading.batch_size,
                max_length=self.settings.reading.max_length,
                known=known,
                on_rows=lambda rows: self.run.append(file, [dataclasses.asdict(row) for row in rows]),
                on_message=self._note,
                label=f"measuring {file}",
            )
        return collect_sweep(row for row in self._swept(file) if row.boundary in wanted)

    def _swept(self, file: str) -> list[SweepRow]:
        return [SweepRow(**row) for row in from_main_process(lambda: self.run.rows(file))]

    def _scores(
        self, metric: str, file: str, examples: Sequence[Example], measured: Sweep, boundaries: list[int]
    ) -> Scores:
        if not metric_named(metric).needs_text:
            return measured.scores(metric)
        gates = boundary_gates(self.loaded.sites, self.plan.stack, boundaries)
        texts = write_answers(
            self.run,
            file,
            self.loaded,
            examples,
            dict(zip(boundaries, gates, strict=True)),
            "boundary",
            [metric],
            self.settings.reading,
            self.settings.generation,
            self.say,
        )
        return score_texts(metric, texts, boundaries, examples)

    def _note(self, message: str) -> None:
        """Say it, and keep it in run.json: which engine was used, what was truncated."""
        self.say(message)
        self.run.document.setdefault("notes", []).append(message)
        self.run.write_json("run.json", self.run.document)


def _headline(choice: Choice, confirmation: BoundaryConfirmation | None) -> list[Point]:
    """The metric at every boundary, with the boundary as the step; the confirmation at the chosen one."""
    points: list[Point] = [
        (one.boundary, {f"boundary/{choice.metric}": one.value, "boundary/to_full": one.difference.estimate})
        for one in choice.candidates
    ]
    points.append((choice.boundary, {"boundary/chosen": choice.boundary}))
    if confirmation is not None:
        held_out = {"value": confirmation.value, "to_full": confirmation.difference.estimate}
        points.append((choice.boundary, {f"confirmation/{name}": value for name, value in held_out.items()}))
    return points


def _read(data: str, confirm: str | None, settings: BoundarySettings) -> tuple[list[Example], list[Example]]:
    metrics = [settings.choosing.select_by]
    examples = read(data, settings.reading, metrics)
    if confirm is None:
        return examples, []
    held_out = read(confirm, settings.reading, metrics)
    check_held_out({"--confirm": (confirm, held_out), "--data": (data, examples)})
    return examples, held_out


def _start(
    out: Path, folder: AdapterFolder, data: str, confirm: str | None, settings: BoundarySettings, resume: bool
) -> RunFolder:
    inputs = {"adapter": folder.path, "data": Path(data), "confirm": Path(confirm) if confirm else None}
    everything = dataclasses.asdict(settings) | {"adapter": folder.path, "data": data, "confirm": confirm}
    return start_run(out, "boundary", everything, inputs, resume)


def _row(site: Site) -> dict[str, Any]:
    """A site without a score: where it is and how large."""
    return {
        "site": site.name,
        "stack": site.stack,
        "layer": site.layer,
        "kind": site.kind,
        "n_parameters": site.n_parameters,
    }


def _prune(
    run: RunFolder, folder: AdapterFolder, stack: str, choice: Choice, confirmation: BoundaryConfirmation | None
) -> PruneResult | None:
    selection = select_boundary(folder.sites, choice.boundary, stack)
    provenance = {"hashes": run.document["hashes"], "versions": run.document["versions"]}
    settings = {**selection.settings, "rule": choice.rule, "metric": choice.metric}
    selection = Selection(selection.sites, selection.method, settings, provenance)
    selection.save(run.path / "selection.json")
    if not selection.kept:
        return None
    note = f"{choice.reason} {confirmation.sentence}\n\n{confirmation.table}" if confirmation else choice.reason
    if (run.path / "adapter").exists():  # a run that stopped between here and the end
        shutil.rmtree(run.path / "adapter")
    return prune(folder.path, selection, run.path / "adapter", note=note)
