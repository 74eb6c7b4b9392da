"""The shape of the code base: who imports whom, what stays light, and how long things may get."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorazor

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "lorazor"
FILES = sorted(
    path for folder in (SOURCE, ROOT / "tests", ROOT / "benchmarks", ROOT / "examples") for path in folder.rglob("*.py")
)

TORCH_FREE = (
    "lorazor",
    "lorazor.errors",
    "lorazor.files",
    "lorazor.naming",
    "lorazor.selection",
    "lorazor.settings",
    "lorazor.runs",
    "lorazor.measure.stats",
    "lorazor.measure.metrics",
    "lorazor.measure.results",
    "lorazor.measure.suite_rows",
    "lorazor.select.boundary",
    "lorazor.select.verdict",
    "lorazor.data.sources",
    "lorazor.data.examples",
    "lorazor.data.questions",
    "lorazor.train.recipes",
    "lorazor.serve.table",
    "lorazor.serve.settings",
    "lorazor.report.reading",
    "lorazor.report.page",
    "lorazor.report.suite_page",
    "lorazor.cli.report",
    "lorazor.report.images",
    "lorazor.cli.app",
)
HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "accelerate"}

MOST_LINES_OF_A_FILE = 350
MOST_LINES_OF_A_FUNCTION = 60
NAMES_THAT_SAY_NOTHING = {"utils", "util", "helpers", "helper", "common", "manager", "managers"}


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_import_contracts_hold() -> None:
    script = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    result = run_python("-c", script, "--no-logo", "--no-cache")
    assert result.returncode == 0, result.stdout + result.stderr


def test_what_is_light_loads_nothing_heavy() -> None:
    """One process imports them in turn, so that the first to load something heavy is the one to blame."""
    lines = [f"import {name}; print({name!r}, sorted({HEAVY!r} & set(sys.modules)))" for name in TORCH_FREE]
    result = run_python("-c", "\n".join(["import sys", *lines]))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"{name} []" for name in TORCH_FREE]


def test_only_sites_knows_the_layer_classes_of_peft() -> None:
    knowing = {
        path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py") if "peft.tuners" in modules_of(path)
    }
    assert knowing == {"adapter/sites.py"}


def test_all_lists_the_public_names() -> None:
    assert len(lorazor.__all__) == len(set(lorazor.__all__))
    assert set(lorazor.__all__) - {"__version__"} == names_taken_from_lorazor(SOURCE / "__init__.py")
    for name in lorazor.__all__:
        assert getattr(lorazor, name) is not None


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES_OF_A_FILE
    lengths = {f"{node.name}, line {node.lineno}": n_lines(node) for node in functions_of(ast.parse(text))}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES_OF_A_FUNCTION} == {}


def test_module_names_say_something() -> None:
    parts = {part for path in FILES for part in path.relative_to(ROOT).with_suffix("").parts}
    assert not parts & NAMES_THAT_SAY_NOTHING


def functions_of(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def n_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the last, docstring included, decorators not."""
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def modules_of(path: Path) -> set[str]:
    """Modules that a file imports, each with its parents: `a.b` gives `a` and `a.b`."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.rsplit(".", depth)[0] for name in modules for depth in range(name.count(".") + 1)}


def names_taken_from_lorazor(path: Path) -> set[str]:
    """Names that a module imports from lorazor, also those it only shows to type checkers."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    taken = [node for node in nodes if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lorazor")]
    return {alias.asname or alias.name for node in taken for alias in node.names}
