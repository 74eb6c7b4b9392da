"""The suite `smoke`, with copies of what it names: a part of it in the fast tier, all of it in the slow one."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest

from lorazor.bench.reading import find_suite, read_suite
from lorazor.bench.run import run_suite
from tests.bench.copies import make_copies

pytestmark = pytest.mark.filterwarnings("ignore")
FAST = "causal lora, pairs directions, seq2seq boundary, questions weightlora"


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    suite = read_suite(find_suite("smoke"))
    return make_copies(tmp_path / "copies", [cell.spec for cell in suite.cells], n_rows=48)


def test_some_cells_of_the_smoke_suite(copies: Path, tmp_path: Path) -> None:
    said: list[str] = []
    result = run_suite("smoke", out=tmp_path / "out", copies=copies, only=FAST, devices="cpu", say=said.append)
    assert result.failed == {}
    assert [(row["task"], row["method"]) for row in result.rows] == [
        ("causal", "lora"), ("pairs", "directions"), ("seq2seq", "boundary"),
        ("questions", "weightlora"),
    ]  # fmt: skip
    assert said[-1].startswith("0 cells left: 0.00 h")
    again = run_suite("smoke", out=tmp_path / "out", copies=copies, only=FAST, say=said.append)
    assert again.rows == result.rows
    assert said[-1].startswith("smoke: 0 cells to run, 4 of")


@pytest.mark.slow
def test_the_whole_smoke_suite(copies: Path, tmp_path: Path) -> None:
    start = time.process_time()
    result = run_suite("smoke", out=tmp_path / "out", copies=copies, devices="cpu")
    assert result.failed == {}
    assert result.left == []
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert {row["method"] for row in rows} >= {"base", "full-finetuning", "shrink", "vera", "domlora"}
    assert all(math.isfinite(value) for row in rows for value in row["metrics"].values())
    print(f"{time.process_time() - start:.0f} s of processor time")
