"""Memory: how many rows fit into it, and going on with fewer where they do not."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from lorazor.errors import MeasureError

Result = TypeVar("Result")


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
