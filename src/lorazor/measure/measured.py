"""What was measured: rows by variant, set and example, in memory and in the files of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from lorazor.measure.sharding import from_main_process
from lorazor.runs import RunFolder

Rows = dict[int, dict[str, Any]]
"""Rows of a file by example."""


@dataclass(frozen=True, eq=False)
class Variant:
    """Some parts of an adapter, with weights.

    Attributes:
        label: what people call it.
        gates: (n_parts,) on the CPU.
        adapter: which adapter it is of, where a meter measures several.
    """

    label: str
    gates: Tensor
    adapter: str = ""

    @cached_property
    def digest(self) -> str:
        """What tells it from other variants, whatever it is called."""
        numbers = self.gates.detach().float().contiguous() + 0.0  # so that -0 and 0 are the same gate
        return hashlib.sha256(self.adapter.encode() + numbers.numpy().tobytes()).hexdigest()[:16]


class Measured:
    """Rows of a run, by file, key and example; a key says what was measured, never what people call it."""

    def __init__(self, run: RunFolder) -> None:
        """Begin with what the run has."""
        self._run = run
        self._found: dict[str, dict[str, Rows]] = {}  # file -> key -> example -> row

    def rows(self, file: str, variant: Variant, settings: str) -> Rows:
        """What is known of a variant under some settings, by example."""
        return self._table(file).get(f"{variant.digest}-{settings}", {})

    def keep(self, file: str, rows: Iterable[dict[str, Any]], settings: str) -> None:
        """Remember rows and append them to the run; those that are known stay as they are.

        Args:
            file: its name.
            rows: with `example`, and the digest of the variant as `key`.
            settings: digest of all else that they depend on.
        """
        table, new = self._table(file), []
        for row in rows:
            key, example = f"{row['key']}-{settings}", row["example"]
            if example not in table.setdefault(key, {}):
                table[key][example] = row | {"key": key}
                new.append(table[key][example])
        if new:
            self._run.append(file, new)

    def lacking(
        self, file: str, variants: Sequence[Variant], settings: str, examples: Iterable[int]
    ) -> tuple[list[Variant], set[int]]:
        """What is not measured: the variants that lack some of the examples, each once, and the examples."""
        wanted, lacking, lost = set(examples), {}, set()
        for variant in variants:
            if missing := wanted - self.rows(file, variant, settings).keys():
                lacking[variant.digest] = variant
                lost |= missing
        return list(lacking.values()), lost

    def _table(self, file: str) -> dict[str, Rows]:
        """The rows of a file, read from the run once."""
        if file not in self._found:
            table: dict[str, Rows] = {}
            for row in from_main_process(lambda: self._run.rows(file)):
                table.setdefault(row["key"], {})[row["example"]] = row
            self._found[file] = table
        return self._found[file]
