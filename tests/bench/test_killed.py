"""kill -9 in the middle of a suite, twice; the same command then ends it as if nothing had been."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.bench.small import command, environment, finished, numbers, run, write_suite

pytestmark = pytest.mark.slow
DEVICES = ("--on", "devices", "--devices", "cpu,cpu")


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    return write_suite(tmp_path_factory.mktemp("suite"))


@pytest.fixture(scope="module")
def whole(suite) -> tuple[Path, float]:
    """A run without a break, and its seconds."""
    start = time.monotonic()
    result = run(suite, out := suite.parent / "whole")
    assert result.returncode == 0, result.stderr
    assert len(numbers(out)) == len(finished(out)) == 5
    assert len(list((out / "shared").iterdir())) == 2
    return out, time.monotonic() - start


def kill_after(seconds: float, suite: Path, out: Path, *more: str) -> None:
    process = subprocess.Popen(
        command(suite, out, *more), env=environment(suite), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    time.sleep(seconds)
    process.kill()
    process.wait()


def check_ends_like(whole: Path, suite: Path, out: Path, done: dict[str, int], *more: str) -> None:
    """The numbers of a run without a break, to the bit; cells that were done are not run again; nothing is left."""
    result = run(suite, out, *more)
    assert result.returncode == 0, result.stderr
    assert numbers(out) == numbers(whole)
    assert finished(out).items() >= done.items() and len(finished(out)) == 5
    hidden = {path.name for folder in (".", "cells", "shared", "suite") for path in (out / folder).glob(".*")}
    assert hidden == {".lock"}


PLACES = {
    "first a shared training, then results": ("/shared/:1", "/results.jsonl:2"),
    "first the suite, then a cell": ("/suite/run.json:1", "/cells/numbers-low-rank:1"),
}


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_a_suite_killed_while_it_writes_goes_on(suite, whole, tmp_path, places):
    out, done = tmp_path / "out", {}
    for place in places:
        assert run(suite, out, die_before=place).returncode == -signal.SIGKILL
        assert finished(out).items() >= done.items()
        done = finished(out)
    check_ends_like(whole[0], suite, out, done)


@pytest.mark.parametrize("where", [(), DEVICES], ids=["here", "devices"])
def test_a_suite_killed_at_any_moment_goes_on(suite, whole, tmp_path, where):
    moments = [random.uniform(0.3, 0.9) for _ in range(2)]
    print(moments)
    out, done = tmp_path / "out", {}
    for moment in moments:
        kill_after(moment * whole[1], suite, out, *where)
        time.sleep(1)  # children notice
        assert finished(out).items() >= done.items()
        done = finished(out)
    check_ends_like(whole[0], suite, out, done, *where)


def test_a_cell_that_is_killed_is_that_cells_failure_alone(suite, whole, tmp_path):
    out = tmp_path / "out"
    result = run(suite, out, *DEVICES, die_before="/cells/numbers-low-rank:1")
    assert result.returncode == 1 and "ended by SIGKILL" in result.stderr
    failed = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert [one["name"] for one in failed] == ["numbers, low-rank, params=0.5, seed=0"]
    assert len(numbers(out)) == 4
    check_ends_like(whole[0], suite, out, finished(out), *DEVICES)
    assert (out / "failures.jsonl").read_text() == ""
