"""`lorazor bench` as a user types it, on cells that have finished."""

from __future__ import annotations

import json

import pytest

from lorazor.bench.reading import read_suite
from tests.report.made_up_suites import make_row

SUITE = """
seeds = [0, 1, 2]
[tasks.sst2]
model = "a"
data = "b"
metrics = "accuracy"
[methods]
base = {}
lora = {}
"""


@pytest.fixture
def finished(tmp_path):
    """A suite and a folder with all its rows."""
    path, out = tmp_path / "tiny.toml", tmp_path / "out"
    path.write_text(SUITE)
    out.mkdir()
    quality = {"base": 0.5, "lora": 0.8}
    rows = [
        make_row("sst2", cell.method, None, cell.seed, {"loss": 0.1, "accuracy": quality[cell.method]}, cell=cell.key)
        for cell in read_suite(path).cells
    ]
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, out, rows


def test_it_ends_with_a_leaderboard_and_the_next_command(lorazor, finished, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    path, out, _ = finished
    status, output, _ = lorazor("bench", path, "--out", out)
    lines = output.splitlines()
    assert status == 0 and lines[0] == "sst2"
    names = [line.split()[0] for line in lines if line.startswith(("base ", "lora "))]
    assert names == ["lora", "base"] and "6 of 6 cells have finished" in output
    assert lines[-1] == f"  lorazor report {out}"
    assert len(list((out / "peft").glob("*.json"))) == 6
    assert lorazor("report", out)[0] == 0


def test_json_has_the_rows(lorazor, finished):
    path, out, rows = finished
    status, output, _ = lorazor("bench", path, "--out", out, "--json")
    assert status == 0 and json.loads(output)["rows"] == rows and json.loads(output)["left"] == []
