"""Suites: a grid of tasks, methods, budgets and seeds in one TOML file, and its cells."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from lorazor.bench import methods
from lorazor.errors import OutputError, SettingsError
from lorazor.fields import Settings
from lorazor.files import json_text
from lorazor.measure.metrics import METRICS

SUITES = Path(__file__).with_name("suites")
"""The suites that come with lorazor."""

BudgetKind = Literal["params", "step_time", "memory"]
S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class Task(Settings):
    """A model and the data it is trained, chosen and judged on.

    Attributes:
        model: hub id or folder.
        data: hub name, `owner/name` or `owner/name:configuration`, or folder.
        train, validation, test: splits. A validation split that is "train" is held out of it.
        metrics: of the test examples, separated by commas, in the order of their weight; the loss is always measured.
        n_train, n_validation, n_test: examples to use, drawn once; all by default.
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
    n_train: int | None = None
    n_validation: int = 64
    n_test: int | None = None
    n_text: int = 64
    gguf_file: str | None = None
    task: str = "auto"
    labels: str = "auto"
    max_length: int | None = None
    max_new_tokens: int = 64
    bleu_tokenizer: str = "13a"
    parameters: float | None = None
    layers: int | None = None
    hidden: int | None = None
    vocabulary: int | None = None
    tokens: int | None = None


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
    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: str = "all-linear"
    select_steps: int = 100
    gate_lr: float = 5.0
    heal_steps: int = 60
    heal_lr: float = 2e-4
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
        return _digest({"seed": self.seed, "spec": _of_data(self.spec), "recipe": dataclasses.asdict(self.recipe)})

    @property
    def folder(self) -> str:
        """Of the cell, in that of the suite."""
        return re.sub(r"[^\w.=-]", "_", "-".join([*self.parts, self.key]))


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


def names_of(metrics: str) -> list[str]:
    """The metrics of a task, the loss first."""
    return ["loss", *(one.strip() for one in metrics.split(",") if one.strip() not in ("", "loss"))]


def find_suite(name: str) -> Path:
    """The file of a suite: a path, or the name of one that comes with lorazor.

    Raises:
        SettingsError: there is none.
    """
    shipped = {path.stem: path for path in sorted(SUITES.glob("*.toml"))}
    if name in shipped:
        return shipped[name]
    if name.endswith(".toml") and Path(name).is_file():
        return Path(name)
    raise SettingsError(f"No suite {name!r}{_nearest(name, shipped)} Pass a .toml file, or {', '.join(shipped)}.")


def read_suite(path: Path) -> Suite:
    """Read the file of a suite.

    Raises:
        SettingsError: it is no TOML, or has a name or a value that is none; the nearest name is said.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{str(path)!r} is not TOML ({error}). Correct it.") from error
    except OSError as error:
        raise OutputError(f"Cannot read {str(path)!r}: {error.strerror}.") from error
    place = path.name
    _check_names(document, ("about", "seeds", "budgets", "recipe", "tasks", "methods"), place)
    for key in ("tasks", "methods"):
        if not isinstance(document.get(key), dict) or not document[key]:
            raise SettingsError(f"{place} has no {key}. Add a table [{key}.NAME] for each.")
    budgets = [_budget(one, place) for one in document.get("budgets", [])]
    seeds = document.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or any(type(one) is not int or one < 0 for one in seeds):
        raise SettingsError(f"{place}: seeds = {seeds!r}. Pass a list of whole numbers, 0 or more.")
    ways = {name: _way(name, table, place) for name, table in document["methods"].items()}
    cells = []
    for seed, (task, table) in itertools.product(seeds, document["tasks"].items()):
        where, table = f"{place}, [tasks.{task}]", dict(table)
        of_task = table.pop("recipe", {})
        spec = _made(Task, table, where)
        _check_names(names_of(spec.metrics), METRICS, f"{where}, metrics")
        for method, (uses, options, only, own) in ways.items():
            if only is not None and task not in only:
                continue
            recipe = _made(Recipe, {**document.get("recipe", {}), **of_task, **own}, f"{where} with {method!r}")
            for budget in _budgets_of(uses, budgets):
                cells.append(Cell(task, method, uses, options, budget, seed, spec, recipe))
    for name, (_, _, only, _) in ways.items():
        _check_names(only or (), document["tasks"], f"{place}, [methods.{name}], only")
    return Suite(path.stem, str(document.get("about", "")), tuple(_once(cells, place)))


def _way(name: str, table: Any, place: str) -> tuple[str, dict[str, Any], list[str] | None, dict[str, Any]]:
    """File, options, tasks and recipe of a method."""
    where, table = f"{place}, [methods.{name}]", dict(table)
    uses, only, own = table.pop("uses", name), table.pop("only", None), table.pop("recipe", {})
    known = methods.names()
    if uses not in known:
        raise SettingsError(f"{where}: no method {uses!r}{_nearest(uses, known)} There are {', '.join(known)}.")
    _check_names(table, methods.options_of(uses), f"{where}: options of {uses}")
    return uses, table, only, own


def _budgets_of(uses: str, budgets: Iterable[Budget]) -> Iterator[Budget | None]:
    """Those that a method can meet; None once for a method that has no budget."""
    kinds = methods.budgets_of(uses)
    yield from (one for one in budgets if one.kind in kinds) if kinds else [None]


def _budget(table: Any, place: str) -> Budget:
    kinds = get_args(BudgetKind)
    if not isinstance(table, dict) or len(table) != 1:
        raise SettingsError(f"{place}: budget {table!r}. Write {{ params = 0.125 }}, step_time or memory in its place.")
    ((kind, share),) = table.items()
    _check_names([kind], kinds, f"{place}, budgets")
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise SettingsError(f"{place}: budget {kind} = {share!r}. Pass a share of LoRA on all sites, above 0, up to 1.")
    return Budget(kind, float(share))


def _made(kind: type[S], table: Mapping[str, Any], where: str) -> S:
    """Settings of a table, after its names were looked at."""
    fields = {one.name: one for one in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    _check_names(table, fields, where)
    lacking = [
        name for name, one in fields.items()
        if name not in table and one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
    ]  # fmt: skip
    if lacking:
        raise SettingsError(f"{where} has no {lacking[0]!r}. Add it.")
    try:
        return kind(**table)
    except SettingsError as error:
        raise SettingsError(f"{where}: {error}") from error


def _once(cells: list[Cell], place: str) -> list[Cell]:
    """The cells, none of which has the numbers of another."""
    seen: dict[str, Cell] = {}
    for cell in cells:
        if (other := seen.setdefault(cell.key, cell)) is not cell:
            raise SettingsError(f"{place}: {cell.name!r} is the same as {other.name!r}. Remove one.")
    return cells


def _check_names(names: Iterable[str], known: Iterable[str], where: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            raise SettingsError(f"{where}: {name!r} is unknown{_nearest(name, known)} There are {', '.join(known)}.")


def _nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence on a name that is unknown."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


def _of_data(spec: Task) -> dict[str, Any]:
    """What a task's numbers depend on: not on how dear it is said to be."""
    said = ("parameters", "layers", "hidden", "vocabulary", "tokens")
    return {name: value for name, value in dataclasses.asdict(spec).items() if name not in said}


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json_text(dict(sorted(document.items()))).encode()).hexdigest()[:12]
