"""Tables fit the terminal, and every number in them is whole."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lorazor.report.table import print_table


def printed(width: int, columns: list[str], rows: list[list[str]], groups: list[str] | None = None) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_table("A title", columns, rows, groups, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [30, 50, 80, 120])
@pytest.mark.parametrize("name", ["12", "a folder of some length that somebody named", "x" * 70])
def test_every_cell_is_whole_at_every_width(width, name):
    columns = ["layer", *(f"a header {index}" for index in range(9))]
    rows = [[f"{name} {row}", *(f"{1000 * row + index}.5e-05" for index in range(9))] for row in range(1, 4)]
    text = printed(width, columns, rows, ["", *["first"] * 4, *["second"] * 5])
    assert all(len(line) <= width for line in text.splitlines()) and "…" not in text
    words = text.split()
    assert all(words.count(cell) == 1 for row in rows for cell in row[1:])
    assert text.count("x") % 210 == 0  # of a name that is folded, no letter is lost


def test_what_fits_stands_side_by_side_under_its_group():
    columns, rows = ["layer", "k", "q", "wo"], [["0", "1.25", "2.5", "3"], ["11", "4", "5", "12.5"]]
    title, above, header, _, first, second, *_ = printed(80, columns, rows, ["", "attn", "attn", "mlp"]).splitlines()
    assert title == "A title"
    assert above.index("attn") > header.index("layer") + len("layer") and header.rstrip().endswith("wo")
    assert first.split() == rows[0] and second.split() == rows[1]
    ends = [header.index(name) + len(name) for name in ("k", "q", "wo")]
    assert [first[:end].split()[-1] for end in ends] == ["1.25", "2.5", "3"]


def test_headers_are_wrapped_before_anything_else_gives_way():
    columns = ["site", "standard error", "per parameter"]
    rows = [["model.layers.0.self_attn", "0.125", "0.25"]]
    assert "standard error" in printed(80, columns, rows)
    narrow = printed(46, columns, rows)
    assert "standard error" not in narrow and "model.layers.0.self_attn" in narrow
