"""Training from start to end: a plain LoRA, or a selection run and then a training of the sites that it chose.

A run folder is an adapter folder as well, like the Trainer's own output folders: the adapter lies in it when the run
has finished, beside `run.json`, `training.jsonl` and, where sites were chosen, `selection.json`, `scores.jsonl` and
`gates.jsonl`.
While the run goes on, `select/` and `train/` hold checkpoints.
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
from lorazor.adapter.prune import prune
from lorazor.adapter.sites import find_sites
from lorazor.data.examples import Example
from lorazor.data.questions import Question
from lorazor.errors import SettingsError
from lorazor.files import json_text, write_text
from lorazor.measure.sharding import from_main_process, is_main_process
from lorazor.runs import RunFolder
from lorazor.selection import Selection
from lorazor.settings import (
    BudgetSettings,
    DataSettings,
    LoraSettings,
    MethodSettings,
    ModelSettings,
    TrackingSettings,
    TrainSettings,
    WarmupSettings,
)
from lorazor.tracking import reporters
from lorazor.train.budget import check_budget, steps_of_selection, survivors_rank, warmup_settings
from lorazor.train.choose import ChooseSites
from lorazor.train.fit import Fitted, Span, check_training, fit
from lorazor.train.resume import SELECTION_FILE
from lorazor.train.rows import Row, make_rows
from lorazor.train.start import Start
from lorazor.train.warmup import GATES_FILE, SCORES_FILE
from lorazor.workflow.reading import read_for
from lorazor.workflow.starting import start_run

LOG_FILE = "training.jsonl"
_SELECT, _TRAIN = "select", "train"


@dataclass(frozen=True)
class TrainingSettings:
    """All settings of a training, by topic."""

    model: ModelSettings = ModelSettings()
    reading: DataSettings = DataSettings()
    lora: LoraSettings = LoraSettings()
    training: TrainSettings = TrainSettings()
    method: MethodSettings = MethodSettings()
    budget: BudgetSettings = BudgetSettings()
    warmup: WarmupSettings = WarmupSettings()
    tracking: TrackingSettings = TrackingSettings()


@dataclass(frozen=True)
class TrainResult:
    """What a training came to.

    Attributes:
        out: the run folder, which is the adapter folder.
        n_sites: LoRA sites of the adapter.
        n_parameters: trainable parameters at the end, a trained head included.
        loss: mean loss of the last logged steps: nats per answer token, per text or per question.
        seconds: time in the trainers, the selection run included.
        log: what the trainers logged, one entry per logging step.
    """

    out: Path
    n_sites: int
    n_parameters: int
    loss: float
    seconds: float
    log: list[dict[str, Any]]


Say = Callable[[str], None]


def train_adapter(
    data: str | Sequence[Example],
    out: str | Path,
    settings: TrainingSettings,
    resume: bool = False,
    say: Say = lambda message: None,
) -> TrainResult:
    """Train a LoRA adapter: on every site, on those of a selection, or on those that a selection run chooses.

    Args:
        data: examples to train on: a file, a dataset folder, a hub name, or the examples themselves.
        out: the run folder, which becomes the adapter folder; new, unless `resume`.
        settings: everything else; `settings.model.model` names the base model.
        resume: go on with an interrupted run in `out`.
        say: receives messages for people.
    Raises:
        LorazorError: settings, model, data or output folder cannot be used; before the training begins.
    """
    method = settings.method
    _check(settings)
    work = _Work.begin("train", data, Path(out), settings, resume, say)
    if work.run.document["finished"]:
        say(f"{str(out)!r} has finished; there is nothing to go on with.")
        return TrainResult(Path(out), **work.run.document["result"], log=work.run.rows(LOG_FILE))
    if method.method == "lora" and method.selection is None:
        return work.train_on(work.start.on_all, 0)
    if method.selection is not None:
        selection = Selection.load(method.selection)
        return work.train_on(lambda: work.start.on_chosen(selection), 0)
    selection = work.choose()

    def make() -> tuple[Loaded, PeftModel]:
        if method.start == "fresh":
            return work.start.on_chosen(selection)
        return work.start.from_adapter(work.run.path / _SELECT / "kept", selection)

    return work.train_on(make, steps_of_selection(settings.warmup, settings.training))


def select_sites(
    data: str | Sequence[Example],
    out: str | Path,
    settings: TrainingSettings,
    resume: bool = False,
    say: Say = lambda message: None,
) -> Selection:
    """Choose the sites to train, in the first steps of a training that goes no further.

    Args:
        data: examples to train on.
        out: the run folder; it receives `selection.json`, `scores.jsonl` and `gates.jsonl`.
        settings: everything else; `settings.method.method` is a weightlora method.
        resume: go on with an interrupted run in `out`.
        say: receives messages for people.
    Raises:
        LorazorError: settings, model, data or output folder cannot be used; before the training begins.
    """
    _check(settings)
    work = _Work.begin("select", data, Path(out), settings, resume, say)
    selection = work.choose()
    work.clean_up()
    work.run.finish()
    return selection


def _check(settings: TrainingSettings) -> None:
    """Refuse what can be refused before the data is read."""
    method, budget = settings.method, settings.budget
    check_training(settings.lora, settings.training, settings.reading.batch_size)
    reporters(settings.tracking.report_to)
    if settings.model.model is None:
        raise SettingsError("No base model. Pass --model, a hub id or a folder.")
    chooses = method.method != "lora" and method.selection is None
    if chooses:
        check_budget(budget)
        steps_of_selection(settings.warmup, settings.training)
    elif any(value is not None for value in dataclasses.astuple(budget)):
        why = "a selection names its sites already" if method.selection else "method='lora' trains every site"
        raise SettingsError(f"A budget of sites or parameters was given, but {why}. Pass --method weightlora.")
    if method.selection is not None and method.method != "lora":
        raise SettingsError(
            f"method={method.method!r} chooses sites, but a selection was given as well. Pass one of the two."
        )


@dataclass
class _Work:
    """A training under way: where it writes, and what it reads."""

    run: RunFolder
    settings: TrainingSettings
    examples: Sequence[Example] | Sequence[Question]
    start: Start
    say: Say
    seconds: float = 0.0
    encoded: list[Row] | None = None

    @classmethod
    def begin(
        cls,
        command: str,
        data: str | Sequence[Example],
        out: Path,
        settings: TrainingSettings,
        resume: bool,
        say: Say,
    ) -> _Work:
        """Read the data and open the run folder."""
        source = data if isinstance(data, str) else None
        examples = read_for({}, data, settings.reading) if isinstance(data, str) else data
        everything = dataclasses.asdict(settings) | {"data": source}
        del everything["tracking"]  # it changes nothing in the run, and may be another when the run goes on
        inputs = {"data": source and Path(source), "selection": settings.method.selection}
        run = start_run(out, command, everything, inputs, resume)
        start = Start(settings.model, settings.lora, settings.training.seed, examples)
        return cls(run, settings, examples, start, say if is_main_process() else lambda message: None)

    def choose(self) -> Selection:
        """The choice of the selection run, which is run unless its choice is on disk already."""
        path = self.run.path / SELECTION_FILE
        if from_main_process(path.exists):
            return Selection.load(path)
        folder = self.run.path / _SELECT
        loaded, model = self.start.on_all()
        sites, training = find_sites(model), self.settings.training
        grow = self.settings.method.method == "weightlora+"
        settings = warmup_settings(sites, self.settings.budget, self.settings.warmup, training, grow)
        self.say(f"Choosing among {len(sites)} sites by {settings.score}, in {settings.warmup_steps} steps.")
        # of a run that was killed between its end and the last line of `keep_choice`
        from_main_process(lambda: (folder / SELECTION_FILE).unlink(missing_ok=True))
        callback = ChooseSites(settings, training.seed)
        self.fit(model, loaded, folder, Span(0, settings.warmup_steps), [callback], folder / "adapter")
        assert callback.selection is not None
        selection = self.note_choice(callback.selection, settings.grow, sites)
        from_main_process(lambda: self.keep_choice(selection, folder))
        return selection

    def note_choice(self, chosen: Selection, grow: bool, sites: Sequence[Any]) -> Selection:
        """The selection with the ranks to train at, and what it was chosen on."""
        names = {site.name for site in chosen.kept}
        rank = survivors_rank(sites, len(names), names) if grow else None
        entries = [dataclasses.replace(site, rank=rank) if rank and site.keep else site for site in chosen.sites]
        provenance = {**chosen.provenance, "hashes": self.run.document["hashes"]}
        return Selection(tuple(entries), chosen.method, chosen.settings, provenance)

    def keep_choice(self, selection: Selection, folder: Path) -> None:
        """Put the outcome of the selection run beside the run; the selection last, which says that it is over."""
        for name in (SCORES_FILE, GATES_FILE):
            shutil.copyfile(folder / name, self.run.path / name)
        kept = folder / "kept"
        shutil.rmtree(kept, ignore_errors=True)
        prune(folder / "adapter", Selection.load(folder / SELECTION_FILE), kept)
        selection.save(self.run.path / SELECTION_FILE)
        n_parameters = sum(site.n_parameters for site in read_adapter(kept).sites)
        self.note(f"Kept {len(selection.kept)} of {len(selection.sites)} sites, {n_parameters:,} parameters.")

    def train_on(self, make: Callable[[], tuple[Loaded, PeftModel]], start: int) -> TrainResult:
        """Train a model from step `start` to the end, and finish the run."""
        loaded, model = make()
        n_sites = len(find_sites(model))
        steps = self.settings.training.steps
        self.say(f"Training {n_sites} sites, steps {start + 1} to {steps} of {self.settings.reading.batch_size} rows.")
        fitted = self.fit(model, loaded, self.run.path / _TRAIN, Span(start, steps), [], self.run.path)
        numbers: dict[str, Any] = {
            "n_sites": n_sites,
            "n_parameters": fitted.n_parameters,
            "loss": fitted.loss,
            "seconds": self.seconds,
        }
        self.run.document["result"] = numbers
        log = from_main_process(lambda: self.run.rows(LOG_FILE))
        self.clean_up()
        self.run.finish()
        return TrainResult(self.run.path, **numbers, log=log)

    def fit(
        self, model: PeftModel, loaded: Loaded, folder: Path, span: Span, callbacks: list[Any], save_to: Path
    ) -> Fitted:
        """One of the two runs; its log is added to the run folder's when it has ended."""
        training, batch_size = self.settings.training, self.settings.reading.batch_size
        report_to, rows = reporters(self.settings.tracking.report_to), self.rows(loaded)
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

    def rows(self, loaded: Loaded) -> list[Row]:
        """The encoded examples; both runs have the same tokenizer, so they are encoded once."""
        if self.encoded is None:
            max_length = self.settings.reading.max_length
            made = make_rows(loaded, self.examples, max_length)
            if made.n_truncated:
                what, end = ("texts", "end") if loaded.task == "classification" else ("prompts", "start")
                limit = max_length or loaded.tokenizer.model_max_length
                self.note(
                    f"{made.n_truncated} of {len(self.examples)} {what} lost their {end} to fit into {limit} tokens "
                    f"(--max-length)."
                )
            self.encoded = made.rows
        return self.encoded

    def note(self, message: str) -> None:
        """Say it, and keep it in `run.json`, once: a run that goes on says it again."""
        self.say(message)
        notes = self.run.document.setdefault("notes", [])
        if message not in notes:
            notes.append(message)

    def clean_up(self) -> None:
        """Remove the checkpoints of a run that has finished; what TensorBoard reads, in `runs/` beside them, stays."""
        if not is_main_process():
            return
        for folder in (self.run.path / _SELECT, self.run.path / _TRAIN):
            if not (folder / "runs").is_dir():
                shutil.rmtree(folder, ignore_errors=True)
                continue
            for path in folder.iterdir():
                if path.is_file():
                    path.unlink()
                elif path.name != "runs":
                    shutil.rmtree(path, ignore_errors=True)
