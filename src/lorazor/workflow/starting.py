"""How every command starts its run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorazor.measure.sharding import from_main_process, is_main_process
from lorazor.runs import RunFolder

_HOW = ("accumulation", "batch_size", "device_map", "engine", "gradient_checkpointing", "heal_accumulation")
"""How numbers are computed, not what they are: a run that ran out of memory may go on with less."""


def start_run(
    out: Path, command: str, settings: Mapping[str, Any], inputs: Mapping[str, Path | None], resume: bool = False
) -> RunFolder:
    """Begin a run, or go on with one, in all processes; the main one writes. See `RunFolder.start`.

    A resumed run must have the same settings, but for how its numbers are computed. Where something is learned, the
    batch size is part of what: of a training, and of a healing.
    """
    learns = command in ("train", "select") or settings.get("heal") is not None
    may_change = [name for name in _HOW if not (learns and name == "batch_size")]
    run = from_main_process(lambda: RunFolder.start(out, command, settings, inputs, resume, may_change))
    run.is_writer = is_main_process()
    return run
