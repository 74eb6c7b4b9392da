"""A suite of seconds, on a tiny model, and the command that runs it, to be killed where a test wants."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.tiny_folders import make_folders, write_rows

SUITE = """
about = "Two of its trainings are shared."
seeds = [0]
budgets = [{ params = 0.5 }]

[recipe]
steps = 6
select_steps = 2
heal_steps = 2
batch_size = 2
rise_steps = 1
rank = 2

[tasks.numbers]
model = "base"
data = "numbers"

[methods]
base = {}
lora = {}
low-rank = {}
shrink = {}
[methods.fisher]
uses = "shrink"
heal = false
"""

DEADLY = """
import os, signal, sys
place, _, number = os.environ.get("DIE_BEFORE", "nowhere:1").rpartition(":")
left = int(number)
def die(event, arguments):
    global left
    if event == "os.rename" and place in str(arguments[1]):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(die)
"""
"""Of every Python process: DIE_BEFORE=/results.jsonl:2 is kill -9 just before that file is renamed the second time."""


def write_suite(root: Path) -> Path:
    """The suite, with copies of its model and data beside it, and what makes processes deadly."""
    root.mkdir(exist_ok=True)
    make_folders(root)
    (root / "numbers").mkdir()
    for split, numbers in {"train": range(40), "validation": range(50, 56), "test": range(60, 66)}.items():
        write_rows(root / "numbers" / f"{split}.jsonl", numbers)
    (root / "sitecustomize.py").write_text(DEADLY)
    (root / "small.toml").write_text(SUITE)
    return root / "small.toml"


def command(suite: Path, out: Path, *more: str) -> list[str]:
    words = ["bench", str(suite), "--out", str(out), "--copies", str(suite.parent), *more]
    return [sys.executable, "-m", "lorazor", *words]


def environment(suite: Path, die_before: str = "nowhere:1") -> dict[str, str]:
    path = os.pathsep.join([str(suite.parent), *sys.path])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "DIE_BEFORE": die_before}


def run(suite: Path, out: Path, *more: str, die_before: str = "nowhere:1") -> subprocess.CompletedProcess[str]:
    options: dict[str, Any] = {"env": environment(suite, die_before), "capture_output": True, "text": True}
    return subprocess.run(command(suite, out, *more), **options)


def numbers(out: Path) -> list[tuple[Any, ...]]:
    """Of all rows: what has to be the same however a suite came to its end."""
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return [(row["cell"], row["metrics"], row["n_parameters"], row["n_sites"], row["ranks"]) for row in rows]


def finished(out: Path) -> dict[str, int]:
    """When the cells that have finished were written."""
    files = (out / "cells").glob("*/run.json")
    return {file.parent.name: file.stat().st_mtime_ns for file in files if json.loads(file.read_text())["finished"]}
