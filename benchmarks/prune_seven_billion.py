"""Pruning the adapter of a 7B model takes seconds, and no base model.

An adapter in the shape of Llama-2-7B (32 layers, 7 projections each, hidden size 4096, inner size 11008, float16) is
made from random numbers, by another process, and pruned at a boundary; the base model it names does not exist. Prints
seconds, bytes, and how far the process's peak memory rose. There is no competitor: PEFT itself can only drop sites from
a loaded model.

    python benchmarks/prune_seven_billion.py [--rank 8] [--boundary 20]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from lorazor.adapter.folder import read_adapter
from lorazor.adapter.prune import select_boundary, write_pruned

N_LAYERS, HIDDEN, INNER = 32, 4096, 11008
PROJECTIONS = {
    **{f"self_attn.{kind}_proj": (HIDDEN, HIDDEN) for kind in "qkvo"},
    **{f"mlp.{kind}_proj": (HIDDEN, INNER) for kind in ("gate", "up")},
    "mlp.down_proj": (INNER, HIDDEN),
}


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "full"
        # In a process of its own, so that its memory does not hide what pruning needs.
        writer = multiprocessing.get_context("spawn").Process(target=write_adapter, args=(folder, arguments.rank))
        writer.start()
        writer.join()
        memory_before = peak_mebibytes()
        start = time.perf_counter()
        selection = select_boundary(read_adapter(folder).sites, arguments.boundary)
        result = write_pruned(folder, selection, Path(place) / "pruned")
        seconds = time.perf_counter() - start
        document = {
            "rank": arguments.rank,
            "boundary": arguments.boundary,
            "n_sites_kept": result.n_sites_kept,
            "n_sites": result.n_sites,
            "n_parameters_kept": result.n_parameters_kept,
            "n_parameters": result.n_parameters,
            "n_bytes": result.n_bytes,
            "n_bytes_before": result.n_bytes_before,
            "share_of_parameters": result.n_parameters_kept / result.n_parameters,
            "share_of_bytes": result.n_bytes / result.n_bytes_before,
            "prune_seconds": seconds,
            "extra_peak_mebibytes": peak_mebibytes() - memory_before,
        }
    print(json.dumps(document, indent=2))


def write_adapter(folder: Path, rank: int) -> None:
    """Random float16 weights under PEFT's names, and the config that goes with them."""
    folder.mkdir()
    tensors = {}
    for layer in range(N_LAYERS):
        for kind, (n_inputs, n_outputs) in PROJECTIONS.items():
            name = f"base_model.model.model.layers.{layer}.{kind}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, n_inputs).half()
            tensors[f"{name}.lora_B.weight"] = torch.randn(n_outputs, rank).half()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    kinds = sorted(kind.rpartition(".")[2] for kind in PROJECTIONS)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "target_modules": kinds}
    config["base_model_name_or_path"] = "no-such/model"
    (folder / "adapter_config.json").write_text(json.dumps(config))


def peak_mebibytes() -> float:
    """Most resident memory this process has had; Linux counts it in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rank", type=int, default=8, help="r of every site")
    parser.add_argument("--boundary", type=int, default=20, help="layers that keep their LoRA, 1 to 32")
    return parser.parse_args()


if __name__ == "__main__":
    main()
