"""Two processes under `accelerate launch` choose the sites, and train the adapter, of one with the same global batch.

`lorazor train --method weightlora` runs on a small random Llama in one process and in several over gloo, DDP around the
model: the selection run, the choice, and the training of the survivors.

    python benchmarks/two_processes_choose_alike.py [--processes 2] [--score loss-change]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _machine import record, say
from _models import byte_tokenizer, random_examples, tiny_llama
from safetensors.torch import load_file
from two_processes_agree import LAUNCHER

from lorazor.select.scores import SCORES
from lorazor.selection import Selection

STEPS, SELECT_STEPS, BATCH_SIZE = 16, 8, 4


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_inputs(place, arguments.seed)
        train_in_processes(place, "alone", 1, arguments)
        train_in_processes(place, "together", arguments.processes, arguments)
        document = describe(place / "alone", place / "together", arguments.processes)
    record(document, arguments.out)
    if not document["is_same_selection"]:
        raise SystemExit("The processes choose other sites than one process does.")


def write_inputs(place: Path, seed: int) -> None:
    loaded = tiny_llama(hidden_size=64, n_layers=4, seed=seed)
    assert loaded.peft_model is not None
    loaded.peft_model.unload().save_pretrained(place / "base")
    byte_tokenizer().save_pretrained(place / "base")
    rows = [{"prompt": one.prompt, "completion": one.completion} for one in random_examples(40, seed)]
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train_in_processes(place: Path, name: str, n_processes: int, arguments: argparse.Namespace) -> None:
    """The command as a user gives it; several processes share the examples of a step."""
    launcher = [*LAUNCHER, str(n_processes)] if n_processes > 1 else []
    command = [sys.executable, *launcher, "-m", "lorazor", "train"]
    command += ["--model", str(place / "base"), "--data", str(place / "data.jsonl"), "--out", str(place / name)]
    command += ["--method", "weightlora", "--keep", "6", "--score", arguments.score, "--schedule", "one-cut"]
    command += ["--steps", str(STEPS), "--select-steps", str(SELECT_STEPS), "--rise-steps", "2"]
    command += ["--batch-size", str(BATCH_SIZE), "--learning-rate", "0.01", "--seed", str(arguments.seed)]
    # One thread each, so that all of them round alike.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, env=environment, stdout=sys.stderr, check=True)
    say(f"{n_processes} process{'es' * (n_processes > 1)} done")


def describe(alone: Path, together: Path, n_processes: int) -> dict[str, Any]:
    first, second = (Selection.load(folder / "selection.json") for folder in (alone, together))
    differences = [
        abs(one.score - other.score)
        for one, other in zip(first.sites, second.sites, strict=True)
        if one.score is not None and other.score is not None
    ]
    kept = [site.name for site in first.kept]
    is_same = kept == [site.name for site in second.kept]
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (alone, together)]
    moved = None
    if is_same:
        moved = max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])
    return {
        "n_processes": n_processes,
        "n_sites": len(first.sites),
        "kept": kept,
        "is_same_selection": is_same,
        "largest_difference_of_a_score": max(differences),
        "largest_score": max(site.score or 0 for site in first.sites),
        "largest_difference_of_a_weight": moved,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--processes", type=int, default=2, help="how many processes to compare with one")
    parser.add_argument("--score", default="gate", choices=SCORES, help="what sites are ranked by")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is random")
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
