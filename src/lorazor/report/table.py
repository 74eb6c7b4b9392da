"""Tables for the terminal, as wide as it is: what does not fit goes below, and no number is cut or wrapped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_NARROWEST_NAME = 24
"""The first column is folded, where that makes room, but not below this many characters."""


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    groups: Sequence[str] | None = None,
    console: Console | None = None,
) -> None:
    """Print a table and an empty line; numbers to the right, the first column to the left.

    Args:
        title: stands above it.
        columns: their headers, wrapped between words where room is scarce.
        rows: of cells, printed as they are: brackets in them are no markup.
        groups: a second header above neighbouring columns, "" for none.
        console: where to; stdout, if left out.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    console.print(Text(title, style="italic"))
    for layout in _layouts(columns, rows, list(groups or [""] * len(columns)), console.width):
        if above := layout.line_above():
            console.print(Text(above, style="bold"), no_wrap=True, crop=False)
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, layout.gap - 1, 0, 0))
        for place, index in enumerate(layout.shown):
            side = "left" if index == 0 else "right"
            table.add_column(Text(columns[index]), justify=side, width=layout.widths[place], overflow="fold")
        for row in rows:
            table.add_row(*(Text(row[index]) for index in layout.shown))
        console.print(table)
        console.print()


@dataclass
class _Layout:
    """Columns that stand side by side."""

    shown: list[int]
    widths: list[int]
    groups: list[str]
    gap: int

    def spans(self) -> list[tuple[str, int, int]]:
        """Each group: its name, its first place, and the place after its last."""
        starts = [i for i in range(len(self.groups)) if i == 0 or self.groups[i] != self.groups[i - 1]]
        return [(self.groups[a], a, b) for a, b in zip(starts, [*starts[1:], len(self.groups)], strict=True)]

    def width(self, start: int = 0, end: int | None = None) -> int:
        widths = self.widths[start:end]
        return sum(widths) + self.gap * (len(widths) - 1)

    def __post_init__(self) -> None:
        """Widen the last column of a group whose name is wider than its columns."""
        for name, start, end in self.spans():
            self.widths[end - 1] += max(0, len(name) - self.width(start, end))

    def line_above(self) -> str:
        """The names of the groups, each above its columns."""
        parts = []
        for name, start, end in self.spans():
            width = self.width(start, end)
            has_rule = name and width >= len(name) + 4
            parts.append(f" {name} ".center(width, "─") if has_rule else name.center(width))
        return (" " * self.gap).join(parts).rstrip()


def _layouts(columns: Sequence[str], rows: Sequence[Sequence[str]], groups: list[str], room: int) -> list[_Layout]:
    """All columns side by side in the widest way that fits; else in several parts, each after the first column."""
    from rich.cells import cell_len

    cells = [max([0, *(cell_len(row[index]) for row in rows)]) for index in range(len(columns))]
    words = [max(cell_len(word) for word in column.split()) for column in columns]
    everything = list(range(len(columns)))

    def layout(shown: list[int], headers: list[int], gap: int, is_folded: bool = True) -> _Layout:
        widths = [max(cells[index], headers[index]) for index in shown]
        made = _Layout(shown, widths, [groups[index] for index in shown], gap)
        if is_folded and made.width() > room:
            least = _NARROWEST_NAME if len(shown) > 2 else 1
            made.widths[0] = max(min(widths[0], least), widths[0] - (made.width() - room))
        return made

    whole = [layout(everything, [cell_len(column) for column in columns], 2, False)]
    whole += [layout(everything, words, gap, is_folded) for is_folded in (False, True) for gap in (2, 1)]
    for one in whole:
        if one.width() <= room:
            return [one]
    parts, shown = [], [0]
    for index in everything[1:]:
        if len(shown) > 1 and layout([*shown, index], words, 2).width() > room:
            parts.append(layout(shown, words, 2))
            shown = [0]
        shown.append(index)
    return [*parts, layout(shown, words, 2)]
