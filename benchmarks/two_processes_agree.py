"""Two processes under `accelerate launch` measure what one measures, each with half of the work.

All boundaries of a small random model are measured by one process, and by several that share the batches over gloo;
every one of them must end with the same rows. The number of examples leaves the last round of batches incomplete.

    python benchmarks/two_processes_agree.py [--processes 2] [--examples 18]

`accelerate launch --cpu --num_processes 2` starts a single process (MPI apart, accelerate 1.15). On the CPU it starts
two with `--multi_gpu`, which only means torch's own launcher:

    CUDA_VISIBLE_DEVICES= accelerate launch --multi_gpu --num_processes 2 SCRIPT
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

import numpy as np
from _machine import record, say

BATCH_SIZE = 4
N_LAYERS = 4
LAUNCHER = ["-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0", "--num_machines", "1"]
LAUNCHER += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes"]


def main() -> None:
    arguments = _arguments()
    if arguments.worker is not None:
        work(arguments)
        return
    with tempfile.TemporaryDirectory() as place:
        alone = measure_in_processes(Path(place) / "alone", 1)
        together = measure_in_processes(Path(place) / "together", arguments.processes)
    document = describe(alone[0], together)
    record(document, arguments.out)
    if not document["is_same_in_every_process"]:
        raise SystemExit("The processes do not agree.")


def measure_in_processes(place: Path, n_processes: int) -> list[dict[str, Any]]:
    """Start this script as a worker, once or several times, and read what each process came to."""
    place.mkdir()
    launcher = [*LAUNCHER, str(n_processes)] if n_processes > 1 else []
    command = [sys.executable, *launcher, *sys.argv, "--worker", str(place)]
    # One thread each, so that all of them round alike.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, env=environment, stdout=sys.stderr, check=True)
    say(f"{n_processes} process{'es' * (n_processes > 1)} done")
    return [json.loads((place / f"{rank}.json").read_text()) for rank in range(n_processes)]


def work(arguments: argparse.Namespace) -> None:
    """Measure all boundaries in this process and write down all of it."""
    from _models import random_examples, tiny_llama
    from accelerate import PartialState

    from lorazor.adapter.parts import Parts
    from lorazor.measure.meter import DATA, Meter, Variant, boundary_gates
    from lorazor.measure.sharding import is_main_process
    from lorazor.runs import RunFolder
    from lorazor.settings import DataSettings, GenerationSettings

    loaded = tiny_llama(hidden_size=64, n_layers=N_LAYERS, seed=arguments.seed)
    passes: list[int] = []
    loaded.model.register_forward_pre_hook(lambda *_: passes.append(1))
    parts, reading = Parts(tuple(loaded.sites)), DataSettings(batch_size=BATCH_SIZE)
    run = RunFolder(arguments.worker / "run", {}, is_writer=is_main_process())
    meter = Meter(loaded, run, reading, GenerationSettings(), lambda message: None)
    meter.add(DATA, random_examples(arguments.examples, arguments.seed))
    stack = "model.layers"
    variants = {b: Variant(str(b), boundary_gates(parts, stack, b)) for b in range(N_LAYERS + 1)}
    meter.prefixes(variants, DATA, stack, "one-pass")
    rows = [
        [one[example.index] for example in meter.examples(DATA)] for one in meter.losses([*variants.values()], DATA)
    ]
    PartialState().wait_for_everyone()
    document = {
        "n_processes": PartialState().num_processes,
        "n_forward_passes": len(passes),
        "n_rows_written": len(run.rows("losses.jsonl")),
        "boundaries": list(variants),
        "examples": [example.index for example in meter.examples(DATA)],
        **{name: [[row[name] for row in one] for one in rows] for name in ("nll_nats", "n_tokens", "n_correct")},
    }
    # torch's launcher sets RANK, whatever the library makes of it
    (arguments.worker / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(document))


def describe(alone: dict[str, Any], together: list[dict[str, Any]]) -> dict[str, Any]:
    differences = [np.abs(np.subtract(one["nll_nats"], alone["nll_nats"])).max() for one in together]
    exact = ("boundaries", "examples", "n_tokens", "n_correct", "n_rows_written")
    is_same = all(one[part] == alone[part] for one in together for part in exact)
    counts = [one["n_processes"] for one in together]
    return {
        "n_examples": len(alone["examples"]),
        "boundaries": alone["boundaries"],
        "batch_size": BATCH_SIZE,
        "n_processes": counts,
        "n_rows": alone["n_rows_written"],
        "largest_difference_nats": float(max(differences)),
        "is_same_in_every_process": is_same and max(differences) == 0 and set(counts) == {len(together)},
        "n_forward_passes_alone": alone["n_forward_passes"],
        "n_forward_passes_of_each": [one["n_forward_passes"] for one in together],
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--processes", type=int, default=2, help="how many processes to compare with one")
    parser.add_argument("--examples", type=int, default=18, help="examples, in batches of 4")
    parser.add_argument("--seed", type=int, default=0, help="seed of model and examples")
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
