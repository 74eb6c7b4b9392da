"""What a selection run and a training have in common: the data, the run folder, and runs of the trainer.

A run folder of a training is an adapter folder as well, like the Trainer's own output folders: the adapter lies in it
when the run has finished, beside `run.json`, `training.jsonl` and, where sites were chosen, `selection.json`,
`scores.jsonl` and `gates.jsonl`. While the run goes on, `select/` and `train/` hold checkpoints.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from lorazor.adapter.folder import read_adapter
from lorazor.adapter.load import Loaded
from lorazor.adapter.prune import write_pruned
from lorazor.adapter.sites import LiveSite, find_sites
from lorazor.data.examples import Example
from lorazor.data.questions import Question
from lorazor.errors import SettingsError
from lorazor.files import json_text, write_text
from lorazor.measure.sharding import from_main_process, is_main_process
from lorazor.runs import RunFolder
from lorazor.select.scores import check_score
from lorazor.selection import Selection
from lorazor.settings import SelectSettings, TrainSettings
from lorazor.train.answers import TrainingRow, make_rows
from lorazor.train.choose import ChooseSites, check_budget, steps_of_selection, warmup_settings
from lorazor.train.disconnect import grown_ranks
from lorazor.train.fit import Fitted, check_training, fit, reporters
from lorazor.train.resume import SELECTION_FILE
from lorazor.train.start import Start
from lorazor.train.warmup import GATES_FILE, SCORES_FILE
from lorazor.workflow.reading import read_for, source_name
from lorazor.workflow.starting import start_run

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
        check_budget(settings.budget)
        check_score(settings.choosing.score)
        steps_of_selection(settings.choosing, settings.fit)


@dataclass
class Training:
    """A training under way: where it writes, and what it reads.

    Attributes:
        run: the run folder.
        settings: all of them.
        examples: to train on.
        start: makes the models.
        say: receives messages for people.
        seconds: spent in the trainer so far.
        encoded: the examples as rows, once they are.
    """

    run: RunFolder
    settings: TrainSettings | SelectSettings
    examples: Sequence[Example] | Sequence[Question]
    start: Start
    say: Say
    seconds: float = 0.0
    encoded: list[TrainingRow] | None = None

    @classmethod
    def begin(
        cls,
        command: str,
        data: str | Path | Sequence[Example],
        out: Path,
        settings: TrainSettings | SelectSettings,
        resume: bool,
        say: Say,
    ) -> Training:
        """Read the data and open the run folder."""
        source = source_name(data)
        examples = read_for({}, str(data), settings.reading) if isinstance(data, str | Path) else data
        everything = dataclasses.asdict(settings) | {"data": source}
        del everything["report_to"]  # it changes nothing in the run, and may be another when the run goes on
        chosen = everything.get("selection")
        inputs = {"data": Path(data) if isinstance(data, str | Path) else None, "selection": chosen and Path(chosen)}
        run = start_run(out, command, everything, inputs, resume)
        start = Start(settings.model, settings.lora, settings.fit.seed, examples)
        return cls(run, settings, examples, start, say if is_main_process() else lambda message: None)

    def choose(self, grow: bool) -> Selection:
        """The choice of the selection run, which is run unless its choice is on disk already.

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
        self.say(f"Choosing among {len(sites)} sites by {settings.score}, in {settings.select_steps} steps.")
        # of a run that was killed between its end and the last line of `keep_choice`
        from_main_process(lambda: (folder / SELECTION_FILE).unlink(missing_ok=True))
        callback = ChooseSites(settings, wanted.fit.seed)
        self.fit(model, loaded, folder, range(settings.select_steps), [callback], folder / "adapter")
        assert callback.selection is not None
        selection = self.note_choice(callback.selection, settings.grow, sites)
        from_main_process(lambda: self.keep_choice(selection, folder))
        return selection

    def note_choice(self, chosen: Selection, grow: bool, sites: Sequence[LiveSite]) -> Selection:
        """The selection with the ranks to train at, and what it was chosen on."""
        names = {site.name for site in chosen.kept}
        # what all can have, so that the kept sites have one rank
        rank = min(grown_ranks([site for site in sites if site.name in names], len(sites))) if grow else None
        entries = [dataclasses.replace(site, rank=rank) if rank and site.keep else site for site in chosen.sites]
        provenance = {**chosen.provenance, "hashes": self.run.document["hashes"]}
        return Selection(tuple(entries), chosen.method, chosen.settings, provenance)

    def keep_choice(self, selection: Selection, folder: Path) -> None:
        """Put the outcome of the selection run beside the run; the selection last, which says that it is over."""
        for name in (SCORES_FILE, GATES_FILE):
            shutil.copyfile(folder / name, self.run.path / name)
        kept = folder / "kept"
        shutil.rmtree(kept, ignore_errors=True)
        write_pruned(folder / "adapter", Selection.load(folder / SELECTION_FILE), kept)
        selection.save(self.run.path / SELECTION_FILE)
        n_parameters = sum(site.n_parameters for site in read_adapter(kept).sites)
        self.note(f"Kept {len(selection.kept)} of {len(selection.sites)} sites, {n_parameters:,} parameters.")

    def fit(
        self, model: PeftModel, loaded: Loaded, folder: Path, span: range, callbacks: list[Any], save_to: Path
    ) -> Fitted:
        """One of the two runs; its log is added to the run folder's when it has ended."""
        training, batch_size = self.settings.fit, self.settings.batch_size
        report_to, rows = reporters(self.settings.report_to), self.rows(loaded)
        self.run.write_json("run.json", self.run.document)  # from here on there is something to go on with
        fitted = fit(model, loaded, rows, folder, training, batch_size, span, callbacks, True, save_to, report_to)
        from_main_process(lambda: self.note_log(fitted.log, span.start))
        self.seconds += fitted.seconds
        return fitted

    def note_log(self, entries: list[dict[str, Any]], start: int) -> None:
        """Add what a run logged to what the one before it did; a run that is done again replaces its own part."""
        before = [row for row in self.run.rows(LOG_FILE) if row["step"] <= start]
        rows = [*before, *(entry | {"step": entry["step"] + start} for entry in entries)]
        write_text(self.run.path / LOG_FILE, "".join(json_text(row) + "\n" for row in rows))

    def rows(self, loaded: Loaded) -> list[TrainingRow]:
        """The encoded examples; both runs have the same tokenizer, so they are encoded once."""
        if self.encoded is None:
            max_length = self.settings.reading.max_length
            self.encoded, n_truncated = make_rows(loaded, self.examples, max_length)
            if n_truncated:
                what, end = ("texts", "end") if loaded.task == "classification" else ("prompts", "start")
                limit = max_length or loaded.tokenizer.model_max_length
                self.note(
                    f"{n_truncated} of {len(self.examples)} {what} lost their {end} to fit into {limit} tokens "
                    f"(--max-length)."
                )
        return self.encoded

    def note(self, message: str) -> None:
        """Say it, and keep it in `run.json`, once: a run that goes on says it again."""
        self.say(message)
        notes = self.run.document.setdefault("notes", [])
        if message not in notes:
            notes.append(message)

    def finish(self) -> None:
        """End the run, then remove its checkpoints; what TensorBoard reads, in `runs/` beside them, stays."""
        self.run.finish()
        if not is_main_process():
            return
        for folder in (self.run.path / SELECT, self.run.path / TRAIN):
            if not (folder / "runs").is_dir():
                shutil.rmtree(folder, ignore_errors=True)
                continue
            for path in folder.iterdir():
                if path.is_file():
                    path.unlink()
                elif path.name != "runs":
                    shutil.rmtree(path, ignore_errors=True)
