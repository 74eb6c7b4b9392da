"""What a cell is said to cost, by hand, and what finished rows make of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from lorazor.bench.copies import Copies
from lorazor.bench.cost import Costs, estimate, in_words, measure_teraflops, n_unknown
from lorazor.bench.run import run_suite
from lorazor.bench.suite import Cell, Recipe, Task
from tests.bench.copies import make_model

SPEC = Task("m", "d", metrics="bleu", parameters=1e9, layers=10, hidden=1000, vocabulary=5000, tokens=100, n_test=50)
RECIPE = Recipe(steps=200, batch_size=4, dtype="bfloat16", precision="bfloat16", rank=8, target_modules="q,v")


def cell(method: str = "lora", seed: int = 0, task: str = "t", spec: Task = SPEC, **recipe: Any) -> Cell:
    return Cell(task, method, method, {}, None, seed, spec, dataclasses.replace(RECIPE, **recipe))


def row(of: Cell, seconds: float) -> dict[str, Any]:
    return {
        "cell": of.key, "task": of.task, "method": of.method, "seed": of.seed, "seconds": seconds, "peak_bytes": 7e9,
    }  # fmt: skip


def test_an_estimate_by_hand() -> None:
    lora, full = estimate(cell(), teraflops=10), estimate(cell("full-finetuning"), teraflops=10)
    trained = 200 * 4 * 100 * 1e9  # tokens times parameters
    assert lora.seconds == pytest.approx(4 * trained / (0.4 * 10e12))
    assert full.seconds == pytest.approx(6 * trained / (0.4 * 10e12))
    assert estimate(cell(gradient_checkpointing=True), 10).seconds == pytest.approx(6 * trained / (0.4 * 10e12))
    reads, writes = 2e9 * 50 * 100, 2e9 * 50 * 64
    assert lora.test_seconds == pytest.approx(reads / (0.4 * 10e12) + writes / (0.04 * 10e12))
    activations, logits = 34 * 10 * 400 * 1000, 8 * 400 * 5000
    factors = 10 * 8 * 2 * 1000 * 2  # layers, rank, both sides, q and v
    assert lora.peak_bytes == pytest.approx(2e9 + 16 * factors + activations + logits)
    assert full.peak_bytes == pytest.approx(4e9 + 3 * 4e9 + activations + logits)
    labelled = dataclasses.replace(SPEC, metrics="accuracy")  # embeddings are looked up, not multiplied with
    assert estimate(cell(spec=labelled), 10).seconds == pytest.approx(lora.seconds * (1e9 - 5e6) / 1e9)
    unknown = dataclasses.replace(SPEC, tokens=None)
    assert estimate(cell(spec=unknown), 10).seconds is None


def test_rows_that_have_finished_count_before_estimates() -> None:
    dora, other = (
        [cell("dora", seed) for seed in range(4)],
        cell("dora", task="u", spec=dataclasses.replace(SPEC, data="e")),
    )
    costs = Costs([*dora, cell("rslora"), other], Copies(), teraflops=10)
    rows = [row(one, seconds) for one, seconds in zip(dora[:3], (50.0, 70.0, 90.0), strict=True)]
    guess, test = estimate(dora[0], 10).seconds, estimate(dora[0], 10).test_seconds
    assert guess is not None
    scale = 70 / guess
    assert costs.scale(other, rows) == pytest.approx(scale)
    same_method, same_task, nothing = costs.seconds([dora[3], cell("rslora"), other], rows)
    assert same_method == same_task == pytest.approx(70 + test * scale)
    assert nothing == pytest.approx((guess + test) * scale)
    assert costs.time_left([dora[3]], rows).startswith("1 cells left: 0.0")
    unmeasured = Costs([*dora, cell("rslora"), other], Copies(), teraflops=None)
    assert unmeasured.seconds([dora[3], cell("rslora"), other], rows) == [70, 70, None]


def test_a_task_is_as_far_from_its_estimates_as_its_own_rows_are_or_those_of_its_model() -> None:
    small = dataclasses.replace(SPEC, model="s", parameters=1e6)
    slow, new, same_model = cell(spec=small, task="small"), cell(task="u"), cell(task="v")
    fast = cell("low-rank", task="v")
    costs = Costs([slow, new, same_model, fast], Copies(), teraflops=10)
    guesses = [costs.estimates[one.key].seconds for one in (slow, fast)]
    assert guesses[0] and guesses[1]
    rows = [row(slow, 20 * guesses[0]), row(fast, 0.5 * guesses[1])]
    assert [costs.scale(one, rows) for one in (slow, new, same_model)] == pytest.approx([20, 0.5, 0.5])
    assert costs.scale(cell(spec=dataclasses.replace(SPEC, model="x"), task="w"), rows) == pytest.approx(10.25)


def test_the_training_that_methods_share_counts_once() -> None:
    cells = [cell("lora"), cell("boundary"), cell("boundary", seed=1)]
    costs = Costs(cells, Copies(), teraflops=10)
    first, second, other = costs.seconds(cells, [])
    test = costs.estimates[cells[0].key].test_seconds
    assert second == pytest.approx(test)
    assert first == other
    assert first is not None
    assert first > test


def test_the_shape_of_a_copy_is_read_from_its_config(tmp_path: Path) -> None:
    model = make_model("llama").model
    model.save_pretrained(tmp_path / "own")
    (tmp_path / "s.toml").write_text(
        '[tasks.a]\nmodel = "own"\ndata = "d"\ntokens = 9\n[tasks.b]\nmodel = "hub"\ndata = "d"\n[methods.lora]\n'
    )
    result = run_suite(tmp_path / "s.toml", out=tmp_path / "out", copies=tmp_path, dry_run=True, teraflops=1e-3)
    known, unknown = result.costs
    n_parameters = sum(one.numel() for one in model.parameters())
    trained = 4 * (n_parameters - 320 * 16) * 300 * 8 * 9 / (0.4 * 1e9)
    assert known.seconds == pytest.approx(trained * (1 + 2 * 1000 / (4 * 300 * 8)))
    assert (unknown.seconds, unknown.peak_bytes) == (None, None)
    rows = in_words(result.costs)
    assert rows[1] == ("b", "lora", "1", "?", "?")
    assert rows[-1][:3] == ("all", "", "2")
    assert n_unknown(result.costs) == 1
    assert not (tmp_path / "out").exists()


def test_the_speed_of_a_matrix_product() -> None:
    seconds = iter(range(1000))
    assert measure_teraflops(100, clock=lambda: float(next(seconds))) == pytest.approx(2e6 / 1e12)
