"""kill -9 in every verb that measures; --resume ends like a run that nothing stopped, and measures nothing twice.

`train` is in test_killed.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.workflow.planted import Planted, answers_of, plant, write_pairs

pytestmark = pytest.mark.slow

N_EXAMPLES = 24
HELPERS = ("losses.jsonl", "confirm-losses.jsonl", "predictions.jsonl", "confirm-predictions.jsonl", "curves.jsonl")


@pytest.fixture(scope="module")
def given(tiny, tmp_path_factory) -> tuple[Planted, str]:
    """An adapter that gains, and data to heal it on."""
    root = tmp_path_factory.mktemp("given")
    planted = plant(tiny.base, shutil.copytree(tiny.adapter, root / "adapter"), root)
    prompts = [f"after {number} comes" for number in range(40, 48)]
    return planted, write_pairs(root / "train.jsonl", prompts, answers_of(tiny.base, planted.adapter, prompts))


def words_of(verb: str, given: tuple[Planted, str]) -> list[str]:
    planted, train = given
    adapter, data, small = str(planted.adapter), ["--data", planted.data], ["--batch-size", "1"]
    confirm, text = ["--confirm", planted.held_out], ["--max-new-tokens", "12"]
    return {
        "shrink": [adapter, *data, *confirm, "--margin", "40%", "--heal", train, "--heal-steps", "40",
                   "--points", "4", "--batch-size", "2"],
        "boundary": [adapter, *data, *confirm, "--select-by", "chrf", "--rule", "best", "--margin", "chrf=90",
                     "--engine", "naive", *text, *small],
        "eval": [adapter, "--base", *data, "--metrics", "loss,chrf", *text, *small],
        "curves": [adapter, *data, *small],
    }[verb]  # fmt: skip


def command(verb: str, given: tuple[Planted, str], out: Path) -> list[str]:
    return [sys.executable, "-m", "lorazor", verb, *words_of(verb, given), "--out", str(out)]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def finished(arguments: list[str]) -> None:
    result = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory) -> Callable[[str], Path]:
    """Runs that nothing stopped, by verb."""
    root, done = tmp_path_factory.mktemp("whole"), {}

    def run(verb: str) -> Path:
        if verb not in done:
            done[verb] = root / verb
            finished(command(verb, given, done[verb]))
        return done[verb]

    return run


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True) if path.exists() else []


def written(name: str, n: int = 1) -> Callable[[Path], bool]:
    return lambda out: len(lines(out / name)) >= n


def any_of(pattern: str) -> Callable[[Path], bool]:
    return lambda out: any(out.glob(pattern))


MOMENTS: dict[tuple[str, str], Callable[[Path], bool]] = {
    ("shrink", "as it begins to score"): written("losses.jsonl", 12),
    ("shrink", "scored"): any_of("basis.json"),
    ("shrink", "measuring"): written("losses.jsonl", 30),
    ("shrink", "healing"): any_of("healing/*-checkpoints/checkpoint-*/optimizer.pt"),
    ("shrink", "healed"): any_of("healing/*-healed/adapter_config.json"),
    ("shrink", "writing"): any_of("adapter*"),
    ("boundary", "measuring"): written("losses.jsonl", 9),
    ("boundary", "writing answers"): written("predictions.jsonl", 3),
    ("boundary", "judging"): written("confirm-predictions.jsonl", 2),
    ("eval", "measuring"): written("losses.jsonl", 3),
    ("eval", "writing answers"): written("predictions.jsonl", 2),
    ("curves", "measuring"): written("curves.jsonl", 20),
}


def kill_at(arguments: list[str], out: Path, moment: Callable[[Path], bool]) -> None:
    process = subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not moment(out):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def keys_of(path: Path) -> Counter[tuple[Any, ...]]:
    """How often each thing was measured."""
    rows = [json.loads(line) for line in lines(path)]
    return Counter(tuple(row.get(name) for name in ("key", "adapter", "variant", "layer", "example")) for row in rows)


@pytest.mark.parametrize(("verb", "moment"), MOMENTS, ids=map("-".join, MOMENTS))
def test_a_verb_killed_with_signal_9_is_resumed(given, whole, tmp_path, verb, moment):
    out = tmp_path / "run"
    kill_at(command(verb, given, out), out, MOMENTS[verb, moment])
    before = {name: [line for line in lines(out / name) if line.endswith("\n")] for name in HELPERS}
    finished([*command(verb, given, out), "--resume"])
    for name in HELPERS:
        assert lines(out / name)[: len(before[name])] == before[name]  # what was there stays as it was
        counts = keys_of(out / name)
        assert set(counts.values()) <= {1}  # and is not measured again
        assert counts == keys_of(whole(verb) / name)
    check_same(verb, whole(verb), out)


def check_same(verb: str, expected: Path, out: Path) -> None:
    assert json.loads((out / "run.json").read_text())["finished"]
    file = {"shrink": "shrink.json", "boundary": "choice.json", "eval": "metrics.json", "curves": "curves.json"}[verb]
    one, two = (json.loads((run / file).read_text()) for run in (expected, out))
    assert close(one, two)
    assert (out / "adapter").exists() == (expected / "adapter").exists()
    if (expected / "adapter").exists():
        one, two = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (expected, out))
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=0)


def close(one: Any, other: Any) -> bool:
    """The same JSON, but for the time it took and the last digits of numbers."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(
            name == "seconds" or close(value, other[name]) for name, value in one.items()
        )
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    return one == pytest.approx(other, rel=1e-4, abs=1e-4) if isinstance(one, float) else one == other
