"""Cells on a Ray cluster, as tasks; results in a folder that all of its nodes see."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lorazor.bench.copies import Copies
from lorazor.bench.settings import BenchSettings
from lorazor.bench.suite import Cell, Outcome
from lorazor.errors import SettingsError

_SECONDS = 20
"""For a cluster to answer; Ray itself waits for minutes."""
_RETRIES = 5
"""Of a cell whose node or process died."""


def check_cluster(settings: BenchSettings) -> None:
    """Refuse what no cell could run on.

    Raises:
        SettingsError: Ray is not installed, or no cluster answers.
    """
    if importlib.util.find_spec("ray") is None:
        raise SettingsError("on='ray', but Ray is not installed. Run: pip install 'lorazor[ray]'")
    address = settings.ray_address
    # In a process of its own: where nothing answers, Ray does not even heed a signal.
    command = [sys.executable, "-c", f"import ray; ray.init({address!r}, log_to_driver=False)"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        reason = (found.stderr.strip() or f"status {found.returncode}").splitlines()[-1] if found.returncode else None
    except subprocess.TimeoutExpired:
        reason = f"no answer within {_SECONDS} seconds"
    if reason is not None:
        raise SettingsError(
            f"No Ray cluster at ray_address={address!r} ({reason}). Start one with 'ray start --head', or pass another."
        )


def run_on_ray(
    cells: Sequence[Cell], out: Path, copies: Copies, settings: BenchSettings, say: Callable[[str], None]
) -> Iterator[Outcome]:
    """Run cells as tasks, each in a process of its own; where and when is Ray's business."""
    ray: Any = importlib.import_module("ray")
    ray.init(settings.ray_address, log_to_driver=False, logging_level="warning")
    try:
        if not any(node["Alive"] and node["Resources"].get("GPU", 0) >= settings.gpus for node in ray.nodes()):
            say(f"No node has {settings.gpus:g} GPUs: cells wait until one joins. Without GPUs: --gpus 0.")
        options = {"num_cpus": 1, "num_gpus": settings.gpus, "max_retries": _RETRIES, "max_calls": 1}
        task, device = ray.remote(**options)(on_node), "cuda:0" if settings.gpus else "cpu"
        shared = Copies(settings.copies and settings.copies.resolve())
        cell_of = {task.remote(cell, out.resolve(), shared, device): cell for cell in cells}
        waiting = list(cell_of)
        while waiting:
            (ended,), waiting = ray.wait(waiting, num_returns=1)
            try:
                outcome = ray.get(ended)
            except ray.exceptions.RayError as error:  # more deaths than retries
                outcome = f"{type(error).__name__}: {error}"
            yield cell_of[ended], outcome
    finally:
        ray.shutdown()


def on_node(cell: Cell, out: Path, copies: Copies, device: str) -> dict[str, Any] | str:
    """The row of a cell, or what went wrong."""
    from lorazor.bench.cell import attempt

    places = [out / "suite", *([copies.folder] if copies.folder else [])]
    if lacking := [str(one) for one in places if not one.is_dir()]:
        return f"Node {socket.gethostname()!r} does not see {lacking[0]!r}. Pass folders that all nodes share."
    return attempt(cell, out, copies, device, print)
