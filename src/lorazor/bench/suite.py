"""Suites: a grid of tasks, methods, budgets and seeds in one TOML file, and its cells."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

from lorazor.fields import Above, AtLeast, Settings
from lorazor.files import json_text

_AFTERWARDS = ("select_steps", "gate_lr", "heal_steps", "heal_lr")
"""Of a recipe, what plain LoRA does not depend on."""

BudgetKind = Literal["params", "step_time", "memory"]


@dataclass(frozen=True)
class Task(Settings):
    """A model and the data it is trained, chosen and judged on.

    Attributes:
        model: hub id or folder.
        data: hub name, `owner/name` or `owner/name:configuration`, or folder.
        train, validation, test: splits. A validation split that is "train" is held out of it.
        metrics: of the test examples, separated by commas, in the order of their weight; the loss is always measured.
        n_train: examples to train on, the first ones; all by default.
        n_validation, n_test: examples to use, drawn once; all of the test by default.
        n_text: of the test examples, those that answers are written for.
        gguf_file: of the model's folder.
        task: as in `ModelSettings`.
        labels: as in `ExampleSettings`.
        max_length: tokens of an example.
        max_new_tokens: of an answer.
        bleu_tokenizer: of sacrebleu.
        parameters, layers, hidden, vocabulary: the shape of the model, by which `--dry-run` says what a cell costs.
        tokens: of an example, likewise.
    """

    model: str
    data: str
    train: str = "train"
    validation: str = "validation"
    test: str = "test"
    metrics: str = ""
    n_train: Annotated[int | None, AtLeast(1)] = None
    n_validation: Annotated[int, AtLeast(1)] = 64
    n_test: Annotated[int | None, AtLeast(1)] = None
    n_text: Annotated[int, AtLeast(1)] = 64
    gguf_file: str | None = None
    task: str = "auto"
    labels: str = "auto"
    max_length: Annotated[int | None, AtLeast(1)] = None
    max_new_tokens: Annotated[int, AtLeast(1)] = 64
    bleu_tokenizer: str = "13a"
    parameters: Annotated[float | None, Above(0)] = None
    layers: Annotated[int | None, AtLeast(1)] = None
    hidden: Annotated[int | None, AtLeast(1)] = None
    vocabulary: Annotated[int | None, AtLeast(1)] = None
    tokens: Annotated[int | None, AtLeast(1)] = None


@dataclass(frozen=True)
class Recipe(Settings):
    """How the trainings of a suite go; tasks and methods may have their own values.

    Attributes:
        steps: optimizer steps of a cell, all of them.
        batch_size: examples of a step.
        learning_rate, rise_steps, weight_decay, accumulation, gradient_checkpointing, precision: as in `FitSettings`.
        dtype: of the base model, as in `ModelSettings`.
        rank, alpha, dropout, target_modules: as in `LoraSettings`; alpha / rank stays where a method has another rank.
        select_steps: of `steps`, those in which a method chooses what to train.
        gate_lr: step size of WeightLoRA's gates.
        heal_steps: of `steps`, those of healing after a cut.
        heal_lr: learning rate of healing.
        save_steps: steps from one checkpoint to the next.
    """

    steps: int = 300
    batch_size: int = 8
    learning_rate: float = 1e-3
    rise_steps: int = 10
    weight_decay: float = 0.01
    accumulation: int = 1
    gradient_checkpointing: bool = False
    precision: str = "auto"
    dtype: str = "auto"
    rank: Annotated[int, Above(0)] = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: str = "all-linear"
    select_steps: Annotated[int, AtLeast(1)] = 100
    gate_lr: Annotated[float, Above(0)] = 5.0
    heal_steps: Annotated[int, AtLeast(1)] = 60
    heal_lr: Annotated[float, Above(0)] = 2e-4
    save_steps: int = 10**9


@dataclass(frozen=True)
class Budget:
    """What a cell may end with, as a share of LoRA on all sites: `params=0.125`."""

    kind: BudgetKind
    share: float

    def __str__(self) -> str:
        return f"{self.kind}={self.share:g}"


@dataclass(frozen=True)
class Cell:
    """One training to measure.

    Attributes:
        task: its name in the suite.
        method: its name in the suite.
        uses: the file of the method.
        options: of the method.
        budget: None of a method that has none.
        seed: of everything that is drawn.
        spec: the task.
        recipe: of the training.
    """

    task: str
    method: str
    uses: str
    options: Mapping[str, Any]
    budget: Budget | None
    seed: int
    spec: Task
    recipe: Recipe

    @property
    def parts(self) -> list[str]:
        """What tells it from the other cells: `sst2`, `directions`, `params=0.125`, `seed=0`."""
        return [self.task, self.method, *([str(self.budget)] if self.budget else []), f"seed={self.seed}"]

    @property
    def name(self) -> str:
        """For people."""
        return ", ".join(self.parts)

    @cached_property
    def key(self) -> str:
        """A hash of all that the cell's numbers depend on, but for versions, machines and names."""
        named = {"task": None, "method": None, "spec": _of_data(self.spec), "options": dict(self.options)}
        return _digest({**dataclasses.asdict(self), **named})

    @property
    def source_key(self) -> str:
        """A hash of what trainings are the same by: those of other methods and budgets of the task may share them."""
        own = {name: one for name, one in vars(self.recipe).items() if name not in _AFTERWARDS}
        return _digest({"seed": self.seed, "spec": _of_data(self.spec), "recipe": own})

    @property
    def folder(self) -> str:
        """Of the cell, in that of the suite."""
        return file_name("-".join([*self.parts, self.key]))


Outcome = tuple[Cell, dict[str, Any] | str]
"""A cell, and its row or what went wrong."""


@dataclass(frozen=True)
class Suite:
    """A grid of cells.

    Attributes:
        name: of the suite.
        about: one line for people.
        cells: all of them, seed by seed, so that a suite that is broken off has whole tables.
    """

    name: str
    about: str
    cells: tuple[Cell, ...] = field(repr=False)


def file_name(text: str) -> str:
    """The text with what file systems may not take replaced."""
    return re.sub(r"[^\w.=-]", "_", text)


def names_of(metrics: str) -> list[str]:
    """The metrics of a task, the loss first."""
    return ["loss", *(one.strip() for one in metrics.split(",") if one.strip() not in ("", "loss"))]


def _of_data(spec: Task) -> dict[str, Any]:
    """What a task's numbers depend on: not on how dear it is said to be."""
    said = ("parameters", "layers", "hidden", "vocabulary", "tokens")
    return {name: value for name, value in dataclasses.asdict(spec).items() if name not in said}


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json_text(dict(sorted(document.items()))).encode()).hexdigest()[:12]
