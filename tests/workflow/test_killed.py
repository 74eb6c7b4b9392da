"""kill -9 at moments that a user might hit, in a process of its own; the same command with --resume ends the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_folders import write_rows

pytestmark = pytest.mark.slow


def command(tiny, out: Path, by: str = "site") -> list[str]:
    how = {"--method": "weightlora+"} if by == "site" else {"--method": "weightlora", "--by": by}
    options = how | {
        "--model": tiny.base, "--data": tiny.validation, "--out": out, "--keep": 5,
        "--steps": 80, "--select-steps": 40, "--batch-size": 2, "--rank": 2, "--rise-steps": 4, "--save-steps": 3,
        "--gate-lr": 50, "--learning-rate": 0.02,
    }  # fmt: skip
    return [sys.executable, "-m", "lorazor", "train", *(str(part) for pair in options.items() for part in pair)]


def run(arguments: list[str], **kwargs) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, **kwargs)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    result = run(command(tiny, out))
    assert result.returncode == 0, result.stderr
    return out


def test_a_healing_killed_with_signal_9_is_resumed(tiny, tmp_path):
    """Killed in the middle of its steps, it ends with the bytes of a run that was not."""
    sets = {"val": range(60), "train": range(100, 140)}
    data = {name: write_rows(tmp_path / f"{name}.jsonl", numbers) for name, numbers in sets.items()}

    def arguments(out: Path) -> list[str]:
        options = {
            "--data": data["val"], "--heal": data["train"], "--heal-steps": 60, "--params-fraction": 0.3,
            "--points": 1, "--score-examples": 8, "--heal-lr": 0.002, "--out": out,
        }  # fmt: skip
        words = (str(part) for pair in options.items() for part in pair)
        return [sys.executable, "-m", "lorazor", "shrink", str(tiny.adapter), *words]

    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(arguments(whole)).returncode == 0
    process = subprocess.Popen(arguments(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list(out.glob("healing/*-checkpoints/checkpoint-*/lorazor_complete")):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (out / "adapter").exists()
    result = run([*arguments(out), "--resume"])
    assert result.returncode == 0, result.stderr
    logs = [(one / "healing.jsonl").read_text().splitlines() for one in (whole, out)]
    steps = [[json.loads(line)["step"] for line in log] for log in logs]
    assert steps[0] == steps[1]
    expected, seen = (load_file(one / "adapter" / "adapter_model.safetensors") for one in (whole, out))
    for name, tensor in expected.items():
        torch.testing.assert_close(seen[name], tensor, atol=1e-6, rtol=0)


def a_checkpoint_of(phase: str) -> Callable[[Path], bool]:
    return lambda out: len(list((out / phase).glob("checkpoint-*/optimizer.pt"))) > 0


MOMENTS = {
    "in the warm-up": a_checkpoint_of("select"),
    "at the switch": lambda out: (out / "select" / "adapter").exists(),
    "after the switch": a_checkpoint_of("train"),
    "while the adapter is written": lambda out: (out / "adapter_model.safetensors").exists(),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_with_signal_9_is_resumed(tiny, whole, tmp_path, moment):
    check_resumed(tiny, whole, tmp_path / "run", moment, "site")


def test_a_run_by_direction_is_resumed_with_what_it_had_seen(tiny, tmp_path):
    whole = tmp_path / "whole"
    assert run(command(tiny, whole, "direction")).returncode == 0
    check_resumed(tiny, whole, tmp_path / "run", "in the warm-up", "direction")


def check_resumed(tiny, whole: Path, out: Path, moment: str, by: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(tiny, out, by), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not MOMENTS[moment](out):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    result = run([*command(tiny, out, by), "--resume"])
    assert result.returncode == 0, result.stderr
    assert (out / "selection.json").read_text() == (whole / "selection.json").read_text()
    expected, seen = (load_file(folder / "adapter_model.safetensors") for folder in (whole, out))
    assert seen.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(seen[name], tensor, atol=1e-6, rtol=0)
