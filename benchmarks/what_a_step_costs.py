"""What a training step costs with ways to save that choose no sites: LoRA-FA, rank 1, recomputed activations.

Time (in turn, the median of the ratios to LoRA on all sites) and the peak of memory (bytes of tensors that live,
weights and optimizer state included) of stock PEFT in a plain loop. How far choices of sites meet a budget, the suite
`costs` and budgets_are_met.py say.

    python benchmarks/what_a_step_costs.py [--model FOLDER [--gguf-file NAME]]     default: a random Llama
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

from _machine import record
from _training import (
    Step,
    add_training_arguments,
    compare_times,
    describe_base,
    load_base,
    make_optimizer,
    random_batches,
    stock_lora,
    stock_step,
    time_in_turn,
)

from lorazor.measure.peak import counting_peak

SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WAYS = ("LoRA", "LoRA-FA", "rank 1", "LoRA, recomputed", "rank 1, recomputed")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_training_arguments(parser, rows=2, tokens=75, rounds=7)
    arguments = parser.parse_args()
    base = load_base(arguments, SHAPE)
    steps, peaks = {}, {}
    for way in WAYS:
        steps[way], peaks[way] = prepared(way, base, arguments)
    times = compare_times(time_in_turn(steps, arguments.rounds), "LoRA")
    memory = {way: peaks[way] / peaks["LoRA"] for way in WAYS}
    record(describe_base(base, arguments) | times | {"peak_bytes": peaks, "ratio_of_peaks": memory}, arguments.out)


def prepared(way: str, base: Any, arguments: argparse.Namespace) -> tuple[Step, int]:
    """A step of one way to train, and the peak of its second one."""
    own = copy.copy(arguments)
    own.rank = 1 if way.startswith("rank 1") else arguments.rank
    model = stock_lora(base, own)
    for name, parameter in model.named_parameters():
        if way == "LoRA-FA" and "lora_A" in name:
            parameter.requires_grad_(False)
    if way.endswith("recomputed"):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = make_optimizer(model)
    step = stock_step(model, optimizer, random_batches(base, own))
    step()
    state = sum(one.nbytes for values in optimizer.state.values() for one in values.values())
    with counting_peak(model) as peak:
        step()
        return step, peak() + state


if __name__ == "__main__":
    main()
