"""Sharing work between the processes of `accelerate launch`; with one process it does nothing special."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from rich.console import Console
from rich.progress import track

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
    """
    state = this_process()
    rows: list[Row] = []
    starts = range(0, len(items), state.num_processes)
    console = Console(stderr=True)
    for start in track(starts, label or "", console=console, disable=label is None or not state.is_main_process):
        index = start + state.process_index
        mine = measure(items[index]) if index < len(items) else []
        everyones = gather_object(mine)
        on_rows(everyones)
        rows.extend(everyones)
    return rows


def from_main_process(make: Callable[[], Value]) -> Value:
    """Make a value in the main process and give it to all."""
    holder = [make() if is_main_process() else None]
    broadcast_object_list(holder)
    return holder[0]  # pyright: ignore[reportReturnType]
