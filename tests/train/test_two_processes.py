"""Two processes over gloo choose what one process with the same global batch chooses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.train.tiny_training import make_trainer, tiny_llama

ROOT = Path(__file__).resolve().parents[2]
# On the CPU, --multi_gpu only means torch's own launcher.
LAUNCHER = ["-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0", "--num_machines", "1"]
LAUNCHER += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes"]


def work(folder: Path, n_processes: int) -> None:
    """Train as one of the processes, and write down what this one came to."""
    from lorazor.train.callback import WeightLora

    callback = WeightLora(4, 4, "every-step", gate_lr=30.0, dense_steps=1)
    trainer = make_trainer(
        folder, tiny_llama(), callback, per_device_train_batch_size=4 // n_processes, gradient_accumulation_steps=2
    )
    trainer.train()
    assert trainer.args.world_size == n_processes
    trainer.model.save_pretrained(folder / f"rank{os.environ.get('RANK', '0')}")
    assert callback.selection is not None
    scores = {site.name: site.score for site in callback.selection.sites}
    (folder / f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(scores))


def train_in_processes(folder: Path, n_processes: int) -> list[dict[str, float]]:
    launcher = [*LAUNCHER, str(n_processes)] if n_processes > 1 else []
    command = [sys.executable, *launcher, "-m", "tests.train.test_two_processes", str(folder), str(n_processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}/src:{ROOT}"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(n_processes)]


@pytest.mark.slow
def test_two_processes_choose_like_one(tmp_path):
    (alone,) = train_in_processes(tmp_path / "alone", 1)
    together = train_in_processes(tmp_path / "together", 2)
    assert together[0] == together[1]
    assert sum(score > 0 for score in alone.values()) == 4
    assert together[0] == pytest.approx(alone, abs=1e-5)
    expected = load_file(tmp_path / "alone/rank0/adapter_model.safetensors")
    for rank in range(2):
        seen = load_file(tmp_path / f"together/rank{rank}/adapter_model.safetensors")
        assert seen.keys() == expected.keys()
        assert all((seen[name] - expected[name]).abs().max() < 1e-5 for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("score", ["gate", "loss-change"])
def test_two_processes_of_the_command_choose_and_train_like_one(score):
    script = ROOT / "benchmarks" / "two_processes_choose_alike.py"
    result = subprocess.run([sys.executable, str(script), "--score", score], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    document = json.loads(result.stdout)
    assert document["is_same_selection"] and len(document["kept"]) == 6
    assert document["largest_difference_of_a_score"] < 1e-5 * document["largest_score"]
    assert document["largest_difference_of_a_weight"] < 1e-3


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]))
