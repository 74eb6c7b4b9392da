"""Every task with every method of the suites that repeat the papers, on tiny models of the same classes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from lorazor.bench.cell import run_cell
from lorazor.bench.copies import Copies
from lorazor.bench.reading import SUITES, find_suite, read_suite
from lorazor.bench.suite import Cell, names_of
from tests.bench.copies import make_copies

pytestmark = pytest.mark.filterwarnings("ignore")


def first_cells(suite: str) -> list[Cell]:
    """One cell of every task and method, of the first seed and the largest budget, with a recipe of five steps."""
    cells = read_suite(find_suite(suite)).cells
    found: dict[tuple[str, str], Cell] = {}
    for cell in (one for one in cells if one.seed == cells[0].seed):
        last = found.get((cell.task, cell.method))
        if last is None or cell.budget.share > last.budget.share:
            found[cell.task, cell.method] = cell
    return [small(cell) for cell in found.values()]


def small(cell: Cell) -> Cell:
    fields = {"steps": 5, "select_steps": 3, "heal_steps": 1, "batch_size": 4, "rise_steps": 0}
    recipe = dataclasses.replace(cell.recipe, **fields, accumulation=min(2, cell.recipe.accumulation))
    spec = dataclasses.replace(
        cell.spec, n_train=16, n_validation=4, n_test=4, n_text=2, max_new_tokens=2, max_length=64
    )
    return dataclasses.replace(cell, recipe=recipe, spec=spec)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("papers")
    tasks = [cell.spec for suite in ("weightlora-paper", "boundary-paper") for cell in first_cells(suite)]
    make_copies(place / "copies", tasks)
    return place


CELLS = {
    f"{suite}: {cell.task}, {cell.method}": cell
    for suite in ("weightlora-paper", "boundary-paper")
    for cell in first_cells(suite)
}


@pytest.mark.parametrize("suite", sorted(path.stem for path in SUITES.glob("*.toml")))
def test_the_steps_of_every_cell_fit_together(suite: str) -> None:
    for own in {cell.recipe for cell in read_suite(find_suite(suite)).cells}:
        assert own.rise_steps <= own.select_steps < own.steps  # as `lorazor train --method weightlora` wants it
        assert own.heal_steps < own.steps
        assert own.batch_size % own.accumulation == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_every_task_with_every_method(name: str, place: Path) -> None:
    cell = CELLS[name]
    row = run_cell(cell, place / name.partition(":")[0], Copies(place / "copies"), "cpu", print)
    assert set(row["metrics"]) == set(names_of(cell.spec.metrics))
    assert all(math.isfinite(value) for value in row["metrics"].values())
    assert row["n_parameters"] > 0 or cell.uses in ("base", "boundary")
