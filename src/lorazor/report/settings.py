"""The settings of the page of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lorazor.fields import Settings


@dataclass(frozen=True)
class ReportSettings(Settings):
    """What the page of runs, or of a suite, shows."""

    examples: Annotated[int, "Most examples to show of each run, worst first."] = 50
    figures: Annotated[Path | None, "Also write every figure as PNG and SVG into this folder (needs kaleido)."] = None
    force: Annotated[bool, "Replace a file that exists."] = False
    markdown: Annotated[Path | None, "Of a suite: also write its results as Markdown into this file."] = None
    against: Annotated[
        str | None,
        "Of a suite: the method that differences are taken to. Default: low-rank, else random sites, else LoRA.",
    ] = None
    partial: Annotated[bool, "Take runs that have not finished, and show what they have."] = False
    open: Annotated[bool, "Open the page in the browser."] = False
