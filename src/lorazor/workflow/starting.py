"""How every command starts its run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorazor.measure.sharding import from_main_process, is_main_process
from lorazor.runs import RunFolder


def start_run(
    out: Path, command: str, settings: Mapping[str, Any], inputs: Mapping[str, Path | None], resume: bool = False
) -> RunFolder:
    """Begin a run, or go on with one, in all processes; the main one writes. See `RunFolder.start`."""
    run = from_main_process(lambda: RunFolder.start(out, command, settings, inputs, resume))
    run.is_writer = is_main_process()
    return run
