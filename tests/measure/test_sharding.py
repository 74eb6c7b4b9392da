"""Sharding against a plain loop: in one process, in threads that play several, and in two real processes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorazor.errors import MeasureError
from lorazor.measure import sharding
from lorazor.measure.sharding import Fitting, from_main_process, is_main_process, measure_sharded

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


def in_processes(monkeypatch, n_processes: int, work: Callable[[int], Any]) -> list[Any]:
    """What each process comes to. Threads play them; gathering waits for all of them, as the real one does."""
    here = threading.local()
    barrier = threading.Barrier(n_processes, timeout=10)
    slots: list[list[Any]] = [[] for _ in range(n_processes)]

    def gather(mine: list[Any]) -> list[Any]:
        slots[here.index] = mine
        barrier.wait()
        everyones = [row for slot in slots for row in slot]
        barrier.wait()  # nobody overwrites a slot that another has not read
        return everyones

    def broadcast(holder: list[Any]) -> None:
        gathered = gather([list(holder)])
        holder[:] = gathered[0]

    def state(**_: object) -> SimpleNamespace:
        return SimpleNamespace(num_processes=n_processes, process_index=here.index, is_main_process=here.index == 0)

    def run(index: int) -> Any:
        here.index = index
        return work(index)

    monkeypatch.setattr(sharding, "PartialState", state)
    monkeypatch.setattr(sharding, "gather_object", gather)
    monkeypatch.setattr(sharding, "broadcast_object_list", broadcast)
    with ThreadPoolExecutor(n_processes) as threads:
        return list(threads.map(run, range(n_processes)))


@pytest.mark.parametrize("n_processes", [2, 3])
@pytest.mark.parametrize("n_items", range(7))
def test_processes_share_the_items_and_all_have_all_rows(monkeypatch, n_processes, n_items):
    items = [3, 1, 0, 2, 5, 4, 1][:n_items]
    measured: list[tuple[int, int]] = []

    def run(index: int) -> tuple[list[str], list[str]]:
        def measure(item: int) -> list[str]:
            measured.append((index, item))
            return rows_of(item)

        handed_on: list[str] = []
        return measure_sharded(items, measure, handed_on.extend), handed_on

    results = in_processes(monkeypatch, n_processes, run)
    expected = [row for item in items for row in rows_of(item)]
    assert results == [(expected, expected)] * n_processes
    assert sorted(item for _, item in measured) == sorted(items)  # each once
    shares = [sum(index == process for index, _ in measured) for process in range(n_processes)]
    assert max(shares) - min(shares) <= 1


MEMORY, NAN = torch.OutOfMemoryError("CUDA out of memory"), MeasureError("The loss of example 4 is nan.")


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ({4: MEMORY}, [("OutOfMemoryError", "ran out of memory. It says: CUDA out of memory")] * 2),
        ({3: RuntimeError("HIP out of memory")}, [("OutOfMemoryError", "HIP out of memory")] * 2),
        ({4: NAN}, [("MeasureError", "Another process failed: The loss of example 4"), ("MeasureError", "The loss")]),
        ({3: MEMORY, 4: NAN}, [("MeasureError", "Another process failed"), ("MeasureError", "The loss of example 4")]),
        ({3: NAN, 4: NAN}, [("MeasureError", "The loss of example 4")] * 2),
    ],
    ids=["memory in one", "memory in the other", "another failure", "memory and another", "both"],
)
def test_processes_fail_together(monkeypatch, errors, expected):
    """One that just left would let the others wait for its rows for ever."""

    def run(index: int) -> tuple[str, str, list[str]]:
        def measure(item: int) -> list[str]:
            if item in errors:
                raise errors[item]
            return rows_of(item)

        handed_on: list[str] = []
        with pytest.raises(Exception) as failed:
            measure_sharded([1, 2, 3, 4, 5, 6], measure, handed_on.extend)
        return type(failed.value).__name__, str(failed.value), handed_on

    results = in_processes(monkeypatch, 2, run)
    survivors = [row for item in (1, 2, 3, 4) if item not in errors for row in rows_of(item)]
    for (name, message, handed_on), (expected_name, expected_message) in zip(results, expected, strict=True):
        assert name == expected_name and expected_message in message
        assert handed_on == survivors  # what was measured is kept


@pytest.mark.slow
def test_all_processes_halve_their_batches_when_one_runs_out_of_memory(monkeypatch):
    numbers, largest = list(range(12)), {0: 4, 1: 1}

    def run(index: int) -> tuple[int, list[int]]:
        sizes = []

        def work(size: int) -> list[int]:
            sizes.append(size)

            def measure(batch: list[int]) -> list[int]:
                if len(batch) > largest[index]:
                    raise RuntimeError("CUDA out of memory")
                return batch

            batches = [numbers[start : start + size] for start in range(0, len(numbers), size)]
            return measure_sharded(batches, measure, lambda rows: None)

        return Fitting({"losses": 4}).run("losses", work), sizes

    assert in_processes(monkeypatch, 2, run) == [(numbers, [4, 2, 1])] * 2


def test_a_failure_of_the_main_process_is_told_to_all(monkeypatch):
    def fail() -> str:
        raise MeasureError("no room on the disk")

    def run(index: int) -> str:
        with pytest.raises(MeasureError) as failed:
            from_main_process(fail)
        return str(failed.value)

    first, second = in_processes(monkeypatch, 2, run)
    assert (first, second) == ("no room on the disk", "Another process failed: no room on the disk")


@pytest.mark.slow
def test_two_processes_measure_what_one_measures():
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
