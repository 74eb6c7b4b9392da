"""Two processes score, choose and heal what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.test_two_processes import LAUNCHER, ROOT
from tests.workflow.planted import answers_of, plant, write_pairs

pytestmark = pytest.mark.slow


def shrink_in_processes(words: list[str], out: Path, n_processes: int) -> Path:
    launcher = [*LAUNCHER, str(n_processes), "-m"] if n_processes > 1 else ["-m"]
    command = [sys.executable, *launcher, "lorazor", "shrink", *words, "--points", "2", "--batch-size", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}/src:{ROOT}"}
    result = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("Adapter:") == 1  # one process talks
    return out


@pytest.mark.parametrize("is_healed", [False, True])
def test_two_processes_choose_like_one(tiny, tmp_path, is_healed):
    one = plant(tiny.base, tiny.adapter, tmp_path)
    words = [str(one.adapter), "--data", one.data, "--confirm", one.held_out, "--margin", "40%"]
    if is_healed:
        prompts = [f"after {number} comes" for number in range(40, 48)]
        train = write_pairs(tmp_path / "train.jsonl", prompts, answers_of(tiny.base, tiny.adapter, prompts))
        words += ["--heal", train, "--heal-steps", "4"]
    alone, together = (shrink_in_processes(words, tmp_path / str(n), n) for n in (1, 2))
    scores = [
        [json.loads(line)["score"] for line in (out / "scores.jsonl").read_text().splitlines()]
        for out in (alone, together)
    ]
    assert scores[1] == pytest.approx(scores[0], abs=1e-6)
    kept = [
        {site["name"]: site.get("components", site["keep"]) for site in json.loads(text)["sites"]}
        for text in ((out / "selection.json").read_text() for out in (alone, together))
    ]
    assert kept[0] == kept[1]
    documents = [json.loads((out / "shrink.json").read_text()) for out in (alone, together)]
    assert documents[0]["chosen"] == documents[1]["chosen"] and documents[1]["loaded_differs_by"] < 1e-4
    assert documents[1]["verdict"]["value"] == pytest.approx(documents[0]["verdict"]["value"], rel=1e-5)
    tensors = [load_file(out / "adapter" / "adapter_model.safetensors") for out in (alone, together)]
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], tensor, atol=1e-4, rtol=0)
