"""Examples as tokens: made once, for batches of any size."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

AnyBatch = TypeVar("AnyBatch")


@dataclass(frozen=True)
class EncodedRow:
    """One encoded example: what the model reads first, and the targets, which may be just the class."""

    index: int
    ids: list[int]
    targets: list[int]
    is_truncated: bool


@dataclass(frozen=True, eq=False)
class Encoding(Generic[AnyBatch]):
    """A data set as tokens.

    Attributes:
        rows: its examples.
        collate: makes a batch of some of them.
        batch_size: rows of a batch.
    """

    rows: list[EncodedRow]
    collate: Callable[[list[EncodedRow]], AnyBatch]
    batch_size: int

    @cached_property
    def batches(self) -> list[AnyBatch]:
        """All batches, the longest examples first, so that memory runs out early or not at all."""
        return self.of_size(self.batch_size)

    @property
    def n_truncated(self) -> int:
        """Examples that lost tokens to fit the limit."""
        return sum(row.is_truncated for row in self.rows)

    def of_size(self, batch_size: int, examples: Collection[int] | None = None) -> list[AnyBatch]:
        """The same tokens in batches of another size: rows of similar length together, equal ones in their order.

        Args:
            batch_size: rows of a batch; the last batch may have fewer.
            examples: indices of those that are wanted; all if left out.
        """
        wanted = [row for row in self.rows if examples is None or row.index in examples]
        ordered = sorted(wanted, key=lambda row: -(len(row.ids) + len(row.targets)))
        starts = range(0, len(ordered), batch_size)
        return [self.collate(ordered[start : start + batch_size]) for start in starts]
