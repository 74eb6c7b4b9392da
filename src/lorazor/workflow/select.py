"""The selection run alone: which sites to train, whoever trains them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorazor.data.examples import Example
from lorazor.selection import Selection
from lorazor.settings import SelectSettings
from lorazor.workflow.training import Say, Training, check_settings


@dataclass(frozen=True)
class SelectResult:
    """What a selection run came to.

    Attributes:
        out: the run folder, with `selection.json`, `scores.jsonl` and `gates.jsonl`.
        selection: every site, and whether it stays.
    """

    out: Path
    selection: Selection


def select_sites(
    data: str | Path | Sequence[Example],
    *,
    out: str | Path,
    settings: SelectSettings,
    resume: bool = False,
    say: Say = lambda message: None,
) -> SelectResult:
    """Choose the sites to train, in the first steps of a training that goes no further.

    Args:
        data: examples to train on: a file, a dataset folder, a hub name, or the examples themselves.
        out: the run folder; new, unless `resume`.
        settings: everything else; `settings.model.model` names the base model.
        resume: go on with an interrupted run in `out`.
        say: receives messages for people.
    Raises:
        LorazorError: settings, model, data or output folder cannot be used; before the training begins.
    """
    check_settings(settings, chooses=True)
    work = Training("select", data, Path(out), settings, resume, say)
    selection = work.choose(settings.grow)
    work.finish()
    return SelectResult(work.run.path, selection)
