"""Two processes score and choose what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.test_two_processes import LAUNCHER, ROOT


def subset_in_processes(tiny, out: Path, n_processes: int) -> Path:
    launcher = [*LAUNCHER, str(n_processes), "-m"] if n_processes > 1 else ["-m"]
    command = [sys.executable, *launcher, "lorazor", "subset", str(tiny.adapter), "--data", str(tiny.validation)]
    command += ["--confirm", str(tiny.held_out), "--tolerance", "loss", "--points", "2", "--batch-size", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}/src:{ROOT}"}
    result = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("Adapter:") == 1  # one process talks
    return out


@pytest.mark.slow
def test_two_processes_choose_like_one(tiny, tmp_path):
    alone, together = (subset_in_processes(tiny, tmp_path / str(n), n) for n in (1, 2))
    scores = [
        [json.loads(line)["score"] for line in (out / "scores.jsonl").read_text().splitlines()]
        for out in (alone, together)
    ]
    assert scores[1] == pytest.approx(scores[0], abs=1e-6)
    kept = [
        [site["keep"] for site in json.loads((out / "selection.json").read_text())["sites"]]
        for out in (alone, together)
    ]
    assert kept[0] == kept[1]
    confirmations = [json.loads((out / "subset.json").read_text())["confirmation"] for out in (alone, together)]
    assert confirmations[1]["value"] == pytest.approx(confirmations[0]["value"], rel=1e-6)
