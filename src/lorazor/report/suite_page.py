"""What a page, or a Markdown file, shows of a suite."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from lorazor.report.drawing import Drawing
from lorazor.report.findings import Finding, findings
from lorazor.report.gains import draw_gains
from lorazor.report.leaderboards import Board, Table, answered, board_table, leaderboards, reading_aid
from lorazor.report.suites import SuiteResults, versions_of


@dataclass(frozen=True)
class SuiteSection:
    """What is shown of a suite.

    Attributes:
        results: its rows.
        boards: as data.
        tables: the boards, as texts.
        findings: questions and what the rows say on them.
        drawings: its figures.
        aid: how to read the tables.
    """

    results: SuiteResults
    boards: tuple[Board, ...]
    tables: tuple[Table, ...]
    findings: tuple[Finding, ...]
    drawings: tuple[Drawing, ...]
    aid: str

    @property
    def versions(self) -> dict[str, str]:
        """That the rows were measured with."""
        return versions_of(self.results.rows)

    @property
    def size(self) -> str:
        """How much there is, in words."""
        own = self.results
        rows, seeds = len(own.rows), len({row["seed"] for row in own.rows})
        counts = ((rows, "cells"), (len(own.tasks), "tasks"), (len(own.methods()), "methods"), (seeds, "seeds"))
        words = [f"{n} {name if n != 1 else name[:-1]}" for n, name in counts]
        words[0] += f" of {own.n_cells}" if own.n_cells not in (None, rows) else ""
        return ", ".join(words) + "."


def make_suite_section(results: SuiteResults, against: str | None = None) -> SuiteSection:
    """Compute and draw all of it.

    Args:
        results: what was read.
        against: the method that differences on the leaderboards are taken to; see `leaderboards`.
    Raises:
        SettingsError: no row is of that method.
    """
    boards = tuple(leaderboards(results, against))
    return SuiteSection(
        results,
        boards,
        tuple(board_table(board) for board in boards),
        tuple(findings(results)),
        tuple(draw_gains(results)),
        " ".join([reading_aid(boards), *answered(results)]),
    )


def suite_markdown(section: SuiteSection, place: Path, figures: Mapping[str, Path]) -> str:
    """The same as Markdown: questions first, then leaderboards, figures and failures.

    Args:
        section: what to show.
        place: of the file, from which figures are linked.
        figures: image files, by the keys of the drawings.
    """
    lines = [
        f"# Results of the suite {_escaped(section.results.name)}",
        f"{section.size} Every sentence and number here is counted from the rows by "
        "`lorazor report SUITE --markdown FILE`. What the methods are is in lorazor's docs/guides/bench.md, how they "
        "were set up in the TOML file of the suite.",
        section.aid,
    ]
    for one in section.findings:
        lines += [f"## {one.question}", "\n".join(f"* {_escaped(sentence)}" for sentence in one.sentences)]
        lines += [text for table in one.tables for text in _folded(table)]
    lines.append("## Leaderboards")
    lines += [text for table in section.tables for text in (f"### {_escaped(table.title)}", _table(table))]
    lines += ["## Gain at each size"] if section.drawings else []
    for drawing in section.drawings:
        lines += [f"### {_escaped(drawing.title)}", _escaped(drawing.caption)]
        if drawing.key in figures:
            link = quote(Path(os.path.relpath(figures[drawing.key], place.parent)).as_posix())
            lines.append(f"![{_escaped(drawing.title)}]({link})")
        else:
            lines += _folded(Table("The numbers", drawing.columns, drawing.rows))
    if section.results.failures:
        lines.append("## Cells that failed")
        lines.append(_table(Table("", ("cell", "error"), section.results.failures)))
    versions = ", ".join(f"{name} {version}" for name, version in section.versions.items())
    lines.append(f"Versions: {_escaped(versions)}.")
    return "\n\n".join(lines) + "\n"


def _folded(table: Table) -> list[str]:
    """A table that is there for who opens it."""
    return [f"<details><summary>{_escaped(table.title)}</summary>", _table(table), "</details>"]


def _table(table: Table) -> str:
    sides = ["---", *["--:"] * (len(table.columns) - 1)]
    return "\n".join(f"| {' | '.join(map(_escaped, row))} |" for row in (table.columns, sides, *table.rows))


def _escaped(text: str) -> str:
    """Foreign text that is neither markup nor the end of a cell."""
    text = re.sub(r"([\\|*`])", r"\\\1", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")
