"""A suite on a Ray cluster of two nodes, one of which dies."""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.bench.small import command, environment, finished, numbers, run, write_suite

pytestmark = pytest.mark.slow
cluster_utils = pytest.importorskip("ray.cluster_utils", reason="Ray is not installed: make test-ray")


@pytest.fixture
def suite(tmp_path) -> Path:
    return write_suite(tmp_path / "suite")


@pytest.fixture
def cluster(suite, monkeypatch):
    for name, value in environment(suite).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else they wait for whatever else the machine does
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield cluster
    cluster.shutdown()


def under_way(out: Path) -> set[tuple[str, str]]:
    """Tries of cells: a folder each, with the cell's in it."""
    return {(path.parent.name, path.name) for path in (out / "cells").glob(".*/*")}


def test_a_suite_of_which_a_node_dies_ends_like_one_in_this_process(suite, cluster, tmp_path):
    assert run(suite, tmp_path / "whole").returncode == 0
    out, where = tmp_path / "out", ("--on", "ray", "--ray-address", cluster.address, "--gpus", "0")
    second = cluster.add_node(num_cpus=1)
    process = subprocess.Popen(command(suite, out, *where))
    tries, dead, deadline = set(), False, time.monotonic() + 540
    try:
        while process.poll() is None:
            assert time.monotonic() < deadline
            now = under_way(out)
            if not dead and len({one for one in now if one[1] not in finished(out)}) == 2:
                cluster.remove_node(second, allow_graceful=False)
                dead = True
            tries |= now
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.returncode == 0
    assert dead and max(Counter(cell for _, cell in tries).values()) == 2
    assert numbers(out) == numbers(tmp_path / "whole") and len(finished(out)) == 5
    assert not under_way(out)


def test_where_no_cluster_is_that_is_said_within_seconds(suite, tmp_path):
    result = run(suite, tmp_path / "out", "--on", "ray", "--ray-address", "127.0.0.1:1")
    said = (
        "No Ray cluster at ray_address='127.0.0.1:1' (no answer within 20 seconds). Start one with 'ray start --head'"
    )
    assert result.returncode == 1 and said in result.stderr and "Traceback" not in result.stderr
