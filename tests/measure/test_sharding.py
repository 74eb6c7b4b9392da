"""Sharding against a plain loop: in one process, in threads that play several, and in two real processes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from lorazor.measure import sharding
from lorazor.measure.sharding import from_main_process, is_main_process, measure_sharded

ROOT = Path(__file__).resolve().parents[2]


def rows_of(item: int) -> list[str]:
    """No row for 0, one for 1, two for 2, ..."""
    return [f"{item}.{row}" for row in range(item)]


def test_one_process_measures_everything_in_order_and_hands_rows_on_at_once():
    events = []

    def measure(item: int) -> list[str]:
        events.append(("measured", item))
        return rows_of(item)

    rows = measure_sharded([2, 0, 3], measure, lambda new: events.append(("rows", new)))
    assert rows == ["2.0", "2.1", "3.0", "3.1", "3.2"]
    assert events == [
        ("measured", 2),
        ("rows", ["2.0", "2.1"]),
        ("measured", 0),
        ("rows", []),
        ("measured", 3),
        ("rows", ["3.0", "3.1", "3.2"]),
    ]


def test_nothing_to_measure():
    assert measure_sharded([], rows_of, lambda rows: pytest.fail("there are no rows")) == []


def test_rows_before_an_interruption_were_handed_on():
    kept = []

    def measure(item: int) -> list[str]:
        if item == 3:
            raise KeyboardInterrupt
        return rows_of(item)

    with pytest.raises(KeyboardInterrupt):
        measure_sharded([1, 2, 3, 4], measure, kept.extend)
    assert kept == ["1.0", "2.0", "2.1"]


def test_progress_goes_to_stderr_and_only_where_there_is_a_label(capsys):
    measure_sharded([1, 2], rows_of, lambda rows: None)
    assert capsys.readouterr() == ("", "")
    measure_sharded([1, 2], rows_of, lambda rows: None, label="measuring")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "measuring" in shown.err


def test_the_only_process_is_the_main_one():
    assert is_main_process()
    assert from_main_process(lambda: {"a": [1]}) == {"a": [1]}


@pytest.mark.parametrize("n_processes", [2, 3])
@pytest.mark.parametrize("n_items", range(7))
def test_processes_share_the_items_and_all_have_all_rows(monkeypatch, n_processes, n_items):
    """Threads play the processes; gathering waits for all of them, as the real one does."""
    here = threading.local()
    barrier = threading.Barrier(n_processes, timeout=10)
    slots: list[list[str]] = [[] for _ in range(n_processes)]

    def gather(mine: list[str]) -> list[str]:
        slots[here.index] = mine
        barrier.wait()
        everyones = [row for slot in slots for row in slot]
        barrier.wait()  # nobody overwrites a slot that another has not read
        return everyones

    def state(**_: object) -> SimpleNamespace:
        return SimpleNamespace(num_processes=n_processes, process_index=here.index, is_main_process=here.index == 0)

    monkeypatch.setattr(sharding, "PartialState", state)
    monkeypatch.setattr(sharding, "gather_object", gather)
    items = [3, 1, 0, 2, 5, 4, 1][:n_items]
    measured: list[tuple[int, int]] = []

    def run(index: int) -> tuple[list[str], list[str]]:
        here.index = index

        def measure(item: int) -> list[str]:
            measured.append((index, item))
            return rows_of(item)

        handed_on: list[str] = []
        return measure_sharded(items, measure, handed_on.extend), handed_on

    with ThreadPoolExecutor(n_processes) as threads:
        results = list(threads.map(run, range(n_processes)))
    expected = [row for item in items for row in rows_of(item)]
    assert results == [(expected, expected)] * n_processes
    assert sorted(item for _, item in measured) == sorted(items)  # each once
    shares = [sum(index == process for index, _ in measured) for process in range(n_processes)]
    assert max(shares) - min(shares) <= 1


@pytest.mark.slow
def test_two_processes_give_the_sweep_of_one():
    script = ROOT / "benchmarks" / "two_processes_agree.py"
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    document = json.loads(result.stdout)
    assert document["n_processes"] == [2, 2]  # what each of the two sees
    assert document["is_same_in_every_process"]
    assert document["largest_difference_nats"] == 0
    # 18 examples in batches of 4 are 5 batches: 3 for one process, 2 for the other
    alone, shares = document["n_forward_passes_alone"], document["n_forward_passes_of_each"]
    assert [share / alone for share in shares] == pytest.approx([3 / 5, 2 / 5])
