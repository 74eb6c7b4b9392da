"""Sharing work between the processes of `accelerate launch`; with one process it does nothing special."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from rich.console import Console
from rich.progress import track

from lorazor.errors import MeasureError
from lorazor.measure.memory import is_out_of_memory

Item = TypeVar("Item")
Row = TypeVar("Row")
Value = TypeVar("Value")


def this_process() -> PartialState:
    """This process among those of the launch.

    Without an accelerator PartialState has to be asked for the CPU: otherwise each of the launched processes believes
    that it is the only one, does all of the work and writes all of the files.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


def is_main_process() -> bool:
    """Whether this process writes the files and talks to the user."""
    return this_process().is_main_process


def measure_sharded(
    items: Sequence[Item],
    measure: Callable[[Item], list[Row]],
    on_rows: Callable[[list[Row]], None],
    label: str | None = None,
) -> list[Row]:
    """Measure every item once, each process its share, and give all rows to all processes.

    Args:
        items: the work, the same in every process.
        measure: the rows of one item.
        on_rows: called in every process with the rows of each round, as soon as they are there.
        label: text of a progress bar on stderr; none if left out.
    Returns:
        All rows, in the order of the items.
    Raises:
        OutOfMemoryError: a process ran out of memory; from all of them, so that all go on with smaller batches.
        MeasureError: another process failed in another way; the one that did raises what it met.
    """
    state = this_process()
    rows: list[Row] = []
    starts = range(0, len(items), state.num_processes)
    console = Console(stderr=True)
    for start in track(starts, label or "", console=console, disable=label is None or not state.is_main_process):
        index = start + state.process_index
        mine, error = _tried(measure, items[index]) if index < len(items) else ([], None)
        gathered = gather_object([(mine, None if error is None else f"{error}", is_out_of_memory(error))])
        everyones = [row for of_one, _, _ in gathered for row in of_one]
        on_rows(everyones)
        _raise_alike(error, [(reason, is_memory) for _, reason, is_memory in gathered if reason is not None])
        rows.extend(everyones)
    return rows


def _tried(measure: Callable[[Item], list[Row]], item: Item) -> tuple[list[Row], Exception | None]:
    """The rows of an item, or what went wrong: a process that just left would let the others wait for ever."""
    try:
        return measure(item), None
    except Exception as error:
        return [], error


def _raise_alike(own: Exception | None, failures: Sequence[tuple[str, bool]]) -> None:
    """Raise in every process what lets all of them do the same next.

    Args:
        own: what went wrong in this process.
        failures: of all processes, what was said and whether it was about memory.
    """
    others = [reason for reason, is_memory in failures if not is_memory]
    if not failures:
        return
    if own is not None and (not is_out_of_memory(own) or not any(is_memory for _, is_memory in failures)):
        raise own
    if others:
        raise MeasureError(f"Another process failed: {others[0]}") from own
    raise torch.OutOfMemoryError(f"A process ran out of memory. It says: {failures[0][0]}") from own


def from_main_process(make: Callable[[], Value]) -> Value:
    """Make a value in the main process and give it to all.

    Raises:
        MeasureError: it could not be made; the main process raises what it met.
    """
    value, error = None, None
    if is_main_process():
        try:
            value = make()
        except Exception as failed:  # the others would wait for ever
            error = failed
    holder = [value, None if error is None else str(error)]
    broadcast_object_list(holder)
    _raise_alike(error, [] if holder[1] is None else [(str(holder[1]), False)])
    return holder[0]  # pyright: ignore[reportReturnType]
