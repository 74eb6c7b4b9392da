"""Reading suites: a TOML file to cells, and what is wrong with it, with the nearest right name."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from lorazor.bench import methods
from lorazor.bench.recipes import check_cell
from lorazor.bench.suite import Budget, BudgetKind, Cell, Recipe, Suite, Task, names_of
from lorazor.errors import OutputError, SettingsError
from lorazor.fields import LARGEST_SEED, Settings
from lorazor.measure.metrics import METRICS

SUITES = Path(__file__).with_name("suites")
"""The suites that come with lorazor."""

LONGEST_NAME = 80
"""Of a task or a method, in characters: both are in the names of folders."""

S = TypeVar("S", bound=Settings)
V = TypeVar("V", dict[str, Any], list[str])


@dataclass(frozen=True)
class _Way:
    """A method of a suite.

    Attributes:
        uses: its file.
        options: of it.
        recipe: what is not that of the task.
        only: tasks.
        budgets: None for those of the task.
    """

    uses: str
    options: dict[str, Any]
    recipe: dict[str, Any]
    only: list[str]
    budgets: list[Budget] | None


@dataclass(frozen=True)
class _Ground:
    """A task of a suite.

    Attributes:
        spec: what it is.
        recipe: what is not that of the suite.
        recipes: what is neither, by the methods that they are of.
        methods: that apply.
        budgets: None for those of the suite.
    """

    spec: Task
    recipe: dict[str, Any]
    recipes: dict[str, Any]
    methods: list[str]
    budgets: list[Budget] | None


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
        document = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{str(path)!r} is not TOML ({error}). Correct it.") from error
    except OSError as error:
        raise OutputError(f"Cannot read {str(path)!r}: {error.strerror}.") from error
    place = path.name
    _check_names(document, ("about", "seeds", "budgets", "recipe", "tasks", "methods"), place)
    for key in ("tasks", "methods"):
        if not isinstance(document.get(key), dict) or not document[key]:
            raise SettingsError(f"{place} has no {key}. Add a table [{key}.NAME] for each.")
        for name, table in document[key].items():
            _check_table(name, table, f"{place}, {key}")
    budgets = _budgets(document, place) or []
    seeds = document.get("seeds", [0])
    if (
        not isinstance(seeds, list)
        or not seeds
        or any(type(one) is not int or not 0 <= one <= LARGEST_SEED for one in seeds)
    ):
        raise SettingsError(f"{place}: seeds = {seeds!r}. Pass a list of whole numbers, from 0 to {LARGEST_SEED}.")
    common = _taken(document, "recipe", {}, place)
    ways = {name: _way(name, table, list(document["tasks"]), place) for name, table in document["methods"].items()}
    grounds = {name: _ground(name, table, list(ways), place) for name, table in document["tasks"].items()}
    cells = []
    for seed, (task, ground), (method, way) in itertools.product(seeds, grounds.items(), ways.items()):
        if method not in ground.methods or task not in way.only:
            continue
        fields = {**common, **ground.recipe, **way.recipe, **ground.recipes.get(method, {})}
        recipe = _made(Recipe, fields, f"{place}, [tasks.{task}] with {method!r}")
        few = next(one for one in (way.budgets, ground.budgets, budgets) if one is not None)
        for budget in _budgets_of(way.uses, few):
            cell = Cell(task, method, way.uses, way.options, budget, seed, ground.spec, recipe)
            _check(cell, place)
            cells.append(cell)
    return Suite(path.stem, str(document.get("about", "")), tuple(_once(cells, place)))


def _way(name: str, table: Any, tasks: list[str], place: str) -> _Way:
    where, table = f"{place}, [methods.{name}]", dict(table)
    uses, recipe = table.pop("uses", name), _taken(table, "recipe", {}, where)
    only, budgets = _taken(table, "only", tasks, where), _budgets(table, where)
    known = methods.names()
    if not isinstance(uses, str) or uses not in known:
        raise SettingsError(f"{where}: no method {uses!r}{_nearest(uses, known)} There are {', '.join(known)}.")
    _check_names(table, methods.options_of(uses), f"{where}: options of {uses}")
    _check_names(only, tasks, f"{where}, only")
    return _Way(uses, table, recipe, only, budgets)


def _ground(name: str, table: Any, ways: list[str], place: str) -> _Ground:
    where, table = f"{place}, [tasks.{name}]", dict(table)
    recipe, recipes = _taken(table, "recipe", {}, where), _taken(table, "recipes", {}, where)
    applied, budgets = _taken(table, "methods", ways, where), _budgets(table, where)
    _check_names(applied, ways, f"{where}, methods")
    _check_names(recipes, ways, f"{where}, recipes")
    recipes = {method: _taken(recipes, method, {}, f"{where}, recipes") for method in tuple(recipes)}
    spec = _made(Task, table, where)
    _check_names(names_of(spec.metrics), METRICS, f"{where}, metrics")
    return _Ground(spec, recipe, recipes, applied, budgets)


def _taken(table: dict[str, Any], key: str, default: V, where: str) -> V:
    """What a table has under a key, taken out of it; of the kind of the default, or refused."""
    found = table.pop(key, default)
    is_names = isinstance(found, list) and all(isinstance(one, str) for one in found)
    if not (isinstance(found, dict) if isinstance(default, dict) else is_names):
        what = "table" if isinstance(default, dict) else "list of names"
        raise SettingsError(f"{where}: {key} = {found!r}. Pass a {what}.")
    return found  # pyright: ignore[reportReturnType]


def _budgets(table: dict[str, Any], where: str) -> list[Budget] | None:
    """Those of a table, which are taken out of it."""
    if "budgets" not in table:
        return None
    found = table.pop("budgets")
    if not isinstance(found, list):
        raise SettingsError(f"{where}: budgets = {found!r}. Pass a list, such as [{{ params = 0.125 }}].")
    return [_budget(one, where) for one in found]


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
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
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


def _check(cell: Cell, place: str) -> None:
    try:
        check_cell(cell)
    except SettingsError as error:
        raise SettingsError(f"{place}, {cell.name!r}: {error}") from error


def _once(cells: list[Cell], place: str) -> list[Cell]:
    """The cells, none of which has the numbers of another, or its name."""
    seen: dict[str, Cell] = {}
    for cell, what in itertools.product(cells, ("key", "name")):
        if (other := seen.setdefault(getattr(cell, what), cell)) is not cell:
            raise SettingsError(f"{place}: {cell.name!r} is the same as {other.name!r}. Remove one.")
    if not cells:
        raise SettingsError(f"{place} has no cell: no method applies to a task, or none can meet a budget. Add one.")
    return cells


def _check_table(name: str, table: Any, where: str) -> None:
    if not isinstance(table, dict):
        raise SettingsError(f"{where}: {name} = {table!r:.80}. Pass a table, such as {name} = {{}}.")
    if not 0 < len(name) <= LONGEST_NAME:
        raise SettingsError(f"{where}: {name!r:.80} has {len(name)} characters. Use 1 to {LONGEST_NAME}.")


def _check_names(names: Iterable[str], known: Iterable[str], where: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            raise SettingsError(f"{where}: {name!r} is unknown{_nearest(name, known)} There are {', '.join(known)}.")


def _nearest(name: Any, known: Iterable[str]) -> str:
    """The end of a sentence on a name that is unknown."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "."
