"""`lorazor --help` and a usage error answer in under half a second.

Starts the console script that is installed beside this Python, several times, and prints the median of the wall-clock
seconds, and of the processor's, which a busy machine stretches less. The first start may still compile bytecode; all
seconds are listed.

    python benchmarks/help_is_fast.py [--runs 7]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from _machine import record

LIMIT_SECONDS = 0.5
CALLS = {  # by what they show: the arguments, and the exit status they must have
    "help": (["--help"], 0),
    "help of a command": (["boundary", "--help"], 0),
    "usage error": (["boundary", "--no-such-option"], 2),
}


def main() -> None:
    arguments = _arguments()
    script = Path(sys.executable).with_name("lorazor")
    if not script.exists():
        raise SystemExit(f"There is no {script}. Install lorazor for this Python first: pip install -e .")
    calls = {name: time_call([str(script), *call], status, arguments.runs) for name, (call, status) in CALLS.items()}
    largest = max(call["median_seconds"] for call in calls.values())
    record({"limit_seconds": LIMIT_SECONDS, "is_under": largest < LIMIT_SECONDS, "calls": calls}, arguments.out)


def time_call(command: list[str], status: int, n_runs: int) -> dict[str, Any]:
    seconds, processor_seconds = [], []
    for _ in range(n_runs):
        start, processor_start = time.perf_counter(), children_seconds()
        result = subprocess.run(command, capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        processor_seconds.append(children_seconds() - processor_start)
        if result.returncode != status:
            raise SystemExit(f"{command[1:]} ended with status {result.returncode}, not {status}: {result.stderr}")
    return {
        "arguments": command[1:],
        "median_seconds": median(seconds),
        "median_processor_seconds": median(processor_seconds),
        "seconds": seconds,
    }


def children_seconds() -> float:
    """Processor time of the processes that ended under this one."""
    times = os.times()
    return times.children_user + times.children_system


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=7, help="starts of each call")
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
