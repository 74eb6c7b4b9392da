"""Sharing work between the processes of `accelerate launch`, and going on in smaller pieces where memory runs out.

With one process, and enough memory, nothing special happens.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from rich.console import Console
from rich.progress import track

from lorazor.errors import MeasureError

Item = TypeVar("Item")
Row = TypeVar("Row")
Value = TypeVar("Value")
Result = TypeVar("Result")


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
        mine, error = [], None
        try:
            mine = measure(items[index]) if index < len(items) else []
        except Exception as failed:  # a process that just left would let the others wait for ever
            error = failed
        gathered = gather_object([(mine, None if error is None else f"{error}", is_out_of_memory(error))])
        everyones = [row for of_one, _, _ in gathered for row in of_one]
        on_rows(everyones)
        _raise_alike(error, [(reason, is_memory) for _, reason, is_memory in gathered if reason is not None])
        rows.extend(everyones)
    return rows


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


def is_out_of_memory(error: Exception | None) -> bool:
    """Whether an error says that a device or the machine has no memory left."""
    if error is None:
        return False
    is_worded = isinstance(error, RuntimeError) and "out of memory" in str(error)
    return is_worded or isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


class Fitting:
    """Batch sizes that fit into memory, found out once for each kind of work."""

    def __init__(self, sizes: dict[Hashable, int]) -> None:
        """Give the rows of a batch to begin with, by kind of work."""
        self._sizes = dict(sizes)

    def run(self, kind: Hashable, work: Callable[[int], Result]) -> Result:
        """Run something with a number of rows, and with half of them where memory runs out.

        Raises:
            MeasureError: not even one row fits.
        """
        while True:
            try:
                return work(self._sizes[kind])
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if self._sizes[kind] == 1:
                    raise MeasureError(
                        "Memory runs out on a single example. Shorten the prompts (--max-length), or load the model in "
                        "fewer bits (--dtype bfloat16)."
                    ) from error
            self._sizes[kind] //= 2
            clear_device_cache(garbage_collection=True)  # here, where the error holds no tensors any more
