"""Every verb that measures or trains comes to the same in two processes as in one; `shrink` has a file of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.train.test_two_processes import LAUNCHER, ROOT

pytestmark = pytest.mark.slow

TEXT = ["--max-new-tokens", "6"]
FIT = ["--steps", "8", "--rise-steps", "1", "--learning-rate", "0.01", "--rank", "2", "--batch-size", "2"]
"""In steps of two rows, one for each of two processes."""


def in_processes(verb: str, words: list[str], out: Path, n_processes: int) -> Path:
    """The command as a user gives it, by itself or under accelerate."""
    launcher = [*LAUNCHER, str(n_processes), "-m"] if n_processes > 1 else ["-m"]
    command = [sys.executable, *launcher, "lorazor", verb, *words, "--out", str(out), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}/src:{ROOT}"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    json.loads(result.stdout)  # one process talks
    return out


def both(verb: str, words: list[object], tmp_path: Path) -> tuple[Path, Path]:
    alone, together = (in_processes(verb, [*map(str, words)], tmp_path / str(n), n) for n in (1, 2))
    assert json.loads((together / "run.json").read_text())["finished"]
    return alone, together


def rows(path: Path, *key: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Lines by what tells them apart; none is there twice."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    table = {tuple(row[name] for name in key): row for row in found}
    assert len(table) == len(found) > 0
    return table


def check_losses(alone: Path, together: Path) -> None:
    one, two = (rows(out / "losses.jsonl", "adapter", "example") for out in (alone, together))
    assert one.keys() == two.keys()
    for key, row in one.items():
        assert two[key]["nll_nats"] == pytest.approx(row["nll_nats"], rel=1e-5)
        assert (two[key]["n_tokens"], two[key]["n_correct"]) == (row["n_tokens"], row["n_correct"])


def check_answers(alone: Path, together: Path) -> None:
    one, two = (rows(out / "predictions.jsonl", "adapter", "example") for out in (alone, together))
    assert {key: row["text"] for key, row in one.items()} == {key: row["text"] for key, row in two.items()}


def test_boundary(tiny, tmp_path):
    words = [tiny.adapter, "--data", tiny.validation, "--confirm", tiny.held_out, "--rule", "best", "--batch-size", 2]
    words += ["--select-by", "chrf", "--margin", "chrf=90", "--shortlist", 3, *TEXT]
    alone, together = both("boundary", words, tmp_path)
    check_losses(alone, together)
    check_answers(alone, together)
    one, two = (json.loads((out / "choice.json").read_text()) for out in (alone, together))
    assert one == two
    kept = [(out / "selection.json").read_text() for out in (alone, together)]
    assert kept[0] == kept[1]


def test_eval_by_loss_and_by_text(tiny, tmp_path):
    words = [tiny.adapter, "--base", "--data", tiny.held_out, "--metrics", "loss,chrf", "--batch-size", 2, *TEXT]
    alone, together = both("eval", words, tmp_path)
    check_losses(alone, together)
    check_answers(alone, together)
    one, two = (json.loads((out / "metrics.json").read_text()) for out in (alone, together))
    assert [row["value"] for row in two] == pytest.approx([row["value"] for row in one], rel=1e-5)


def test_curves(tiny, tmp_path):
    alone, together = both("curves", [tiny.adapter, "--data", tiny.validation, "--batch-size", 2], tmp_path)
    one, two = (rows(out / "curves.jsonl", "variant", "layer", "example") for out in (alone, together))
    assert one.keys() == two.keys()
    for key, row in one.items():
        assert two[key]["probability"] == pytest.approx(row["probability"], rel=1e-4)
        assert two[key]["ranks"] == row["ranks"]
    proposals = [json.loads((out / "curves.json").read_text())["boundary"] for out in (alone, together)]
    assert proposals[0] == proposals[1]


def test_train(tiny, tmp_path):
    alone, together = both("train", ["--model", tiny.base, "--data", tiny.validation, *FIT], tmp_path)
    losses = [
        [json.loads(line)["loss"] for line in (out / "training.jsonl").read_text().splitlines()]
        for out in (alone, together)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    one, two = (load_file(out / "adapter_model.safetensors") for out in (alone, together))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-3, rtol=0)


@pytest.mark.parametrize("score", ["gate", "loss-change", "fisher", "balanced"])
def test_select(tiny, tmp_path, score):
    words = ["--model", tiny.base, "--data", tiny.validation, "--keep", 5, "--select-steps", 6, "--score", score, *FIT]
    words += ["--by", "direction"] if score in ("fisher", "balanced") else []
    alone, together = both("select", words, tmp_path)
    sites = [json.loads((out / "selection.json").read_text())["sites"] for out in (alone, together)]
    assert [site["keep"] for site in sites[0]] == [site["keep"] for site in sites[1]]
    assert [site.get("components") for site in sites[0]] == [site.get("components") for site in sites[1]]
    scores = [[site["score"] for site in each] for each in sites]
    assert scores[1] == pytest.approx(scores[0], abs=1e-4 * max(scores[0]))


def test_select_within_memory(tiny, tmp_path):
    """Half of a step's rows pass in each of two processes, so that the peaks differ; both choices keep to their own."""
    words = ["--model", tiny.base, "--data", tiny.validation, "--memory", 0.9, "--select-steps", 6, *FIT]
    for out in both("select", words, tmp_path):
        costs = json.loads((out / "costs.json").read_text())
        assert costs["predicted"] <= costs["limit"] < costs["all_sites"]
        assert costs["measured"] == pytest.approx(costs["predicted"], rel=0.1)
