"""Trackers: the headline numbers of a finished run in TensorBoard or Trackio, through accelerate's trackers.

Trainings log themselves, step by step, through transformers' Trainer (`report_to`). Nothing here writes a log of its
own, and what a run folder holds does not depend on it.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from typing import Any, get_args

from lorazor.errors import SettingsError
from lorazor.files import explained
from lorazor.runs import RunFolder
from lorazor.settings import Tracker

_FOLDER = "tensorboard"
_PROJECT = "lorazor"

Point = tuple[int, Mapping[str, float]]
"""Numbers by name, and the step that they belong to."""


def check_tracker(tracker: Tracker) -> None:
    """Refuse a tracker that cannot be used, before any work starts.

    Raises:
        SettingsError: unknown, or its package is not installed.
    """
    if tracker not in get_args(Tracker):
        raise SettingsError(f"track={tracker!r} is unknown. Pass one of {', '.join(get_args(Tracker))}.")
    if tracker != "none":
        _check_installed("track", tracker)


def track(run: RunFolder, tracker: Tracker, points: Sequence[Point]) -> None:
    """Log the headline numbers of a run that is about to finish; only the process that writes the run does.

    TensorBoard's file goes into the folder `tensorboard` of the run and takes the place of one from before; Trackio
    gets a run named like the run folder, in the project `lorazor`.

    Args:
        run: the run.
        tracker: `none` logs nothing.
        points: steps, ascending, and what to log there; a name's slashes group it.
    Raises:
        SettingsError: see `check_tracker`.
        OutputError: the folder cannot be written to.
    """
    check_tracker(tracker)
    if tracker == "none" or not run.is_writer:
        return
    # these take a second to import
    from accelerate.tracking import TensorBoardTracker, TrackioTracker

    from lorazor.measure.sharding import this_process

    this_process()  # accelerate's trackers ask which process this is
    if tracker == "trackio":
        log: Any = TrackioTracker(_PROJECT, name=run.path.name, config=run.document["settings"])
    else:
        shutil.rmtree(run.path / _FOLDER, ignore_errors=True)
        log = TensorBoardTracker(_FOLDER, logging_dir=str(run.path))
    with explained(run.path), redirect_stdout(sys.stderr):  # where Trackio says hello and goodbye
        log.start()
        for step, numbers in points:
            log.log(dict(numbers), step=step)
        log.finish()


def reporters(report_to: str) -> list[str]:
    """The names in `report_to`, for transformers' `TrainingArguments`.

    Args:
        report_to: names separated by commas, or `none`.
    Raises:
        SettingsError: a name that transformers does not know, or whose package is not installed.
    """
    names = [name.strip() for name in report_to.split(",") if name.strip()]
    if names in ([], ["none"]):
        return []
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise SettingsError(f"report_to={name!r} is unknown to transformers. Pass none, or some of {known}.")
        if name in get_args(Tracker):
            _check_installed("report_to", name)
        # flyte cannot be found this way, and says so itself
        elif name not in get_available_reporting_integrations() and name != "flyte":
            raise SettingsError(f"report_to={name!r} needs a package that is not installed. Install {name} first.")
    return names


def _check_installed(setting: str, tracker: str) -> None:
    if find_spec(tracker) is None:
        raise SettingsError(
            f"{setting}={tracker!r} needs the package {tracker}, which is not installed. "
            f"Run: pip install 'lorazor[{tracker}]'"
        )
