"""What a method works with: a model, data, a recipe and a budget, and the trainings that several methods share."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import PeftConfig, get_peft_model
from transformers import set_seed

from lorazor.adapter.load import Loaded
from lorazor.adapter.sites import Site, find_sites
from lorazor.adapter.tasks import TASK_TYPES, modules_to_train
from lorazor.bench.places import appearing
from lorazor.bench.recipes import train_settings
from lorazor.bench.suite import Cell, file_name
from lorazor.data.examples import Example, asked
from lorazor.data.questions import Question
from lorazor.errors import BudgetError, SettingsError
from lorazor.measure.peak import peak
from lorazor.selection import Selection
from lorazor.settings import BudgetSettings, ModelSettings, TrainSettings
from lorazor.train.answers import make_rows
from lorazor.train.fit import fit
from lorazor.train.start import Start
from lorazor.workflow.train import train_adapter


@dataclass
class Experiment:
    """A cell under way.

    Attributes:
        cell: what is asked for.
        model: the base model.
        train: examples to train on, in the order that the seed gives them.
        validation: examples to choose by.
        folder: for everything that is trained here.
        shared: for trainings that several cells of a suite have in common.
        seconds_before, peak_before: what such trainings took, where they were there already.
    """

    cell: Cell
    model: ModelSettings
    train: list[Example] | list[Question]
    validation: list[Example] | list[Question]
    folder: Path
    shared: Path
    seconds_before: float = 0.0
    peak_before: int = 0

    def settings(self, rank: int | None = None, steps: int | None = None, **fields: Any) -> TrainSettings:
        """Of `lorazor train`; alpha / rank is that of the recipe."""
        return train_settings(self.cell, self.model, rank, steps, **fields)

    @property
    def steps_before_healing(self) -> int:
        """Of those of the cell.

        Raises:
            SettingsError: healing takes all of them.
        """
        own = self.cell.recipe
        if own.heal_steps >= own.steps:
            raise SettingsError(f"heal_steps={own.heal_steps} leave none of steps={own.steps} to train. Pass fewer.")
        return own.steps - own.heal_steps

    def unseen(self, n_seen: int, n: int) -> list[Any]:
        """Rows that follow those that a training has taken, from the start again where it has taken all of them.

        Those that share a prompt with a validation example are left out: `lorazor shrink` refuses them.
        """
        chosen_by = {asked(one) for one in self.validation if isinstance(one, Example)}
        start = n_seen % len(self.train)
        rows = (self.train[start:] + self.train[:start])[:n]  # pyright: ignore[reportOperatorIssue]
        return [one for one in rows if not isinstance(one, Example) or asked(one) not in chosen_by]

    def new(self, name: str) -> Path:
        """A folder that is not there."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        return path

    def trained(self, name: str, settings: TrainSettings) -> Path:
        """What `lorazor train` writes."""
        return train_adapter(self.train, out=self.new(name), settings=settings).out

    def start(self) -> Start:
        """The models that trainings start from."""
        settings = self.settings()
        return Start(settings.model, settings.lora, self.cell.seed, self.train)

    @cached_property
    def sites(self) -> list[Site]:
        """All sites, with the rank of the recipe."""
        return list(find_sites(self.start().on_all()[1]))

    @property
    def n_parameters(self) -> int:
        """What the budget allows."""
        budget = self.cell.budget
        assert budget is not None and budget.kind == "params"
        return int(budget.share * sum(site.n_parameters for site in self.sites))

    def budget(self, schedule: str = "one-cut") -> BudgetSettings:
        """The cell's, as `lorazor train` takes it; schedules that drop sites one by one count sites."""
        budget = self.cell.budget
        assert budget is not None
        if budget.kind == "step_time":
            return BudgetSettings(step_time=budget.share)
        if budget.kind == "memory":
            return BudgetSettings(memory=str(budget.share))
        if schedule == "one-cut":
            return BudgetSettings(params=self.n_parameters)
        mean = sum(site.n_parameters for site in self.sites) / len(self.sites)
        return BudgetSettings(keep=max(1, int(self.n_parameters / mean)))

    def rank_on(self, sites: Sequence[Site]) -> int:
        """The highest rank on these sites that the budget allows.

        Raises:
            BudgetError: rank 1 is more than that.
        """
        each = sum(site.n_parameters for site in sites) // self.cell.recipe.rank
        if (rank := self.n_parameters // each) < 1:
            raise BudgetError(f"Rank 1 has {each:,} parameters, more than the {self.n_parameters:,} of the budget.")
        return rank

    def on_sites(self, selection: Selection) -> Path:
        """Fresh LoRA on these sites alone, trained."""
        path = self.folder / "selection.json"
        selection.save(path)
        return self.trained("on-sites", self.settings(selection=path))

    def lora(self, steps: int | None = None) -> Path:
        """LoRA on all sites after the first steps, or all of them, which methods share."""
        name = "lora" if steps is None else f"lora-{steps}"
        return self.once(name, lambda: self.trained("lora", self.settings(steps=steps)))

    def fit(self, model: Any, loaded: Loaded, name: str) -> Path:
        """LoRA that was put on the model otherwise than on all sites alike, after the training."""
        folder = self.new(name)
        self._fit(model, loaded, folder, save_to=folder)
        return folder

    def fit_peft(self, config: PeftConfig, callbacks: Any = ()) -> Path:
        """Any adapter of PEFT after the training, as PEFT itself saves it."""
        loaded = self.start().base()
        config.target_modules = self.settings().lora.targets  # pyright: ignore[reportAttributeAccessIssue]
        config.task_type = TASK_TYPES[loaded.task]  # pyright: ignore[reportAttributeAccessIssue]
        whole = modules_to_train(loaded.model, loaded.task, loaded.untrained)
        config.modules_to_save = whole or None  # pyright: ignore[reportAttributeAccessIssue]
        set_seed(self.cell.seed)
        model = get_peft_model(loaded.model, config)
        self._fit(model, loaded, self.new("peft"), callbacks)
        model.save_pretrained(str(folder := self.new("saved")))
        return folder

    def fit_whole(self) -> Path:
        """All weights of the model after the training, which keeps them in float32: bfloat16 swallows small steps."""
        loaded = self.start().base()
        self._fit(loaded.model.float().train(), loaded, self.new("whole"))
        loaded.model.save_pretrained(folder := self.new("saved"))
        loaded.tokenizer.save_pretrained(folder)
        return folder

    def _fit(self, model: Any, loaded: Loaded, folder: Path, callbacks: Any = (), save_to: Path | None = None) -> None:
        rows, _ = make_rows(loaded, self.train, self.cell.spec.max_length)
        own = self.settings()
        fit(model, loaded, rows, folder, own.fit, own.batch_size, callbacks=callbacks, save_to=save_to)

    def once(self, name: str, make: Callable[[], Path]) -> Path:
        """What several cells of a task and a seed need: made by the first of them, kept for the others.

        Two that make it at one time make the same, and the first to end is taken.

        Args:
            name: tells it from what else is shared by cells of the same task, recipe and seed.
            make: trains it and gives the folder.
        """
        own, cost = self.cell, "cost.json"
        place = self.shared / file_name(f"{own.task}-{own.seed}-{own.source_key}-{name}")
        if place.exists():
            seconds, n_bytes = json.loads((place / cost).read_text())
            self.seconds_before += seconds
            self.peak_before = max(self.peak_before, n_bytes or 0)
            return place
        start = time.perf_counter()
        made = make()
        with appearing(place) as beside:
            shutil.copytree(made, beside)
            (beside / cost).write_text(json.dumps([time.perf_counter() - start, peak()]))
        return place
