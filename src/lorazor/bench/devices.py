"""Cells on the devices of this machine: each in a process of its own, as many at a time as there are devices."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Any

from lorazor.bench.copies import Copies
from lorazor.bench.settings import BenchSettings
from lorazor.bench.suite import Cell, Outcome
from lorazor.errors import SettingsError
from lorazor.files import explained

_SHOWN = 30
"""Last lines of what a process printed that died without a word."""


def find_devices(names: str | None) -> list[str]:
    """The devices that are named, `cuda:0,cuda:1` or `cpu,cpu`; without names every GPU, else the CPU.

    Raises:
        SettingsError: this machine has no such device.
    """
    import torch

    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if names is None:
        return gpus or ["cpu"]
    devices = [one.strip() for one in names.split(",")]
    for one in devices:
        if one not in (*gpus, "cpu"):
            raise SettingsError(
                f"devices={names!r}: this machine has no {one!r}. Pass any of {', '.join([*gpus, 'cpu'])}, with "
                "commas between; one that is named twice runs two cells at a time."
            )
    return devices


def run_on_devices(
    cells: Sequence[Cell], out: Path, copies: Copies, settings: BenchSettings, say: Callable[[str], None]
) -> Iterator[Outcome]:
    """Run cells wherever a device is free; what a process prints is in `OUT/logs`."""
    devices = find_devices(settings.devices)
    waiting, free, running = deque(cells), deque(devices), dict[Any, tuple[subprocess.Popen[bytes], Cell, str]]()
    try:
        while waiting or running:
            while waiting and free:
                cell, device = waiting.popleft(), free.popleft()
                say(f"{cell.name} on {device} ...")
                child = _started(cell, out, copies, device, devices.count("cpu"))
                running[child.stdout] = child, cell, device
            for answer in wait(list(running)):
                child, cell, device = running.pop(answer)
                outcome = _outcome(child, answer, _log(out, cell))  # pyright: ignore[reportArgumentType]
                free.append(device)
                yield cell, outcome
    finally:
        for child, _, _ in running.values():
            child.kill()
            child.wait()


def _started(cell: Cell, out: Path, copies: Copies, device: str, n_cpus: int) -> subprocess.Popen[bytes]:
    """A process that sees one device alone, and ends when this one does."""
    with explained(log := _log(out, cell)):
        log.parent.mkdir(parents=True, exist_ok=True)
        errors = log.open("wb")
    with errors:
        command = [sys.executable, "-X", "faulthandler", "-m", "lorazor.bench.process"]
        pipe, environment = subprocess.PIPE, _environment(device, n_cpus)
        child = subprocess.Popen(command, bufsize=0, stdin=pipe, stdout=pipe, stderr=errors, env=environment)
    assert child.stdin is not None
    with suppress(BrokenPipeError):  # it died at once; its log says why
        seen = "cpu" if device == "cpu" else "cuda:0"
        child.stdin.write(pickle.dumps((cell, out, copies, seen)))
    return child


def _environment(device: str, n_cpus: int) -> dict[str, str]:
    import torch

    if device == "cpu":
        n_threads = max(1, torch.get_num_threads() // n_cpus)
        return {"OMP_NUM_THREADS": str(n_threads), **os.environ, "CUDA_VISIBLE_DEVICES": ""}
    index, visible = int(device.removeprefix("cuda:")), os.environ.get("CUDA_VISIBLE_DEVICES")
    return {**os.environ, "CUDA_VISIBLE_DEVICES": visible.split(",")[index] if visible else str(index)}


def _outcome(child: subprocess.Popen[bytes], answer: IO[bytes], log: Path) -> dict[str, Any] | str:
    """What a process answered, or how it died."""
    text, status = answer.read(), child.wait()
    for pipe in (answer, child.stdin):
        assert pipe is not None
        pipe.close()
    if status == 0 and text:
        return pickle.loads(text)
    how = f"ended with status {status}" if status >= 0 else f"was ended by {signal.Signals(-status).name}"
    why = " (out of memory, if nobody did)" if status == -signal.SIGKILL else ""
    last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN:]
    return "\n".join([*last, f"The process {how}{why}. What it printed is in {log}."])


def _log(out: Path, cell: Cell) -> Path:
    return out / "logs" / f"{cell.folder}.log"
