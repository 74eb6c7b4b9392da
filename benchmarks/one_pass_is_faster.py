"""One pass over all boundaries gives the losses of the naive loop in half its time and the memory of a plain forward.

Both engines measure the same batches in the same process, in turn, so that a machine that slows down slows both; which
goes first alternates. Prints the largest difference of an example's loss at every boundary, the seconds of both and
their ratio, the layer evaluations that really happened, and peak memory: of one plain forward pass on the longest batch
(the full logits, as `model(**inputs)` returns them) and of the one-pass sweep of that batch, each in a fresh process.

    python benchmarks/one_pass_is_faster.py --model FOLDER [--gguf-file NAME] [--adapter FOLDER] --data FILE
    python benchmarks/one_pass_is_faster.py --tiny --examples 16
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _machine import record, say
from _models import add_model_arguments, load_model, read_data
from torch import nn

from lorazor.adapter.load import Loaded
from lorazor.adapter.sites import choose_stack, stack_sizes
from lorazor.data.batches import IGNORED, Batch, make_batches
from lorazor.measure.engines import naive_losses, on_model, one_pass_losses

ENGINES = {"naive": naive_losses, "one-pass": one_pass_losses}


@dataclass
class Measured:
    """What the engines did on all batches.

    Attributes:
        differences: largest difference of an example's loss between the engines so far, in nats, by boundary.
        n_differing: examples and boundaries at which they count another number of right tokens.
        nll_nats: sum over the answer tokens by the naive engine, by boundary: what there is to tell apart.
        n_tokens: answer tokens.
        seconds: of each batch, by engine.
        layer_evaluations: by engine.
    """

    differences: dict[int, float] = field(default_factory=dict)
    n_differing: int = 0
    nll_nats: dict[int, float] = field(default_factory=dict)
    n_tokens: int = 0
    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in ENGINES})
    layer_evaluations: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ENGINES, 0))


def main() -> None:
    arguments = _arguments()
    if arguments.memory_of:
        print(json.dumps(peak_memory(arguments)))
        return
    memory = compare_memory()  # first: a process hands its own peak on to those it starts
    loaded = load_model(arguments)
    stack = choose_stack(loaded.sites)
    n_layers = stack_sizes(loaded.sites)[stack]
    batches = make_batches(read_data(arguments), loaded.tokenizer, "causal", arguments.batch_size).batches
    measured = compare_engines(loaded, batches, stack, range(n_layers + 1))
    record(describe(measured, batches, n_layers) | {"memory": memory}, arguments.out)


def compare_engines(loaded: Loaded, batches: Sequence[Batch], stack: str, boundaries: Sequence[int]) -> Measured:
    measured = Measured()
    for measure in ENGINES.values():  # warm up: threads, caches, and weights still on disk
        measure(loaded.model, loaded.sites, on_model(loaded.model, batches[0]), stack, boundaries[-2:])
    for index, batch in enumerate(batches):
        names = list(ENGINES) if index % 2 == 0 else list(reversed(ENGINES))
        losses = {}
        for name in names:
            with counted(loaded.model, stack) as count:
                start = time.perf_counter()
                losses[name] = ENGINES[name](
                    loaded.model, loaded.sites, on_model(loaded.model, batch), stack, boundaries
                )
                measured.seconds[name].append(time.perf_counter() - start)
            measured.layer_evaluations[name] += sum(count)
        for boundary in boundaries:
            slow, fast = (losses[name][boundary] for name in ENGINES)
            difference = float((slow.nll_nats - fast.nll_nats).abs().max())
            measured.differences[boundary] = max(difference, measured.differences.get(boundary, 0.0))
            measured.n_differing += int((slow.n_correct != fast.n_correct).sum())
            measured.nll_nats[boundary] = measured.nll_nats.get(boundary, 0.0) + float(slow.nll_nats.sum())
        measured.n_tokens += int((batch.targets != IGNORED).sum())
        times = ", ".join(f"{name} {measured.seconds[name][-1]:.2f} s" for name in ENGINES)
        say(f"batch {index + 1} of {len(batches)}: {times}")
    return measured


@contextmanager
def counted(model: nn.Module, stack: str) -> Iterator[list[int]]:
    """Count how often each layer is evaluated.

    A fork also calls the layers that it skips, but nothing inside them; so the first module inside each is watched.
    """
    layers = list(model.get_submodule(stack).children())
    count = [0] * len(layers)

    def counting(index: int) -> Any:
        def add_one(*_: Any) -> None:
            count[index] += 1

        return add_one

    leaves = [next(module for module in layer.modules() if not list(module.children())) for layer in layers]
    handles = [leaf.register_forward_hook(counting(index)) for index, leaf in enumerate(leaves)]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


def compare_memory() -> dict[str, Any] | None:
    """Peak memory of a plain forward pass and of the sweep, each in a process of its own."""
    if not sys.platform.startswith("linux"):
        say("Peak memory is measured on Linux only.")
        return None
    found = {}
    for what in ("plain", "one-pass"):
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", what]
        found[what] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        say(f"memory of {what}: {found[what]}")
    plain, sweep = found["plain"], found["one-pass"]
    increases = [one["peak_mebibytes"] - one["loaded_mebibytes"] for one in (sweep, plain)]
    return found | {
        "peak_ratio": sweep["peak_mebibytes"] / plain["peak_mebibytes"],
        "increase_ratio": increases[0] / increases[1],
    }


def peak_memory(arguments: argparse.Namespace) -> dict[str, float]:
    """Resident memory with the model loaded, and at most, in this process."""
    loaded = load_model(arguments)
    stack = choose_stack(loaded.sites)
    batches = make_batches(read_data(arguments), loaded.tokenizer, "causal", arguments.batch_size).batches
    batch = on_model(loaded.model, batches[0])  # the longest
    with torch.no_grad():
        loaded.model(**{name: tensor[:1, :2] for name, tensor in batch.inputs.items()})  # reads the weights from disk
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of loading, which would hide all that follows
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if arguments.memory_of == "plain":
        with torch.no_grad():
            output = loaded.model(**batch.inputs)
        assert output.logits.shape[:2] == batch.targets.shape
    else:
        one_pass_losses(loaded.model, loaded.sites, batch, stack, range(stack_sizes(loaded.sites)[stack] + 1))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"loaded_mebibytes": before / 1024, "peak_mebibytes": peak / 1024}  # Linux counts in KiB


def describe(measured: Measured, batches: Sequence[Batch], n_layers: int) -> dict[str, Any]:
    totals = {name: sum(seconds) for name, seconds in measured.seconds.items()}
    evaluations = measured.layer_evaluations
    return {
        "n_examples": sum(len(batch.indices) for batch in batches),
        "n_batches": len(batches),
        "batch_shapes": [list(batch.targets.shape) for batch in batches],
        "n_answer_tokens": measured.n_tokens,
        "n_layers": n_layers,
        "n_threads": torch.get_num_threads(),
        "largest_difference_nats": max(measured.differences.values()),
        "largest_difference_nats_by_boundary": measured.differences,
        "n_token_counts_that_differ": measured.n_differing,
        "loss_nats_per_token_by_boundary": {b: nll / measured.n_tokens for b, nll in measured.nll_nats.items()},
        "seconds": totals,
        "seconds_by_batch": measured.seconds,
        "times_faster": totals["naive"] / totals["one-pass"],
        "layer_evaluations": evaluations,
        "layer_evaluations_ratio": evaluations["naive"] / evaluations["one-pass"],
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_model_arguments(parser, n_examples=64)
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    parser.add_argument("--memory-of", choices=("plain", "one-pass"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
