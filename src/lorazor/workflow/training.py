"""What a selection run and a training have in common: the data, the run folder, and runs of the trainer.

A run folder of a training is an adapter folder as well, like the Trainer's own output folders: the adapter lies in it
when the run has finished, beside `run.json`, `training.jsonl` and, where sites were chosen, `selection.json`,
`scores.jsonl` and `gates.jsonl`. While the run goes on, `select/` and `train/` hold checkpoints.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from peft import PeftModel

from lorazor.adapter.directions import factors_of
from lorazor.adapter.folder import read_adapter
from lorazor.adapter.load import Loaded
from lorazor.adapter.prune import write_pruned
from lorazor.adapter.sites import Site, find_sites
from lorazor.data.batches import what_was_cut
from lorazor.errors import SettingsError
from lorazor.measure.sharding import from_main_process, is_main_process
from lorazor.select.scores import check_score
from lorazor.select.weightlora import check_by
from lorazor.selection import Selection
from lorazor.settings import SelectSettings, TrainSettings
from lorazor.train.answers import TrainingRow, make_rows
from lorazor.train.choose import (
    ChooseSites,
    CostLimit,
    check_budget,
    check_limit,
    choose_without_steps,
    steps_of_selection,
    warmup_settings,
)
from lorazor.train.evidence import GATES_FILE, SCORES_FILE
from lorazor.train.fit import Fitted, check_training, fit, reporters
from lorazor.train.preconditions import check_sites
from lorazor.train.probing import Probing
from lorazor.train.resume import SELECTION_FILE
from lorazor.train.start import Start
from lorazor.workflow.reading import Source, read_for, source_name, start_run
from lorazor.workflow.spending import Spending

LOG_FILE = "training.jsonl"
SELECT, TRAIN = "select", "train"
"""Folders of the two runs, for checkpoints."""

Say = Callable[[str], None]


def check_settings(settings: TrainSettings | SelectSettings, chooses: bool) -> None:
    """Refuse what can be refused before the data is read.

    Args:
        settings: of the training.
        chooses: whether it begins with a selection run.
    Raises:
        SettingsError: a setting is out of range, or there is no base model.
        BudgetError: see `check_budget`.
    """
    check_training(settings.lora, settings.fit, settings.batch_size)
    reporters(settings.report_to)
    if settings.model.model is None:
        raise SettingsError("No base model. Pass --model, a hub id or a folder.")
    if chooses:
        choosing = settings.choosing
        assert choosing.by is not None and choosing.score is not None  # by `with_defaults`
        check_budget(settings.budget, choosing.by)
        grows = settings.grow if isinstance(settings, SelectSettings) else settings.method == "weightlora+"
        check_limit(settings.budget, choosing, grows)
        check_by(choosing.by, choosing.schedule, grows)
        check_score(choosing.score, choosing.by)
        steps_of_selection(settings.choosing, settings.fit)


class Training:
    """A training under way: where it writes, and what it reads.

    Attributes:
        run: the run folder.
        settings: all of them.
        examples: to train on.
        start: makes the models.
        say: receives messages for people.
        note: the same, and `run.json` keeps them.
        seconds: spent in the trainer so far.
        encoded: the examples as rows, once they are.
    """

    def __init__(
        self,
        command: str,
        data: Source,
        out: Path,
        settings: TrainSettings | SelectSettings,
        resume: bool,
        say: Say,
    ) -> None:
        """Read the data and open the run folder."""
        self.examples = read_for({}, data, settings.reading)
        everything = dataclasses.asdict(settings) | {"data": source_name(data)}
        del everything["report_to"]  # it changes nothing in the run, and may be another when the run goes on
        inputs = {"data": data, "selection": everything.get("selection")}
        self.run, self.settings = start_run(out, command, everything, inputs, resume), settings
        self.start = Start(settings.model, settings.lora, settings.fit.seed, self.examples)
        self.say = say if is_main_process() else lambda message: None
        self.note = self.run.noting(say)
        rise, steps = settings.fit.rise_steps, settings.fit.steps
        if rise >= steps:
            self.note(
                f"The learning rate rises over {rise} steps, and the training has {steps}: it ends before the peak. "
                "Pass a lower --rise-steps."
            )
        self.seconds = 0.0
        self.encoded: list[TrainingRow] | None = None

    def choose(self, grow: bool) -> Selection:
        """The choice, by a selection run where the score needs one; it is made unless it is on disk already.

        Args:
            grow: WeightLoRA+, the rank of the chosen sites is raised.
        """
        path = self.run.path / SELECTION_FILE
        if from_main_process(path.exists):
            return Selection.load(path)
        folder = self.run.path / SELECT
        loaded, model = self.start.on_all()
        sites, wanted = find_sites(model), self.settings
        settings = warmup_settings(sites, wanted.budget, wanted.choosing, wanted.fit, grow)
        spending = None
        if (limit := CostLimit.of(wanted.budget)) is not None:
            check_sites(model, sites, settings)
            names, rows = [site.name for site in sites], self.rows(loaded)
            probing = Probing(model, loaded, rows, folder, wanted.fit, wanted.batch_size)
            spending = Spending.begin(limit, names, settings.score, probing, self.run)
            self.note(f"{spending}")
        spend, seed = None if spending is None else spending.choose, wanted.fit.seed
        when = f"in {settings.select_steps} steps" if settings.select_steps else "before the first step"
        self.say(f"Choosing among {len(sites)} sites by {settings.score}, {when}.")
        if settings.select_steps == 0:
            (chosen, rows), ranks = choose_without_steps(sites, settings, seed, spend), {}
        else:
            # of a run that was killed between its end and the last line of `keep_choice`
            from_main_process(lambda: (folder / SELECTION_FILE).unlink(missing_ok=True))
            callback = ChooseSites(settings, seed, spend)
            self.fit(model, loaded, folder, range(settings.select_steps), [callback], folder / "adapter")
            assert callback.selection is not None
            chosen, rows, ranks = callback.selection, None, callback.ranks if grow else {}
        if spending is not None:
            self.note(spending.end(model, [site.name for site in chosen.kept]))
        entries = [dataclasses.replace(site, rank=ranks.get(site.name, site.rank)) for site in chosen.sites]
        provenance = {**chosen.provenance, "hashes": self.run.document["hashes"]}
        selection = Selection(tuple(entries), chosen.method, chosen.settings, provenance)
        from_main_process(
            lambda: self.keep_choice(selection, folder) if rows is None else self.keep_order(selection, rows, sites)
        )
        return selection

    def keep_order(self, selection: Selection, rows: list[dict[str, Any]], sites: Sequence[Site]) -> None:
        """Put a choice that no step was taken for into the run; nothing has been trained that could be gone on with."""
        self.run.write_json("run.json", self.run.document)
        self.run.write_rows(SCORES_FILE, rows)
        selection.save(self.run.path / SELECTION_FILE)
        ranks = {site.name: site.kept_rank for site in selection.kept}
        n_parameters = sum(site.n_parameters // site.rank * ranks.get(site.name, 0) for site in sites)
        self.note(f"Kept {len(ranks)} of {len(sites)} sites, {n_parameters:,} parameters.")

    def keep_choice(self, selection: Selection, folder: Path) -> None:
        """Put the outcome of the selection run beside the run; the selection last, which says that it is over."""
        for name in (SCORES_FILE, GATES_FILE):
            if (folder / name).exists():
                shutil.copyfile(folder / name, self.run.path / name)
        chosen, whole, kept = Selection.load(folder / SELECTION_FILE), folder / "adapter", folder / "kept"
        shutil.rmtree(kept, ignore_errors=True)
        by_direction = self.settings.choosing.by == "direction"
        factors = None
        if by_direction:  # what was saved is in the basis of the choice already
            factors = {site.name: (A, B) for site, A, B in factors_of(read_adapter(whole))}
        write_pruned(whole, chosen, kept, factors=factors)
        selection.save(self.run.path / SELECTION_FILE)
        n_parameters = sum(site.n_parameters for site in read_adapter(kept).sites)
        what = f"{len(selection.kept)} of {len(selection.sites)} sites, {n_parameters:,} parameters"
        if by_direction:
            n_kept, n_all = (sum(site.kept_rank for site in selection.kept), sum(site.rank for site in selection.sites))
            what = f"{n_kept} of {n_all} directions on {what}"
        grown = {site.rank for site in selection.kept} if selection.settings["grow"] else ()
        self.note(f"Kept {what}, which grow to rank {max(grown)}." if grown else f"Kept {what}.")

    def fit(
        self, model: PeftModel, loaded: Loaded, folder: Path, span: range, callbacks: list[Any], save_to: Path
    ) -> Fitted:
        """One of the two runs; its log is added to the run folder's when it has ended."""
        training, batch_size = self.settings.fit, self.settings.batch_size
        report_to, rows = reporters(self.settings.report_to), self.rows(loaded)
        self.run.write_json("run.json", self.run.document)  # from here on there is something to go on with
        label = "choosing sites" if folder.name == SELECT else "training"
        fitted = fit(
            model, loaded, rows, folder, training, batch_size, span, callbacks, True, save_to, report_to, label
        )
        # a run that is done again replaces its own part of the log
        before = from_main_process(lambda: [row for row in self.run.rows(LOG_FILE) if row["step"] <= span.start])
        log = [*before, *(entry | {"step": entry["step"] + span.start} for entry in fitted.log)]
        from_main_process(lambda: self.run.write_rows(LOG_FILE, log))
        self.seconds += fitted.seconds
        return fitted

    def rows(self, loaded: Loaded) -> list[TrainingRow]:
        """Encode the examples, once: both runs have the same tokenizer; and say how many were cut."""
        if self.encoded is not None:
            return self.encoded
        max_length = self.settings.reading.max_length
        rows, n_truncated = make_rows(loaded, self.examples, max_length)
        if n_truncated:
            limit = max_length or loaded.tokenizer.model_max_length
            what = what_was_cut(n_truncated, len(self.examples), loaded.task)
            self.note(f"{what} to fit into {limit} tokens (--max-length).")
        self.encoded = rows
        return rows

    def finish(self) -> None:
        """End the run, then remove its checkpoints; what TensorBoard reads, in `runs/` beside them, stays."""
        self.run.finish()
        if not is_main_process():
            return
        for folder in (self.run.path / SELECT, self.run.path / TRAIN):
            for path in folder.glob("*"):
                if path.is_file():
                    path.unlink()
                elif path.name != "runs":
                    shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):  # it is not there, or holds `runs/`
                folder.rmdir()
