"""Made-up results of a suite, from a function that says what each cell measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SIZES = {"base": 0, "lora": 80_000, "boundary": 60_000}
"""Of methods that have no budget."""


def make_row(
    task: str, method: str, budget: float | None, seed: int, metrics: dict[str, float | None], **changes: Any
) -> dict[str, Any]:
    """A row, as the cell of a suite writes it."""
    size = SIZES.get(method, 80_000) if budget is None else int(80_000 * budget)
    return {
        "schema": "lorazor.results/1",
        "cell": f"{task}/{method}/{budget}/{seed}",
        "task": task,
        "method": method,
        "budget": None if budget is None else {"kind": "params", "share": budget},
        "seed": seed,
        "n_parameters": size,
        "n_sites": 0 if method == "base" else 12,
        "ranks": [] if method == "base" else [8],
        "metrics": metrics,
        "n_test": 100,
        "n_text": 64 if any(name in metrics for name in ("bleu", "rougeL", "gsm8k-match")) else 0,
        "seconds": 10.0 + seed,
        "steps": 300,
        "peak_bytes": 1_000_000_000,
        "device": "cpu",
        "versions": {"python": "3.11.7", "lorazor": "0.1.0"},
        **changes,
    }


def write_suite(out: Path, rows: Sequence[dict[str, Any]], failures: Sequence[dict[str, str]] = ()) -> Path:
    """The folder of a suite called `tiny`."""
    run = {"format": "lorazor.run/1", "command": "bench", "settings": {"suite": "tiny"}, "finished": True}
    run["result"] = {"n_cells": len(rows) + len(failures)}
    (out / "suite").mkdir(parents=True)
    (out / "suite" / "run.json").write_text(json.dumps(run))
    for name, lines in (("results", rows), ("failures", failures)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


def grid(
    tasks: Sequence[str],
    methods: Sequence[tuple[str, Sequence[float | None]]],
    seeds: Sequence[int],
    loss: Callable[[str, str, float | None, int], float],
) -> list[dict[str, Any]]:
    """Rows of all cells; accuracy is 1 - loss."""
    return [
        make_row(task, method, budget, seed, {"loss": (one := loss(task, method, budget, seed)), "accuracy": 1 - one})
        for seed in seeds for task in tasks for method, budgets in methods for budget in budgets
    ]  # fmt: skip
